"""What scoring, selection and gathering check alike."""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor

from lyra_ops._backend import missing_kernel
from lyra_ops._checks import readable


def check_share(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a share from 0 to 1")
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: got {value}, expected a share from 0 to 1")


def check_cu_seqlens(name: str, cu_seqlens: Tensor, tokens: int) -> None:
    if cu_seqlens.shape[0] == 0:
        raise ValueError(f"{name}: got no numbers, expected one more than there are samples")
    if readable(cu_seqlens):
        places = cu_seqlens.tolist()
        if places[0] < 0 or places[-1] > tokens or places != sorted(places):
            raise ValueError(f"{name}: got {places}, expected increasing places from 0 to {tokens}")


def why_not_compiled(raw_op: str, tensor: Tensor) -> dict[str, str | None]:
    """Per compiled backend why it cannot serve a call with this tensor, None where it can."""
    device = tensor.device.type
    why_not = {}
    for backend in ("cuda", "cpu"):
        if device != backend:
            why_not[backend] = f"the tensors are on {tensor.device}"
        elif backend == "cuda" and tensor.dtype == torch.float64:
            why_not[backend] = "it computes in float32, and the tensors are float64"
        else:
            why_not[backend] = missing_kernel(f"token_select_{raw_op}", backend)
    return why_not
