"""Every linear of a model by its Hugging Face name: those that LoRA can adapt here, and those that
it can elsewhere."""

from megalora.model.families import layer_projections
from megalora.model.projections import HEAD, Projection
from megalora.model.shape import ModelShape

EMBEDDING = "model.embed_tokens"


def linear_modules(shape: ModelShape) -> dict[str, tuple[Projection, int | None, int | None]]:
    """HF module name -> (projection, layer, expert) of every linear that LoRA can adapt, in the
    order of the table."""
    found: dict[str, tuple[Projection, int | None, int | None]] = {}
    for layer in range(shape.num_layers):
        for p in layer_projections(shape, layer):
            for expert in range(shape.num_experts) if p.is_expert else [None]:
                found[p.hf.format(layer=layer, expert=expert)] = (p, layer, expert)
    return found | {HEAD[0].hf: (HEAD[0], None, None)}


def other_modules(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """HF module name -> (out, in) of what PEFT and vLLM adapt and megalora does not."""
    found = {EMBEDDING: (shape.hidden, shape.vocab)}
    if shape.shared_intermediate:
        found |= {
            f"model.layers.{layer}.mlp.shared_expert_gate": (1, shape.hidden)
            for layer in shape.moe_layers
        }
    return found
