"""Gather loaded base parameters by name, over any layout, to the first rank's host.

A name is that of the whole model: ``layers.3.self_attention.linear_qkv.weight``, ``embedding``,
``final_norm.weight``, ``head``. What adapters and recomputation wrap around a module is not part of
a name, and their own tensors are left out.

    tensor                                  split over   dimension   blocks
    linear_qkv, embedding, head             tp           0           1
    linear_fc1 (dense, shared expert)       tp           0           2: rows of gate and up
    linear_proj, linear_fc2                 tp           1           1
    experts.gate_up of one expert           etp          0           2
    experts.down of one expert              etp          1           1
    norms, router, gates, biases of rows    -
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalora import host
from megalora.model.held_codes import HeldCodes
from megalora.model.score_head import ScoreHead
from megalora.parallel import Groups

EXPERTS = "mlp.experts."
WRAPPERS = ("base", "module")
"""Attributes under which a LoRA layer and ``Recomputed`` keep what they wrap."""


@dataclass(frozen=True)
class Place:
    """The part of a tensor that one rank holds."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    dim: int | None
    """Dimension along which it is split, of one expert's matrix where there are experts; None:
    whole."""
    blocks: int
    """Blocks that are split each for itself: 2 where gate and up lie in one tensor."""
    shard: int
    num_shards: int
    first_expert: int | None = None
    """Number of the first expert in it; None outside of experts."""


def plain_name(name: str) -> str:
    """The name without the wrappers in it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


class DecodedExperts:
    """Experts' weights that are decoded one at a time."""

    def __init__(self, held: HeldCodes) -> None:
        self.held = held
        self.shape = held.sizes
        self.dtype = held.dtype

    def __getitem__(self, expert: int) -> Tensor:
        return self.held.own_copy(expert)

    def detach(self) -> "DecodedExperts":
        """As tensors are asked for it."""
        return self


class Loaded:
    """Base tensors of the wanted layers and of both ends on all ranks, and who holds which part.
    Collective to make."""

    def __init__(self, chunks: Sequence[Any], groups: Groups, layers: Iterable[int]) -> None:
        self.groups = groups
        self.rank = dist.get_rank()
        self.held: dict[str, Any] = {}
        self.places: dict[str, Place] = {}
        self.floats: dict[str, dict[str, dict[str, float]]] = {}
        """Modules' attributes that are floats, such as a norm's epsilon: prefix -> module ->
        name -> value."""
        self.rotary: dict[int, Any] = {}
        wanted = set(layers)
        for chunk in chunks:
            self._take_ends(chunk)
            for layer in chunk.decoder.layers:
                number = layer.layer_number - 1  # Megatron counts from 1
                if number in wanted:
                    self.rotary[number] = chunk.rotary_pos_emb
                    self._take(f"layers.{number}", layer, chunk.config.gated_linear_unit)
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, (self.places, self.floats, sorted(self.rotary)))
        self.everywhere: list[dict[str, Place]] = []
        self.rotary_at: dict[int, int] = {}
        """Layer -> the first rank that has its rotary embedding."""
        for rank, (places, floats, with_rotary) in enumerate(everywhere):
            self.everywhere.append(places)
            for number in with_rotary:
                self.rotary_at.setdefault(number, rank)
            # Of ranks that hold the same module the first one's floats stay.
            self.floats = floats | self.floats if rank else dict(floats)

    @property
    def has_head(self) -> bool:
        """Whether the model has lm_head, which a score head may replace."""
        return any("head" in places for places in self.everywhere)

    def _take_ends(self, chunk: Any) -> None:
        """Embedding, final norm and head of a chunk that has them."""
        if chunk.pre_process:
            self._hold("embedding", chunk.embedding.word_embeddings.weight, 0, 1, self.groups.tp)
        if chunk.post_process:
            tied = chunk.share_embeddings_and_output_weights  # as the model's own forward decides
            # A score head is trained: it is none of the base's tensors.
            if not isinstance(chunk.output_layer, ScoreHead):
                output = chunk.output_layer
                head = chunk.shared_embedding_or_output_weight() if tied else output.weight
                self._hold("head", head, 0, 1, self.groups.tp)
            self._take("final_norm", chunk.decoder.final_layernorm, gated=False)

    def _take(self, prefix: str, module: nn.Module, gated: bool) -> None:
        """Base tensors and floats of a module; ``gated``: whether fc1 is gate above up."""
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        self._take_codes(prefix, module, gated)
        for full, tensor in tensors.items():
            is_trained = ".lora_" in full or ".trained_biases." in full
            if is_trained or full.endswith((".codes", ".scale_codes", ".scale_bits")):
                continue
            name = plain_name(full)
            key = f"{prefix}.{name}"
            if name.startswith(EXPERTS) and name.endswith("gate_up"):
                self._hold(key, tensor, 0, 2, self.groups.etp, experts=True)
            elif name.startswith(EXPERTS):
                self._hold(key, tensor, 1, 1, self.groups.etp, experts=True)
            elif getattr(tensor, "tensor_model_parallel", False):
                blocks = 2 if gated and "linear_fc1." in name else 1
                self._hold(key, tensor, tensor.partition_dim, blocks, self.groups.tp)
            else:
                self._hold(key, tensor, None, 1, None)
        floats: dict[str, dict[str, float]] = {}
        for path, part in module.named_modules():
            own = {}
            for key, value in vars(part).items():
                if type(value) is float:
                    own[key] = value
            # A wrapper and what it wraps have one plain name: the latter comes later, and stays.
            floats[plain_name(path)] = own
        self.floats[prefix] = floats

    def _take_codes(self, prefix: str, module: nn.Module, gated: bool) -> None:
        """Weights that are codes, under the names that they have in a plain model."""
        for path, part in module.named_modules():
            if not isinstance(part, HeldCodes):
                continue
            name = plain_name(path)
            if name.startswith(EXPERTS):
                dim, blocks = (0, 2) if name.endswith("gate_up") else (1, 1)
                key = f"{prefix}.{name}"
                values: Any = DecodedExperts(part)
                self._hold(key, values, dim, blocks, self.groups.etp, experts=True)
                continue
            linear = name.removesuffix(".held")
            dim = 1 if linear.endswith(("linear_proj", "linear_fc2")) else 0
            blocks = 2 if gated and linear.endswith("linear_fc1") else 1
            values = part.own_copy(0)
            self._hold(f"{prefix}.{linear}.weight", values, dim, blocks, self.groups.tp)

    def _hold(
        self,
        name: str,
        tensor: Any,
        dim: int | None,
        blocks: int,
        group: Any,
        *,
        experts: bool = False,
    ) -> None:
        """Note a tensor of this rank: split over ``group`` along ``dim``, or whole without a
        group."""
        shard = 0
        num_shards = 1
        if group is not None:
            shard = group.rank()
            num_shards = group.size()
        # Experts of a layer lie in consecutive blocks over the expert-parallel ranks.
        first = self.groups.ep.rank() * tensor.shape[0] if experts else None
        self.held[name] = tensor.detach()
        self.places[name] = Place(
            tuple(tensor.shape), tensor.dtype, dim, blocks, shard, num_shards, first
        )

    def names(self, prefix: str) -> list[str]:
        """Every name below ``prefix`` on any rank, without the prefix; in one order on all
        ranks."""
        start = prefix + "."
        found: set[str] = set()
        for places in self.everywhere:
            for name in places:
                if name.startswith(start):
                    found.add(name.removeprefix(start))
        return sorted(found)

    def _any_place(self, name: str) -> Place:
        """Where the first rank that has it holds a tensor; every rank's part is of one size."""
        for places in self.everywhere:
            if name in places:
                return places[name]
        raise RuntimeError(f"no rank holds {name}")

    def whole(self, name: str, expert: int | None = None) -> Tensor | None:
        """One tensor, or one expert's matrix of it, on the first rank's host; None elsewhere.
        Collective."""
        place = self._any_place(name)
        parts = [self._part(name, shard, expert) for shard in range(place.num_shards)]
        if self.rank != 0 or place.dim is None:
            return parts[0]
        # Every rank has rows of gate, then rows of up: all of gate's must come before up's.
        pieces: list[Tensor] = []
        for block in range(place.blocks):
            for part in parts:
                assert part is not None
                pieces.append(part.chunk(place.blocks, place.dim)[block])
        return torch.cat(pieces, place.dim)

    def rows(self, name: str, rows: Sequence[int]) -> Tensor | None:
        """Some rows of a tensor that is split by rows (embedding, head); None but on the first
        rank. Collective."""
        per_shard = self._any_place(name).shape[0]
        found = [self._part(name, row // per_shard, row % per_shard) for row in rows]
        return self._stacked(found)

    def _stacked(self, parts: Sequence[Tensor | None]) -> Tensor | None:
        """Tensors that came to the first rank, as one; None on the others, which got none."""
        if self.rank != 0:
            return None
        return torch.stack([part for part in parts if part is not None])

    def layer(self, number: int, experts: Sequence[int]) -> dict[str, Tensor]:
        """All tensors of a layer by name, of routed experts those asked for, stacked; empty but on
        the first rank."""
        prefix = f"layers.{number}"
        found = {}
        for name in self.names(prefix):
            full = f"{prefix}.{name}"
            if not name.startswith(EXPERTS):
                value = self.whole(full)
            elif experts:
                value = self._stacked([self.whole(full, expert) for expert in experts])
            else:
                # The reference has none here: the layer that lacks them is refused as it is built.
                continue
            if value is not None:
                found[name] = value
        return found

    def angles(self, number: int, positions: Sequence[int]) -> Tensor | None:
        """Rotary angles ``[T, 1, 1, d]`` that this layer's attention gets at the positions, on the
        first rank's host."""
        owner = self.rotary_at[number]
        mine = None
        if self.rank == owner:
            rotary = self.rotary[number]
            mine = rotary(torch.tensor(positions, device=rotary.inv_freq.device))
        # Only the owner knows how many features are turned.
        shape: list[Any] = [None if mine is None else tuple(mine.shape)]
        dist.broadcast_object_list(shape, src=owner)
        return self._to_first(mine, owner, shape[0], torch.float32)

    def _part(self, name: str, shard: int, row: int | None) -> Tensor | None:
        """A rank's part of a tensor, or one row (one expert) of it."""
        for owner, places in enumerate(self.everywhere):
            place = places.get(name)
            if place is None or place.shard != shard:
                continue
            if place.first_expert is not None and row is not None:
                # An expert's number among all, looked for among those of this rank.
                if not 0 <= row - place.first_expert < place.shape[0]:
                    continue
                row -= place.first_expert
            shape = place.shape if row is None else place.shape[1:]
            mine = None
            if owner == self.rank:
                mine = self.held[name] if row is None else self.held[name][row]
            return self._to_first(mine, owner, shape, place.dtype)
        of_row = "" if row is None else f", row {row}"
        raise RuntimeError(f"no rank holds part {shard} of {name}{of_row}")

    def _to_first(
        self, mine: Tensor | None, owner: int, shape: Sequence[int], dtype: torch.dtype
    ) -> Tensor | None:
        """Bring the owner's tensor to the first rank's host. All ranks take part: a broadcast works
        in any layout."""
        if owner == 0:
            return None if mine is None else mine.cpu()
        if mine is None:
            buffer = torch.empty(shape, dtype=dtype, device=host.device())
        else:
            buffer = mine.contiguous()
        dist.broadcast(buffer, src=owner)
        return buffer.cpu() if self.rank == 0 else None
