"""How many ranks a config fits: data-parallel sizes, and the words in which others are refused."""

import pytest

from megalora.config import DataConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig


# Attention and experts split the same ranks in two ways, so that each has its own data parallelism.
@pytest.mark.parametrize(
    ("layout", "world_size", "sizes"),
    [
        (ParallelConfig(), 6, (6, 6)),
        (ParallelConfig(tp=2, pp=3), 12, (2, 4)),
        # Attention: 16 / (tp 4 * pp 2) = 2. Experts: 16 / (etp 1 * ep 8 * pp 2) = 1.
        (ParallelConfig(tp=4, pp=2, ep=8, etp=1), 16, (2, 1)),
        (ParallelConfig(tp=2, pp=2, ep=3, etp=5), 60, (15, 2)),
    ],
)
def test_data_parallel_sizes(
    layout: ParallelConfig, world_size: int, sizes: tuple[int, int]
) -> None:
    assert layout.data_parallel_sizes(world_size) == sizes


def run_config(*, batch: int = 24, micro: int = 1, **parallel: int) -> RunConfig:
    return RunConfig(
        model=ModelConfig(path="m"), data=DataConfig(train="d"),
        parallel=ParallelConfig(**parallel),
        train=TrainConfig(steps=1, global_batch_size=batch, micro_batch_size=micro),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("config", "world_size", "message"),
    [
        (
            run_config(ep=8),
            12,
            (
                "12 ranks cannot hold the expert grid: etp=1 * ep=8 * pp=1 = 8, and 12 is not a"
                " multiple of 8.\n  Change parallel.etp or parallel.ep or parallel.pp, or launch a"
                " multiple of 8 ranks."
            ),
        ),
        (
            run_config(tp=2, pp=3, vpp=2),
            4,
            (
                "4 ranks cannot hold the attention grid: tp=2 * cp=1 * pp=3 = 6, and 4 is not a"
                " multiple of 6.\n  Change parallel.tp or parallel.cp or parallel.pp, or launch a"
                " multiple of 6 ranks."
            ),
        ),
        (
            run_config(ep=2, etp=3, pp=2),
            8,
            (
                "8 ranks cannot hold the expert grid: etp=3 * ep=2 * pp=2 = 12, and 8 is not a"
                " multiple of 12.\n  Change parallel.etp or parallel.ep or parallel.pp, or launch a"
                " multiple of 12 ranks."
            ),
        ),
        (
            run_config(batch=10, micro=2, tp=2),
            8,
            (
                "train.global_batch_size=10 cannot be divided: micro_batch_size=2 * data parallel=4"
                " = 8, and 10 is not a multiple of 8.\n  Change train.global_batch_size or"
                " train.micro_batch_size."
            ),
        ),
        (
            run_config(batch=6, pp=2, vpp=2),
            4,
            (
                "the interleaved schedule (parallel.vpp=2) needs a number of microbatches that is a"
                " multiple of parallel.pp=2; train.global_batch_size=6 gives 3."
            ),
        ),
        (run_config(), 0, "a run needs at least 1 rank, got 0"),
        (run_config(), -4, "a run needs at least 1 rank, got -4"),
    ],
)
def test_world_size_refused(config: RunConfig, world_size: int, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        config.check_world(world_size)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("config", "world_size"),
    [
        # 24 samples over 2 data-parallel ranks; 8 over 2 are 4 microbatches, twice the stages;
        # without interleaving 3 microbatches are as good.
        (run_config(ep=8, tp=4, pp=2), 16),
        (run_config(batch=8, pp=2, vpp=2), 4),
        (run_config(batch=6, pp=2), 4),
    ],
)
def test_world_size_accepted(config: RunConfig, world_size: int) -> None:
    config.check_world(world_size)
