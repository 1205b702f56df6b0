"""Bugs in what the planner knows of weights of the base, and of rows of its embedding, that are
trained whole. The same form as ``bugs.py``."""

from tests.mutations.bugs import Bug, bug

COUNT = "megalora/planner/adapter_count.py"
WEIGHTS = "megalora/planner/weights.py"
STATE = "megalora/planner/state_bytes.py"
ACTIVATIONS = "megalora/planner/activations.py"
HEAD_BYTES = "megalora/planner/head_bytes.py"
PASS_BYTES = "megalora/planner/pass_bytes.py"
GRADIENTS = "megalora/planner/weight_gradients.py"
DRY = "tests/planner/test_dryrun.py trained_of_the_base"
KEPT = "tests/planner/test_activations.py trained_whole"
PEAK = "tests/planner/test_peak.py saved"
COST = "tests/planner/test_cost.py"
MEMORY = "tests/planner/test_memory.py"
FLOPS = "megalora/bench/flops.py"
BENCH = "tests/bench/test_trained_whole.py"

WHOLE_PLAN_BUGS: tuple[Bug, ...] = (
    bug(
        0,
        "a benchmark that trains nothing of the base",
        "megalora/bench/steps.py",
        "    shape = model.shape\n",
        "",
        f"{BENCH} for_real",
    ),
    bug(
        0,
        "no FLOPs for the gradient of a trained head or router",
        FLOPS,
        "            whole += weight.num_parameters\n",
        "            pass\n",
        f"{BENCH} torch_counts",
    ),
    bug(
        0,
        "FLOPs of trained norms",
        FLOPS,
        "elif weight.is_router or weight.path",
        "elif len(weight.size) == 1 or weight.is_router or weight.path",
        f"{BENCH} torch_counts",
    ),
    bug(
        0,
        "FLOPs of rows that are looked up",
        FLOPS,
        "(weight.tokens and weight.tied)",
        "weight.tokens",
        f"{BENCH} by_hand",
    ),
    bug(
        0,
        "a trained weight planned as frozen, too",
        "megalora/planner/memory.py",
        " - of_base_elements(model, p, chunk)",
        "",
        DRY,
    ),
    bug(
        0,
        "a tied embedding planned on the first stage alone",
        COUNT,
        "here = chunk.has_embedding or (weight.tied and chunk.has_head)",
        "here = chunk.has_embedding",
        DRY,
    ),
    bug(
        0,
        "token ids beside a tied head not planned",
        WEIGHTS,
        "total += 2 * sum(token // width == tp_rank for token in shape.tokens)",
        "pass",
        "tests/planner/test_plan_command.py rows_of_a_tied_head",
    ),
    bug(
        0,
        "a tied embedding in the bucket of the others",
        STATE,
        "dense += count.tied + -count.tied % multiple",
        "dense += count.tied",
        f"{MEMORY} tied_embedding_has_a_bucket",
    ),
    bug(
        0,
        "a tied embedding's bucket that no rank updates",
        STATE,
        "+ min(count.tied, tied // layout.dp_cp)",
        "",
        f"{MEMORY} tied_embedding_has_a_bucket",
    ),
    bug(
        0,
        "a split weight planned as summed over TP",
        COUNT,
        "return weight.num_parameters if weight.num_shards(p.tp) < p.tp else 0",
        "return 0 if p.tp == 1 else weight.num_parameters",
        f"{MEMORY} only_what_ranks_hold_whole",
    ),
    bug(
        0,
        "base values of what is trained not planned",
        "megalora/planner/memory.py",
        "        put_aside += with_base_value(model, p, chunk)\n",
        "",
        PEAK,
    ),
    bug(
        0,
        "layers that train other norms planned alike",
        WEIGHTS,
        "likeness = (self.shape.is_moe(layer), tuple(ranks), whole)",
        "likeness = (self.shape.is_moe(layer), tuple(ranks))",
        f"{MEMORY} may_train_other_weights",
    ),
    bug(
        0,
        "backward planned to end above a trained norm",
        WEIGHTS,
        "for layer in (*self.by_layer, *self.whole) if layer",
        "for layer in self.by_layer if layer",
        KEPT,
    ),
    bug(
        0,
        "a trained embedding's output planned without a gradient",
        WEIGHTS,
        "        if self.trains_embedding:\n            return -1\n",
        "",
        KEPT,
    ),
    bug(
        0,
        "nothing kept behind trained norms of heads",
        ACTIVATIONS,
        "live or bool(qkv) or model.trains_in_attention(layer)",
        "live or bool(qkv)",
        KEPT,
    ),
    bug(
        0,
        "a trained last norm that keeps no input",
        ACTIVATIONS,
        'return below or model.trains(None, "decoder.final_layernorm")',
        "return below",
        KEPT,
    ),
    bug(
        0,
        "a trained router's input not kept",
        "megalora/planner/mlp_activations.py",
        "live_router = mlp.live or bool(router) or mlp.trains_router",
        "live_router = mlp.live or bool(router)",
        KEPT,
    ),
    bug(
        0,
        "places of trained rows not kept",
        ACTIVATIONS,
        "return batch.own_tokens * (INDEX + 1)",
        "return 0",
        KEPT,
    ),
    bug(
        0,
        "results of a trained head not kept",
        HEAD_BYTES,
        "batch.tokens * 3 * STATISTIC + len(s.tokens)",
        "len(s.tokens)",
        KEPT,
    ),
    bug(
        0,
        "a trained head's gradient without its float32 sum",
        HEAD_BYTES,
        "sums = (len(s.tokens) or vocab) * s.hidden * STATISTIC",
        "sums = 0",
        PEAK,
    ),
    bug(
        0,
        "an embedding's gradient that takes no room",
        HEAD_BYTES,
        "rows = batch.tokens + max(s.vocab // layout.parallel.tp, batch.tokens)",
        "rows = 0",
        PEAK,
    ),
    bug(
        0,
        "no product for a trained head's gradient",
        GRADIENTS,
        '        self.gemm(backward, "head", vocab, hidden, b.tokens)\n',
        "",
        f"{COST} trained_of_the_base",
    ),
    bug(
        0,
        "no product for a router's gradient",
        GRADIENTS,
        'self.gemm(to, "dispatch", s.num_experts, s.hidden, own)',
        "pass",
        f"{COST} trained_of_the_base",
    ),
    bug(
        0,
        "an embedding's gradient summed in no time",
        GRADIENTS,
        "elements * (self.e + 2 * STATISTIC))",
        "0)",
        f"{COST} embedding_takes",
    ),
    bug(
        0,
        "a tied embedding that its stages do not add up",
        "megalora/planner/cost.py",
        "GRADIENT * count.tied, times)",
        "0, times)",
        f"{COST} embedding_takes",
    ),
)
