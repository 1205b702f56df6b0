"""Price the decoding of weights that stay codes in memory: its traffic in every pass, or its
instructions where a grouped GEMM decodes while it loads.

Layers of a kind are taken to be held alike. The rows of a rank's experts are ``batch.rows``.
"""

from collections.abc import Iterable
from math import prod

from megalora.config import Level
from megalora.lora.spec import has_magnitudes
from megalora.model.formats.coded import Coded, HeldForm
from megalora.model.held import coded
from megalora.planner.hardware import Machine
from megalora.planner.layouts import ParallelLayout
from megalora.planner.ledger import Ledger
from megalora.planner.prices import Prices
from megalora.planner.weights import Chunk, PlannedModel
from megalora.planner.workload import Workload

DECODING = "decoding"
"""The part of a step in which codes become values."""
ATTENTION = ("self_attention.linear_qkv", "self_attention.linear_proj")
EXPERTS = ("mlp.experts.gate_up", "mlp.experts.down")
"""Megatron modules in the order in which forward computes with them."""
PRODUCT = 4
"""Bytes that ``QuantisedWeight.decode_into`` reads of a float32 before it writes a value. Counted
in its operations (``tests/planner/test_decode_cost.py``), like the next two."""
BYTES_OF_CODE: dict[HeldForm, int] = {"fp8": 1 + 4, "nf4": 1 + 4 + 2 * (4 + 4)}
"""Bytes that are read and written for a byte of codes before that: fp8 is widened; nf4 is widened
to an index, by which two values are looked up."""
BYTES_OF_SCALE: dict[HeldForm, int] = {"fp8": 3 * 4, "nf4": 4 * 4}
"""The same of a scale of a row: read, repeated, and read again, with nf4 by either half."""
BYTES_OF_NESTED = 1 + 4 + 4 + 4 + 2 * 4 + 3 * 4 + 2 * 4
"""The same of a scale that is a code itself: widened, looked up, times a second scale, which is
repeated before, plus an offset."""
IN_LOAD_ROWS = 256.0
"""``megalora_kernels.coded_gemm.IN_LOAD_ROWS``, of GPUs that the planner knows: rows per expert up
to which forward decodes while it loads."""
IN_LOAD_TILE = 128
"""Rows for which a code is decoded once there."""
IN_LOAD_BYTES: dict[HeldForm, float] = {"nf4": 1.05, "fp8": 0.78}
"""Bytes that memory moves meanwhile: 0.19 and 0.14 ms for 604 M weights at 3.35 TB/s, if decoding
overlaps with nothing (derived in that file). Assumed of other GPUs."""
LEAST_COLUMNS: dict[HeldForm, int] = {"nf4": 32, "fp8": 16}
"""Columns with one scale that its kernel takes, or more, if a power of two."""


def decode_bytes(how: Coded, sizes: tuple[int, int, int], e: int) -> int:
    """Bytes read and written while ``[E, N, K]`` is decoded into elements of ``e`` bytes."""
    experts, n, k = sizes
    columns = how.grain[1]
    of_codes = BYTES_OF_CODE[how.form] * experts * n * how.width(k)
    of_scale = BYTES_OF_SCALE[how.form]
    if how.double is not None:
        of_scale += BYTES_OF_NESTED
    num_scales = experts * n * (k // columns)
    return of_codes + prod(sizes) * (PRODUCT + e) + num_scales * of_scale


def decoded_in(
    accesses: Iterable[str], last: dict[str, str], in_load: frozenset[str] = frozenset()
) -> list[str]:
    """Modules that are decoded when a layer's weights are asked for in this order.

    Args:
        last: memory that layers share -> the module of this layer whose values it has; updated.
        in_load: modules that are not decoded into memory.
    """
    found = []
    for module in accesses:
        # gate_up and down of experts have memory of their own, all dense linears share theirs.
        place = module if module in EXPERTS else "dense"
        if module not in in_load and last.get(place) != module:
            last[place] = module
            found.append(module)
    return found


class Decoding(Prices):
    """Adds what decoding costs to the ledgers it is given."""

    def __init__(
        self, model: PlannedModel, layout: ParallelLayout, work: Workload, machine: Machine
    ) -> None:
        super().__init__(model, layout, work, machine)
        self.held = work.held

    def decode(
        self, forward: Ledger, backward: Ledger, again: Ledger, layer: int, level: Level
    ) -> None:
        """One layer's weights, whenever a pass asks for one that its memory does not have."""
        mlp = self._mlp_modules(layer)
        order = (*ATTENTION, *mlp)
        in_load = frozenset(module for module in EXPERTS if self._is_in_load(layer, module))
        # Other layers were there between a layer's forward and its backward.
        self._decode(forward, layer, decoded_in(order, {}, in_load))
        self._in_load(forward, layer, in_load)
        last: dict[str, str] = {}
        if level == "full":
            self._decode(again, layer, decoded_in(order, last, in_load))
            self._in_load(again, layer, in_load)
        elif level == "selective":
            # Core attention needs no weight; gate_up of experts is asked for once more, or the
            # whole of a dense MLP.
            dense = [module for module in mlp if module not in EXPERTS]
            self._decode(again, layer, decoded_in(dense, last))
            self._in_load(again, layer, in_load - {EXPERTS[1]})
        self._decode(backward, layer, decoded_in(reversed(order), last))

    def decode_for_norms(self, to: Ledger, chunk: Chunk) -> None:
        """DoRA's norms of ``W + s B A``, once a step."""
        for layer in chunk.layers:
            for module, adapted in self.model.modules_of(layer).items():
                if has_magnitudes(adapted):
                    self._decode(to, layer, [module])

    def _mlp_modules(self, layer: int) -> tuple[str, ...]:
        if not self.shape.is_moe(layer):
            return ("mlp.linear_fc1", "mlp.linear_fc2")
        shared = ()
        if self.shape.shared_intermediate:
            shared = ("mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2")
        return (*EXPERTS, *shared)

    def _coded(self, layer: int, module: str) -> tuple[Coded, tuple[int, int, int]] | None:
        if self.held is None or (layer, module) not in self.held.modules:
            return None
        return coded(self.held, self.shape, self.p, layer, module)

    def _is_in_load(self, layer: int, module: str) -> bool:
        """Whether forward decodes this module while it loads: by Triton's kernels alone, where
        experts have few rows."""
        found = self._coded(layer, module)
        if found is None or self.on_cpu or self.has_room:
            return False
        how, sizes = found
        columns = how.grain[1]
        reads = columns >= LEAST_COLUMNS[how.form] and columns & (columns - 1) == 0
        return reads and self.batch.rows <= IN_LOAD_ROWS * sizes[0]

    def _decode(self, to: Ledger, layer: int, modules: Iterable[str]) -> None:
        for module in modules:
            if (found := self._coded(layer, module)) is not None:
                self.traffic(to, DECODING, decode_bytes(*found, self.e))

    def _in_load(self, to: Ledger, layer: int, modules: Iterable[str]) -> None:
        for module in modules:
            found = self._coded(layer, module)
            assert found is not None
            how, sizes = found
            tiles = max(1.0, self.batch.rows / sizes[0] / IN_LOAD_TILE)
            num_bytes = tiles * prod(sizes) * IN_LOAD_BYTES[how.form]
            rate = self.machine.memory.at(num_bytes)
            to.add(DECODING, num_bytes / rate.value, "assumed")
