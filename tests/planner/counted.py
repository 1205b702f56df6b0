"""A real training step on CPU ranks with every live tensor counted, beside what the planner says of
the same step.

What differs from a GPU is named here and nowhere else:

    routing      made even, as the planner takes it to be: a constant on the router's logits that
                 cannot be outvoted
    experts      computed one at a time. For few rows the CPU has a single call, whose result is a
                 temporary, and takes SwiGLU's gradient of several experts at once, in float32:
                 2 % of the peak of these models. GPUs' kernels, which are planned, write in place
    optimizer    torch's AdamW works on lists of tensors, as it does on GPUs by default
    batches      stay on the host: not counted
    norms        are composed of operations on the CPU and keep float32: planned beside the
                 product's formula, see ``widened_norms``
    planned      without the CUDA context and without room for adapters, which float32 and the
                 CPU's back end go without
"""

import gc
import itertools
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock
from weakref import WeakSet

import torch
from megalora_kernels import each_expert, swiglu_backward
from torch import Tensor, nn

from megalora.bench.live import LiveTensors
from megalora.config import LoRAConfig, RunConfig
from megalora.data.loader import Batch
from megalora.hf.json_file import read_hf_config
from megalora.model.fields import model_shape
from megalora.planner.layouts import ParallelLayout, Workload
from megalora.planner.memory import CONTEXT, ROOM, MemoryPlan, memory_of_model
from megalora.planner.microbatch import Microbatch
from megalora.planner.weights import Chunk, PlannedModel, attention_widths, chunks_of
from megalora.tiny import make_tiny
from megalora.train.assemble import Run
from megalora.train.optim import _parts, clip_and_step
from tests.distributed.ranks import run_ranks
from tests.parity.built import built
from tests.parity.runs import make_config

SEQUENCE = 192
RANK = 8
MICROBATCHES = 4
_SIZES = {
    "hidden_size": 160, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32,
    "vocab_size": 640,
    "num_hidden_layers": 4,
}  # fmt: skip
_EXPERTS = {"moe_intermediate_size": 60, "num_experts": 16, "num_experts_per_tok": 4}
MODELS: dict[str, dict[str, Any]] = {
    "moe": _SIZES | _EXPERTS,
    "vocab": _SIZES | _EXPERTS | {"vocab_size": 8192, "num_hidden_layers": 2},
    "many": _SIZES | _EXPERTS | {"num_experts": 40},
    "dense": _SIZES | {"arch": "qwen3", "intermediate_size": 420},
    "shared": _SIZES | _EXPERTS
    | {"arch": "qwen2_moe", "intermediate_size": 420, "shared_expert_intermediate_size": 140,
       "mlp_only_layers": [1]},
}  # fmt: skip
"""In proportions like those of Qwen3-30B. ``vocab``: the loss is the peak; ``many``: more experts
than are given room."""
CATEGORIES = (
    "weights",
    "adapters",
    "gradients",
    "optimizer",
    "activations",
    "pass",
    "step",
    "peak",
)


@dataclass(frozen=True)
class Case:
    """A layout of one of ``MODELS``."""

    world: int
    parallel: dict[str, int]
    micro: int = 1
    recompute: Any = "off"
    model: str = "moe"
    dtype: Any = "float32"

    @property
    def name(self) -> str:
        sizes = " ".join(f"{name}{n}" for name, n in self.parallel.items()) or "alone"
        return f"{self.world} {sizes} micro{self.micro} {self.recompute} {self.model} {self.dtype}"

    def config(self, folder: Path, chats: Path) -> RunConfig:
        base = make_model(self.model, folder)
        sizes = {
            "micro_batch_size": self.micro,
            "global_batch_size": MICROBATCHES * self.micro * self.world,
        }
        config = make_config(
            base, chats, folder / "run", self.parallel, self.recompute, lora=LoRAConfig(rank=RANK),
            dtype=self.dtype, **sizes
        )  # fmt: skip
        dp, _ = config.parallel.data_parallel_sizes(self.world)
        assert sizes["global_batch_size"] % (dp * self.micro) == 0
        return config


def make_model(model: str, folder: Path) -> Path:
    """Its folder inside ``folder``, made where it is not yet."""
    base = folder / f"counted {model}"
    return base if base.exists() else make_tiny(base, **MODELS[model])


def compare(case: Case, folder: Path, chats: Path) -> list[dict[str, Any]]:
    """For one rank of each pipeline stage: bytes found and said by category. Ranks of a stage are
    alike, which is checked."""
    config = case.config(folder, chats)
    model = PlannedModel.of(model_shape(read_hf_config(Path(config.model.path))), config.lora)
    layout = ParallelLayout(
        parallel=config.parallel,
        num_ranks=case.world,
        micro_batch_size=case.micro,
        recompute=case.recompute,
    )
    size = MICROBATCHES * case.micro * layout.dp
    work = Workload(sequence_length=SEQUENCE, global_batch_size=size, dtype=case.dtype)
    found = run_ranks(
        count_step, case.world, config, model.shape.top_k if model.shape.moe_layers else 0
    )
    size = case.world // config.parallel.pp
    rows = []
    for stage in range(config.parallel.pp):
        alike = found[stage * size : (stage + 1) * size]
        fullest = max(alike, key=lambda rank: rank["peak"])
        assert min(rank["peak"] for rank in alike) > 0.99 * fullest["peak"], alike
        said = categories(memory_of_model(model, layout, work, stage))
        if case.dtype == "bfloat16":
            assert config.parallel.pp == 1 and case.recompute != "full", (
                "what norms keep is counted for one microbatch alone"
            )
            batch = Microbatch.of(model, layout, work)
            wide = widened_norms(
                model, layout, batch, chunks_of(model.shape, config.parallel, 0)[0]
            )
            for name in ("activations", "pass", "peak"):
                said[name] += wide
        rows.append({"stage": stage, "found": fullest, "said": said})
    return rows


def categories(plan: MemoryPlan) -> dict[str, int]:
    """A plan in the categories that a step is counted in; ``pass`` and ``step`` are what they add
    to what is always there."""
    passes = plan.sum_of("pass") + max(plan.sum_of("loss"), plan.sum_of("layer"))
    step = plan.sum_of("step")
    return {
        "weights": plan["weights"], "adapters": plan["adapters"] + plan["buffer padding"],
        "gradients": plan["gradients"],
        "optimizer": plan["optimizer"], "activations": plan["activations"] + plan["loss"],
        "pass": passes, "step": step, "peak": plan.peak_bytes - plan[CONTEXT] - plan[ROOM],
    }  # fmt: skip


def widened_norms(
    model: PlannedModel, layout: ParallelLayout, batch: Microbatch, chunk: Chunk
) -> int:
    """Bytes by which float32 inputs of a chunk's norms exceed the bfloat16 ones that are counted;
    every linear adapted.

    On the CPU a norm is composed of float32 operations and keeps its input widened; a GPU has it as
    one kernel that does not.
    """
    s = model.shape
    q, kv = attention_widths(model.shape, layout.parallel)
    num_norms = 2 * len(chunk.layers) - chunk.has_embedding + chunk.has_head
    heads = (
        batch.tokens * (4 * (q + kv) - 2 * q * (kv > s.head_dim)) * s.qk_norm
    )  # k's, one group's q too, is part of qkv's output
    return num_norms * batch.own_tokens * s.hidden * 2 + len(chunk.layers) * heads


# ---- on one rank ---------------------------------------------------------------------------------


def count_step(config: RunConfig, top_k: int) -> dict[str, int]:
    """The categories of one rank, after a step in which the optimizer made its state."""
    with (
        mock.patch.object(each_expert, "FEW_ROWS", 0),
        mock.patch.object(swiglu_backward, "LOOP_ELEMENTS", 0),
        built(config) as run,
    ):
        if top_k:
            route_evenly(run, top_k)
        for part in _parts(run.optimizer):
            for group in part.optimizer.param_groups:
                group["foreach"] = True
        batches = make_batches(config.train.micro_batch_size)
        run.stepper.train(batches, run.optimizer)
        clip_and_step(run.optimizer)
        there = tensors_of(run)
        found = {name: num_bytes(tensors) for name, tensors in there.items()}
        already = list(itertools.chain.from_iterable(there.values()))
        found |= peaks(run, batches, already)
        return found | {"activations": kept(run, batches, already)}


def route_evenly(run: Run, top_k: int) -> None:
    """Token t goes to experts t k, t k + 1, ..., modulo their number: the router's own logits
    decide the weights alone."""

    def evenly(gating: Any) -> Any:
        def even(x: Tensor) -> Tensor:
            logits = gating(x)
            tokens = logits.numel() // logits.shape[-1]
            experts = logits.shape[-1]
            chosen = (torch.arange(tokens)[:, None] * top_k + torch.arange(top_k)) % experts
            bonus = torch.zeros(tokens, experts, dtype=logits.dtype).scatter_(1, chosen, 64.0)
            return logits.add_(bonus.view_as(logits))

        return even

    for module in modules_of(run):
        if not hasattr(module, "gating"):
            continue
        if "gating" not in vars(module):
            module.gating = evenly(module.gating)


def make_batches(micro: int) -> list[Batch]:
    """Samples of one length: what is padded would not be in the plan's tokens."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(MICROBATCHES):
        tokens = torch.randint(0, 256, (micro, SEQUENCE), generator=generator)
        found.append(Batch(tokens, tokens.roll(-1, 1), torch.ones(micro, SEQUENCE)))
    return found


def tensors_of(run: Run) -> dict[str, list[Tensor]]:
    """What a rank always holds: frozen weights, parameter and gradient buffers, the optimizer's
    state."""
    # Megatron keeps dense and routed adapters in buffers of their own.
    buffers = []
    for chunk in run.stepper.chunks:
        buffers += chunk.buffers + chunk.expert_parallel_buffers
    state: list[Any] = []
    for part in _parts(run.optimizer):
        for moments in part.optimizer.state.values():
            # Moments are vectors; the number of the step, a scalar, is not worth counting.
            state += [t for t in moments.values() if torch.is_tensor(t) and t.dim()]
        # Masters of parameters in half precision.
        for group in part.shard_fp32_from_float16_groups:
            state += group
    frozen: list[Tensor] = []
    for chunk in run.model.chunks:
        frozen += [p for p in chunk.parameters() if not p.requires_grad]
    return {
        "weights": frozen, "adapters": [b.param_data for b in buffers],
        "gradients": [b.grad_data for b in buffers],
        "optimizer": state,
    }  # fmt: skip


def modules_of(run: Run) -> Iterator[nn.Module]:
    for chunk in run.model.chunks:
        yield from chunk.modules()


def num_bytes(tensors: list[Tensor]) -> int:
    """Of distinct storages."""
    storages = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def peaks(run: Run, batches: list[Batch], already: list[Tensor]) -> dict[str, int]:
    """``pass``: most that forward and backward add; ``step``: most that reduction or optimizer add
    to what is left then."""
    settings = run.stepper.chunks[0].config
    gc.collect()
    finalize = settings.finalize_model_grads_func
    live = LiveTensors(already)
    found = {}
    always = live.now_bytes
    left = 0

    def reduce(*args: Any, **kwargs: Any) -> None:
        nonlocal left
        found["pass"] = live.peak_bytes - always
        left = live.now_bytes
        live.reset_peak()
        finalize(*args, **kwargs)
        found["step"] = live.peak_bytes - left

    settings.finalize_model_grads_func = reduce
    with live:
        run.stepper.train(batches, run.optimizer)
        found["peak"] = max(always + found["pass"], live.peak_bytes)
        left = live.now_bytes
        live.reset_peak()
        clip_and_step(run.optimizer)
    settings.finalize_model_grads_func = finalize
    found["step"] = max(found["step"], live.peak_bytes - left)
    found["peak"] = max(found["peak"], live.peak_bytes)
    return found


class Saved:
    """A tensor that a node keeps for backward; gone when the node is."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def kept_beside(own: Container[int], saved: Iterable[Saved]) -> list[Tensor]:
    """Saved tensors but those that lie in storages of ``own``, named by their addresses."""
    tensors = []
    for holder in saved:
        if holder.tensor.untyped_storage().data_ptr() not in own:
            tensors.append(holder.tensor)
    return tensors


def kept(run: Run, batches: list[Batch], already: list[Tensor]) -> int:
    """Most bytes that nodes keep for backward, looked at whenever a forward pass ended and a
    backward pass begins."""
    own = {t.untyped_storage().data_ptr() for t in already}
    saved: WeakSet[Saved] = WeakSet()
    forward = True
    most = 0

    def pack(tensor: Tensor) -> Saved:
        nonlocal forward
        forward = True
        saved.add(holder := Saved(tensor))
        return holder

    def unpack(holder: Saved) -> Tensor:
        nonlocal forward, most
        if forward:
            most = max(most, num_bytes(kept_beside(own, saved)))
        forward = False
        return holder.tensor

    with collecting(), torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        run.stepper.train(batches, run.optimizer)
    return most


@contextmanager
def collecting() -> Iterator[None]:
    """A node whose output is kept by a hook is a cycle, which the collector alone frees: often, so
    that none counts twice."""
    before = gc.get_threshold()
    gc.set_threshold(200, 1, 1)
    yield
    gc.set_threshold(*before)
