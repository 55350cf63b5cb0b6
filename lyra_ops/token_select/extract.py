"""Score, select and gather in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lyra_ops._backend import register_fake
from lyra_ops._checks import check_option
from lyra_ops.token_select.gather import checked_tensors, gather_tokens, moved_back, without_grad
from lyra_ops.token_select.scores import padded_arguments, run
from lyra_ops.token_select.selection import (
    LAYOUTS,
    TokenSelection,
    check_fits,
    checked_selection,
    one_of_three,
    select_tokens,
)


def extract_tokens(
    query: Tensor,
    key: Tensor,
    candidates: Tensor,
    *tensors: Tensor,
    keep: float | int | Tensor,
    min_keep: int = 0,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    key_limits: Tensor | None = None,
    key_bias: Tensor | None = None,
    head_weights: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    lse: Tensor | None = None,
    bias: Tensor | None = None,
    segments: Tensor | None = None,
    capacity: int | None = None,
    layout: str = "right",
    fill: float | Sequence[float] = 0,
    backend: str | None = None,
) -> tuple[TokenSelection, tuple[Tensor, ...]]:
    """`token_scores`, `select_tokens` and `gather_tokens` in one call: the extractor of the paper.

        selection, (hidden, position_ids) = extract_tokens(query, key, is_image, hidden, position_ids, keep=0.7)

    The arguments are those of the three functions, ``key_mask`` serving two of them; ``tensors`` and only they are
    differentiated. ``backend`` by name is asked of all three. With ``capacity`` nothing is read back from a GPU, and
    all of it is one call of the compiled library: three launches for samples of up to 2048 tokens and 32 segments that
    go out padded.

    Returns (TokenSelection, tuple of the gathered tensors).
    """
    options = query_mask, key_mask, key_limits, key_bias, head_weights, scale, causal, lse, False
    chosen, arguments = padded_arguments(query, key, *options, backend)
    doubled = isinstance(bias, Tensor) and bias.dtype == torch.float64
    if capacity is not None and not doubled and chosen in ("cuda", "cpu"):
        return _at_once(
            arguments, candidates, tensors, keep, min_keep, key_mask, bias, segments, capacity, layout, fill
        )
    with torch.no_grad():
        scores = run(chosen, arguments)
    selection = select_tokens(
        scores,
        candidates,
        keep=keep,
        min_keep=min_keep,
        key_mask=key_mask,
        bias=bias,
        segments=segments,
        capacity=capacity,
        layout=layout,
        backend=backend,
    )
    return selection, gather_tokens(selection, *tensors, fill=fill, backend=backend)


def _at_once(arguments, candidates, tensors, keep, min_keep, key_mask, bias, segments, capacity, layout, fill):
    query, key = arguments[:2]
    shape = query.shape[0], key.shape[2]
    check_option("layout", layout, LAYOUTS)
    segments, keep, most, _ = checked_selection(
        shape, shape[0], query.device, candidates, keep, min_keep, key_mask, bias, segments, capacity, layout
    )
    planes, fills = checked_tensors(tensors, fill, torch.Size(shape), query.device)
    bias = None if bias is None else bias.float().expand(shape)
    *scoring, _, _, _ = arguments[2:]  # neither per head nor packed
    index, lengths, inverse, *moved = _Extract.apply(
        query,
        key,
        candidates,
        *scoring,
        bias,
        segments,
        *one_of_three(keep),
        min_keep,
        capacity,
        LAYOUTS.index(layout),
        planes,
        fills,
        *tensors,
    )
    if query.device.type == "cpu" and capacity < most:  # on a GPU the kernel itself says so
        check_fits(lengths, capacity, layout)
    if layout == "packed":
        index, moved = index[0], [result.squeeze(int(p)) for result, p in zip(moved, planes)]
    return TokenSelection(index, lengths, inverse), tuple(moved)


class _Extract(torch.autograd.Function):
    """The raw op; the derivative moves the rows of the tensors back, and stops there."""

    @staticmethod
    def forward(query, key, candidates, *rest) -> tuple[Tensor, ...]:
        options, tensors = rest[: _OPTIONS - 3], rest[_OPTIONS - 3 :]
        *selection, moved = torch.ops.lyra.token_select_extract(query, key, candidates, tensors, *options)
        return (*selection, *moved)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        index, lengths, inverse, *moved = output
        *_, layout, ctx.planes, _ = inputs[:_OPTIONS]
        ctx.flat, ctx.backend = LAYOUTS[layout] == "packed", index.device.type  # compiled
        ctx.save_for_backward(index, inverse)
        ctx.mark_non_differentiable(index, lengths, inverse, *without_grad(inputs[_OPTIONS:], moved))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return *[None] * _OPTIONS, *moved_back(ctx, grads[3:])


_OPTIONS = 21  # arguments of the raw op but the tensors


@register_fake("token_select_extract")
def _(query, key, candidates, tensors, *options):
    *_, capacity, layout, planes, _ = options
    packed = LAYOUTS[layout] == "packed"
    rows, samples = (1 if packed else query.shape[0]), query.shape[0]
    shapes = (rows, capacity), (samples,), (samples, key.shape[2])
    moved = [t.new_empty((*t.shape[:p], rows, capacity, *t.shape[2 + p :])) for t, p in zip(tensors, planes)]
    return (*(query.new_empty(shape, dtype=torch.int64) for shape in shapes), moved)
