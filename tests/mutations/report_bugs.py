"""Bugs in what a run reports of itself: logs, trackers, traces, router counts and the report page.
The same form as ``bugs.py``."""

from tests.mutations.bugs import Bug, bug

METRICS, LOGS, TRACKERS, TRACE = (
    f"megalora/train/{name}.py" for name in ("metrics", "run_logs", "trackers", "trace")
)
METRICS_TEST, TRACKERS_TEST, TRACE_TEST = (
    f"tests/train/test_{name}.py" for name in ("metrics", "trackers", "trace")
)

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
)
