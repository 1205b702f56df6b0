"""Bugs in leaving out bad steps. The same form as ``bugs.py``."""

from tests.mutations.bugs import Bug, bug

TESTS = "tests/train/test_bad_steps.py"
LEFT_OUT = f"{TESTS} change_nothing"

BAD_STEP_BUGS: tuple[Bug, ...] = (
    bug(
        0,
        "a bad step is taken",
        "megalora/train/optim.py",
        "if may_change is not None and not may_change(norm):",
        "if may_change is not None and not may_change(norm) and False:",
        LEFT_OUT,
    ),
    bug(
        0,
        "a loss of NaN is no bad step",
        "megalora/train/bad_steps.py",
        "return math.isfinite(loss) and math.isfinite(grad_norm)",
        "return math.isfinite(grad_norm)",
        LEFT_OUT,
    ),
    bug(
        0,
        "the samples of the step behind a bad one",
        "megalora/train/loop.py",
        "batches.samples_of_step(step - 1)",
        "batches.samples_of_step(step)",
        LEFT_OUT,
    ),
    bug(
        0,
        "bad steps without end",
        "megalora/train/bad_steps.py",
        "if self.count > self.limit:",
        "if self.count > self.limit + 1:",
        f"{TESTS} one_more",
    ),
)
