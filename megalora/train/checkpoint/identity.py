"""Identify what a run trains by its content: data and base model, the same on every node, and the
same when the run is resumed.

One rank of each node reads; nodes must agree. Digests are kept in the run folder (``digests.py``).
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError

from megalora.config import RunConfig
from megalora.data.chat import Encoded
from megalora.data.digest import mixture_digest, source_digest
from megalora.data.logits_header import HEADER, is_logits_folder
from megalora.data.samples import digest_of_samples
from megalora.digests import Digests
from megalora.first_rank import on_first_rank
from megalora.hf.base_identity import base_config, values_digest, weights_digest
from megalora.hf.folder import check_base_folder, local_folder

KEPT = ".digests.json"
"""File in the run folder with digests of files that have not changed since."""


@dataclass(frozen=True)
class Samples:
    """Number and content of the training samples, as tokens."""

    count: int
    digest: str

    @classmethod
    def of(cls, samples: Sequence[Encoded]) -> "Samples":
        """Count and digest encoded samples, in their order."""
        return cls(len(samples), digest_of_samples(samples))


@dataclass(frozen=True)
class Identity:
    """Data and base of a run."""

    train: str
    """Digest of ``data.train``."""
    eval: str | None
    """Digest of ``data.eval`` where that is a source of its own."""
    config: dict[str, Any]
    """Fields of the base's config.json that can change what it computes."""
    weights: str
    """Digest of the base's tensors."""
    teacher: str | None = None
    """Digest of the tensors of a teacher that is a second model."""

    def as_json(self, samples: str) -> dict[str, Any]:
        """As state.json holds it; ``samples`` is the digest of the training samples."""
        return {**asdict(self), "samples": samples}


def identify(config: RunConfig, base: Path) -> Identity:
    """The identity of this run's data and base; collective over the world.

    Args:
        base: the folder of ``config.model.path``.
    Raises:
        ValueError: on every rank, when a node cannot read something, nodes have different files, or
            the run folder cannot be written.
    """
    # A file whose size and time have not changed is not read again when the run is resumed.
    kept = Path(config.checkpoint.dir) / KEPT
    digests = Digests.load(kept)
    mine: Identity | str | None = None
    if _reads_for_its_node():
        mine = _of_this_node(config, base, digests)
    # All ranks get all answers, errors included, so that all of them go on or none does.
    answers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(answers, (mine, digests.used))
    identities: dict[int, Identity] = {}
    faults: dict[int, str] = {}
    for rank, (answer, _) in enumerate(answers):
        if isinstance(answer, Identity):
            identities[rank] = answer
        elif answer is not None:
            faults[rank] = answer
    if faults:
        rank = min(faults)
        is_only_node = len(identities) + len(faults) == 1
        where = "" if is_only_node else f"on the node of rank {rank}: "
        raise ValueError(f"{where}{faults[rank]}")
    first_rank = min(identities)
    first = identities[first_rank]
    for rank, other in identities.items():
        if parts := differing_parts(first.as_json(""), other.as_json("")):
            raise ValueError(
                f"the nodes of ranks {first_rank} and {rank} have different files for"
                f" {' and '.join(parts)}. Copy the same files to every node, or use a folder that"
                " all share."
            )
    # The run folder may be of one node; its first rank keeps what every node has read.
    for _, used in answers:
        digests.used |= used
    on_first_rank(lambda: digests.save(kept), f"{kept} cannot be written")
    return first


def differing_parts(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Options of a config whose content differs between two of ``Identity.as_json``."""
    options = {
        "train": "data.train",
        "eval": "data.eval",
        "weights": "model.path",
        "config": "model.path",
        "teacher": "objective.teacher",
    }
    # Weights and config are of one option, which is named once.
    return list(dict.fromkeys(name for key, name in options.items() if before[key] != now[key]))


def _reads_for_its_node() -> bool:
    """Whether this is the first rank of its node; without torchrun all ranks are on one."""
    return int(os.environ.get("LOCAL_RANK", dist.get_rank())) == 0


def _of_this_node(config: RunConfig, base: Path, digests: Digests) -> Identity | str:
    """The identity, or why there is none: an error on one rank alone would leave the others
    waiting."""
    data = config.data
    try:
        check_base_folder(base)
        return Identity(
            train=mixture_digest(data.sources, digests),
            eval=source_digest(data.eval, digests) if isinstance(data.eval, str) else None,
            config=base_config(base),
            weights=weights_digest(base, digests),
            teacher=_teacher_digest(config, digests),
        )
    except ValueError as error:
        return str(error)
    except (OSError, SafetensorError) as error:
        return f"data or base model cannot be read ({error})"


def _teacher_digest(config: RunConfig, digests: Digests) -> str | None:
    name = config.objective.teacher_model
    if name is None:
        return None
    if is_logits_folder(name):
        # It has digests of the teacher's weights and of the samples.
        return hashlib.sha256((Path(name) / HEADER).read_bytes()).hexdigest()
    folder = local_folder(name, "objective.teacher")
    check_base_folder(folder)
    return values_digest(folder, digests)
