"""Time live sync: versions of a small adapter into vLLM's CPU build, and a message with the sizes
of Qwen3-30B-A3B over the loopback.

    python -m benchmarks.live_sync small --out benchmarks/results/live_sync.json
                                             # needs make vllm; median of 12 versions, each way
    python -m benchmarks.live_sync large --out benchmarks/results/live_sync_large.json
                                             # rank 8, bfloat16: 839 MB; needs 4 GB of memory

``large`` starts a process that takes the message as vLLM's HTTP server does, into a file in memory
with its hash checked, and then puts the factors into slots as a worker does, which is the part for
which decoding stops.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalora.serve.live.address import TOKEN, TRAINER
from megalora.serve.live.broadcast import Sender
from megalora.serve.live.message import Form, build_message
from megalora.serve.live.publisher import Publisher, Transport
from megalora.serve.live.source import Source
from megalora.serve.server import Server
from megalora.serve.vllm_cpu.vllm_cpu_moe_lora import live, wire
from megalora.serve.vllm_cpu.vllm_cpu_moe_lora.arrival import Arrivals, new_folder, read_file

VERSIONS = 12
LAYERS = 48
EXPERTS = 128
HIDDEN = 2048
INTERMEDIATE = 768
RANK = 8
SLOT_RANK = 16
"""Rank of vLLM's slots, the next that it has."""
DENSE = {"q_proj": (4096, 2048), "k_proj": (512, 2048), "v_proj": (512, 2048),
         "o_proj": (2048, 4096)}  # fmt: skip
WAYS: tuple[tuple[Transport, Form], ...] = (
    ("http", "per_expert"), ("http", "packed"), ("group", "per_expert"), ("group", "packed"),
    ("folder", "per_expert"),
)  # fmt: skip


def small(out: Path | None) -> None:
    """Print a row for each way of publishing a small model's adapters, and save all rows."""
    # Here, so that the process which takes the large message does not import Megatron.
    from benchmarks.harness import save
    from megalora.adapters.write.form import adapter_contents, write_adapter
    from megalora.config import LoRAConfig
    from megalora.hf.json_file import read_hf_config
    from megalora.model.fields import model_shape
    from megalora.tiny import make_tiny
    from tests.parity.built import random_factors
    from tests.serve.adapters import EVERYTHING

    root = Path(tempfile.mkdtemp(prefix="live-sync-"))
    base = root / "base"
    make_tiny(base)
    config = LoRAConfig(rank=4, alpha=6.0, target_modules=EVERYTHING)
    shape = model_shape(read_hf_config(base))
    plugin = Path(__file__).parents[1] / "megalora/serve/vllm_cpu"
    # Every version has other values, so that none is served from a cache.
    made = []
    for seed in range(VERSIONS):
        adapted, factors = random_factors(config, base, seed)
        made.append(adapter_contents(adapted, shape, factors, str(base))[:2])
        write_adapter(_new(root / f"{seed}"), adapted, shape, factors, str(base))
    with Server(
        base, max_rank=8, max_loras=4, trainer="http://127.0.0.1", env={"PYTHONPATH": str(plugin)}
    ) as server:
        print(f"{len(made[0][0])} tensors; ms, median of {VERSIONS} versions")
        print(f"{'transport':10} {'form':12} {'publish':>8} {'arrive':>8} {'load':>8}")
        rows = []
        for transport, form in WAYS:
            rows.append(_time_small(server, transport, form, made, root / "shared"))
        with server.client() as client:
            # What live sync is compared with: a folder that is there already.
            took = []
            for seed in range(VERSIONS):
                start = time.perf_counter()
                client.swap("swapped", root / f"{seed}")
                took.append(time.perf_counter() - start)
            swap_ms = round(1000 * statistics.median(took), 1)
            print(f"{'swap of a written folder':23} {swap_ms:8.0f}")
            rows.append({"transport": "swap", "form": "per_expert", "publish_ms": swap_ms})
    if out is not None:
        # Of a machine that is busy, times are upper bounds.
        size = {"tensors": len(made[0][0]), "versions": VERSIONS, "load": os.getloadavg()[0]}
        save("live_sync", [size, *rows], out)


def _time_small(
    server: Server, transport: Transport, form: Form, made: list[Any], folder: Path
) -> dict[str, Any]:
    # Whole call, and what the server says of it; a folder's is not said.
    publish = []
    arrive = []
    load = []
    with Publisher(
        [server.url], f"{transport}-{form}", transport=transport, form=form, folder=folder
    ) as publisher:
        for number, (tensors, config) in enumerate(made):
            # Building the message is a part of it.
            start = time.perf_counter()
            publisher.publish(number, tensors, config)
            publish.append(time.perf_counter() - start)
            timing = publisher.timings()[server.url]
            if timing is not None:
                arrive.append(timing.arrive_s)
                load.append(timing.load_s)
    row: dict[str, Any] = {"transport": transport, "form": form}
    # Decoding waits for the load alone.
    for name, seconds in (("publish", publish), ("arrive", arrive), ("load", load)):
        if seconds:
            row[f"{name}_ms"] = round(1000 * statistics.median(seconds), 1)
    shown = [f"{value:8.0f}" for value in row.values() if isinstance(value, float)]
    print(f"{transport:10} {form:12} {' '.join(shown)}", flush=True)
    # Slots are few: the next way begins with all of them.
    with server.client() as client:
        client.unload(f"{transport}-{form}")
    return row


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder


def large(out: Path | None) -> None:
    """Print seconds of each step of one message with the sizes of Qwen3-30B-A3B, and save them."""
    from benchmarks.harness import save

    tensors = large_adapter()
    config = {"r": RANK, "lora_alpha": 12, "target_modules": [*DENSE, "gate_proj"]}
    # The process that takes the message inherits what it may take.
    os.environ[TRAINER] = "http://127.0.0.1"
    os.environ[TOKEN] = "benchmark"
    source = Source("http://127.0.0.1", "benchmark")
    rows: list[dict[str, Any]] = []
    for form in ("packed", "per_expert"):
        # Stacking, scaling, copying into the buffer, hashing.
        start = time.perf_counter()
        message = build_message("v0", tensors, config, form)
        built_s = time.perf_counter() - start
        ident = message.id_of("large")
        source.messages[ident] = message
        count = message.described["count"]
        print(f"{form}: {count:,} tensors, {message.num_bytes / 1e6:,.0f} MB", flush=True)
        print(f"  build and hash          {built_s:6.2f} s", flush=True)
        size = {"form": form, "tensors": count, "bytes": message.num_bytes, "build_s": built_s}
        taken = _time_large("http", ident, source.address_of(ident), lambda: None)
        rows.append({"transport": "http"} | size | taken)
        sender = Sender("127.0.0.1", source.port, 1)
        # Before the other process joins, which needs the port.
        sender.open()
        path = sender.address_of(ident, 0)
        send = partial(sender.send, message)
        taken = _time_large("group", ident, path, send)
        rows.append({"transport": "group"} | size | taken)
    source.close()
    if out is not None:
        save("live_sync_large", rows, out, load=os.getloadavg()[0])


def _time_large(how: str, ident: str, path: str, send: Callable[[], None]) -> dict[str, float]:
    """Have another process take the message; print and return the seconds of each step."""
    results = multiprocessing.get_context("spawn").Queue()
    taker = multiprocessing.get_context("spawn").Process(
        target=take_and_load, args=[ident, path, results]
    )
    taker.start()
    # Until it has imported everything.
    # Importing torch would count as moving otherwise.
    results.get()
    send()
    seconds = results.get()
    taker.join()
    for step, took in seconds.items():
        print(f"  {how + ': ' + step:23} {took:6.2f} s", flush=True)
    return seconds


def take_and_load(ident: str, path: str, results: Any) -> None:
    """As vLLM's server and a worker of it do, with slots in place of a model's."""
    arrivals = Arrivals(new_folder())
    # Touched before, as a server's are.
    slots = _slots()
    results.put("ready")
    start = time.perf_counter()
    start_cpu = time.process_time()
    place, _ = arrivals.take(ident, path)
    arrived = time.perf_counter()
    arrived_cpu = time.process_time()
    header, buffer = wire.split(read_file(Path(place.partition("#")[2])))
    _, stacks = live.apart(wire.decode(header, buffer))
    for factors in stacks.values():
        # Rank 8 into a slot of 16: a corner of it, as vLLM copies.
        for name, stack in factors.items():
            rows, columns = stack.shape[1:]
            slots[name][:, :rows, :columns].copy_(stack)
    # Decoding goes on during this part, and waits for the next.
    # Beside the clock's, the processor's, which other work on the machine does not change.
    seconds = {"arrive_s": arrived - start, "arrive_cpu_s": arrived_cpu - start_cpu}
    if stacks:
        seconds["load_s"] = time.perf_counter() - arrived
        seconds["load_cpu_s"] = time.process_time() - arrived_cpu
    results.put(seconds)


def _slots() -> dict[str, Tensor]:
    """One layer's slot, into which each layer is copied in turn."""
    sizes = {1: (INTERMEDIATE, HIDDEN), 2: (HIDDEN, INTERMEDIATE), 3: (INTERMEDIATE, HIDDEN)}
    slots = {}
    for number, (out_features, in_features) in sizes.items():
        a = torch.zeros(EXPERTS, SLOT_RANK, in_features, dtype=torch.bfloat16)
        slots[f"w{number}.lora_A"] = a
        b = torch.zeros(EXPERTS, out_features, SLOT_RANK, dtype=torch.bfloat16)
        slots[f"w{number}.lora_B"] = b
    return slots


def large_adapter() -> dict[str, Tensor]:
    """Every linear of every layer."""
    experts = {
        "gate_proj": (INTERMEDIATE, HIDDEN), "up_proj": (INTERMEDIATE, HIDDEN),
        "down_proj": (HIDDEN, INTERMEDIATE),
    }  # fmt: skip
    tensors = {}
    # Names as PEFT writes them; sizes of the published config.
    for layer in range(LAYERS):
        modules = {f"self_attn.{leaf}": size for leaf, size in DENSE.items()}
        for expert in range(EXPERTS):
            for leaf, size in experts.items():
                modules[f"mlp.experts.{expert}.{leaf}"] = size
        for module, (out_features, in_features) in modules.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            for factor, size in (("A", (RANK, in_features)), ("B", (out_features, RANK))):
                # Any values will do, and drawing 419 million takes a minute.
                values = torch.full(size, float(len(tensors) % 251), dtype=torch.bfloat16)
                tensors[f"{name}.lora_{factor}.weight"] = values
    return tensors


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["small", "large"])
    parser.add_argument("--out", type=Path, help="file for the rows, as JSON")
    options = parser.parse_args()
    {"small": small, "large": large}[options.what](options.out)
