"""Score, select and gather in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lyra_ops._backend import register_fake
from lyra_ops._checks import check_option
from lyra_ops.token_select.gather import apply, checked_tensors, gather_tokens, moved_back, without_grad
from lyra_ops.token_select.scores import packed_arguments, padded_arguments, run
from lyra_ops.token_select.selection import (
    LAYOUTS,
    TokenSelection,
    check_fits,
    checked_selection,
    one_of_three,
    select_tokens,
    select_tokens_packed,
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
    all of it is one call of the compiled library: three launches for samples of up to 4096 tokens and 32 segments that
    go out padded.

    Returns (TokenSelection, tuple of the gathered tensors).
    """
    options = query_mask, key_mask, key_limits, key_bias, head_weights, scale, causal, lse, False
    scoring = padded_arguments(query, key, *options, backend)
    selecting = candidates, keep, min_keep, key_mask, bias, segments, capacity, layout
    return _extract(*scoring, *selecting, tensors, fill, backend)


def extract_tokens_packed(
    query: Tensor,
    key: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
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
    fill: float | Sequence[float] = 0,
    backend: str | None = None,
) -> tuple[TokenSelection, tuple[Tensor, ...]]:
    """`token_scores_packed`, `select_tokens_packed` and `gather_tokens` in one call.

    The arguments are those of the three functions; the candidates stand where ``cu_seqlens_k`` says, and tensors are
    (Tk, ...) or (P, Tk, ...). ``capacity`` as in `extract_tokens`, but for the number of launches: seven at most for up
    to 16384 tokens in all.

    Returns (TokenSelection, tuple of the gathered tensors).
    """
    options = query_mask, key_mask, key_limits, key_bias, head_weights, scale, causal, lse, False
    scoring = packed_arguments(query, key, cu_seqlens_q, cu_seqlens_k, *options, backend)
    selecting = candidates, keep, min_keep, key_mask, bias, segments, capacity, "packed"
    return _extract(*scoring, *selecting, tensors, fill, backend)


def _extract(
    chosen, scoring, candidates, keep, min_keep, key_mask, bias, segments, capacity, layout, tensors, fill, backend
) -> tuple[TokenSelection, tuple[Tensor, ...]]:
    query, key, *_, cu_seqlens = scoring
    doubled = isinstance(bias, Tensor) and bias.dtype == torch.float64
    if capacity is None or doubled or chosen not in ("cuda", "cpu"):
        with torch.no_grad():
            scores = run(chosen, scoring)
        options = {"keep": keep, "min_keep": min_keep, "key_mask": key_mask, "bias": bias, "segments": segments}
        options |= {"capacity": capacity, "backend": backend}
        if cu_seqlens is None:
            selection = select_tokens(scores, candidates, layout=layout, **options)
        else:
            selection = select_tokens_packed(scores[0], candidates, cu_seqlens, **options)
        return selection, gather_tokens(selection, *tensors, fill=fill, backend=backend)

    batch, length = query.shape[0], key.shape[2]  # packed, a batch of one
    packed_in, packed_out = cu_seqlens is not None, layout == "packed"
    shape = (length,) if packed_in else (batch, length)
    samples = cu_seqlens.shape[0] - 1 if packed_in else batch
    check_option("layout", layout, LAYOUTS)
    segments, keep, most, _ = checked_selection(
        shape, samples, query.device, candidates, keep, min_keep, key_mask, bias, segments, capacity, layout
    )
    planes, fills = checked_tensors(tensors, fill, torch.Size(shape), query.device)
    bias = None if bias is None else bias.float().expand(shape)
    if packed_in:
        candidates, bias, segments = (t if t is None else t[None] for t in (candidates, bias, segments))
        tensors = [tensor.unsqueeze(int(p)) for tensor, p in zip(tensors, planes)]
    *options, _, cu_seqlens_q, _ = scoring[2:]  # not per head
    index, lengths, inverse, *moved = apply(
        _Extract,
        query,
        key,
        candidates,
        *options,
        bias,
        segments,
        *one_of_three(keep),
        min_keep,
        capacity,
        LAYOUTS.index(layout),
        planes,
        fills,
        cu_seqlens_q,
        cu_seqlens,
        *tensors,
    )
    if query.device.type == "cpu" and capacity < most:  # on a GPU the kernel itself says so
        check_fits(lengths, capacity, layout)
    if packed_out:
        index, moved = index[0], [result.squeeze(int(p)) for result, p in zip(moved, planes)]
    return TokenSelection(index, lengths, inverse[0] if packed_in else inverse), tuple(moved)


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
        *_, layout, ctx.planes, _, _, cu_seqlens = inputs[:_OPTIONS]
        ctx.flat = LAYOUTS[layout] == "packed" and cu_seqlens is None
        ctx.backend = index.device.type  # compiled
        ctx.save_for_backward(index, inverse)
        ctx.mark_non_differentiable(index, lengths, inverse, *without_grad(inputs[_OPTIONS:], moved))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return *[None] * _OPTIONS, *moved_back(ctx, grads[3:])


_OPTIONS = 23  # arguments of the raw op but the tensors


@register_fake("token_select_extract")
def _(query, key, candidates, tensors, *options):
    *_, capacity, layout, planes, _, _, cu_seqlens = options
    batch, length = query.shape[0], key.shape[2]
    rows = 1 if LAYOUTS[layout] == "packed" else batch
    shapes = (rows, capacity), (batch if cu_seqlens is None else cu_seqlens.shape[0] - 1,), (batch, length)
    moved = [t.new_empty((*t.shape[:p], rows, capacity, *t.shape[2 + p :])) for t, p in zip(tensors, planes)]
    return (*(query.new_empty(shape, dtype=torch.int64) for shape in shapes), moved)
