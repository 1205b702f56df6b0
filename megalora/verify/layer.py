"""Compare one layer of each kind, as loaded, with stock transformers' before the first step.

    reference   transformers' own classes and its loader, from the folder (``reference.py``)
    ours        our own layer in float32, weights gathered by name from the ranks that train with
                them (``loaded.py``)

Both run on the first rank's host, on the same few tokens (``records.py``); the others wait. Only
the experts that those tokens need and a few rows of embedding and head are read. Adapters are left
out: the base is compared.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from megalora import host
from megalora.first_rank import on_first_rank
from megalora.model.hf_weights import quiet
from megalora.model.quantised.scheme import UNROUNDED, Rounded
from megalora.parallel import Groups, first_rank_alone
from megalora.verify.compare_layer import OPTION, LayerComparison
from megalora.verify.loaded import Loaded
from megalora.verify.records import Inputs


def check_layers(
    chunks: Sequence[Any],
    groups: Groups,
    folder: Path,
    dtype: torch.dtype,
    nf4: Rounded = UNROUNDED,
) -> str:
    """Compare one layer of each kind, embedding and head with transformers'; collective over the
    world.

    Args:
        chunks: this rank's model chunks, with or without adapters.
        dtype: the run's dtype; both sides take weights rounded to it.
        nf4: plain matrices that the run has quantised, as transformers' side is given
            them.

    Returns: a line for the user.
    Raises: ``ValueError`` on every rank, with the layer and the module that differ first.
    """
    start = time.perf_counter()
    with first_rank_alone() as alone, torch.no_grad():
        # Methods of ``first`` run on the first rank alone, inside ``agreed``; those of ``loaded``
        # are collective and must be reached by all ranks, with the same arguments.
        first = LayerComparison(folder, dtype, chunks[0].config, alone, nf4=nf4)
        labels = agreed(first.open)
        loaded = Loaded(chunks, groups, labels)
        inputs = Inputs.make(*agreed(first.sizes))
        embedding = loaded.rows("embedding", inputs.tokens)
        has_head = loaded.has_head
        head = loaded.rows("head", inputs.rows) if has_head else None
        norm = {name: loaded.whole(f"final_norm.{name}") for name in loaded.names("final_norm")}
        norm_floats = loaded.floats.get("final_norm", {})
        agreed(lambda: first.compare_ends(inputs, embedding, head, norm, norm_floats))
        for number in labels:
            # The router's choice says which experts are gathered at all.
            angles = loaded.angles(number, inputs.positions_T.tolist())
            experts = agreed(lambda n=number, a=angles: first.route(n, inputs, a))
            weights = loaded.layer(number, experts)
            agreed(
                lambda n=number, w=weights: first.compare_layer(
                    n, inputs, w, loaded.floats[f"layers.{n}"]
                )
            )
        error = agreed(lambda: first.largest)
    layers = ", ".join(f"{number} ({label})" for number, label in labels.items())
    return (
        f"base: layer{'s' * (len(labels) > 1)} {layers}, embedding and"
        f" {'head' if has_head else 'final norm'} equal transformers' to"
        f" {error:.1e} in {time.perf_counter() - start:.1f} s"
    )


def agreed[T](work: Callable[[], T]) -> T:
    """Do the work on the first rank's host and give its result to all; its failure becomes every
    rank's. Collective."""

    def on_host() -> T:
        try:
            with host.on_host(), quiet():  # the run's own generators are not drawn from
                return work()
        except Exception as error:
            if not isinstance(error, ValueError | OSError | SafetensorError):
                error.add_note(f"{OPTION}=off trains without this check")
            raise

    return on_first_rank(on_host, f"{OPTION}: the base model cannot be read")
