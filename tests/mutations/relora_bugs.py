"""Bugs in periodic merges. The same form as ``bugs.py``."""

from tests.mutations.bugs import Bug, bug

RELORA = "megalora/train/relora.py"
REFOLD = "megalora/lora/refold.py"
FACTORS = "megalora/lora/factors.py"
TESTS = "tests/train/test_relora.py"
CYCLES = f"{TESTS} test_cycles_in_every_layout"
BESIDE = f"{TESTS} fp8"
ROUNDING = f"{TESTS} test_ten_merges_round_once"
RESUMING = f"{TESTS} test_resuming_at_another_layout"

RELORA_BUGS: tuple[Bug, ...] = (
    bug(
        0,
        "the base has the last cycle alone",
        REFOLD,
        "for factors in self._cycles:",
        "for factors in self._cycles[-1:]:",
        CYCLES,
    ),
    bug(
        0,
        "of kept cycles the first one alone",
        "megalora/lora/kept.py",
        "self.count = len(cycles)",
        "self.count = 1",
        BESIDE,
    ),
    bug(
        0,
        "another rank's part of a kept factor",
        "megalora/lora/kept.py",
        "memory.num_shards, memory.shard)",
        "memory.num_shards, memory.num_shards - 1 - memory.shard)",
        BESIDE,
    ),
    bug(
        0,
        "kept B's of the next projection",
        FACTORS,
        "(rows.start * times, total - rows.stop * times)",
        "(rows.start, total - rows.start - rank)",
        BESIDE,
    ),
    bug(
        0,
        "experts without what was kept",
        FACTORS,
        "if self.lora_A0 is not None or self._keeps:",
        "if self.lora_A0 is not None:",
        BESIDE,
    ),
    bug(
        0,
        "kept cycles that the plan leaves out",
        "megalora/planner/memory.py",
        " + kept_elements(model, p, chunks)",
        "",
        "tests/planner/test_dryrun.py kept_cycles",
    ),
    bug(
        0,
        "copies of kept factors that the plan leaves out",
        "megalora/planner/shared_factors.py",
        "total += (1 + a.kept) *",
        "total += 0 *",
        "tests/planner/test_activations.py earlier_cycles",
    ),
    bug(
        0,
        "a merged matrix is taken for the next one",
        REFOLD,
        "if self._last is None or self._last[0] != name:",
        "if self._last is None:",
        f"{TESTS} test_merges_quantise",
    ),
    bug(
        0,
        "a merge forgets that scales are quantised, too",
        RELORA,
        "doubly = config.model.quantises_scales",
        "doubly = False",
        f"{TESTS} test_merges_quantise",
    ),
    bug(
        0,
        "merges round at every cycle",
        REFOLD,
        "weight.to(host.device(), torch.float64)",
        "weight.to(host.device(), self._dtype)",
        ROUNDING,
    ),
    bug(
        0,
        "merges without alpha",
        REFOLD,
        "alpha=self._scales[module]",
        "alpha=1.0",
        ROUNDING,
    ),
    bug(
        0,
        "Adam's moments outlive a merge",
        RELORA,
        "state[key].zero_()",
        "pass",
        CYCLES,
    ),
    bug(
        0,
        "Adam's count outlives a merge",
        RELORA,
        "begin_state(run.optimizer, step=0)",
        "begin_state(run.optimizer, step=2)",
        CYCLES,
    ),
    bug(
        0,
        "every cycle begins with the same A",
        RELORA,
        "module.reset_parameters(cycle=self.count)",
        "module.reset_parameters()",
        CYCLES,
    ),
    bug(
        0,
        "a resumed run counts Adam's steps of all cycles",
        "megalora/train/checkpoint/load.py",
        "state.step - state.cycle_start",
        "state.step",
        RESUMING,
    ),
    bug(
        0,
        "a resumed run forgets what it had merged",
        RELORA,
        "        if self.count:\n            self._fold()",
        "        pass",
        RESUMING,
    ),
    bug(
        0,
        "a checkpoint has the last cycle's adapter alone",
        "megalora/train/checkpoint/adapter_file.py",
        "summed_source(adapted, earlier, get)",
        "summed_source(adapted, [], get)",
        f"{TESTS} test_ten_cycles_are_one_adapter",
    ),
    bug(
        0,
        "the sum has the scale of a larger rank",
        "megalora/adapters/cycles.py",
        "alpha=a.scale * rank",
        "alpha=a.alpha, scale=a.alpha / rank",
        f"{TESTS} test_ten_cycles_are_one_adapter",
    ),
    bug(
        0,
        "no warm-up behind a merge",
        "megalora/train/optim.py",
        "return again * _scheduled",
        "return _scheduled",
        f"{TESTS} test_the_rate_warms_up",
    ),
)
