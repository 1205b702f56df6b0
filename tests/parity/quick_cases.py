"""The few cases of the grid that tests run; ``make parity`` runs all of it."""

from dataclasses import replace

from tests.parity.grid import PACKED, Case
from tests.parity.models import MODELS, VARIANTS, shape_of

FAST = (
    Case(1, recompute="full", micro=3, adapter="ranks"),
    Case(2, tp=2, model="tied", adapter="router", micro=3),
    Case(2, pp=2, model="mixed", recompute="selective", micro=3),
    Case(2, ep=2, model="idle", adapter="rslora"),
    Case(2, cp=2, ep=2, micro=PACKED, balance="on"),
    Case(2, tp=2, ep=2, adapter="ranks", micro=3, objective="dpo"),
    Case(2, tp=2, model="dense", adapter="dora", micro=3),
    Case(2, tp=2, ep=2, adapter="ranks", micro=3, objective="classify"),
)
"""For ``make test``: each way of splitting a model once, but for ETP, which needs four ranks."""

QUICK_OF_FAMILIES: list[Case] = []
"""A case for every family that is not among ``VARIANTS``, with two tensor-parallel ranks and their
gradients: losses are right even where a sum over the ranks is missing."""
for _model in MODELS:
    if _model not in VARIANTS:
        # A dense model has no expert grid to divide.
        _ep = 2 if shape_of(_model).moe_layers else 1
        QUICK_OF_FAMILIES.append(Case(2, tp=2, ep=_ep, model=_model, adapter="router"))

QUICK = (
    *FAST,
    Case(4, tp=2, ep=2, etp=2, adapter="ranks", micro=3),
    # All of these ways at once.
    Case(8, tp=2, pp=2, ep=2, micro=3),
    Case(4, tp=2, ep=2, model="shared", adapter="router", micro=3, recompute="full"),
    Case(4, ep=4, model="idle", micro=3, recompute="selective"),
    Case(4, tp=4, model="2 kv heads", adapter="some", micro=3),
    Case(2, pp=2, vpp=2, etp=1, model="one moe layer", adapter="router", micro=3),
    Case(4, pp=2, vpp=2, tp=2, model="dense", adapter="all", recompute="full1+selective", micro=3),
    # Context parallelism with every other one, packed and not.
    Case(8, tp=2, cp=2, pp=2, ep=2, model="shared", micro=PACKED),
    Case(4, cp=4, ep=2, model="idle", adapter="router", micro=3, recompute="selective"),
    # Samples that are cut, and whole logits.
    Case(2, cp=2, adapter="ranks", micro=PACKED, too_long="split"),
    Case(2, pp=2, model="tied", adapter="router", micro=3, too_long="truncate_right", head="whole"),
    Case(4, tp=2, cp=2, micro=PACKED, too_long="truncate_left", head="whole"),
    # Stages that are not equal: 2 and 5 layers.
    Case(4, pp=2, ep=2, model="7 layers", adapter="router", micro=3, stages="uneven"),
    # One A of gate, one of up and one B of down for all experts.
    Case(2, tp=2, etp=2, adapter="shared outer", micro=3),
    Case(8, tp=2, pp=2, ep=2, etp=2, adapter="shared outer", model="mixed", recompute="selective"),
    # Biases of B: key heads that ranks share, stages, and rows that ranks share out.
    Case(2, tp=2, ep=2, adapter="lora bias", model="shared", micro=3),
    Case(2, tp=2, ep=2, adapter="biases", model="shared", micro=3),
    # A frozen pair beside A and B, on every kind of linear.
    Case(2, tp=2, ep=2, adapter="begun", micro=3),
    Case(2, pp=2, vpp=2, adapter="begun", model="mixed", recompute="full"),
    # Weights of the base: tied over two stages, a head of its own, norms of heads that ranks share
    # and of all heads at once.
    Case(2, tp=2, ep=2, adapter="saved", model="olmoe", micro=3),
    Case(2, tp=2, ep=2, adapter="saved", model="tied", micro=3, head="whole"),
    # Rows of single tokens.
    Case(4, tp=2, pp=2, ep=2, adapter="tokens", model="tied", micro=3),
    Case(2, tp=2, ep=2, adapter="tokens", micro=3, recompute="full"),
    # Pairs, whose two sequences may lie on different context-parallel ranks.
    Case(4, tp=2, cp=2, model="tied", adapter="router", micro=3, head="whole", objective="dpo"),
    # Balanced routing, of sequences that lie on several ranks, in rows that end with filler.
    Case(
        4,
        pp=2,
        vpp=2,
        tp=2,
        ep=2,
        model="glm4_moe",
        adapter="router",
        recompute="full",
        balance="on",
    ),
    Case(2, tp=2, ep=2, adapter="ranks", micro=3, objective="dpo of start"),
    # Labelled answers, of which mismatched ones lie in rows of their own.
    Case(2, micro=1, objective="kto"),
    # DoRA: norms of rows that lie on several ranks, stages, parts of a row, replicated key heads.
    Case(4, tp=2, ep=2, etp=2, adapter="dora", micro=3, recompute="selective"),
    # Of each expert, also of those without tokens; DoRA beside plain linears.
    Case(2, ep=2, model="idle", adapter="dora", recompute="full"),
    Case(2, tp=2, etp=2, adapter="some dora", micro=PACKED, recompute="selective"),
    # A score head in place of lm_head: tied or not, its row on one context-parallel rank or two.
    Case(1, model="tied", micro=3, objective="reward"),
    # The distributions of a second model of other sizes, and of the base; also of whole logits.
    Case(1, micro=3, objective="distill"),
    Case(2, pp=2, adapter="ranks", micro=3, objective="distill base"),
    Case(2, tp=2, ep=2, micro=3, head="whole", objective="distill"),
    # Rollouts: ratios of sequences that lie on several ranks, and tokens of two passes.
    Case(2, tp=2, ep=2, micro=3, objective="grpo"),
    Case(2, pp=2, adapter="router", micro=3, objective="grpo of start"),
    Case(2, cp=2, ep=2, micro=PACKED, objective="grpo"),
    # The same, by the experts that tokens went to while they were sampled.
    Case(2, tp=2, ep=2, adapter="router", micro=3, objective="grpo routed"),
    Case(2, ep=2, model="glm4_moe", micro=3, objective="grpo routed"),
    # Weights that stay codes, whose blocks cuts divide: DoRA's norms of what is decoded, decoded
    # again where a layer is recomputed, stages in turns, rows that several ranks share.
    Case(2, tp=2, etp=2, adapter="dora", micro=3, recompute="selective", base="nf4"),
    Case(4, tp=2, pp=2, vpp=2, ep=2, model="shared", micro=3, recompute="full", base="fp8"),
    *QUICK_OF_FAMILIES,
)
"""For ``make test-all``: the layouts README names, every value of every factor at least once, and
every registered family."""

MORE = (
    Case(4, pp=2, etp=2, model="2 kv heads", adapter="some"),
    Case(4, cp=2, pp=2, vpp=2, adapter="rslora", micro=PACKED, recompute="full"),
    Case(4, tp=2, cp=2, etp=2, model="tied", adapter="router"),
    Case(
        2,
        pp=2,
        vpp=2,
        model="7 layers",
        adapter="ranks",
        micro=3,
        stages="uneven",
        recompute="full1+selective",
    ),
    Case(4, pp=2, tp=2, model="tied", adapter="router", micro=3, stages="uneven"),
    Case(2, adapter="shared outer", micro=3),
    Case(4, ep=2, adapter="shared outer", model="idle"),
    Case(4, cp=2, ep=2, adapter="shared outer", model="shared", micro=PACKED),
    Case(4, cp=2, pp=2, adapter="lora bias", model="shared", micro=PACKED),
    Case(4, tp=2, ep=2, etp=2, adapter="begun", model="shared", micro=3, recompute="selective"),
    Case(2, tp=2, ep=2, adapter="saved", micro=3),
    Case(2, adapter="router", micro=3, objective="dpo"),
    Case(4, tp=4, model="2 kv heads", adapter="dora", micro=3, recompute="full"),
    Case(4, pp=2, vpp=2, tp=2, model="dense", adapter="dora", micro=PACKED),
    Case(4, pp=2, vpp=2, ep=2, model="7 layers", adapter="some dora", micro=3, stages="uneven"),
    Case(2, cp=2, ep=2, adapter="router", micro=PACKED, objective="distill"),
    Case(4, tp=2, model="dense", adapter="dora", micro=PACKED, objective="distill base"),
    Case(1, micro=3, objective="grpo"),
    Case(1, micro=3, objective="grpo of start"),
    Case(4, cp=2, pp=2, model="tied", micro=PACKED, objective="grpo of start", balance="on"),
    Case(8, tp=2, pp=2, ep=2, model="shared", micro=PACKED, objective="grpo"),
    Case(2, cp=2, ep=2, model="idle", micro=PACKED, objective="grpo routed", balance="on"),
    Case(2, pp=2, ep=1, model="mixed", micro=3, recompute="full", objective="grpo routed"),
    Case(4, tp=4, ep=2, etp=2, model="shared", adapter="rslora", micro=3),
    Case(4, cp=2, pp=2, adapter="biases", model="shared", micro=PACKED, objective="dpo"),
    Case(2, cp=2, ep=2, adapter="begun", micro=PACKED, objective="dpo"),
    Case(4, tp=4, ep=2, etp=2, adapter="saved", model="2 kv heads", recompute="full"),
    Case(2, cp=2, ep=2, micro=PACKED, objective="dpo"),
    Case(4, tp=2, cp=2, adapter="router", micro=PACKED, recompute="full", balance="on"),
    Case(2, ep=2, adapter="router", micro=3, objective="kto"),
    Case(2, cp=2, ep=2, micro=PACKED, objective="kto"),
    Case(4, pp=2, vpp=2, cp=2, micro=PACKED, recompute="full", objective="dpo of start"),
    Case(2, cp=2, ep=2, micro=PACKED, objective="reward"),
    Case(4, tp=2, cp=2, adapter="rslora", micro=PACKED, objective="classify", balance="on"),
    Case(2, tp=2, adapter="router", micro=3, objective="distill"),
    Case(4, tp=4, ep=2, etp=2, adapter="router", micro=3, objective="distill base", balance="on"),
    Case(2, cp=2, ep=2, adapter="router", micro=PACKED, base="nf4"),
    Case(2, tp=2, ep=2, model="tied", adapter="saved", micro=3, objective="dpo", base="fp8"),
    Case(4, cp=2, pp=2, adapter="saved", micro=PACKED, objective="dpo"),
    Case(4, pp=2, vpp=2, tp=2, ep=2, adapter="saved", model="mixed", balance="on"),
    Case(4, tp=2, cp=2, adapter="tokens", model="tied", micro=PACKED, objective="kto"),
    Case(4, pp=2, vpp=2, etp=2, recompute="full", objective="dpo"),
    Case(8, tp=2, pp=2, ep=2, model="shared", micro=PACKED, recompute="selective", objective="dpo"),
    Case(4, ep=2, etp=2, model="mixed", recompute="selective", objective="dpo", balance="on"),
    Case(4, pp=2, vpp=2, etp=2, recompute="full", objective="kto"),
    Case(8, tp=2, pp=2, ep=2, model="shared", micro=PACKED, recompute="selective", objective="kto"),
    Case(4, tp=2, cp=2, model="tied", adapter="dora", micro=PACKED, recompute="full1+selective"),
    Case(4, pp=2, ep=2, model="mixed", adapter="dora", objective="dpo"),
    Case(4, cp=2, ep=2, model="shared", adapter="some dora", micro=PACKED, objective="kto"),
    Case(4, pp=2, vpp=2, etp=2, recompute="full", objective="classify"),
    Case(4, pp=2, tp=2, model="tied", micro=3, stages="uneven", objective="reward"),
    Case(
        8,
        tp=2,
        pp=2,
        ep=2,
        model="shared",
        micro=PACKED,
        recompute="selective",
        objective="reward",
    ),
    Case(4, pp=2, vpp=2, etp=2, adapter="router", recompute="full", objective="distill"),
    Case(4, cp=2, pp=2, model="tied", micro=PACKED, too_long="split", objective="distill"),
    Case(8, tp=2, pp=2, ep=2, model="shared", micro=3, recompute="selective", objective="distill"),
    Case(4, tp=2, ep=2, adapter="router", micro=3, head="whole", objective="grpo of start"),
    Case(4, pp=2, vpp=2, etp=2, adapter="rslora", recompute="full", objective="grpo"),
    Case(4, tp=4, ep=4, adapter="begun", model="2 kv heads", micro=3),
    Case(4, tp=4, adapter="lora bias", model="shared", micro=3, recompute="full"),
    Case(4, tp=2, ep=4, adapter="shared outer", micro=3, recompute="full"),
    Case(4, pp=2, adapter="saved", model="tied", micro=3, recompute="selective"),
    Case(4, pp=2, adapter="tokens", model="tied", micro=3, head="whole"),
    Case(2, tp=2, ep=2, adapter="begun", micro=3, base="nf4"),
    Case(4, tp=4, ep=4, model="2 kv heads", recompute="full1+selective", base="fp8"),
    Case(4, cp=2, tp=2, model="dense", adapter="dora", micro=PACKED, base="fp8"),
    Case(2, cp=2, adapter="ranks", micro=PACKED, too_long="split", objective="sft", base="nf4"),
    Case(2, pp=2, vpp=2, model="mixed", adapter="shared outer", balance="on", base="nf4"),
    Case(2, ep=2, model="idle", micro=3, objective="distill base", base="nf4"),
    Case(2, tp=2, model="glm4_moe", micro=3, objective="dpo of start", base="nf4"),
    Case(2, tp=2, ep=2, model="mixtral", adapter="router", micro=3, head="whole", base="fp8"),
)
"""More ways to combine the same, left out of ``make test-all`` for their time: ``make test-long``
and the seeded bugs run them."""

THREE_STAGES = Case(
    3, pp=3, model="7 layers", adapter="some", micro=PACKED, recompute="full1+selective",
    stages="uneven",
)  # fmt: skip
"""Stages of 1, 2 and 4 layers: a middle one too, which the sizes of the grid never have."""

LAYOUTS_OF_FAMILIES = (
    Case(1, adapter="all", micro=3),
    Case(2, pp=2, adapter="router", recompute="full", micro=3),
    Case(4, tp=4, ep=2, etp=2, adapter="ranks", micro=3),
)
MORE_OF_FAMILIES: list[Case] = []
"""More layouts for families that have layer parts of their own."""
for _model in ("glm4_moe", "olmoe"):
    for _layout in LAYOUTS_OF_FAMILIES:
        MORE_OF_FAMILIES.append(replace(_layout, model=_model))
