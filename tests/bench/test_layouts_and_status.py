"""Text that the benchmark reads: layouts and options of the command line, logs of runs that
ended."""

import pytest

from megalora.bench.outcome import status_of
from megalora.bench.rows import BenchOptions
from megalora.bench.runs import layout_overrides, parse_layout
from megalora.config import ParallelConfig
from megalora.config.file import load_config, save_config
from megalora.planner.layouts import ParallelLayout
from tests.parity.runs import make_config


def test_parse_layout(tiny, chats, tmp_path) -> None:
    config = make_config(tiny, chats, tmp_path, {"ep": 2}, "selective")
    parsed = parse_layout(" tp=2, ep=4,micro=4,recompute=full", 8, config)
    assert parsed == ParallelLayout(
        parallel=ParallelConfig(tp=2, ep=4), num_ranks=8, micro_batch_size=4, recompute="full"
    )
    # What a layout does not name is the config's: ep=2, two samples, selective.
    kept = parse_layout("tp=2", 4, config)
    assert (kept.parallel.ep, kept.micro_batch_size, kept.recompute) == (2, 2, "selective")
    # A run gets its layout as overrides of the config file: they must say all that the layout does.
    save_config(config, tmp_path / "c.yaml")
    for text in (
        "tp=2,pp=2,vpp=2,recompute=off",
        "etp=2,micro=1,recompute=full",
        "pp=2,recompute=full1+selective",
        "pp=2,cp=2,recompute=full1+off",
        "pp=2,stage_layers=1+3",
    ):
        layout = parse_layout(text, 8, config)
        read = load_config(tmp_path / "c.yaml", layout_overrides(layout))
        assert read.parallel == layout.parallel
        assert read.train.micro_batch_size == layout.micro_batch_size
        assert read.train.recompute == layout.recompute


def test_a_config_s_stages_are_kept_until_others_are_named(tiny, chats, tmp_path) -> None:
    config = make_config(tiny, chats, tmp_path, {"pp": 2, "stage_layers": (1, 3)})
    assert parse_layout("micro=4", 8, config).parallel == config.parallel
    assert parse_layout("pp=4", 8, config).parallel == ParallelConfig(pp=4)
    other = parse_layout("pp=2,stage_layers=3+1", 8, config).parallel
    assert other == ParallelConfig(pp=2, stage_layers=(3, 1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tp=2,mirco=2", "layout 'tp=2,mirco=2': unknown key 'mirco'; did you mean micro?"),
        ("dp=2", "unknown key 'dp'; known keys: tp, cp, pp, vpp, ep, etp, stage_layers, micro,"),
        ("stage_layers=1-3", "stage_layers must be numbers of layers as in 11+12+12+11, got '1-3'"),
        ("tp", "'tp' is not of the form key=value"),
        ("tp=2,tp=4", "tp is given twice"),
        ("ep=two", "ep must be a number of at least 1, got 'two'"),
        (
            "recompute=on",
            "recompute must be one of off, selective, full, or the first layers fully and the rest"
            " less as in full12+selective, got 'on'",
        ),
        # A text of the right form that no config accepts, and one that these ranks cannot hold.
        ("vpp=2", "layout 'vpp=2': parallel.vpp=2 interleaves"),
        ("ep=16", "layout 'ep=16': 8 ranks cannot hold the expert grid"),
    ],
)
def test_layouts_that_are_none(text, message, tiny, chats, tmp_path) -> None:
    with pytest.raises(ValueError) as caught:
        parse_layout(text, 8, make_config(tiny, chats, tmp_path, {}))
    assert message in str(caught.value)


def test_options_that_are_none() -> None:
    for options, message in (
        ({"steps": 0}, "--steps"),
        ({"warmup": 1}, "--warmup"),
        ({"routing": "even"}, "--routing"),
    ):
        with pytest.raises(ValueError, match=message):
            BenchOptions(**options)  # type: ignore[arg-type]


# torchrun writes this below whatever a rank wrote; it never names the cause.
TORCHRUN = (
    "torch.distributed.elastic.multiprocessing.errors.ChildFailedError:"
    " \n====\nmegalora.bench.measure FAILED\n"
)


@pytest.mark.parametrize(
    ("log", "status"),
    [
        # A user's mistake: the status is its first line, without how to fix it.
        (
            "megalora: 3 ranks cannot hold it.\n  Change parallel.ep\n" + TORCHRUN,
            "refused: 3 ranks cannot hold it.",
        ),
        (
            "[rank1]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB\n"
            + TORCHRUN,
            "out of memory",
        ),
        # NCCL's buffers do not come from torch's allocator, and its message has other words.
        (
            "torch.distributed.DistBackendError: NCCL error ... Cuda failure 2 'out of memory'\n"
            + TORCHRUN,
            "out of memory",
        ),
        # Killed without a word: by Linux, which had no memory left.
        (TORCHRUN + "  exitcode  : -9 (pid: 12)\n", "out of memory"),
        # Rank 0 fails only because rank 1 is gone: the first error is the cause.
        (
            "[rank1]: Traceback (most recent call last):\n[rank1]: KeyError: 'q'\n[rank0]:"
            " RuntimeError: [gloo] Connection closed by peer\n" + TORCHRUN,
            "failed: KeyError: 'q'",
        ),
        ("[rank0]: AssertionError\n" + TORCHRUN, "failed: AssertionError"),
        # No rank has started: the last line there is.
        ("bash: torchrun: not found\n\n", "failed: bash: torchrun: not found"),
        ("", "failed: the log is empty"),
    ],
)
def test_status(log: str, status: str) -> None:
    assert status_of(log) == status
