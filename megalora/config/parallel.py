"""The ``parallel`` section: how the model is divided over the ranks (one process per GPU)."""

import math
from dataclasses import dataclass

from megalora.config.checks import require


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How ranks are laid out. Attention and experts use two grids over the same world.

    attention grid: world = tp * cp * pp * dp
    experts grid:   world = etp * ep * pp * edp
    """

    tp: int = 1
    """Tensor-parallel size of attention and dense layers. Above 1, sequence parallelism is on."""
    pp: int = 1
    """Pipeline-parallel size: the number of stages that the layers are divided into."""
    vpp: int = 1
    """Virtual pipeline size: model chunks per pipeline stage, for the interleaved schedule."""
    ep: int = 1
    """Expert-parallel size: the number of ranks that the experts of a layer are divided over."""
    etp: int = 1
    """Expert-tensor-parallel size: the number of ranks that divide each expert. Megatron's default
    is tp, megalora's is 1."""
    cp: int = 1
    """Context-parallel size: the number of ranks that divide the tokens of a row. Keys and values
    are gathered in every layer."""
    stage_layers: tuple[int, ...] | None = None
    """Decoder layers of each pipeline stage, first to last, for stages that are not equal: as in
    [23, 24, 24, 23], where embedding and head count as a layer each. With vpp above 1, a number for
    each of the pp * vpp model chunks, in the order in which tokens pass them. null: equal parts,
    which pp * vpp must divide the layers into."""

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "vpp", "ep", "etp", "cp"):
            size = getattr(self, name)
            require(size >= 1, f"parallel.{name} must be at least 1, got {size}")
        require(
            self.vpp == 1 or self.pp > 1,
            f"parallel.vpp={self.vpp} interleaves the chunks of several pipeline stages, but"
            " parallel.pp=1. Set parallel.vpp=1 or parallel.pp to 2 or more.",
        )
        if self.stage_layers is not None:
            self._check_stage_layers(self.stage_layers)

    def _check_stage_layers(self, sizes: tuple[int, ...]) -> None:
        """Raise ``ValueError`` unless there is a number of layers for every chunk; how many layers
        the model has is not known here."""
        written = as_list(sizes)
        require(
            len(sizes) == self.num_chunks,
            f"parallel.stage_layers={written} has {len(sizes)} numbers, and there are"
            f" {self.num_chunks} parts of the model: parallel.pp={self.pp} * vpp={self.vpp}. Give"
            " one number for each.",
        )
        require(
            min(sizes) >= 1,
            f"parallel.stage_layers={written}: every part needs at least 1 layer",
        )

    @property
    def stages(self) -> str:
        """``pp=4 vpp=1``, and the layers of stages that are not equal."""
        found = f"pp={self.pp} vpp={self.vpp}"
        if self.stage_layers is not None:
            found += f" stage_layers={as_list(self.stage_layers)}"
        return found

    @property
    def num_chunks(self) -> int:
        """Parts that the layers are divided into: the model chunks of all pipeline stages."""
        return self.pp * self.vpp

    def chunk_layers(self, num_layers: int) -> list[range]:
        """Numbers of the layers of every model chunk, in the order in which tokens pass them: chunk
        v of stage s is entry ``v * pp + s``.

        Args:
            num_layers: layers of the model, which this layout can divide.
        """
        sizes = self.stage_layers or (num_layers // self.num_chunks,) * self.num_chunks
        assert sum(sizes) == num_layers, f"{sizes} are not {num_layers} layers"
        found = []
        first = 0
        for size in sizes:
            found.append(range(first, first + size))
            first += size
        return found

    def largest_stage(self, num_layers: int) -> int:
        """Layers of the pipeline stage that has most of them, on all its chunks."""
        of_stage = [0] * self.pp
        for number, layers in enumerate(self.chunk_layers(num_layers)):
            of_stage[number % self.pp] += len(layers)
        return max(of_stage)

    @property
    def row_multiple(self) -> int:
        """What the number of tokens of a row must be a multiple of.

        Context parallelism cuts a row into 2 cp chunks, sequence parallelism each rank's part into
        tp.
        """
        return self.tp * (2 * self.cp if self.cp > 1 else 1)

    @property
    def round_multiple(self) -> int:
        """What the number of microbatches of a pass must be a multiple of: the interleaved schedule
        takes them in rounds of one per stage."""
        return self.pp if self.vpp > 1 else 1

    def data_parallel_sizes(self, world_size: int) -> tuple[int, int]:
        """(dp, edp): how often attention and expert parameters are replicated on ``world_size``
        ranks."""
        require(world_size >= 1, f"a run needs at least 1 rank, got {world_size}")
        # Both grids lie over the same ranks, and each must fill them.
        dp = self._replicas(world_size, "attention", ("tp", "cp", "pp"))
        edp = self._replicas(world_size, "expert", ("etp", "ep", "pp"))
        return dp, edp

    def _replicas(self, world_size: int, grid: str, names: tuple[str, ...]) -> int:
        """How often a grid with these dimensions fits into the world; raises ``ValueError`` unless
        it does so without a remainder."""
        product = math.prod(getattr(self, name) for name in names)
        if world_size % product == 0:
            return world_size // product
        # The message is made only where it is needed: the planner asks for thousands of layouts.
        terms = [f"{name}={getattr(self, name)}" for name in names]
        options = [f"parallel.{name}" for name in names]
        raise ValueError(
            f"{world_size} ranks cannot hold the {grid} grid: {' * '.join(terms)} = {product}, and"
            f" {world_size} is not a multiple of {product}.\n  Change {' or '.join(options)}, or"
            f" launch a multiple of {product} ranks."
        )


def check_generation(pp: int, cp: int, what: str = "generation") -> None:
    """Raise ``ValueError`` for a layout in which nothing is generated; ``what`` begins the
    message."""
    for name, size in (("pp", pp), ("cp", cp)):
        require(
            size == 1,
            f"{what} does not run with parallel.{name}={size}. Set parallel.{name}=1; tensor,"
            " expert and data parallelism work.",
        )


def as_list(sizes: tuple[int, ...]) -> str:
    """Layers of each part as YAML and an override have them, without spaces."""
    return f"[{','.join(map(str, sizes))}]"


def split_layers(num_layers: int, num_chunks: int) -> tuple[int, ...]:
    """Layers of each of ``num_chunks`` parts, as equal as can be where embedding and head count as
    a layer each: Megatron's ``account_for_embedding_in_pipeline_split`` and
    ``account_for_loss_in_pipeline_split``, for numbers that do not divide too.

    Raises:
        ValueError: there are fewer layers than parts.
    """
    require(
        1 <= num_chunks <= num_layers,
        f"{num_layers} layers cannot be divided into {num_chunks} parts",
    )
    size, rest = divmod(num_layers + 2, num_chunks)
    if size >= 2:
        sizes = [size] * num_chunks
        # The first parts take what is left over. The embedding is memory and hardly any work, while
        # the head is more work than a layer in most models: its part comes last.
        for number in range(rest):
            sizes[number] += 1
        # Both are in one part where there is one alone.
        sizes[0] -= 1
        sizes[-1] -= 1
        return tuple(sizes)
    # A part of one layer has no room for embedding or head: the parts between take a second layer.
    sizes = [1] * num_chunks
    for number in range(1, num_layers - num_chunks + 1):
        sizes[number] += 1
    return tuple(sizes)
