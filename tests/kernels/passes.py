"""Single passes of a back end with what they leave in parts summed up."""

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
    """Fills dy; dp, dA of down and dB of gate and up as one matrix, in the way of ``loop`` or
    ``triton``."""
    inner = dh.shape[1]
    shapes = [
        None if ds is None else (ds.shape[1], inner),
        None if s is None else (2 * inner, s.shape[1]),
    ]
    sums = SUMS[way](routing, dh, shapes)
    da, db = sums.places
    getattr(module, f"swiglu_backward_{way}")(
        dh, y, p, routing, dy, s, ds, sums, da, () if db is None else (db,)
    )
    dp_M, (da_EQI, db_EJR) = sums.finish()
    return SimpleNamespace(dp_M=dp_M, da_EQI=da_EQI, db_EJR=db_EJR)


def wgrad(
    way: str, g: torch.Tensor, x: torch.Tensor, routing: Routing, source: Any = None
) -> torch.Tensor:
    sums = SUMS[way](routing, x, [(g.shape[1], x.shape[1])])
    getattr(lora_wgrad, f"lora_wgrad_{way}")(g, x, routing, sums.places[0], source)
    return sums.finish()[1][0]
