"""Change Megatron-Core so that it runs on this machine, quietly; ``host.install`` applies these
patches.

Each replaces one function of an installed Megatron in memory.
"""

import inspect
import logging
import warnings
from typing import Any

import torch

from megalora import staged


def hush() -> None:
    """Silence warnings of Megatron, Bridge and torch about parts that are not used or that work as
    they should."""
    for name in ("megatron", "torch.utils.cpp_extension", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"megatron\.")
    # Invalid escapes in Megatron's docstrings.
    warnings.filterwarnings("ignore", category=SyntaxWarning)
    known = "Apex|[Tt]ransformer.[Ee]ngine|is deprecated. Please use|not a leaf Tensor|experimental"
    warnings.filterwarnings("ignore", message=f".*({known}).*")


def leave_router_uncompiled() -> None:
    """Undo the compilation of one function: Megatron compiles the update of a bias that is not in
    use here, and starting the compiler costs every rank seconds."""
    import megatron.core.transformer.moe.router as router

    router.TopKRouter._apply_expert_bias = inspect.unwrap(router.TopKRouter._apply_expert_bias)


def run_on_cpu() -> None:
    """Replace what Megatron cannot do on a CPU, or over gloo."""
    import megatron.core.tensor_parallel.mappings as mappings
    import megatron.core.tensor_parallel.random as random
    import megatron.core.transformer.moe.token_dispatcher as dispatcher

    random._set_cuda_rng_state = _set_rng_state
    dispatcher.maybe_move_tensor_to_cpu = _on_host_already
    # The dispatcher gathers a different number of tokens from each expert-tensor-parallel rank,
    # which gloo refuses.
    even_gather = mappings._gather_along_first_dim
    even_scatter = mappings._reduce_scatter_along_first_dim

    def gather(
        input_: Any,
        group: Any,
        output_split_sizes: list[int] | None = None,
        use_global_buffer: bool = False,
    ):
        if group.size() == 1 or output_split_sizes is None:
            return even_gather(input_, group, None, use_global_buffer)
        return staged.uneven_all_gather(input_, group, output_split_sizes)

    def scatter(
        input_: Any,
        group: Any,
        input_split_sizes: list[int] | None = None,
        use_global_buffer: bool = False,
    ):
        if group.size() == 1 or input_split_sizes is None:
            return even_scatter(input_, group, None, use_global_buffer)
        return staged.uneven_reduce_scatter(input_, group, input_split_sizes)

    # The functions that the dispatcher calls look these two up in their module.
    mappings._gather_along_first_dim = gather
    mappings._reduce_scatter_along_first_dim = scatter


def _set_rng_state(state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
    """Megatron's generators are all the CPU's one, which each of them sets before it is used."""
    torch.set_rng_state(state)


def _on_host_already(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """On a GPU this would copy to the host. Here tensors are there already, but the sizes of
    splits must still become numpy."""
    if as_numpy and torch.is_tensor(tensor):
        return tensor.numpy()
    return tensor
