"""Read the experts that vLLM says it has chosen: ``routed_experts`` of an answer, by a server that
was started with ``--enable-return-routed-experts``.

In vLLM 0.32 an answer of ``/v1/completions`` has them where it comes whole, as the base64 of a .npy
file, ``[tokens - 1, layers, k]``: of all that was read, and of every decoder layer, those without
experts being zeros (vllm/entrypoints/openai/completion/protocol.py, CompletionResponseChoice, and
vllm/model_executor/layers/fused_moe/routed_experts_capturer.py).
"""

import base64
import io
from dataclasses import dataclass
from typing import Any

import numpy as np

from megalora.model.shape import ModelShape
from megalora.serve.errors import ServerError

OPTION = "--enable-return-routed-experts"


@dataclass(frozen=True)
class ReportedRoutes:
    """What a model's servers must report."""

    shape: ModelShape

    def read(self, reported: Any, num_read: int, where: str) -> np.ndarray:
        """``[num_read, L, k]`` int16: of the L layers with experts, as ``Sampled.routes`` has them.

        Args:
            reported: as the answer has it.
            num_read: tokens of prompt and answer, but for the last one.
            where: how messages begin.
        Raises:
            ServerError: there is nothing, or it is of another model.
        """
        if reported is None:
            raise ServerError(
                f"{where}: the answer does not say which experts were chosen. Start vLLM with"
                f" {OPTION} (0.32, on GPUs), or leave rl.replay_routes out"
            )
        try:
            content = base64.b64decode(reported, validate=True)
            routes = np.load(io.BytesIO(content), allow_pickle=False)
        except (TypeError, ValueError, EOFError) as error:
            raise ServerError(
                f"{where}: routed_experts cannot be read ({type(error).__name__}: {error})"
            ) from None
        wanted = (num_read, self.shape.num_layers, self.shape.top_k)
        if routes.shape != wanted or routes.dtype.kind not in "iu":
            raise ServerError(
                f"{where}: routed_experts are {routes.dtype} {list(routes.shape)}, wanted are"
                f" integers {list(wanted)}: tokens, layers, experts of a token"
            )
        chosen = routes[:, sorted(self.shape.moe_layers)].astype(np.int64)
        # A token goes to an expert once.
        ordered = np.sort(chosen, axis=-1)
        is_twice = (ordered[..., 1:] == ordered[..., :-1]).any()
        if is_twice or chosen.min() < 0 or chosen.max() >= self.shape.num_experts:
            raise ServerError(
                f"{where}: routed_experts are not {self.shape.top_k} different ones of"
                f" {self.shape.num_experts} for each token"
            )
        return chosen.astype(np.int16)
