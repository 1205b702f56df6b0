"""List every linear of a model by its Hugging Face name: those that LoRA can adapt here, and those
that it can elsewhere."""

from collections.abc import Iterator

from megalora.hf.tensor_names import EMBED_TOKENS
from megalora.model.families import layer_projections
from megalora.model.projections import HEAD, Projection
from megalora.model.shape import ModelShape


def projection_places(shape: ModelShape) -> Iterator[tuple[Projection, int | None]]:
    """Every (projection, layer) that LoRA can adapt, in layer order; last lm_head, whose layer is
    None, unless a score head stands in its place."""
    for layer in range(shape.num_layers):
        for projection in layer_projections(shape, layer):
            yield projection, layer
    if not shape.num_scores:
        for projection in HEAD:
            yield projection, None


def linear_modules(shape: ModelShape) -> dict[str, tuple[Projection, int | None, int | None]]:
    """HF module name -> (projection, layer, expert) of every linear that LoRA can adapt, in the
    order of the table."""
    found: dict[str, tuple[Projection, int | None, int | None]] = {}
    for projection, layer in projection_places(shape):
        if not projection.is_expert:
            found[projection.hf.format(layer=layer)] = (projection, layer, None)
            continue
        for expert in range(shape.num_experts):
            module = projection.hf.format(layer=layer, expert=expert)
            found[module] = (projection, layer, expert)
    return found


def other_names(shape: ModelShape) -> dict[str, str]:
    """Every name of a linear that adapters made elsewhere may have -> its HF module name.

    A linear has several names only where transformers changes them on loading: PEFT also accepts
    Mixtral's experts as ``mlp.experts.E.w1``, and vLLM as ``block_sparse_moe.experts.E.gate_proj``.
    """
    found: dict[str, str] = {}
    for module, (p, layer, expert) in linear_modules(shape).items():
        if not p.in_memory:
            continue
        # Either path with either name of the linear: four names each.
        for name in (p.hf, p.in_memory):
            stem = name.rsplit(".", 1)[0].format(layer=layer, expert=expert)
            for leaf in (p.name, p.role):
                found[f"{stem}.{leaf}"] = module
    return found


def expert_blocks(shape: ModelShape) -> dict[str, int]:
    """Names up to ``experts`` under which a layer's routed experts may stand -> the layer."""
    found: dict[str, int] = {}
    for layer in shape.moe_layers:
        for p in layer_projections(shape, layer):
            if p.is_expert:
                for name in (p.hf, p.loaded):
                    block, _, _ = name.partition(".{expert}.")
                    found[block.format(layer=layer)] = layer
    return found


def parameters_of(projection: Projection, layer: int | None) -> tuple[str, ...]:
    """Names by which PEFT's ``target_parameters`` can mean a linear: its own weight, or the
    parameter for all experts that holds an expert's linear."""
    block, of_expert, _ = projection.loaded.partition(".{expert}.")
    if not of_expert:
        return (f"{block.format(layer=layer)}.weight",)
    # transformers fuses gate and up of all experts into one parameter.
    packed = "down_proj" if projection.kind == "expert_row" else "gate_up_proj"
    return (f"{block.format(layer=layer)}.{packed}",)


def other_modules(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """HF module name -> (out, in) of what PEFT and vLLM adapt and megalora does not."""
    # LoRA on an embedding [vocab, hidden] maps one-hot tokens to hidden: (out, in) the other way.
    found = {EMBED_TOKENS: (shape.hidden, shape.vocab)}
    if shape.shared_intermediate:
        for layer in shape.moe_layers:
            found[f"model.layers.{layer}.mlp.shared_expert_gate"] = (1, shape.hidden)
    return found
