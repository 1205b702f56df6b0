"""Refuse linears that cannot have what the ``lora`` section asks of their factors."""

from collections import defaultdict

from megalora.config import LoRAConfig
from megalora.hf.tensor_names import within_layer
from megalora.lora.spec import Adapted
from megalora.model.projections import HEAD, has_bias
from megalora.model.shape import ModelShape


def check_bias(adapted: list[Adapted], shape: ModelShape) -> None:
    """Raise ``ValueError`` for linears whose own bias cannot take the bias of a B in."""
    for a in adapted:
        if not has_bias(a.projection, shape):
            name = within_layer(a.projection.hf).replace("{expert}", "*")
            raise ValueError(
                f"lora.lora_bias: {name} has no bias in this base, so that nothing could be merged"
                " into it. Set lora.target_modules to linears with one, or leave lora_bias out"
            )


def check_expert_ranks(lora: LoRAConfig, adapted: list[Adapted]) -> None:
    """Raise ``ValueError`` where experts of a layer have ranks of their own although their factors
    are not each expert's, or begin as full matrices."""
    for a in adapted:
        if not a.expert_ranks:
            continue
        hits = f"lora.rank_pattern gives experts of layer {a.layer} different ranks of {a.name}"
        if a.shared:
            raise ValueError(
                f"{hits}, and with lora.share_outer they share factors. Leave one of them out"
            )
        if lora.init != "lora":
            raise ValueError(
                f"{hits}, and lora.init={lora.init} is not there for that. Leave one of them out"
            )


KERNEL_RANK = 128
"""Largest sum of ranks, those of gate and up added up, that the Triton kernels of experts take
(``megalora_kernels.backend.MAX_TRITON_RANK``)."""


def check_kept(lora: LoRAConfig, adapted: list[Adapted]) -> None:
    """Raise ``ValueError`` where adapters of earlier cycles cannot lie beside the one that
    trains."""
    kept = adapted[0].kept
    why = f"train.relora keeps {kept} earlier adapters beside a base that is stored as codes"
    if lora.dropout:
        raise ValueError(
            f"{why}, which read their input as a merged weight does: set lora.dropout=0, got"
            f" {lora.dropout:g}"
        )
    ranks: dict[tuple[int | None, str], int] = defaultdict(int)
    for a in adapted:
        if a.projection.is_expert:
            ranks[a.layer, a.projection.module] += a.product_rank
    largest = max(ranks.values(), default=0)
    if largest > KERNEL_RANK:
        raise ValueError(
            f"{why}, which makes a rank of {largest} for the experts' gate_up or down in the last"
            f" cycle, above the {KERNEL_RANK} of the kernels. Lower lora.rank or train.steps, raise"
            " train.relora.every, or give the plain model with model.weight_format=nf4"
        )


def check_init(lora: LoRAConfig, adapted: list[Adapted]) -> None:
    """Raise ``ValueError`` for linears that cannot be initialised from the base weights."""
    for a in adapted:
        name = within_layer(a.projection.hf).replace("{expert}", "*")
        if a.projection in HEAD:
            raise ValueError(
                f"lora.init={lora.init}: {name} cannot be initialised so, with a vocabulary that"
                " ranks share and an embedding that it may be tied to. Leave it out of"
                " lora.target_modules"
            )
        # The kernels of experts drop out what both A and A0 read, and A0 must read all of it.
        if a.projection.is_expert and lora.dropout:
            raise ValueError(
                f"lora.init={lora.init}: {name} needs lora.dropout=0, got {lora.dropout}; attention"
                " and dense MLPs do not"
            )
        smallest = min(a.out_features, a.in_features)
        if a.rank > smallest:
            raise ValueError(
                f"lora.init={lora.init}: {name} is {a.out_features} x {a.in_features} and has no"
                f" {a.rank} singular values. Give it a rank of up to {smallest} (lora.rank,"
                " lora.rank_pattern)"
            )
