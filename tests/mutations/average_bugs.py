"""Bugs in the moving average of the adapter. The same form as ``bugs.py``."""

from tests.mutations.bugs import Bug, bug

AVERAGE = "megalora/train/average.py"
TESTS = "tests/train/test_average.py"

AVERAGE_BUGS: tuple[Bug, ...] = (
    bug(
        0,
        "the average takes in the whole adapter every time",
        AVERAGE,
        "alpha=1 - self.decay",
        "alpha=1",
        f"{TESTS} test_the_average",
    ),
    bug(
        0,
        "the average is the adapter itself",
        AVERAGE,
        "parameter.detach().float().clone()",
        "parameter.detach().float()",
        f"{TESTS} test_the_average",
    ),
    bug(
        0,
        "a resumed run begins its average anew",
        AVERAGE,
        "if state is not None and state.imported_from is None:",
        "if False:",
        f"{TESTS} test_a_resumed_run",
    ),
    bug(
        0,
        "the planner forgets the average",
        "megalora/planner/workload.py",
        "averaged=config.train.ema_decay > 0",
        "averaged=False",
        f"{TESTS} test_its_memory",
    ),
)
