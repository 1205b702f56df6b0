"""Bugs in what a run reports of itself: logs, trackers, traces, router counts and the report page.
The same form as ``bugs.py``."""

from tests.mutations.bugs import Bug, bug

METRICS, LOGS, TRACKERS, TRACE, EXPERTS, INPUTS = (
    f"megalora/train/{name}.py"
    for name in ("metrics", "run_logs", "trackers", "trace", "expert_tokens", "inputs")
)
LOAD = "megalora/model/expert_load.py"
METRICS_TEST, TRACKERS_TEST, TRACE_TEST, EXPERTS_TEST, INPUTS_TEST = (
    f"tests/train/test_{name}.py"
    for name in ("metrics", "trackers", "trace", "expert_tokens", "inputs")
)
COUNTS = f"{EXPERTS_TEST} test_counts_are_those"

REPORT_BUGS: tuple[Bug, ...] = (
    bug(
        0,
        "time left at the pace of the first step",
        METRICS,
        "pace = (now - first_done) / (step - first_step)",
        "pace = seconds",
        f"{METRICS_TEST} test_a_line_without_a_terminal",
    ),
    bug(
        0,
        "a resumed run is a new run at W&B",
        TRACKERS,
        "self.id = run_id or uuid.uuid4().hex[:12]",
        "self.id = uuid.uuid4().hex[:12]",
        f"{TRACKERS_TEST} test_wandb_is_told",
    ),
    bug(
        0,
        "W&B's own counter of steps",
        TRACKERS,
        'self.run.log({"step": step, **values})',
        "self.run.log(dict(values), step=step)",
        f"{TRACKERS_TEST} test_wandb_is_told",
    ),
    bug(
        0,
        "MLflow's time in seconds",
        TRACKERS,
        "now_ms = int(1000 * time.time())",
        "now_ms = int(time.time())",
        f"{TRACKERS_TEST} test_mlflow_is_told",
    ),
    bug(
        0,
        "an outage of a tracker ends the run",
        LOGS,
        "                except Exception as error:\n                    self.failure = error\n",
        "                except KeyError as error:\n                    self.failure = error\n",
        f"{TRACKERS_TEST} test_an_outage_ends",
    ),
    bug(
        0,
        "a trace one step too long",
        TRACE,
        "if len(self.done) == self.config.steps:",
        "if len(self.done) > self.config.steps:",
        f"{TRACE_TEST} test_only_the_steps",
    ),
    # Tokens per expert
    bug(
        0,
        "tokens of filler counted",
        LOAD,
        "        if self._filler:\n",
        "        if False:\n",
        f"{COUNTS} and tp2",
    ),
    bug(
        0,
        "choices of a recomputed layer counted twice",
        LOAD,
        "        yield\n        self._filler = None\n",
        "        yield\n",
        f"{COUNTS} and recomputed",
    ),
    bug(
        0,
        "tokens of one rank taken for all",
        LOAD,
        "        dist.all_reduce(total_LE)\n",
        "",
        f"{COUNTS} and tp2",
    ),
    bug(
        0,
        "layers of every stage counted from its own first",
        "megalora/model/dispatcher.py",
        "self.load.add(self.layer_number - 1, made.pair_ends_E, routing_map)",
        "self.load.add((self.layer_number - 1) % 2, made.pair_ends_E, routing_map)",
        f"{COUNTS} and pp2",
    ),
    bug(
        0,
        "filler looked for in early chunks alone",
        INPUTS,
        "            of_part += max(0, stop - max(start, first))\n",
        "            of_part = max(0, stop - max(start, first))\n",
        f"{INPUTS_TEST} test_filler_of_every_rank",
    ),
    bug(
        0,
        "starved by the mean of all layers",
        EXPERTS,
        "counts < STARVED * counts.mean(-1, keepdims=True)",
        "counts < STARVED * counts.mean()",
        f"{EXPERTS_TEST} test_entropy_and_starvation",
    ),
    bug(
        0,
        "a resumed run's counts stand twice",
        EXPERTS,
        "                if step <= start_step:\n",
        "                if True:\n",
        f"{EXPERTS_TEST} test_a_resumed_run",
    ),
    bug(
        0,
        "half a record read",
        EXPERTS,
        "if end > len(content) or zlib",
        "if zlib",
        f"{EXPERTS_TEST} test_a_resumed_run",
    ),
)
