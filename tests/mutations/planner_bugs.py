"""Bugs in the planner and its benchmark: bytes, seconds, what is called known. The same form as
``bugs.py``."""

from tests.mutations.bugs import Bug, bug

ACTIVATIONS = "megalora/planner/activations.py"
MLP_ACTIVATIONS = "megalora/planner/mlp_activations.py"
MEMORY = "megalora/planner/memory.py"
PASS_BYTES = "megalora/planner/pass_bytes.py"
WEIGHTS = "megalora/planner/weights.py"
COUNT = "megalora/planner/adapter_count.py"
COST = "megalora/planner/cost.py"
LAYER_COST = "megalora/planner/layer_cost.py"
PRICES = "megalora/planner/prices.py"
HARDWARE = "megalora/planner/hardware.py"
SEARCH = "megalora/planner/search.py"
COST_TEST = "tests/planner/test_cost.py"
BYTES_TEST = "tests/planner/test_cost_bytes.py"
PEAK = "tests/planner/test_peak.py"
PLAN = "tests/planner/test_plan.py"
COMMAND = "tests/planner/test_plan_command.py"
COUNTED = "tests/planner/test_counted_layers.py"
ALONE = f"{COUNTED} an_adapter_alone"

# fmt: off
PLANNER_BUGS: tuple[Bug, ...] = (
    bug(0, "one microbatch in flight on every stage", PASS_BYTES, "math.sumprod(counts, kept)",
        "math.sumprod([min(n, 1) for n in counts], kept)", PEAK),
    bug(0, "loss and a layer's backward at the same time", MEMORY,
        '    ("pass", "loss"),\n    ("pass", "layer"),\n',
        '    ("pass", "loss", "layer"),\n', PEAK),
    bug(0, "experts' adapters reduced with the dense ones", COUNT, "own = is_expert and separate",
        "own = is_expert and not separate", "tests/planner/test_memory.py"),
    bug(0, "a dry run that forgets the buffers of routers", WEIGHTS,
        "return num_routers * shape.num_experts * 2 * 4", "return 0", f"{COMMAND} have_buffers"),
    bug(0, "a shared factor's table without its shards", COUNT, "lead * size if shards < group",
        "lead * size // shards if shards < group", "tests/planner/test_memory.py tables"),
    bug(0, "a bubble that chunks do not shorten", COST, " - longest.total) / p.vpp",
        " - longest.total)", f"{COST_TEST} bubble"),
    bug(0, "an all-to-all out and none back", LAYER_COST,
        "max(sent, received / self.p.etp), times=2)",
        "max(sent, received / self.p.etp), times=1)", f"{BYTES_TEST} all_to_all"),
    bug(0, "attention whole on every tensor-parallel rank", LAYER_COST,
        "attention_flops(b.samples, b.sequence, width)",
    "attention_flops(b.samples, b.sequence, width * self.p.tp)", f"{COST_TEST} share"),
    bug(0, "full recomputation for nothing", COST, "again.take(forward, before=\"recompute \")",
        "again.take(forward, 0.0, before=\"recompute \")", f"{COST_TEST} recomputation"),
    bug(0, "the host's time on top of a GPU's", PRICES,
        "max(0.0, host - device)", "host", f"{COST_TEST} host"),
    bug(0, "a wait before the all-to-all that hides the host", PRICES, "        if waits:\n",
        "        if waits and not over.hidden:\n", f"{COST_TEST} hidden"),
    bug(0, "no wait in the forward that is run again", COST,
        'if level == "full" and waits:', "if False:", f"{COST_TEST} wait"),
    bug(0, "a wait for experts cut by ETP alone forgotten", COST, "return p.ep * p.etp > 1",
        "return p.ep > 1", f"{COST_TEST} hidden"),
    bug(0, "what lies beyond a table called interpolated", HARDWARE,
        "Estimate(math.exp(mean), \"interpolated\" if inside else \"extrapolated\")",
    "Estimate(math.exp(mean), \"interpolated\")", "tests/planner/test_hardware.py table"),
    bug(0, "a ring over nodes with one adapter", HARDWARE, "self.outside_bytes_per_s * per_node)",
        "self.outside_bytes_per_s)", "tests/planner/test_hardware.py links"),
    bug(0, "reasons written only where something fits", "megalora/planner/command.py",
        "    if options.rejected:\n", "    if options.rejected and plan.fitting:\n",
        f"{COMMAND} where_nothing_fits"),
    bug(0, "a layout taken that hardly fits", SEARCH,
        "safe = [v for v in variants if self.share(v) <= FULL] or variants", "safe = variants",
    f"{PLAN} split"),
    bug(0, "a recomputed layer kept alive by its dispatcher", "megalora/model/dispatcher.py",
        "        self.probs_dtype = probs.dtype\n",
        "        self.probs_dtype = probs.dtype\n        self.probs = probs\n", PEAK),
    bug(0, "recomputing gate_up for an adapter of down needs no input", MLP_ACTIVATIONS,
        "experts_are_live = live_router or mlp.adapts_experts", "experts_are_live = live_router",
        ALONE),
    bug(0, "a shared expert's output kept for a frozen gate", MLP_ACTIVATIONS,
        "own * (s.hidden * mlp.live + 1)", "own * (s.hidden + 1)", ALONE),
    bug(0, "a norm below the only adapted head kept", "megalora/planner/head_bytes.py",
        "(model, layout)\n    if live:", "(model, layout)\n    if True:", ALONE),
    bug(0, "router's indexes not kept", MLP_ACTIVATIONS, "choices * (INDEX + INT)",
        "choices * INT", ALONE),
    bug(0, "B of gate multiplied with the ranks of up", LAYER_COST,
        "else rank / 2", "else rank", ALONE),
    bug(0, "no gradient of the experts' A", LAYER_COST,
        "big, 2 * halves * inner + h)", "big, 2 * halves * inner)", ALONE),
    bug(0, "a level of recomputation that nobody counts", "tests/pretended/layer_cases.py",
        'LEVELS = ("off", "selective", "full")', 'LEVELS = ("off", "full")',
        f"{COUNTED} kind_and_level"),
    bug(0, "a layer that keeps what nobody planned", "megalora/model/backend.py",
        "return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)",
        "return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps).sin()",
        ALONE),
    bug(0, "even routing that favours the first rank", "megalora/bench/routing.py",
        "experts.view(num_tokens, top_k)", "experts.view(num_tokens, top_k) // 2",
    "tests/bench/test_routing.py balanced"),
    bug(0, "live tensors never freed", "megalora/bench/live.py", "self.now_bytes -= ",
        "self.now_bytes -= 0 * ", "tests/bench/test_live.py"),
)
# fmt: on
