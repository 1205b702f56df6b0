"""Realistic bugs, one edit each, and the tests that must notice them. ``python -m
tests.mutations.run`` puts them in.

A bug is a change of text in one file; every old text occurs there exactly once, which test_bugs.py
checks. Where lines are broken does not count: the formatter may wrap an old text in any way.
"""

import re
from dataclasses import dataclass

PARALLEL, TRAINING, FILES = (
    f"tests/pitfalls/test_{name}.py" for name in ("parallel", "training", "files")
)


@dataclass(frozen=True)
class Bug:
    name: str
    pitfall: int
    """Its number in tests/pitfalls/README.md; 0: a kernel's."""
    file: str
    edits: tuple[tuple[str, str], ...]
    tests: str
    """A pytest file, with -k expressions after it."""

    def put_into(self, text: str) -> str:
        """The file's text with this bug.

        Raises:
            ValueError: an old text does not occur exactly once.
        """
        for old, new in self.edits:
            places = [match.span() for match in re.finditer(re.escape(old), text)]
            if not places:
                places = [match.span() for match in re.finditer(_wrapped(old), text)]
            if len(places) != 1:
                raise ValueError(f"{self.name}: {old!r} occurs {len(places)} times in {self.file}")
            begin, end = places[0]
            text = text[:begin] + new + text[end:]
        return text


def _wrapped(old: str) -> str:
    """A regular expression that matches ``old`` wherever its lines are broken.

    The formatter also adds a comma before a bracket that stands on a line of its own.
    """
    pieces = [r"\n\s*" if old[:1] == "\n" else ""]
    last_end = 0
    for token in re.finditer(r"\w+|[^\w\s]", old.strip()):
        if last_end:
            is_apart = token.start() > last_end and token[0][0].isalnum()
            pieces.append(r"\s+" if is_apart else r",?\s*" if token[0] in ")]}" else r"\s*")
        pieces.append(re.escape(token[0]))
        last_end = token.end()
    pieces.append(r"\s*\n" if old.endswith("\n") else "")
    return "".join(pieces)


def bug(
    pitfall: int, name: str, file: str, old: str, new: str, tests: str, *more: tuple[str, str]
) -> Bug:
    return Bug(name, pitfall, file, ((old, new), *more), tests)


FACTORS = "megalora/lora/factors.py"
SHARDS = "megalora/lora/shards.py"
STEP = "megalora/train/step.py"
SPEC = "megalora/lora/spec.py"
SELECT = "megalora/lora/select.py"
PROJECTIONS = "megalora/model/projections.py"
PEFT = "megalora/lora/gather.py"
FORM = "megalora/adapters/write/form.py"
STACKED = "megalora/adapters/read/stacked.py"
MERGE = "megalora/adapters/merge.py"
TRAINED = "megalora/adapters/trained.py"
DENSE = "megalora/lora/dense.py"
OPTIM = "megalora/train/optim.py"
BUILD = "megalora/model/build.py"
BASE = "megalora/model/hf_weights.py"

BUGS = (
    # 1: what an adapter starts from depends on the layout
    bug(
        1,
        "init by an expert's number on its rank",
        FACTORS,
        'adapted.factor_module("A", expert)',
        'adapted.factor_module("A", *lead)',
        f"{PARALLEL} test_01",
    ),
    bug(
        1,
        "fan-in of the stacked tensor",
        "megalora/lora/init.py",
        "bound = 1 / math.sqrt(in_features)",
        "bound = 1 / math.sqrt(8 * in_features)",
        f"{PARALLEL} test_01",
    ),
    bug(
        1,
        "another rank's slice of A",
        FACTORS,
        "self.group_size, self.group_rank)",
        "self.group_size, self.group_size - 1 - self.group_rank)",
        f"{PARALLEL} test_01",
    ),
    bug(
        1,
        "init from the rank's generator",
        "megalora/lora/init.py",
        ".uniform_(-bound, bound, generator=generator)",
        ".uniform_(-bound, bound)",
        f"{PARALLEL} test_01",
    ),
    # 2: gradients summed over the wrong ranks, or twice, or not
    bug(
        2,
        "no sum over expert tensor parallel",
        STEP,
        'for name in ("tp", "etp"):',
        'for name in ("tp",):',
        f"{PARALLEL} test_02",
    ),
    bug(
        2,
        "sum over tensor parallel twice",
        STEP,
        'for name in ("tp", "etp"):',
        'for name in ("tp", "tp", "etp"):',
        f"{PARALLEL} test_02",
    ),
    bug(
        2,
        "experts reduced over the group of attention",
        SHARDS,
        "not (is_expert and groups.experts_reduce_separately)",
        "True",
        f"{PARALLEL} test_02",
    ),
    bug(
        2,
        "attention reduced over the group of experts",
        SHARDS,
        "not (is_expert and groups.experts_reduce_separately)",
        "not groups.experts_reduce_separately",
        f"{PARALLEL} test_02",
    ),
    bug(
        2,
        "loss averaged per microbatch",
        "megalora/objectives/sft.py",
        'return Loss(total / divisors["tokens"], metrics)',
        "return Loss(total / count.clamp(min=1), metrics)",
        f"{PARALLEL} test_02",
    ),
    bug(
        2,
        "padding counted as target tokens",
        "megalora/train/inputs.py",
        "torch.from_numpy(np.flatnonzero(own(batch.loss_mask).numpy()))",
        "torch.arange(len(labels))",
        f"{PARALLEL} test_02",
    ),
    bug(
        2,
        "mean per rank and microbatch, not per token",
        BUILD,
        "calculate_per_token_loss=True",
        "calculate_per_token_loss=False",
        f"{PARALLEL} test_02",
    ),
    bug(
        2,
        "one dropout mask for all ranks",
        "megalora/host.py",
        "torch.manual_seed(seed + 104_729 * (rank + 1))",
        "torch.manual_seed(seed)",
        f"{PARALLEL} test_02",
        ("model_parallel_cuda_manual_seed(seed + 104_729 * (rank + 1), force_reset_rng=True)", ""),
    ),
    bug(
        2,
        "adapters of the next rank's experts",
        SHARDS,
        "return range(ep.rank() * count, (ep.rank() + 1) * count)",
        "next_rank = (ep.rank() + 1) % ep.size()\n"
        "    return range(next_rank * count, (next_rank + 1) * count)",
        f"{PARALLEL} test_02",
    ),
    # 3: the delta is in another parallel state than what it is added to
    bug(
        3,
        "scale applied twice",
        FACTORS,
        "of[name] * adapted.scale)",
        "of[name] * adapted.scale**2)",
        f"{PARALLEL} test_03",
    ),
    bug(
        3,
        "scale forgotten",
        FACTORS,
        "of[name] * adapted.scale)",
        "of[name])",
        f"{PARALLEL} test_03",
    ),
    bug(
        3,
        "a row-parallel delta that is not reduced",
        DENSE,
        "scatter_seq(h, self.tp)",
        "h.chunk(self.tp.size())[self.tp.rank()]",
        f"{PARALLEL} test_03",
    ),
    bug(
        3,
        "the router's delta doubled under tensor parallel",
        "megalora/lora/router.py",
        "h.to(logits.dtype)",
        "2 * h.to(logits.dtype)",
        f"{PARALLEL} test_03",
    ),
    bug(
        3,
        "probabilities applied twice",
        "megalora/model/experts.py",
        'self._operand("down"), probs_M, routing',
        'self._operand("down"), probs_M**2, routing',
        f"{PARALLEL} test_03",
    ),
    bug(
        3,
        "no adapter on the shared expert",
        "megalora/model/families/decoder.py",
        "return ATTENTION + MOE + (SHARED_EXPERT if shape.shared_intermediate else ())",
        "return ATTENTION + MOE",
        f"{PARALLEL} test_03",
    ),
    # 4: replicated factors under sequence parallelism
    bug(
        4,
        "replicated factors not summed",
        SHARDS,
        "group_name if replicas > 1 else None",
        "None",
        f"{PARALLEL} test_04",
    ),
    bug(
        4,
        "gathered activations' gradient not summed",
        "megalora/comm.py",
        "gather_seq = _collective(all_gather, _reduce_scatter)",
        "gather_seq = _collective(all_gather, lambda x, g:"
        " x.chunk(g.size())[g.rank()].contiguous())",
        f"{PARALLEL} test_04",
    ),
    bug(
        4,
        "the router's factors in the experts' group",
        SPEC,
        '"router": Sharding("tp",',
        '"router": Sharding("etp",',
        f"{PARALLEL} test_04",
    ),
    bug(
        4,
        "shared KV heads' B not summed",
        SHARDS,
        "group_name if replicas > 1 else None",
        "group_name if split is None and replicas > 1 else None",
        f"{PARALLEL} test_02",
    ),
    bug(
        4,
        "replicas counted twice in the gradient norm",
        SHARDS,
        "split is not None and group.rank() % replicas == 0",
        "True",
        f"{TRAINING} test_08",
    ),
    # 5: the order of fused rows
    bug(
        5,
        "gate and up of the base swapped",
        BASE,
        'halves = ("gate_proj", "up_proj")',
        'halves = ("up_proj", "gate_proj")',
        f"{PARALLEL} test_02",
    ),
    bug(
        5,
        "gate and up adapters swapped",
        PROJECTIONS,
        'f"{_EXPERT}.gate_proj", "mlp.experts',
        'f"{_EXPERT}.swap_proj", "mlp.experts',
        f"{PARALLEL} test_03",
        ('f"{_EXPERT}.up_proj", "mlp.experts', 'f"{_EXPERT}.gate_proj", "mlp.experts'),
        ('f"{_EXPERT}.swap_proj", "mlp.experts', 'f"{_EXPERT}.up_proj", "mlp.experts'),
    ),
    bug(
        5,
        "k and v adapters swapped",
        PROJECTIONS,
        '_qkv("k_proj"',
        '_qkv("swap_proj"',
        f"{PARALLEL} test_03",
        ('_qkv("v_proj"', '_qkv("k_proj"'),
        ('_qkv("swap_proj"', '_qkv("v_proj"'),
    ),
    bug(
        5,
        "q, k, v as one block, not by query group",
        PROJECTIONS,
        "lambda s: (heads(s) * s.head_dim, s.hidden), lambda s: s.num_kv_heads, heads,",
        "lambda s: (heads(s) * s.head_dim, s.hidden), lambda s: 1, heads,",
        f"{PARALLEL} test_04",
    ),
    bug(
        5,
        "KV heads repeated in the wrong order",
        BASE,
        "heads.repeat_interleave(config.num_query_groups // heads.shape[0], 0)",
        "heads.repeat(config.num_query_groups // heads.shape[0], *[1] * (heads.dim() - 1))",
        f"{PARALLEL} test_02",
    ),
    bug(
        5,
        "the wrong rank's part of a shared KV head",
        SHARDS,
        "group.rank() // replicas",
        "group.rank() % num_shards",
        f"{FILES} test_05",
    ),
    # 6: stacks of experts
    bug(
        6,
        "rsLoRA's scale not folded into alpha",
        FORM,
        "make_adapted(projection, layer, r, s * r, s, shape, factors)",
        "make_adapted(projection, layer, r, own.alpha if own else s * r, s, shape, factors)",
        f"{FILES} test_06",
    ),
    bug(
        6,
        "experts written in reverse",
        FACTORS,
        "adapted.tensor_name(factor, expert),",
        "adapted.tensor_name(factor, self.experts[-1 - index[0]] if self.is_expert else None),",
        f"{PARALLEL} test_02",
    ),
    bug(
        6,
        "padding of A before its rows",
        FORM,
        "F.pad(value, (0, 0, 0, missing))",
        "F.pad(value, (0, 0, missing, 0))",
        "tests/adapters/test_form.py stock_peft",
    ),
    bug(
        6,
        "columns of a stacked B by expert",
        STACKED,
        "b_Eor.permute(1, 2, 0).flatten(1, 2)",
        "b_Eor.permute(1, 0, 2).flatten(1, 2)",
        "tests/adapters/test_form.py stock_peft",
    ),
    bug(
        6,
        "old and new orientation of a square parameter",
        STACKED,
        "(0, 19, 1)",
        "(0, 18, 0)",
        "tests/adapters/test_adapter.py sibling",
    ),
    bug(
        6,
        "input and output of an old file not exchanged",
        STACKED,
        "transposed(factors) if old else factors",
        "factors",
        "tests/adapters/test_adapter.py orientations",
    ),
    bug(
        6,
        "gate and up of a stacked file swapped",
        STACKED,
        "gate_b, up_b = b_EoR.chunk(2, 1)",
        "up_b, gate_b = b_EoR.chunk(2, 1)",
        "tests/adapters/test_adapter.py orientations",
    ),
    bug(
        6,
        "an expert without adapter imported as zeros",
        TRAINED,
        "if idle_r.any():",
        "if False:",
        "tests/adapters/test_import.py without_adapter",
    ),
    # 7: experts that never train
    bug(
        7,
        "no gradient into the first recomputed block",
        "megalora/model/recompute.py",
        "use_reentrant=False",
        "use_reentrant=True",
        f"{TRAINING} test_07",
    ),
    bug(
        7,
        "experts left out at injection",
        "megalora/lora/inject.py",
        "    if gate_up or down:\n",
        "    if False:\n",
        f"{TRAINING} test_07",
    ),
    bug(
        7,
        "down of the experts left out at injection",
        "megalora/lora/inject.py",
        "ExpertsLoRA(mlp.experts, gate_up, down, dropout)",
        "ExpertsLoRA(mlp.experts, gate_up, None, dropout)",
        f"{TRAINING} test_07",
    ),
    bug(
        7,
        "a target that matches nothing passes",
        SELECT,
        "if entry.text not in option.used:",
        "if False:",
        f"{TRAINING} test_07",
    ),
    # 8: checkpoints
    bug(
        8,
        "only one data-parallel rank's slice of the state",
        OPTIM,
        "OwnedRun(parameter, owned.start, owned.end, part)",
        "OwnedRun(parameter, 0, owned.end - owned.start, part)",
        f"{TRAINING} test_08",
    ),
    bug(
        8,
        "second moments lost",
        "megalora/train/checkpoint/load.py",
        "saved.read(block.key, name, part)",
        'saved.read(block.key, name, part) * (block.key != "exp_avg_sq")',
        f"{TRAINING} test_08",
    ),
    bug(
        8,
        "Adam's step count starts anew",
        OPTIM,
        'state["step"].fill_(step)',
        'state["step"].fill_(0)',
        f"{TRAINING} test_08",
        ('group["step"] = step', 'group["step"] = 0'),
    ),
    bug(
        8,
        "a missing tensor passes",
        PEFT,
        "        if name not in names:\n            raise ValueError(",
        "        if name not in names:\n            continue\n            raise ValueError(",
        f"{TRAINING} test_08",
    ),
    bug(
        8,
        "an expert's replicas taken for attention's",
        PEFT,
        'groups.edp if shard.group == "etp" else groups.dp_cp',
        "groups.dp_cp",
        f"{TRAINING} test_08",
    ),
    # 9: a server that accepts and ignores
    bug(
        9,
        "rsLoRA scaled like LoRA",
        SPEC,
        "(math.sqrt(rank) if use_rslora else rank)",
        "rank",
        f"{FILES} test_06",
    ),
    bug(
        9,
        "an adapter without effect verified",
        "megalora/verify/peft.py",
        "self.difference <= self.atol < self.effect",
        "self.difference <= self.atol",
        f"{FILES} test_09",
    ),
    bug(
        9,
        "a file without tensors read",
        "megalora/adapters/read/weights.py",
        "        if not self.info:\n",
        "        if False:\n",
        f"{FILES} test_09",
    ),
    bug(
        9,
        "the router's adapter exported for vLLM",
        "megalora/adapters/write/engines.py",
        '"loads it and then ignores it"}',
        '""}',
        "tests/adapters/test_export.py nothing_trained_is_dropped",
    ),
    bug(
        9,
        "a served adapter proved by acting alone",
        "megalora/serve/proof.py",
        "return self.effect > 0 and self.relative <= RELATIVE and exact",
        "return self.effect > 0",
        "tests/serve/test_proof.py wrong_scale",
    ),
    bug(
        9,
        "new contents under an old id",
        "megalora/serve/adapter_names.py",
        "{content_hash(Path(folder))}",
        "",
        "tests/serve/test_client.py test_a_version_is_named",
    ),
    # 10: recomputation and losses that were not asked for
    bug(
        10,
        "recomputation draws other dropout masks",
        "megalora/model/recompute.py",
        "*tensors, use_reentrant=False)",
        "*tensors, use_reentrant=False, preserve_rng_state=False)",
        f"{TRAINING} test_10",
    ),
    bug(
        10,
        "recomputation routes by noisy logits",
        "megalora/model/router.py",
        "return F.linear(input.to(dtype), self.weight.to(dtype))",
        "return F.linear(input.to(dtype), self.weight.to(dtype))"
        # Python's numbers, which recomputation does not set back; another one for each expert.
        " + __import__('random').random() * torch.arange(len(self.weight))",
        f"{TRAINING} test_10",
    ),
    bug(
        10,
        "merged without the scale",
        MERGE,
        "block.scale * (b_PR @ a_RI)",
        "(b_PR @ a_RI)",
        "tests/adapters/test_merge.py unmerged",
    ),
    bug(
        10,
        "merged in the base's precision",
        MERGE,
        "(w_PI + delta_PI).to(dtype)",
        "(w_PI.to(dtype) + delta_PI.to(dtype))",
        "tests/adapters/test_merge.py rounded",
    ),
    bug(
        10,
        "auxiliary loss on",
        BUILD,
        'moe_router_load_balancing_type="none", moe_aux_loss_coeff=0.0',
        'moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=1e-2',
        f"{TRAINING} test_10",
    ),
)
