"""Build the frozen model that Megatron-Bridge's LoRA adapts: Bridge's own with Transformer Engine;
without it ours, with Megatron's MoE layer and experts in the place of megalora's.

Shape legend: M routed rows   E experts   K inputs   N outputs   H hidden   I expert intermediate
"""

import importlib.util
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor, nn

from benchmarks.arms import grouped_mm
from benchmarks.train_arms import Setup
from benchmarks.train_megalora import model_config
from megalora.config import ParallelConfig
from megalora.model.backend import TorchBackend, block_spec
from megalora.model.build import configure
from megalora.model.documents import Documents
from megalora.model.fields import model_shape
from megalora.model.head import Outputs, Wanted
from megalora.model.hf_weights import AutoMapping, load_named, open_architecture, quiet


def bridge_base(setup: Setup, grouped: bool) -> tuple[nn.Module, str]:
    """The frozen model with the shared weights, and a note on what its experts are."""
    # Late: importing hf_weights above has made Bridge importable.
    from megatron.bridge.models.qwen.qwen3_moe_bridge import Qwen3MoEBridge

    shape = model_shape(setup.config)
    bridge = open_architecture(setup.config)
    engine = importlib.util.find_spec("transformer_engine") is not None
    with quiet():
        provider: Any = bridge.provider()
        # ``configure`` puts megalora's layers in; a user of Bridge has Bridge's.
        its_own = provider.transformer_layer_spec
        configure(provider, model_config(setup), ParallelConfig(), shape)
        provider.moe_grouped_gemm = grouped
        provider.transformer_layer_spec = its_own if engine else partial(_block, grouped=grouped)
        provider.finalize()
        chunk = provider.provide()
    _take_rows(chunk)
    chunk.to(setup.device).requires_grad_(False)
    load_named(Qwen3MoEBridge(), bridge.hf_config, setup.weights(), [chunk], "shared weights")
    if engine:
        return chunk, "Transformer Engine's model and grouped experts"
    if grouped:
        return chunk, "torch's grouped_mm in the place of Transformer Engine's grouped linears"
    return chunk, "Megatron's SequentialMLP (no Transformer Engine)"


def _take_rows(chunk: Any) -> None:
    """Let Bridge's model take a row of documents of one length as a batch of sequences, and answer
    as megalora's head does: its attention and rotary embedding know packed rows only in a format of
    their own, and its loss is Megatron's, with all logits."""
    of_sequences = chunk.forward

    def forward(
        tokens_1T: Tensor, *ignored: None, packed_seq_params: Documents, output_processor: Any,
        output_processor_context: Wanted,
    ) -> Outputs:  # fmt: skip
        (row,) = packed_seq_params.chunks
        num_documents = len(row.query_ends) - 1
        wanted = output_processor_context
        # Tokens that are in no loss get the label 0, and their losses are not read.
        labels_T = torch.zeros_like(tokens_1T[0])
        labels_T[wanted.positions] = wanted.targets
        losses_BS = of_sequences(
            tokens_1T.view(num_documents, -1), None, None, labels=labels_T.view(num_documents, -1)
        )
        return {"logprob": -losses_BS.flatten()[wanted.positions]}

    chunk.forward = forward


class _Backend(TorchBackend):
    """megalora's parts of a layer, with Megatron's experts."""

    def __init__(self, grouped: bool) -> None:
        super().__init__()
        self.grouped = grouped

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> Any:
        if self.grouped:
            return GroupedExperts
        # Past ``TorchBackend``, whose experts are megalora's, to Megatron's own SequentialMLP.
        return super(TorchBackend, self).grouped_mlp_modules(False)


def _block(
    config: Any, vp_stage: int | None = None, *, grouped: bool
) -> TransformerBlockSubmodules:
    """megalora's decoder layers with Megatron's MoE layer, router, dispatcher and experts."""
    block = block_spec(config, vp_stage)
    for layer in block.layer_specs or []:
        moe = get_moe_module_spec_for_backend(
            _Backend(grouped), config.num_moe_experts, moe_grouped_gemm=grouped
        )
        layer.submodules.mlp = moe  # pyright: ignore
    return block


class _Grouped(nn.Module):
    """Weights of all experts, ``[E, N, K]``, behind the names and the call of Transformer Engine's
    grouped linears."""

    def build(self, config: Any, num_experts: int, inputs: int, outputs: int, groups: Any) -> Any:
        # Bridge asks for the types of the parallel linears; their own constructors would allocate
        # weights and buffers for one matrix, so they are not called.
        nn.Module.__init__(self)
        self.config = config
        self.num_gemms = num_experts
        self.input_size = inputs
        self.output_size = outputs
        self.tp_group = groups.expt_tp
        device = torch.device("cpu")
        if torch.cuda.is_available():
            device = torch.device("cuda", torch.cuda.current_device())
        self.w_ENK = torch.empty(
            num_experts, outputs, inputs, dtype=config.params_dtype, device=device
        )
        # Bridge loads experts one by one, as weight0, weight1, ...: views, so that loading fills
        # the tensor that the grouped GEMM reads.
        for e in range(num_experts):
            setattr(self, f"weight{e}", nn.Parameter(self.w_ENK[e], requires_grad=False))
        return self

    def forward(self, x_MK: Tensor, counts: list[int]) -> tuple[Tensor, None]:
        # The row behind each expert's last: how torch's grouped GEMM wants groups.
        ends = torch.tensor(counts, dtype=torch.int32, device=x_MK.device).cumsum(
            0, dtype=torch.int32
        )
        return grouped_mm(x_MK, self.w_ENK.transpose(1, 2), offs=ends), None


class GroupedColumn(_Grouped, ColumnParallelLinear):
    """gate_up of all experts."""


class GroupedRow(_Grouped, RowParallelLinear):
    """down of all experts."""


# Bridge decides by the name of a class how a weight is split over tensor-parallel ranks.
AutoMapping.register_module_type("GroupedColumn", "column")
AutoMapping.register_module_type("GroupedRow", "row")


class GroupedExperts(MegatronModule):
    """Megatron's ``TEGroupedMLP`` with torch's grouped GEMM: the module names and calls that
    Bridge's LoRA knows."""

    def __init__(
        self, num_local_experts: int, config: Any, submodules: Any = None,
        pg_collection: Any = None,
        name: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(config=config)
        self.num_local_experts = num_local_experts
        H = config.hidden_size
        inner = config.moe_ffn_hidden_size
        new = GroupedColumn.__new__(GroupedColumn)
        self.linear_fc1 = new.build(config, num_local_experts, H, 2 * inner, pg_collection)
        new = GroupedRow.__new__(GroupedRow)
        self.linear_fc2 = new.build(config, num_local_experts, inner, H, pg_collection)

    def forward(
        self, x_MH: Tensor, tokens_per_expert: Tensor, probs_M: Tensor
    ) -> tuple[Tensor, None]:
        # Transformer Engine's grouped linears take the counts on the host; reading them waits for
        # the device, as in Megatron.
        counts = tokens_per_expert.tolist()
        gate, up = self.linear_fc1(x_MH, counts)[0].chunk(2, dim=1)
        h_MI = F.silu(gate) * up * probs_M[:, None].to(gate.dtype)
        return self.linear_fc2(h_MI, counts)

    def backward_dw(self) -> None:
        """Megatron's hook for delayed weight gradients; there are none."""
