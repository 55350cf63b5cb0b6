"""How an implementation is judged: against float64, allowed twice the error of plain torch at the same precision."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_within_reference_error(got: Tensor, plain: Tensor, exact: Tensor, *, name: str = "result") -> None:
    """Asserts max|got - exact| <= 2 max|plain - exact| + rounding floor.

    ``plain`` is the same formula in plain torch at the precision of ``got``; ``exact`` the formula in float64.
    The floor is what storing ``exact`` in the dtype of ``got`` costs: 2 eps max|exact|.
    NaN and infinities must stand at the same places, with the same sign.
    """
    assert got.dtype == plain.dtype, f"{name}: dtype {got.dtype}, plain torch gives {plain.dtype}"
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    got, plain, exact = (t.detach().cpu() for t in (got, plain, exact))
    eps = torch.finfo(got.dtype).eps
    got, plain, exact = got.double(), plain.double(), exact.double()
    finite = exact.isfinite()
    if not torch.equal(got.isnan(), exact.isnan()) or not torch.equal(got[exact.isinf()], exact[exact.isinf()]):
        raise AssertionError(f"{name}: NaN or inf at other places than the float64 result")
    if not finite.any():
        return
    error = (got - exact)[finite].abs().max().item()
    allowed = 2 * (plain - exact)[finite].abs().max().item() + 2 * eps * exact[finite].abs().max().item()
    assert error <= allowed, f"{name}: max error {error:.3e}, allowed {allowed:.3e} (twice plain torch plus rounding)"
