"""The ``parallel`` section: how the model is divided over the ranks (one process per GPU)."""

from dataclasses import dataclass, fields

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

    def __post_init__(self) -> None:
        for f in fields(self):
            require(
                getattr(self, f.name) >= 1,
                f"parallel.{f.name} must be at least 1, got {getattr(self, f.name)}",
            )
        require(
            self.vpp == 1 or self.pp > 1,
            f"parallel.vpp={self.vpp} interleaves the chunks of several pipeline stages, but"
            " parallel.pp=1. Set parallel.vpp=1 or parallel.pp to 2 or more.",
        )

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
        product = 1
        terms = []
        options = []
        for name in names:
            product *= getattr(self, name)
            terms.append(f"{name}={getattr(self, name)}")
            options.append(f"parallel.{name}")
        require(
            world_size % product == 0,
            f"{world_size} ranks cannot hold the {grid} grid: {' * '.join(terms)} = {product}, and"
            f" {world_size} is not a multiple of {product}.\n  Change {' or '.join(options)}, or"
            f" launch a multiple of {product} ranks.",
        )
        return world_size // product


def check_generation(pp: int, cp: int, what: str = "generation") -> None:
    """Raise ``ValueError`` for a layout in which nothing is generated; ``what`` begins the
    message."""
    for name, size in (("pp", pp), ("cp", cp)):
        require(
            size == 1,
            f"{what} does not run with parallel.{name}={size}. Set parallel.{name}=1; tensor,"
            " expert and data parallelism work.",
        )
