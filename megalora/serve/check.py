"""Check whether vLLM would serve an adapter as it was trained, before it is asked to.

Refused is what vLLM would refuse, and what it would load and ignore. Measured on vLLM 0.32: it
loads NaN, ranks other than the config's, siblings of zero tensors, modules that it does not wrap
and matrices smaller than the base's, all without a word; incomplete experts fail with a bare
assertion.
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from megalora.adapters.files import CONFIG, WEIGHTS
from megalora.adapters.read.copies import check_copies, copies_in
from megalora.adapters.read.options import has_score, not_plain, refused_options
from megalora.adapters.read.rules import Rules
from megalora.adapters.read.weights import FLOATS, TensorInfo
from megalora.hf.json_file import read_hf_config
from megalora.hf.tensor_names import (
    described,
    is_copy_of_vocabulary,
    is_of_experts,
    parse_expert,
    parse_plain_factor,
)
from megalora.lora.modules import linear_modules, other_modules
from megalora.lora.select import ALIASES
from megalora.model.fields import model_shape
from megalora.model.shape import ModelShape
from megalora.serve.adapter_files import AdapterFiles, read_adapter_files
from megalora.serve.errors import (
    AdapterForOtherBase,
    AdapterInvalid,
    AdapterRankTooLarge,
    AdapterTargetsUnserved,
)
from megalora.serve.heads import SCORE_WEIGHT, kind_of, num_scores
from megalora.wording import shorten

_FUSED: dict[str, str] = {}
"""vLLM's fused linear by the HF linear that is a part of it: q_proj is in qkv_proj."""
for _fused in ("qkv_proj", "gate_up_proj"):
    for _part in ALIASES[_fused]:
        _FUSED[_part] = _fused
_EXPERT_LEAVES = (frozenset({"gate_proj", "up_proj", "down_proj"}), frozenset({"w1", "w2", "w3"}))
"""Names of an expert's linears: those of most families, and Mixtral's."""


@dataclass(frozen=True)
class Limits:
    """Options that a server was started with; the server checks what is None here."""

    max_rank: int | None = None
    """Largest rank that the server takes."""
    target_modules: tuple[str, ...] | None = None
    """vLLM's names of the adapted modules (qkv_proj, o_proj, experts, ...), or parts (q_proj)."""
    base: Path | None = None
    """Folder of the base model, if it can be read from here."""
    num_scores: int | None = None
    """Numbers that the served score heads give; 0 for a server of language models."""


@dataclass(frozen=True)
class Needs:
    """What an adapter asks of a server."""

    rank: int
    """Largest rank of its modules."""
    target_modules: frozenset[str]
    """vLLM's names of its modules."""
    num_scores: int = 0
    """Numbers that its score head gives; 0 for a language model."""


@dataclass(frozen=True)
class _Module:
    """Sizes of A [r, in] and B [out, r] of one HF linear, or of an embedding."""

    rank: int
    out_features: int
    in_features: int


def check_adapter(folder: Path, limits: Limits | None = None) -> Needs:
    """Check the whole adapter, reading every byte once; returns what it asks of a server.

    Raises:
        AdapterNotFound: it is not an adapter folder.
        AdapterInvalid, or a subclass that says more: what is wrong, with names and numbers.
    """
    files = read_adapter_files(folder)
    limits = limits or Limits()
    # First what the headers say, which takes no time; the values come last.
    _check_config(files)
    modules = _modules(files)
    _check_ranks(files, modules)
    rank = max(module.rank for module in modules.values())
    shape = _shape(limits.base)
    needs = Needs(rank, frozenset(map(vllm_module, modules)), num_scores(files, shape))
    _check_limits(files, needs, modules, limits)
    if shape is not None:
        _check_base(files, modules, shape)
        _check_copies(files, shape, limits.base)
    _check_experts(files, modules, shape)
    bad = files.weights.not_finite()
    if bad is not None:
        raise AdapterInvalid(
            f"{folder / WEIGHTS}: {bad} holds NaN or an infinite number; serve an earlier"
            " checkpoint"
        )
    return needs


def vllm_module(hf_module: str) -> str:
    """The module of vLLM that holds this HF linear, as ``--lora-target-modules`` names it."""
    leaf = hf_module.rsplit(".", 1)[-1]
    return "experts" if is_of_experts(hf_module) else _FUSED.get(leaf, leaf)


def _check_config(files: AdapterFiles) -> None:
    path = files.folder / CONFIG
    config = files.config
    for key in ("r", "lora_alpha", "target_modules"):
        if key not in config:
            raise AdapterInvalid(f"{path}: {key} is missing; vLLM reads it")
    # Not isinstance: true is an int for it.
    if type(config["r"]) is not int or config["r"] < 1:
        raise AdapterInvalid(f"{path}: r must be a positive whole number, got {config['r']!r}")
    # Options beyond plain LoRA, such as DoRA.
    options = [*not_plain(config), *refused_options(config, "vllm")]
    # vLLM takes a score head for each request, and no other weight that was trained whole.
    if has_score(config):
        options.remove("modules_to_save")
    found = [f"{key}={shorten(config[key])}" for key in options]
    if found:
        raise AdapterInvalid(
            f"{path}: vLLM does not serve {', '.join(found)}; train without, or merge into the base"
        )


def _modules(files: AdapterFiles) -> dict[str, _Module]:
    """Adapted modules by HF name; every A has its B and their ranks agree."""
    path = files.folder / WEIGHTS
    # Shapes by module, then by factor, A or B.
    shapes: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for name, tensor in files.tensors.items():
        # PEFT may save the embeddings along with an adapter of theirs; ``_check_copies`` compares.
        if is_copy_of_vocabulary(name):
            continue
        if name == SCORE_WEIGHT and has_score(files.config):
            continue
        module, factor = _parsed_factor(path, name, tensor)
        shapes[module][factor] = tensor.shape
    modules = {}
    for name, factors in shapes.items():
        a = factors.get("A")
        b = factors.get("B")
        if a is None or b is None:
            present = "B" if a is None else "A"
            raise AdapterInvalid(f"{path}: {name} has {present} only; a factor is missing")
        # A [r, in] and B [out, r].
        if a[0] != b[1]:
            raise AdapterInvalid(
                f"{path}: {name} has A {list(a)} and B {list(b)}; A's rows must be B's columns"
            )
        modules[name] = _Module(a[0], b[0], a[1])
    if not modules:
        raise AdapterInvalid(f"{path} has no LoRA factor: it would serve the base model")
    return modules


def _parsed_factor(path: Path, name: str, tensor: TensorInfo) -> tuple[str, str]:
    """Module and factor of a tensor; raises ``AdapterInvalid`` for one that vLLM cannot take."""
    parsed = parse_plain_factor(name)
    if parsed is None:
        raise AdapterInvalid(
            f"{path}: {name} is not a LoRA factor but {described(name)}, which vLLM refuses;"
            " megalora export writes the adapter without copies of the base's weights"
        )
    module, factor = parsed
    # PEFT's target_parameters: A of all experts in one matrix, B in another.
    if module.endswith((".experts", ".experts.base_layer")):
        raise AdapterInvalid(
            f"{path}: {name} stacks all experts; vLLM takes one A and B per expert for this model"
        )
    # A bank [experts, r, in] or [experts, out, r].
    if len(tensor.shape) == 3 and is_of_experts(name):
        raise AdapterInvalid(
            f"{path}: {name} is {tensor.dtype} {list(tensor.shape)}, one tensor for all"
            " experts; vLLM takes one A and B per expert for this model, which megalora export"
            " writes"
        )
    if tensor.dtype not in FLOATS or len(tensor.shape) != 2:
        raise AdapterInvalid(
            f"{path}: {name} is {tensor.dtype} {list(tensor.shape)}; must be a matrix of floats"
        )
    return module, factor


def _check_ranks(files: AdapterFiles, modules: dict[str, _Module]) -> None:
    """vLLM takes the scale's rank from the config, whatever the tensors say."""
    try:
        rules = Rules(files.folder, files.config, files.folder / WEIGHTS)
        expected = {name: rules.rank(name) for name in modules}
    except ValueError as error:
        raise AdapterInvalid(str(error)) from None
    for name, module in modules.items():
        if module.rank != expected[name]:
            raise AdapterInvalid(
                f"{files.folder}: {name} has rank {module.rank}, but {CONFIG} says"
                f" {expected[name]}; its scale would be wrong"
            )


def _check_limits(
    files: AdapterFiles, needs: Needs, modules: dict[str, _Module], limits: Limits
) -> None:
    if limits.max_rank is not None and needs.rank > limits.max_rank:
        raise AdapterRankTooLarge(
            f"{files.folder} has rank {needs.rank}, and the server takes up to {limits.max_rank};"
            " start it with a larger --max-lora-rank"
        )
    if limits.num_scores is not None and limits.num_scores != needs.num_scores:
        raise AdapterTargetsUnserved(
            f"{files.folder} is {kind_of(needs.num_scores)}, and the server is for"
            f" {kind_of(limits.num_scores)}. Serve it by a megalora serve of its own"
        )
    if limits.target_modules is None:
        return
    served = set(limits.target_modules)
    for name in modules:
        # The server may have been given a fused linear's name or that of a part.
        if not served & {vllm_module(name), name.rsplit(".", 1)[-1]}:
            raise AdapterTargetsUnserved(
                f"{files.folder}: {name} needs {vllm_module(name)!r}, and the server adapts"
                f" {', '.join(sorted(served))} only; it would be ignored. Start the server with it"
            )


def _shape(base: Path | None) -> ModelShape | None:
    """The base's shape; None where it cannot be read, or is of a family that megalora does not
    know."""
    if base is None or not (base / "config.json").is_file():
        return None
    try:
        return model_shape(read_hf_config(base))
    except ValueError:
        return None


def base_modules(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """(out, in) of everything that vLLM can adapt in this model, by HF name."""
    sizes = {}
    for module, (projection, _, _) in linear_modules(shape).items():
        sizes[module] = projection.features(shape)
    return sizes | other_modules(shape)


def _check_base(files: AdapterFiles, modules: dict[str, _Module], shape: ModelShape) -> None:
    """Every module exists in the base, with these sizes."""
    sizes = base_modules(shape)
    for name, module in modules.items():
        if name not in sizes:
            raise AdapterForOtherBase(
                f"{files.folder}: the base model ({shape.model_type}, {shape.num_layers} layers,"
                f" {shape.num_experts} experts) has no {name}; was the adapter trained on"
                f" {files.config.get('base_model_name_or_path')}?"
            )
        if (module.out_features, module.in_features) != sizes[name]:
            raise AdapterForOtherBase(
                f"{files.folder}: {name} is {module.out_features} x {module.in_features}, and the"
                f" base model's is {sizes[name][0]} x {sizes[name][1]}; was it trained on"
                f" {files.config.get('base_model_name_or_path')}?"
            )


def _check_copies(files: AdapterFiles, shape: ModelShape, base: Path | None) -> None:
    """The file's copies of base weights are equal to the base's, which vLLM uses instead."""
    try:
        check_copies(files.weights, copies_in(files.weights, shape), shape, base)
    except ValueError as error:
        raise AdapterInvalid(str(error)) from None


def _check_experts(
    files: AdapterFiles, modules: dict[str, _Module], shape: ModelShape | None
) -> None:
    """All experts of a block, all three projections, one rank per projection."""
    # Ranks by block, number of the expert and projection.
    blocks: dict[str, dict[int, dict[str, int]]] = defaultdict(lambda: defaultdict(dict))
    for name, module in modules.items():
        of = parse_expert(name)
        if of is not None:
            blocks[of.block][of.number][of.leaf] = module.rank
    for block, experts in blocks.items():
        found: set[str] = set()
        for ranks in experts.values():
            found |= ranks.keys()
        # The family's names are those that the file has most of.
        leaves = max(_EXPERT_LEAVES, key=lambda names: len(names & found))
        # Without the base, the highest number in the file has to do.
        num_experts = shape.num_experts if shape else max(experts) + 1
        expected = range(num_experts)
        for expert in expected:
            missing = leaves - experts.get(expert, {}).keys()
            if missing:
                raise AdapterInvalid(
                    f"{files.folder}: {block}.{expert} lacks {', '.join(sorted(missing))}; vLLM"
                    " wants all three projections of every expert (zeros do). megalora export"
                    " writes them"
                )
        for leaf in sorted(leaves):
            ranks = {experts[expert][leaf] for expert in expected}
            if len(ranks) > 1:
                raise AdapterInvalid(
                    f"{files.folder}: {block}.*.{leaf} has ranks {sorted(ranks)}; must be one"
                )
