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
REPORT_RECORDS, CHART, HEAT_MAP, NORMS, PAGE, TABLES = (
    f"megalora/report/{name}.py"
    for name in ("records", "chart", "heat_map", "adapter_norms", "page", "tables")
)
PAGE_TEST = "tests/report/test_page.py"

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
        f"{EXPERTS_TEST} tp2_ep2",
    ),
    bug(
        0,
        "choices of a recomputed layer counted twice",
        LOAD,
        "        yield\n        self._filler = None\n",
        "        yield\n",
        f"{EXPERTS_TEST} recomputed",
    ),
    bug(
        0,
        "tokens of one rank taken for all",
        LOAD,
        "        dist.all_reduce(total_LE)\n",
        "",
        f"{EXPERTS_TEST} tp2_ep2",
    ),
    bug(
        0,
        "layers of every stage counted from its own first",
        "megalora/model/dispatcher.py",
        "self.load.add(number - 1, made.pair_ends_E, routing_map)",
        "self.load.add((number - 1) % 2, made.pair_ends_E, routing_map)",
        f"{EXPERTS_TEST} pp2_full",
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
        "if zlib.crc32(content[start + HEAD.size : end]) != crc:",
        "if crc is None:",
        f"{EXPERTS_TEST} test_a_resumed_run",
    ),
    # The page
    bug(
        0,
        "a sample is markup",
        PAGE,
        "text = escape(str(part[0]))",
        "text = str(part[0])",
        f"{PAGE_TEST} test_text_of_a_run",
    ),
    bug(
        0,
        "a config's keys are markup",
        TABLES,
        'lines.append(f"<tr><th>{escape(first)}</th>{cells}</tr>")',
        'lines.append(f"<tr><th>{first}</th>{cells}</tr>")',
        f"{PAGE_TEST} test_runs_with_hostile_options",
    ),
    bug(
        0,
        "a step done twice drawn as it was first",
        REPORT_RECORDS,
        "by_step.setdefault(key, {})[step] = float(value)",
        "by_step.setdefault(key, {}).setdefault(step, float(value))",
        f"{PAGE_TEST} test_steps_done_twice",
    ),
    bug(
        0,
        "peaks of long series lost",
        CHART,
        "points.append(Point(sum(steps) / len(steps), mean, min(values), max(values)))",
        "points.append(Point(sum(steps) / len(steps), mean, mean, mean))",
        f"{PAGE_TEST} test_a_long_series",
    ),
    bug(
        0,
        "values drawn upside down",
        CHART,
        "max(point.high for point in points), BOTTOM, TOP)",
        "max(point.high for point in points), TOP, BOTTOM)",
        f"{PAGE_TEST} test_a_long_series",
    ),
    bug(
        0,
        "a colour for what lies below an edge",
        HEAT_MAP,
        'side="right"',
        'side="left"',
        f"{PAGE_TEST} test_a_value_on_an_edge",
    ),
    bug(
        0,
        "norms without the scale",
        NORMS,
        "square = scale**2 * float(",
        "square = float(",
        f"{PAGE_TEST} test_norms_are",
    ),
    bug(
        0,
        "experts of a layer add up to norms, not squares",
        NORMS,
        "experts[layer, expert] += square",
        "experts[layer, expert] += math.sqrt(square)",
        f"{PAGE_TEST} test_norms_are",
    ),
)
