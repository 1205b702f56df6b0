"""Grouped LoRA for mixture-of-experts layers. Depends on torch and triton and nothing else."""

from .augmented_weight import AugmentedWeight
from .backend import BACKENDS, prefers_grouped_mm
from .coded_weight import CodedWeight, Scratch
from .combine import combine
from .dense_lora import add_low_rank, dense_lora
from .destinations import Destinations, route_to_ranks
from .expert_factors import ExpertFactors
from .expert_mlp import expert_mlp
from .grouped_lora import grouped_lora
from .logit_rows import (
    join_blocks_triton,
    read_logits_triton,
    softmax_gradient_triton,
    takes_logit_kernels,
)
from .lora_wgrad import lora_wgrad
from .permute_shrink import permute_shrink
from .quantised_weight import NF4, Nested, QuantisedWeight, block_bytes, pack_nf4
from .regroup import Arrivals, regroup_values
from .route import route, route_values
from .routing import Routing, permute, permute_values, unpermute

__all__ = [
    "BACKENDS",
    "NF4",
    "Arrivals",
    "AugmentedWeight",
    "CodedWeight",
    "Destinations",
    "ExpertFactors",
    "Nested",
    "QuantisedWeight",
    "Routing",
    "Scratch",
    "add_low_rank",
    "block_bytes",
    "combine",
    "dense_lora",
    "expert_mlp",
    "grouped_lora",
    "join_blocks_triton",
    "lora_wgrad",
    "pack_nf4",
    "permute",
    "permute_shrink",
    "permute_values",
    "prefers_grouped_mm",
    "read_logits_triton",
    "regroup_values",
    "route",
    "route_to_ranks",
    "route_values",
    "softmax_gradient_triton",
    "takes_logit_kernels",
    "unpermute",
]
