"""Measure one layout, that of a config, on all ranks; rank 0 writes the result.

    torchrun --nproc-per-node N -m megalora.bench.measure CONFIG.yaml --row=ROW.json [--steps=5] ...
    [section.key=value ...]

``runs.py`` starts this for one layout after the other.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from megalora.environment import refuse_shared_gpu, set_defaults
from megalora.user_error import guarded


def main(arguments: list[str]) -> None:
    from megalora.bench.rows import BenchOptions, write_json
    from megalora.config.file import load_config

    parser = argparse.ArgumentParser(prog="megalora.bench.measure")
    parser.add_argument("config", type=Path)
    parser.add_argument("--row", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--steps", type=int, default=BenchOptions.steps)
    parser.add_argument("--warmup", type=int, default=BenchOptions.warmup)
    parser.add_argument("--routing", default=BenchOptions.routing)
    parser.add_argument("--weights", default=BenchOptions.weights)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    # Intermixed, because options stand between the config and the overrides.
    asked = parser.parse_intermixed_args(arguments)
    options = BenchOptions(
        steps=asked.steps, warmup=asked.warmup, routing=asked.routing, weights=asked.weights
    )
    config = load_config(asked.config, asked.overrides)
    refuse_shared_gpu()
    # Environment variables of torch, which it reads as it is imported.
    set_defaults()
    from megalora import host

    config.check_world(host.world_size())
    host.install()
    # Imports Megatron, which must come after host.install().
    from megalora.bench.steps import measure_layout

    with host.process_group(config.train.timeout_minutes):
        measured = measure_layout(config, options)
        if measured is not None:
            write_json(asdict(measured), asked.row)


if __name__ == "__main__":
    guarded(main, sys.argv[1:])
