"""Moves the kept tokens of any number of tensors to their new places, and gradients back."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from lyra_ops._backend import choose, register_fake
from lyra_ops._checks import check_tensor
from lyra_ops.token_select import reference
from lyra_ops.token_select.checks import why_not_compiled
from lyra_ops.token_select.selection import TokenSelection


def gather_tokens(
    selection: TokenSelection,
    *tensors: Tensor,
    fill: float | Sequence[float] = 0,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """The kept tokens of every tensor, in their original order.

        out[b, i] = tensor[b, index[b, i]]        out[b, i] = fill where index[b, i] = -1

    tensors  any dtype and strides, each (B, L, ...), such as hidden states, labels, masks, cos and sin; or
             (P, B, L, ...), such as M-RoPE position ids (3, B, L). One that fits both is read as (B, L, ...). Keys and
             values (B, H, L, D) go in and come out as their ``.transpose(1, 2)``. For a selection from
             `select_tokens_packed` they are (T, ...) or (P, T, ...).
    fill     what padding holds: one number, or one per tensor (0, and -100 for labels)

    Returns a tuple of (B, K, ...) or (P, B, K, ...), as many as there are tensors; of a packed selection (K, ...) or
    (P, K, ...). Differentiable, as often as one likes; the backward is a gather by ``selection.inverse`` that writes
    every element once, without atomics: d tensor[b, j] = d out[b, inverse[b, j]], and 0 where the token was dropped.

    Raises TypeError or ValueError for tensors that do not fit the selection.
    """
    if not isinstance(selection, TokenSelection):
        raise TypeError(f"selection: got {type(selection).__name__}, expected a TokenSelection")
    index, _, inverse = selection
    planes, fills = checked_tensors(tensors, fill, inverse.shape, index.device)
    why_not = {**why_not_compiled("gather", index), "reference": None}
    if index.device.type == "cuda" or backend == "triton":  # else nothing of Triton is imported
        from lyra_ops.token_select import triton

        why_not["triton"] = triton.why_not_on(index)
    chosen = choose("gather_tokens", why_not, backend)
    # Packed tokens are the one row of a batch of one.
    if packed_in := inverse.ndim == 1:
        inverse = inverse[None]
        tensors = [tensor.unsqueeze(int(p)) for tensor, p in zip(tensors, planes)]
    packed_out = index.ndim == 1
    index = index[None] if packed_out else index
    results = apply(_Gather, index, inverse, planes, fills, packed_out and not packed_in, chosen, *tensors)
    return tuple(result.squeeze(int(p)) for result, p in zip(results, planes)) if packed_out else results


def checked_tensors(
    tensors: Sequence[Tensor], fill: float | Sequence[float], tokens: torch.Size, device: torch.device
) -> tuple[list[bool], list[float]]:
    """Which of the tensors have planes, and what padding holds in each."""
    if isinstance(fill, Real):
        fills = [fill] * len(tensors)
    elif not isinstance(fill, (list, tuple)):
        raise TypeError(f"fill: got {type(fill).__name__}, expected a number or a list of numbers")
    elif len(fill) != len(tensors):
        raise ValueError(f"fill: got {len(fill)} numbers, expected one, or one for each of {len(tensors)} tensors")
    else:
        fills = list(fill)
    planes = [_has_planes(i, tensor, tokens, device) for i, tensor in enumerate(tensors)]
    for i, (tensor, value) in enumerate(zip(tensors, fills)):
        _check_fill(i, value, tensor.dtype)
    return planes, fills


def apply(function: type[torch.autograd.Function], *arguments: object) -> tuple[Tensor, ...]:
    """``function.apply``. Where nothing requires grad torch.compile would hand ``forward``, as it takes any number of
    arguments, a context that it does not take: there it is called without."""
    wanted = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments)
    return (function.apply if wanted or not torch.compiler.is_compiling() else function.forward)(*arguments)


class _Gather(torch.autograd.Function):
    """Moves the rows of all tensors to the places of ``index``; the derivative moves them back, by ``inverse``."""

    @staticmethod
    def forward(index, inverse, planes, fills, flat, backend, *tensors: Tensor) -> tuple[Tensor, ...]:
        if backend == "reference":
            return tuple(reference.take(t, index, fill, p, flat) for t, fill, p in zip(tensors, fills, planes))
        if backend == "triton":
            from lyra_ops.token_select import triton

            return tuple(triton.gather_tokens(list(tensors), index, planes, fills, flat))
        return tuple(torch.ops.lyra.token_select_gather(tensors, index, planes, fills, flat))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        index, inverse, ctx.planes, _, ctx.flat, ctx.backend, *tensors = inputs
        ctx.save_for_backward(index, inverse)
        ctx.mark_non_differentiable(*without_grad(tensors, output))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, None, None, None, None, *moved_back(ctx, grads)


def without_grad(tensors: Sequence[Tensor], moved: Sequence[Tensor]) -> list[Tensor]:
    """What was moved of tensors that require no grad: else one that does would make all of them require it."""
    return [out for out, tensor in zip(moved, tensors) if not tensor.requires_grad]


def moved_back(ctx, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients of the tensors that were moved, by what ctx saved and its planes, flat and backend."""
    index, inverse = ctx.saved_tensors
    given = [i for i, grad in enumerate(grads) if grad is not None]
    planes = [ctx.planes[i] for i in given]
    results: list[Tensor | None] = [None] * len(grads)
    if given:
        fills, wanted = [0] * len(given), [grads[i] for i in given]
        moved = apply(_Gather, inverse, index, planes, fills, ctx.flat, ctx.backend, *wanted)
        for i, result in zip(given, moved):
            results[i] = result
    return results


def _has_planes(i: int, tensor: Tensor, tokens: torch.Size, device: torch.device) -> bool:
    """Whether the tensor is (P, B, L, ...), not (B, L, ...); packed (P, T, ...), not (T, ...)."""
    check_tensor(f"tensors[{i}]", tensor, device=device)
    for planes in (False, True):
        if tensor.shape[planes : planes + len(tokens)] == tokens:
            return planes
    want = ", ".join(map(str, tokens))
    raise ValueError(f"tensors[{i}]: got shape {tuple(tensor.shape)}, expected ({want}, ...) or (P, {want}, ...)")


def _check_fill(i: int, fill: object, dtype: torch.dtype) -> None:
    if isinstance(fill, bool) or not isinstance(fill, Real):
        raise TypeError(f"fill: got {type(fill).__name__} for tensors[{i}], expected a number")
    if dtype.is_floating_point or dtype.is_complex:
        return
    low, high = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    if not (low <= fill <= high and float(fill).is_integer() and int(float(fill)) == fill):
        raise ValueError(f"fill: got {fill} for tensors[{i}], expected a number that {dtype} holds")


@register_fake("token_select_gather")
def _(tensors, index, planes, fill, flat):
    return [t.new_empty((*t.shape[:p], *index.shape, *t.shape[2 + p :])) for t, p in zip(tensors, planes)]
