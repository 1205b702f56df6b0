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
        "if not math.isfinite(loss):",
        "if False:",
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
    bug(
        0,
        "a resumed run does not know the losses before it",
        "megalora/train/loop.py",
        "run.bad_steps.resume(at.state.recent_losses,",
        "run.bad_steps.resume((),",
        f"{TESTS} resumed_run_knows",
    ),
    bug(
        0,
        "each rank finds spikes by its own sum",
        "megalora/train/assemble.py",
        "    dist.all_reduce(loss, op=dist.ReduceOp.MAX)\n",
        "",
        f"{TESTS} all_ranks_leave_out",
    ),
    bug(
        0,
        "a spike has no place among the losses of later steps",
        "megalora/train/spikes.py",
        "        self.losses.append(loss)\n",
        "        if limit is None or loss <= limit:\n            self.losses.append(loss)\n",
        f"{TESTS} which_losses",
    ),
    bug(
        0,
        "a spike is compared with its own loss",
        "megalora/train/spikes.py",
        "        limit = self._limit(self.options)\n",
        "        self.losses.append(loss)\n        limit = self._limit(self.options)\n"
        "        self.losses.pop()\n",
        f"{TESTS} which_losses",
    ),
    bug(
        0,
        "a resumed run counts bad steps among those that Adam took",
        "megalora/train/checkpoint/load.py",
        "state.step - state.cycle_start - state.left_out)",
        "state.step - state.cycle_start)",
        f"{TESTS} resumed_behind",
    ),
    bug(
        0,
        "a checkpoint behind a bad first step lacks moments",
        "megalora/train/optim.py",
        "        _make_moments(optimizer)\n        return norm\n",
        "        return norm\n",
        f"{TESTS} resumed_behind",
    ),
    bug(
        0,
        "a bad step moves the average",
        "megalora/train/saver.py",
        "if self.average is not None and self.run.fault is None:",
        "if self.average is not None:",
        f"{TESTS} resumed_behind",
    ),
    bug(
        0,
        "bad steps of a cycle are counted in the next one",
        "megalora/train/relora.py",
        "        run.bad_steps.left_out = 0\n",
        "",
        f"{TESTS} resumed_behind",
    ),
    bug(
        0,
        "more bad steps than steps",
        "megalora/adapters/training_state.py",
        '_require(left_out <= since, path, "left_out"',
        '_require(True, path, "left_out"',
        "tests/train/test_where.py test_a_wrong_state",
    ),
    bug(
        0,
        "a lowest loss is said to be here, and is in another run's folder",
        "megalora/train/announce.py",
        "if (Path(config.checkpoint.dir) / name).is_dir():",
        "if True:",
        "tests/train/test_best.py elsewhere",
    ),
)
