"""Every linear of a model that LoRA can adapt, by its Hugging Face name: the table of ``spec.py`` written out."""

from megalora.lora.spec import HEAD, Projection, layer_projections
from megalora.model.shape import ModelShape


def linear_modules(shape: ModelShape) -> dict[str, tuple[Projection, int | None, int | None]]:
    """HF module name -> (projection, layer, expert) of every linear that LoRA can adapt, in the order of the table."""
    found: dict[str, tuple[Projection, int | None, int | None]] = {}
    for layer in range(shape.num_layers):
        for p in layer_projections(shape, layer):
            for expert in range(shape.num_experts) if p.is_expert else [None]:
                found[p.hf.format(layer=layer, expert=expert)] = (p, layer, expert)
    return found | {HEAD[0].hf: (HEAD[0], None, None)}
