"""Exchange microbatches of any length between pipeline stages, whose shapes all stages know."""

from typing import Any

import torch.distributed as dist
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator


class KnownShapes(P2PCommunicator):
    """Megatron's communication between pipeline stages for microbatches of different lengths.

    Megatron has neighbours send each other the shape before each tensor and wait for the device
    until it is there, four times a microbatch. All stages of a pipeline read the same samples, so
    each knows the shapes. The schedule receives forward and backward tensors in the order of
    microbatches.
    """

    def __init__(
        self, group: dist.ProcessGroup, config: Any, shapes: list[tuple[int, ...]]
    ) -> None:
        super().__init__(group, config)
        self.coming_forward = iter(shapes)
        self.coming_backward = iter(shapes)

    def _communicate(
        self, *, recv_prev: bool, recv_next: bool, tensor_shape: Any, **options: Any
    ) -> Any:
        assert not (recv_prev and recv_next), (
            "only the interleaved schedule receives from both sides at once"
        )
        # From the previous stage come activations, from the next one gradients.
        if recv_prev or recv_next:
            tensor_shape = next(self.coming_forward if recv_prev else self.coming_backward)
        return super()._communicate(
            recv_prev=recv_prev, recv_next=recv_next, tensor_shape=tensor_shape, **options
        )
