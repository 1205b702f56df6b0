"""Train biases of the base (``lora.bias``): one parameter for each Hugging Face linear, beside the
frozen, fused bias of Megatron's.

    out = base(x) + (b - b0)

b0 is the base's own bias, which ``base`` adds. Where b is as it began, the sum is the base bit for
bit. Megatron's linear with a frozen weight gives its bias no gradient, and decay must not touch the
rows of a fused bias that belong to a linear without an adapter: so b is a parameter of its own.
"""

from typing import Any

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megalora.lora.fused_rows import fused_rows
from megalora.lora.trained_weight import TrainedWeight
from megalora.model.families import layer_projections
from megalora.model.shape import ModelShape


class LinearWithBiases(nn.Module):
    """A linear of attention, with or without adapters, some of whose biases are trained.

    tensor         shape on one rank   across TP                  gradient across TP
    q, k, v        [out/t]             dim 0 (see ``B`` of k, v)  whole
    o              [H]                 replicated                 partial: each rank saw S/t tokens
    result         as ``base`` gives it
    """

    def __init__(self, base: Any, layer: int, path: str, shape: ModelShape, tp: int) -> None:
        """``path``: Megatron's name of the linear in its layer; ``tp``: tensor-parallel size."""
        super().__init__()
        self.base = base
        fused = [p for p in layer_projections(shape, layer) if p.module == path]
        self.rows = fused_rows(fused, layer, shape, tp)
        self.trained_biases = nn.ParameterDict()

    def train_bias(self, weight: TrainedWeight) -> nn.Parameter:
        """Let the bias of one linear train; returns its parameter, which begins as the base's."""
        name = weight.module.rsplit(".", 1)[-1]
        # A clone: a view would move b0 along with b, and b - b0 would stay 0.
        bias = nn.Parameter(self.rows.part(self._base_bias(), name).clone())
        self.trained_biases[name] = bias
        return bias

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        out, bias = self.base(x, *args, **kwargs)
        frozen_O = self._base_bias()
        moved: dict[str, Tensor] = {}
        for name, trained in self.trained_biases.items():
            moved[name] = trained - self.rows.part(frozen_O, name)
        return out + self.rows.stacked(moved, frozen_O), bias

    def _base_bias(self) -> Tensor:
        """``[out/t]``: the fused bias, under the adapters where there are any."""
        linear = self.base.base if hasattr(self.base, "factors") else self.base
        return linear.bias.detach()


def biased_linear(
    decoder_layer: Any, layer: int, path: str, shape: ModelShape, group: ProcessGroup
) -> LinearWithBiases:
    """The ``LinearWithBiases`` of a decoder layer, put in the linear's place where it is not there
    yet."""
    owner, _, name = path.rpartition(".")
    parent = decoder_layer.get_submodule(owner)
    linear = getattr(parent, name)
    if not isinstance(linear, LinearWithBiases):
        linear = LinearWithBiases(linear, layer, path, shape, group.size())
        setattr(parent, name, linear)
    return linear
