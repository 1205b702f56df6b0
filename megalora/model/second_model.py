"""Plan a second, frozen model beside the one that trains, under the same process groups. No
torch."""

from dataclasses import replace
from pathlib import Path

from megalora.config import ParallelConfig
from megalora.config.checks import require
from megalora.config.parallel import split_layers
from megalora.hf.vocabulary import check_same_vocabulary
from megalora.model.account import open_folder
from megalora.model.shape import ModelShape


def plan_second(
    p: ParallelConfig, folder: Path, first: Path, option: str = "objective.teacher"
) -> tuple[ModelShape, ParallelConfig]:
    """(sizes of the model in ``folder``, how it is cut): as the first model, but for what depends
    on the number of its layers and on whether it has experts.

    Args:
        first: folder of the model that trains.
        option: name of the option that ``folder`` was given by, for messages.
    Raises:
        ValueError: it is no model that megalora computes, has other tokens, or cannot be cut so.
    """
    shape = open_folder(folder).shape
    check_same_vocabulary(folder, first, option)
    vocab = open_folder(first).shape.vocab
    # Rows behind the last token pad a vocabulary, and take part in the softmax.
    require(
        shape.vocab == vocab,
        f"{option}={folder} has {shape.vocab:,} vocabulary entries and model.path={first} has"
        f" {vocab:,}: their distributions cannot be compared",
    )
    return shape, cut_second(p, shape, f"{option}={folder}")


def cut_second(p: ParallelConfig, shape: ModelShape, name: str) -> ParallelConfig:
    """How the second model is cut, beside a first one that is cut as ``p`` says.

    Args:
        name: what the model is called in messages.
    Raises:
        ValueError: it cannot be cut so.
    """
    cut = replace(p, stage_layers=None)
    if not shape.moe_layers:
        # Dense layers use neither group: ranks that share out the first model's experts are
        # replicas here.
        cut = replace(cut, ep=1, etp=1)
    if shape.num_layers % p.num_chunks and shape.num_layers > p.num_chunks:
        cut = replace(cut, stage_layers=split_layers(shape.num_layers, p.num_chunks))
    try:
        shape.check_layout(cut)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return cut
