"""Let weights and biases of the base train, or some rows of its embedding, and put a score head in
place: what a model trains beside adapters (``trained_weight.py``).

Legend: B batch, S sequence, H hidden, K trained tokens, V vocabulary, /t divided over the
tensor-parallel group.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megalora import host
from megalora.comm import gather_seq
from megalora.hf.tensor_names import SCORE
from megalora.lora.biases import biased_linear
from megalora.lora.init import initial_score
from megalora.lora.shards import FactorShard, shard_of_whole
from megalora.lora.trained_weight import TrainedWeight, trained_weights
from megalora.model.score_head import ScoreHead
from megalora.model.shape import ModelShape
from megalora.model.token_logprobs import TrainedRows


class EmbeddingWithRows(nn.Module):
    """A frozen embedding, of which the rows of some tokens are trained.

    tensor   shape on one rank   across TP             gradient across TP
    rows     [K, H]              replicated            partial: each rank saw S/t tokens
    result   [S/t, B, H]         dim 0; [B, S, H] on one rank, as the embedding itself has it
    """

    def __init__(self, base: Any, rows_KH: nn.Parameter, tokens_K: Tensor) -> None:
        super().__init__()
        self.base = base
        self.rows = rows_KH
        self.register_buffer("tokens", tokens_K, persistent=False)

    @property
    def weight(self) -> Any:
        # Megatron reads it where the head is tied to it.
        return self.base.weight

    def forward(self, tokens_BS: Tensor) -> Tensor:
        out = self.base(tokens_BS)
        own = tokens_BS
        # With sequence parallelism each rank goes on with its own part of the tokens.
        if self.base.reduce_scatter_embeddings:
            group = self.base.tp_group
            own = tokens_BS.t().chunk(group.size())[group.rank()]
        trained: Any = self.tokens
        # In ascending order: where a token is among them, this is its place.
        places = torch.searchsorted(trained, own).clamp_(max=len(trained) - 1)
        is_trained = trained[places] == own
        return torch.where(is_trained[..., None], F.embedding(places, self.rows), out)


class HeadWithRows(nn.Module):
    """The same rows in a head that is tied to the embedding.

    tensor   shape on one rank   across TP             gradient across TP
    rows     [K, H]              replicated            partial: each rank has V/t of the logits
    x        [S/t, B, H]         dim 0
    result   [S, B, V/t]         dim 2
    """

    def __init__(self, base: Any, rows_KH: nn.Parameter, tokens_K: Tensor, width: int) -> None:
        """``width``: entries of the vocabulary on a rank."""
        super().__init__()
        self.base = base
        self.rows = rows_KH
        columns = tokens_K - base.tp_group.rank() * width
        here = ((columns >= 0) & (columns < width)).nonzero()[:, 0]
        # Which of the rows make a logit here, and which one.
        self.register_buffer("here", here, persistent=False)
        self.register_buffer("columns", columns[here], persistent=False)

    @property
    def weight(self) -> Any:
        # Megatron reads it where it is tied to the embedding of another stage.
        return self.base.weight

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """All logits, for callers without ``head.py``."""
        out, bias = self.base(x, *args, **kwargs)
        own = self.of_rank()
        assert own.columns_K is not None
        logits = F.linear(gather_seq(x, self.base.tp_group), own.rows_KH)
        return out.index_copy(2, own.columns_K, logits), bias

    def of_rank(self) -> TrainedRows:
        """The rows that make this rank's logits, with their columns."""
        here: Any = self.here
        columns: Any = self.columns
        return TrainedRows(self.rows.index_select(0, here), columns)


def unfreeze(
    chunks: list[Any], shape: ModelShape, group: ProcessGroup,
    *, seed: int, dtype: torch.dtype, keeps_base: bool,
) -> list[FactorShard]:  # fmt: skip
    """Let everything train that ``shape`` says is trained beside adapters; returns this rank's
    shards of it.

    Args:
        group: the tensor-parallel group.
        seed: seed of a score head's first values.
        keeps_base: keep the base's values beside those that are trained, for passes of the base
            (``switched_off.py``).
    """
    shards: list[FactorShard] = []
    weights = trained_weights(shape)
    for chunk in chunks:
        for weight in weights:
            for parameter in _parameters(chunk, weight, shape, group, seed, dtype):
                parameter.requires_grad_(True)
                weight.mark(parameter, group)
                # A score head is none of the base's weights.
                if weight.module != SCORE:
                    kept = parameter.detach().clone() if keeps_base else None
                    parameter.base_value = kept  # pyright: ignore[reportAttributeAccessIssue]
                shards.append(shard_of_whole(weight, parameter))
    return shards


def _parameters(
    chunk: Any, weight: TrainedWeight, shape: ModelShape, group: ProcessGroup, seed: int,
    dtype: torch.dtype,
) -> Iterator[nn.Parameter]:  # fmt: skip
    """The parameter that a chunk has for a weight, if it has one."""
    if weight.module == SCORE:
        if chunk.post_process:
            yield _new_score(chunk, weight, shape, group, seed, dtype)
    elif weight.tokens:
        yield from _rows(chunk, weight, group)
    elif weight.layer is not None:
        for layer in chunk.decoder.layers:
            # Megatron counts layers of the whole model from 1.
            if layer.layer_number - 1 == weight.layer and weight.is_bias:
                yield biased_linear(layer, weight.layer, weight.path, shape, group).train_bias(
                    weight
                )
            elif layer.layer_number - 1 == weight.layer:
                yield layer.get_submodule(weight.path).weight
    elif (found := _outside_layers(chunk, weight)) is not None:
        yield found


def _outside_layers(chunk: Any, weight: TrainedWeight) -> nn.Parameter | None:
    """The embedding's, the last norm's or the head's parameter on the stages that have it."""
    if weight.path.startswith("embedding"):
        if chunk.pre_process:
            return chunk.embedding.word_embeddings.weight
        # The last stage's own copy of a tied embedding.
        return chunk.output_layer.weight if weight.tied and chunk.post_process else None
    return chunk.get_submodule(weight.path).weight if chunk.post_process else None


def _rows(chunk: Any, weight: TrainedWeight, group: ProcessGroup) -> Iterator[nn.Parameter]:
    """Rows of the embedding on the first stage, and of a head that is tied to it on the last: one
    parameter where these are one stage."""
    tokens = torch.tensor(weight.tokens, dtype=torch.int64, device=host.device())
    rows: nn.Parameter | None = None
    if chunk.pre_process:
        embedding = chunk.embedding.word_embeddings
        rows = nn.Parameter(_whole_rows(embedding.weight, tokens, group))
        chunk.embedding.word_embeddings = EmbeddingWithRows(embedding, rows, tokens)
    if weight.tied and chunk.post_process:
        own = chunk.shared_embedding_or_output_weight()
        if rows is None:
            rows = nn.Parameter(_whole_rows(own, tokens, group))
            # As Megatron marks a copy, which counts once in the gradient's norm.
            rows.shared = True  # pyright: ignore[reportAttributeAccessIssue]
        chunk.output_layer = HeadWithRows(chunk.output_layer, rows, tokens, len(own))
    if rows is None:
        return
    # A bucket of its own, so that both stages' optimizers own the same part of it.
    rows.shared_embedding = weight.tied and not (chunk.pre_process and chunk.post_process)  # pyright: ignore
    yield rows


def _whole_rows(weight_VH: Tensor, tokens_K: Tensor, group: ProcessGroup) -> Tensor:
    """[K, H]: the rows of these tokens, of all ranks' parts of the vocabulary; collective."""
    width = len(weight_VH)
    columns = tokens_K - group.rank() * width
    here = (columns >= 0) & (columns < width)
    own = weight_VH.detach()[columns.clamp(0, width - 1)]
    # A plan's weights are on the meta device, and the tokens are not.
    own = own * here[:, None].to(own.device)
    # Each row lies on one rank, to which the others add zeros: exact.
    torch.distributed.all_reduce(own, group=group)
    return own


def _new_score(
    chunk: Any, weight: TrainedWeight, shape: ModelShape, group: ProcessGroup, seed: int,
    dtype: torch.dtype,
) -> nn.Parameter:  # fmt: skip
    """Give a last stage its score head, in place of lm_head, which ``make_chunks`` has left
    out."""
    rows, columns = weight.size
    drawn = initial_score(seed, rows, columns, shape.initializer_range)
    chunk.output_layer = ScoreHead(drawn.to(dtype=dtype, device=host.device()), group)
    return chunk.output_layer.weight
