"""Count what one MoE layer launches on a GPU and what the host does for it, forward and backward.

    python -m tests.pretended.launches [--names | --json]

Counted on the pretended GPU for ``expert_mlp`` alone and for megalora's whole MoE layer (router,
sort, all-to-all, experts, combine; gradients added to Megatron's buffers), by back end, with 1 and
with 8 expert-parallel ranks, without and with adapters on gate, up and down; and for the loss of
one chunk of tokens. A kernel is a Triton
launch or an operation of torch that reads or writes memory of the GPU; torch's grouped GEMM is two
(one prepares pointers), others may be more than the one they count for. A host operation is any
call of torch's dispatcher, views and allocations among them, or a Triton launch. Collectives stand
apart.
"""

import argparse
import contextlib
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch.autograd import Variable
from torch.utils._python_dispatch import TorchDispatchMode

from tests.pretended.device import install, pretended_gpu
from tests.pretended.recorder import Recorder, on_gpu, print_and_end
from tests.pretended.run import all_there
from tests.pretended.scenarios import MOE, Scenario

BACKENDS = ("triton", "grouped_mm")
RANKS = (1, 8)
PASSES = ("forward", "backward")
# CUTLASS needs an array of each expert's pointers and sizes; torch fills it by a kernel of its own.
KERNELS_OF = {"grouped_mm": 2}
# Sizes differ from one another, and no count depends on them.
EXPERTS = 16
TOP_K = 2
HIDDEN = 96
INNER = 80
RANK = 16
TOKENS = 64
Cell = dict[str, Any]
"""``kernels`` and ``collectives`` by name and ``host_operations``."""


class Operations(TorchDispatchMode):
    """Counts operations of torch, those on the GPU's memory by name."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.kernels: Counter[str] = Counter()
        self.collectives: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        namespace, _, name = func._schema.name.partition("::")
        # prim::device and the like ask about a tensor and do nothing.
        if namespace == "prim":
            return out
        self.total += 1
        if namespace in ("c10d", "_c10d_functional"):
            self.collectives[name] += 1
        # The pretended device notes the grouped GEMM itself, among its launches.
        elif name != "_grouped_mm" and _touches_memory(func, name, (args, kwargs, out)):
            self.kernels[name] += 1
        return out


def _touches_memory(func: Any, name: str, values: Any) -> bool:
    """Whether an operation reads or writes memory of the GPU: views and allocations do not."""
    # A view's result aliases an argument that is not written.
    for returned in func._schema.returns:
        alias = returned.alias_info
        if alias is not None and not alias.is_write:
            return False
    # These touch no memory either, though their schemas name no alias.
    if "empty" in name or name in ("detach", "set_", "lift_fresh", "_unsafe_view"):
        return False
    return any(on_gpu(t) for t in torch.utils._pytree.tree_leaves(values))


@contextlib.contextmanager
def counted(recorder: Recorder, cell: Cell) -> Iterator[None]:
    """Fill ``cell`` with what happens inside."""
    recorder.forget()
    with recorder.phase("now"), Operations() as operations:
        yield
    launched = recorder.kernels["now"]
    kernels = Counter(operations.kernels)
    for name, count in launched.items():
        kernels[name] += count * KERNELS_OF.get(name, 1)
    cell["kernels"] = dict(sorted(kernels.items()))
    cell["collectives"] = dict(sorted(operations.collectives.items()))
    # A grouped GEMM passed the dispatcher as well, and is in the total already.
    cell["host_operations"] = operations.total + sum(launched.values()) - launched["grouped_mm"]


def both_passes(
    recorder: Recorder, call: Callable[[], torch.Tensor], leaves: Iterable[torch.Tensor]
) -> dict[str, Cell]:
    """Forward and backward of the second call: the first one sets things up. Gradients of leaves
    start from nothing."""
    cells: dict[str, Cell] = {}
    for _ in range(2):
        # A gradient that is there already would be added to: one operation more.
        for leaf in leaves:
            leaf.grad = None
        cells = {name: {} for name in PASSES}
        with counted(recorder, cells["forward"]):
            out = call()
        gradient = torch.ones_like(out)
        with counted(recorder, cells["backward"]):
            _backward(out, gradient)
    return cells


def _backward(out: torch.Tensor, gradient: torch.Tensor) -> None:
    """As Megatron calls it: torch's own function takes off the mode that answers for the device."""
    # keep_graph and create_graph are False; no inputs: gradients of every leaf are accumulated.
    Variable._execution_engine.run_backward(  # pyright: ignore
        (out,), (gradient,), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def of_expert_mlp(recorder: Recorder, backend: str, ranks: int, adapted: bool) -> dict[str, Cell]:
    """``expert_mlp`` on tokens that it gathers (one rank) or on received rows (one of 8)."""
    from megalora_kernels import (
        Arrivals,
        AugmentedWeight,
        ExpertFactors,
        expert_mlp,
        regroup_values,
        route,
    )

    leaves: list[torch.Tensor] = []

    def leaf(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        leaves.append(torch.zeros(*shape, dtype=dtype, device="cuda", requires_grad=True))
        return leaves[-1]

    # Of 8 ranks each holds 2 experts, and gets as many rows as one rank has by itself.
    experts = EXPERTS // ranks
    num_rows = TOKENS * TOP_K
    if ranks == 1:
        routing, _ = route(torch.zeros(TOKENS, experts, dtype=torch.bool, device="cuda"), TOP_K)
        x = leaf(TOKENS, HIDDEN)
    else:
        counts = torch.zeros(ranks, experts, dtype=torch.int64, device="cuda")
        unused = torch.zeros(num_rows, device="cuda")
        routing, _ = regroup_values(Arrivals.single(counts, num_rows), unused)
        x = leaf(num_rows, HIDDEN)
    w1: Any = leaf(experts, 2 * INNER, HIDDEN).detach()
    w2: Any = leaf(experts, HIDDEN, INNER).detach()
    adapters: dict[str, ExpertFactors] = {}
    if adapted:
        a_gate_up = leaf(experts, 2 * RANK, HIDDEN)
        b_gate_up = (leaf(experts, INNER, RANK), leaf(experts, INNER, RANK))
        adapters["gate_up"] = ExpertFactors(a_gate_up, b_gate_up, (2.0, 0.5))
        adapters["down"] = ExpertFactors(
            leaf(experts, RANK, INNER), (leaf(experts, HIDDEN, RANK),), (2.0,)
        )
        # Training reserves columns for the adapter beside the weight where this back end is used.
        if backend == "grouped_mm":
            w1 = AugmentedWeight(w1, 2 * RANK)
            w2 = AugmentedWeight(w2, RANK)
    p = leaf(num_rows, dtype=torch.float32)
    call = lambda: expert_mlp(x, w1, w2, p, routing, backend=backend, **adapters)  # noqa: E731
    return both_passes(recorder, call, leaves)


def of_layer(recorder: Recorder, backend: str, ranks: int, adapted: bool) -> dict[str, Cell]:
    """The MoE layer of a model with one layer, built and wrapped as for training."""
    from megalora import host
    from megalora.parallel import parallel_groups
    from megalora.train.optim import wrap_chunks
    from tests.pretended.steps import build, even_routing, world

    hf = MOE | {"num_experts": EXPERTS, "moe_intermediate_size": INNER, "hidden_size": HIDDEN}
    scenario = Scenario("launches", hf, {"ep": ranks}, ranks)
    config = scenario.config()
    # Something must have an adapter: q_proj, outside of the MoE layer, launches nothing in it.
    targets = ["gate_proj", "up_proj", "down_proj"] if adapted else ["q_proj"]
    config = replace(
        config, lora=replace(config.lora, target_modules=targets, rank=RANK, alpha=2.0 * RANK)
    )
    with (
        mock.patch.dict("os.environ", MEGALORA_BACKEND=backend),
        world(scenario, recorder),
        even_routing(),
        parallel_groups(config.parallel) as groups,
    ):
        chunks = wrap_chunks(build(config, hf, groups).chunks)
        layer = chunks[0].module.decoder.layers[0].mlp
        # Megatron's order: [sequence, batch, hidden].
        shape = (TOKENS // 2, 2, HIDDEN)
        x = torch.zeros(*shape, dtype=torch.bfloat16, device=host.device(), requires_grad=True)
        return both_passes(recorder, lambda: layer(x)[0], [x])


def of_loss(recorder: Recorder, adapted: bool) -> dict[str, Cell]:
    """Log-probabilities of one chunk of tokens, on one rank."""
    from megalora.model.token_logprobs import token_logprobs

    leaves: list[torch.Tensor] = []

    def leaf(*shape: int) -> torch.Tensor:
        made = torch.zeros(*shape, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        leaves.append(made)
        return made

    x = leaf(TOKENS, HIDDEN)
    weight = leaf(EXPERTS * INNER, HIDDEN).detach()
    targets = torch.zeros(TOKENS, dtype=torch.int64, device="cuda")
    factors: dict[str, Any] = {}
    if adapted:
        factors = {"h_NR": leaf(TOKENS, RANK), "b_VR": leaf(EXPERTS * INNER, RANK)}
    group = torch.distributed.group.WORLD
    call = lambda: token_logprobs(x, weight, targets, group, TOKENS, **factors)[0]  # noqa: E731
    return both_passes(recorder, call, leaves)


def count_all() -> dict[str, Cell]:
    """Every cell, by "subject backend ep adapters pass". Needs a process that has not met the
    pretended device."""
    recorder = Recorder()
    install(recorder)  # before anything of Megatron is imported
    from megalora import host
    from megalora.fake_world import fake_world

    host.install()
    recorder.answers["check_coverage"] = all_there
    found: dict[str, Cell] = {}
    functions = {"expert_mlp": of_expert_mlp, "layer": of_layer}
    for subject, backend, ranks, adapted in itertools.product(
        functions, BACKENDS, RANKS, (False, True)
    ):
        with pretended_gpu(recorder):
            cells = functions[subject](recorder, backend, ranks, adapted)
        which_model = "adapters" if adapted else "base"
        name = f"{subject} {backend} ep{ranks} {which_model}"
        for which, cell in cells.items():
            found[f"{name} {which}"] = cell
    for adapted in (False, True):
        with pretended_gpu(recorder), fake_world(0, 1):
            cells = of_loss(recorder, adapted)
        for which, cell in cells.items():
            found[f"loss {'adapters' if adapted else 'base'} {which}"] = cell
    return found


def num_kernels(cell: Cell) -> int:
    return sum(cell["kernels"].values())


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.pretended.launches", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--names", action="store_true", help="list the kernels of every cell")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    options = parser.parse_args(arguments)
    found = count_all()
    if options.json:
        print_and_end(found)
    print(f"{'':44}{'kernels':>8}{'host':>8}{'collectives':>12}")
    for name, cell in found.items():
        collectives = sum(cell["collectives"].values())
        print(f"{name:44}{num_kernels(cell):8}{cell['host_operations']:8}{collectives:12}")
        if options.names:
            names = [f"{count} {kernel}" for kernel, count in cell["kernels"].items()]
            print(f"    {', '.join(names)}")


if __name__ == "__main__":
    main(sys.argv[1:])
