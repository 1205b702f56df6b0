"""Run single passes of a back end and sum up what they leave in parts."""

from types import SimpleNamespace
from typing import Any

import torch
from megalora_kernels import Routing
from megalora_kernels.sums import TorchSums, TritonSums

from tests.kernels.conftest import lora_wgrad
from tests.kernels.conftest import swiglu_backward as module

SUMS: dict[str, Any] = {"loop": TorchSums, "triton": TritonSums}


def swiglu_backward(
    way: str,
    dh: torch.Tensor,
    y: torch.Tensor,
    p: torch.Tensor,
    routing: Routing,
    dy: torch.Tensor,
    s: Any,
    ds: Any,
) -> SimpleNamespace:
    """Backward of SwiGLU by ``loop`` or ``triton``: fills ``dy`` and returns dp, dA of down, and dB
    of gate and up as one matrix.

    ``s`` and ``ds`` are None where gate and up, or down, have no adapter.
    """
    inner = dh.shape[1]
    # An adapter's gradient per expert: dA of down [Q, I], dB of gate and up [2 I, R].
    shapes: list[tuple[int, int] | None] = [None, None]
    if ds is not None:
        shapes[0] = (ds.shape[1], inner)
    if s is not None:
        shapes[1] = (2 * inner, s.shape[1])
    sums = SUMS[way](routing, dh, shapes)
    da, db = sums.places
    # One B over the rows of both, as where gate and up share an adapter.
    dbs = () if db is None else (db,)
    getattr(module, f"swiglu_backward_{way}")(dh, y, p, routing, dy, s, ds, sums, da, dbs)
    # The kernels leave a part for every chunk of rows; finish() adds them up.
    dp_M, (da_EQI, db_EJR) = sums.finish()
    return SimpleNamespace(dp_M=dp_M, da_EQI=da_EQI, db_EJR=db_EJR)


def wgrad(
    way: str, g: torch.Tensor, x: torch.Tensor, routing: Routing, source: Any = None
) -> torch.Tensor:
    """Per expert, the sum of ``g[m]^T x[m]`` over its rows, ``[E, R, K]``, by one back end."""
    sums = SUMS[way](routing, x, [(g.shape[1], x.shape[1])])
    getattr(lora_wgrad, f"lora_wgrad_{way}")(g, x, routing, sums.places[0], source)
    return sums.finish()[1][0]
