"""Drops the modality tokens that a text query does not look at: score, select, gather (the paper's LMME).

    scores = token_scores(query, key, query_mask=..., key_mask=...)                 # (B, L)
    selection = select_tokens(scores, candidates, keep=0.7, min_keep=32)            # which tokens stay
    hidden, position_ids = gather_tokens(selection, hidden, position_ids)           # (B, K, D), (3, B, K)

That is the rule of the published Lyra code. No attention map is built, so it runs beside any attention implementation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from numbers import Integral, Real
from typing import NamedTuple

import torch
from torch import Tensor

from lyra_ops._backend import choose, missing_kernel, register_fake
from lyra_ops._checks import FLOAT_DTYPES, INT_DTYPES, check_option, check_tensor, readable
from lyra_ops.token_select import reference

LAYOUTS = ("right", "left", "packed")
_TRITON = find_spec("lyra_ops.token_select.triton")  # imported by the first call that may use it


class TokenSelection(NamedTuple):
    """Which tokens of a batch stay, and where they go.

    index    (B, K) int64: the kept tokens of each sample, increasing; -1 for padding, behind the last or, with layout
             "left", in front of the first
    lengths  (B,)   int64: how many each sample keeps
    inverse  (B, L) int64: the new place of each token; -1 for the dropped and for padding

    With layout "packed", index is (K,): the kept tokens of all samples, one sample after the other, as places b L + i
    in the flat batch; -1 behind the last. From a packed batch of T tokens, inverse is (T,) and index holds places in T.
    """

    index: Tensor
    lengths: Tensor
    inverse: Tensor

    @property
    def mask(self) -> Tensor:
        """(B, L) bool: the tokens that stay."""
        return self.inverse >= 0

    @property
    def key_mask(self) -> Tensor:
        """(B, K) or packed (K,) bool: the real tokens after gathering; the rest is padding."""
        return self.index >= 0

    @property
    def cu_seqlens(self) -> Tensor:
        """(B + 1,) int32: where each sample starts if the kept tokens are packed one after the other."""
        return torch.nn.functional.pad(self.lengths.cumsum(0), (1, 0)).to(torch.int32)


@torch.no_grad()
def token_scores(
    query: Tensor,
    key: Tensor,
    *,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    key_limits: Tensor | None = None,
    key_bias: Tensor | None = None,
    head_weights: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    lse: Tensor | None = None,
    per_head: bool = False,
    backend: str | None = None,
) -> Tensor:
    """How much attention each key gets from the counted query rows, averaged over heads and rows.

        score_k = sum_h w_h mean_q softmax_k(scale * Q_q^h . K_k^(h // (Hq/Hkv)) + key_bias_k)

    w_h = 1/Hq, or ``head_weights`` divided by their sum; so the scores of a sample sum to 1. The softmax runs over the
    real keys that the row sees. Computed in float32 (float64 for float64 inputs) from blocks of logits; no matrix of
    size Lq x L exists. Not differentiable: the result never requires grad, as in the published code.

    query        (B, Hq, Lq, D), any strides; what attention would get, i.e. after rotary embedding
    key          (B, Hkv, L, D), any strides, dtype of query; Hq is a multiple of Hkv
    query_mask   (B, Lq) bool: the rows that count (e.g. the instruction's text); default all
    key_mask     (B, L) bool: the keys that are real; default all. Padding and rows that do not count may hold anything.
    key_limits   (B, Lq) int64 or int32: row i sees the keys at places 0 .. key_limits[b, i] - 1 alone
    key_bias     (B, L) float, added to the scaled logits of all rows and heads; -inf hides a key
    head_weights (Hq,) or (B, Hq), not negative, with a positive sum
    scale        default 1 / sqrt(D)
    causal       the rows are the last Lq of the L positions, and row i sees keys up to its own, L - Lq + i; with
                 ``key_limits``, both hold
    lse          (B, Hq, Lq) float32 or float64: the natural log of the sum of exp of the scaled logits of each row over
                 the keys that it sees, as attention returns it; saves one of two passes over the keys
    per_head     each head's own scores, mean over rows alone, (B, Hq, L); ``head_weights`` must be None

    Returns (B, L) float32 (float64 for float64 inputs); 0 for padding. A row that sees no key does not count; a sample
    in which no row counts has all scores 0. A NaN among the numbers that count makes the scores of its sample NaN.

    A sample gets bitwise the same scores alone and in any batch, whatever the padding on either side (compiled: and
    with any number of threads; reference: on one machine with one number of threads).

    Raises TypeError or ValueError for arguments that do not fit these shapes, dtypes and devices; values of
    ``head_weights`` are checked on the CPU only.

    Source: Lyra (ICCV 2025), equation 4, as its code computes it: ``causal=False`` and all keys in the softmax. With
    ``causal=True`` and the last row alone it is FastV's score, with the last rows SnapKV's before pooling;
    `lyra_ops.token_select.policies` has those and more.
    """
    check_tensor("query", query, shape=("B", "Hq", "Lq", "D"), dtypes=FLOAT_DTYPES)
    batch, heads, rows, dim = query.shape
    check_tensor("key", key, shape=(batch, "Hkv", "L", dim), dtypes=(query.dtype,), device=query.device)
    length = key.shape[2]
    per_token = {
        "query_mask": (query_mask, (batch, rows), (torch.bool,)),
        "key_mask": (key_mask, (batch, length), (torch.bool,)),
        "key_limits": (key_limits, (batch, rows), INT_DTYPES),
        "key_bias": (key_bias, (batch, length), FLOAT_DTYPES),
        "lse": (lse, (batch, heads, rows), (torch.float32, torch.float64)),
    }
    _check_given(per_token, query.device)
    if causal and rows > length:
        raise ValueError(f"causal: got {rows} query rows and {length} keys, expected at most as many rows as keys")
    given = [tensor for tensor, *_ in per_token.values()]
    return _score(query, key, *given, head_weights, scale, causal, per_head, (None, None), backend)


@torch.no_grad()
def token_scores_packed(
    query: Tensor,
    key: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    key_limits: Tensor | None = None,
    key_bias: Tensor | None = None,
    head_weights: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    lse: Tensor | None = None,
    per_head: bool = False,
    backend: str | None = None,
) -> Tensor:
    """`token_scores` of samples that stand one after the other, as in flash-attn's varlen functions.

    query         (Tq, Hq, D): sample b has the rows cu_seqlens_q[b] .. cu_seqlens_q[b+1] - 1
    key           (Tk, Hkv, D): and the keys cu_seqlens_k[b] .. cu_seqlens_k[b+1] - 1
    cu_seqlens_q, cu_seqlens_k  (B + 1,) int32, increasing
    query_mask, key_limits (Tq,), key_mask, key_bias (Tk,), lse (Hq, Tq), head_weights (Hq,) or (B, Hq): as there;
                  key_limits count from the sample's first key

    Returns (Tk,), or (Hq, Tk) with ``per_head``: bit for bit what `token_scores` gives the samples; 0 for keys that
    belong to none. The reference reads cu_seqlens back from a GPU.
    """
    check_tensor("query", query, shape=("Tq", "Hq", "D"), dtypes=FLOAT_DTYPES)
    rows, heads, dim = query.shape
    check_tensor("key", key, shape=("Tk", "Hkv", dim), dtypes=(query.dtype,), device=query.device)
    length = key.shape[0]
    per_token = {
        "query_mask": (query_mask, (rows,), (torch.bool,)),
        "key_mask": (key_mask, (length,), (torch.bool,)),
        "key_limits": (key_limits, (rows,), INT_DTYPES),
        "key_bias": (key_bias, (length,), FLOAT_DTYPES),
        "lse": (lse, (heads, rows), (torch.float32, torch.float64)),
    }
    _check_given(per_token, query.device)
    check_tensor("cu_seqlens_q", cu_seqlens_q, shape=("B + 1",), dtypes=(torch.int32,), device=query.device)
    shape = tuple(cu_seqlens_q.shape)
    check_tensor("cu_seqlens_k", cu_seqlens_k, shape=shape, dtypes=(torch.int32,), device=query.device)
    _check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, rows)
    _check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, length)
    if causal and readable(cu_seqlens_q):
        longer = cu_seqlens_q.diff() > cu_seqlens_k.diff()
        if bool(longer.any()):
            raise ValueError(f"causal: sample {int(longer.int().argmax())} has more query rows than keys")
    given = [None if tensor is None else tensor[None] for tensor, *_ in per_token.values()]
    query, key = query.transpose(0, 1)[None], key.transpose(0, 1)[None]
    packed = cu_seqlens_q, cu_seqlens_k
    return _score(query, key, *given, head_weights, scale, causal, per_head, packed, backend)[0]


def _check_given(arguments: dict[str, tuple], device: torch.device) -> None:
    for name, (tensor, shape, dtypes) in arguments.items():
        if tensor is not None:
            check_tensor(name, tensor, shape=shape, dtypes=dtypes, device=device)


def _score(
    query, key, query_mask, key_mask, key_limits, key_bias, lse, head_weights, scale, causal, per_head, packed, backend
):
    heads, dim, kv_heads = query.shape[1], query.shape[3], key.shape[1]
    if kv_heads == 0 or heads == 0 or heads % kv_heads:
        raise ValueError(f"query: got {heads} heads, expected a positive multiple of the {kv_heads} heads of key")
    if dim == 0:
        raise ValueError("query: got head dimension 0, expected at least 1")
    if scale is None:
        scale = dim**-0.5
    elif not isinstance(scale, Real) or not abs(scale) < math.inf:
        raise ValueError(f"scale: got {scale!r}, expected a finite number")
    samples = query.shape[0] if packed[0] is None else packed[0].shape[0] - 1
    if head_weights is not None:
        if per_head:
            raise ValueError("head_weights: got weights and per_head=True, expected one of them")
        head_weights = _head_weights(head_weights, query, samples)
    if key_limits is not None:
        key_limits = key_limits.clamp(0, key.shape[2]).int()
    if key_bias is not None:
        key_bias = key_bias.to(torch.float64 if query.dtype == torch.float64 else torch.float32)
    why_not = {**_why_not_compiled("scores", query), "reference": None}
    most = 128 if query.dtype == torch.float32 else 256
    if query.device.type == "cpu" and query.dtype == torch.float64:
        why_not["cpu"] = "it computes in float32, and query is float64"
    elif why_not["cuda"] is None and dim > most:
        why_not["cuda"] = f"its tiles hold {most} channels of {query.dtype}, and query has {dim}"
    if query.device.type == "cuda" or backend == "triton":  # else nothing of Triton is imported
        why_not["triton"] = _why_not_triton(query, packed)
    arguments = (
        query,
        key,
        query_mask,
        key_mask,
        key_limits,
        key_bias,
        head_weights,
        float(scale),
        causal,
        lse,
        per_head,
    )
    chosen = choose("token_scores", why_not, backend)
    if chosen == "triton":
        from lyra_ops.token_select import triton

        return triton.token_scores(*arguments)
    raw_op = reference.token_scores if chosen == "reference" else torch.ops.lyra.token_select_scores
    return raw_op(*arguments, *packed)


def _why_not_triton(query: Tensor, packed: tuple[Tensor | None, ...]) -> str | None:
    if _TRITON is None:
        return "not written yet"
    from lyra_ops.token_select import triton

    return triton.why_not(query) if packed[0] is None else "it takes padded batches alone"


@torch.no_grad()
def select_tokens(
    scores: Tensor,
    candidates: Tensor,
    *,
    keep: float | int | Tensor,
    min_keep: int = 0,
    key_mask: Tensor | None = None,
    bias: Tensor | None = None,
    segments: Tensor | None = None,
    capacity: int | None = None,
    layout: str = "right",
    backend: str | None = None,
) -> TokenSelection:
    """Keeps the best candidates of each sample, and all tokens that are no candidates, in their original order.

    Of n candidates the min(n, max(min_keep, k)) with the highest score + bias stay, where

        keep a float in [0, 1]     k = floor(keep * n), in float64
        keep an int                k = keep; beware that ``keep=1`` is one token and ``keep=1.0`` all
        keep a tensor (B,)         one number per sample: int64 or int32 counts, or float64 shares
        keep a tensor (B, S)       one number per segment of each sample; needs ``segments``

    Of equal scores the lower index wins; -0 equals 0; +inf is first, NaN last, behind -inf. Not differentiable.

    scores      (B, L) float
    candidates  (B, L) bool: tokens that may be dropped (image, video, speech); all others stay
    min_keep    least number of candidates kept (published: 32); per segment, if there are segments
    key_mask    (B, L) bool: tokens that are real; padding is never kept and never counted. Default: all.
    bias        (B, L) or (L,) float, added to the scores (recency, diversity, ...)
    segments    (B, L) int64 or int32: the candidates of one number (image, frame window, modality) compete among
                themselves for a budget of their own. Numbers are 0 to S - 1, or 0 to L - 1 where ``keep`` does not
                give S; those of other tokens are not looked at.
    capacity    width K of ``index``, at most L ("packed": B L). Default: what the tokens need, which is one number read
                back from the device; with a capacity nothing is, and the call can stand in a CUDA graph or a full-graph
                compile.
    layout      where the kept tokens stand, here and in what `gather_tokens` makes of it: "right" or "left", padded on
                that side; or "packed", one sample after the other without padding

    Returns TokenSelection(index (B, K), lengths (B,), inverse (B, L)), all int64; "packed": index (K,). The same for a
    sample alone and in any batch, but for the width.

    Raises TypeError or ValueError for arguments that do not fit. Values in tensors are checked on the CPU only. On a
    GPU a negative ``keep`` counts as 0, a candidate with a segment out of range is kept, and a sample that needs more
    than ``capacity`` raises a device-side assertion.

    Source: Lyra (ICCV 2025), section 3.3 (``keep=rho, min_keep=32``); torch.topk leaves ties and order open.
    """
    check_tensor("scores", scores, shape=("B", "L"), dtypes=FLOAT_DTYPES)
    check_option("layout", layout, LAYOUTS)
    return _select(scores, candidates, keep, min_keep, key_mask, bias, segments, capacity, layout, None, backend)


@torch.no_grad()
def select_tokens_packed(
    scores: Tensor,
    candidates: Tensor,
    cu_seqlens: Tensor,
    *,
    keep: float | int | Tensor,
    min_keep: int = 0,
    key_mask: Tensor | None = None,
    bias: Tensor | None = None,
    segments: Tensor | None = None,
    capacity: int | None = None,
    backend: str | None = None,
) -> TokenSelection:
    """`select_tokens` of samples that stand one after the other: token cu_seqlens[b] is the first of sample b.

    scores, candidates, key_mask, bias, segments  (T,)
    cu_seqlens  (B + 1,) int32, increasing, as in flash-attn's varlen functions; tokens outside every sample are dropped
    keep        as there: B samples, and S segments or T where it does not give S
    capacity    size K of ``index``, at most T

    Returns TokenSelection(index (K,), lengths (B,), inverse (T,)): the kept tokens of all samples, one after the other,
    by their place in T; ``selection.cu_seqlens`` tells where each sample's begin.
    """
    check_tensor("scores", scores, shape=("T",), dtypes=FLOAT_DTYPES)
    check_tensor("cu_seqlens", cu_seqlens, shape=("B + 1",), dtypes=(torch.int32,), device=scores.device)
    _check_cu_seqlens("cu_seqlens", cu_seqlens, scores.shape[0])
    return _select(
        scores, candidates, keep, min_keep, key_mask, bias, segments, capacity, "packed", cu_seqlens, backend
    )


def _select(scores, candidates, keep, min_keep, key_mask, bias, segments, capacity, layout, cu_seqlens, backend):
    shape, device = tuple(scores.shape), scores.device
    check_tensor("candidates", candidates, shape=shape, dtypes=(torch.bool,), device=device)
    if key_mask is not None:
        check_tensor("key_mask", key_mask, shape=shape, dtypes=(torch.bool,), device=device)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if bias is not None:
        bias_shape = shape[-1:] if isinstance(bias, Tensor) and bias.ndim == 1 else shape
        check_tensor("bias", bias, shape=bias_shape, dtypes=FLOAT_DTYPES, device=device)
        scores = scores + bias
    if segments is not None:
        check_tensor("segments", segments, shape=shape, dtypes=INT_DTYPES, device=device)
        segments = segments.long()
    samples = shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    keep = _check_keep(keep, samples, segments, device)
    _check_count("min_keep", min_keep)
    if segments is not None and readable(segments):
        _check_segments(segments, candidates if key_mask is None else candidates & key_mask, keep)
    most = math.prod(shape) if layout == "packed" else shape[1]
    if capacity is not None:
        _check_capacity(capacity, most)
    width = most if capacity is None else capacity

    rows = (t if t is None or t.ndim == 2 else t[None] for t in (scores, candidates, key_mask, segments))
    scores, candidates, key_mask, segments = rows
    why_not = {**_why_not_compiled("select", scores), "reference": None}
    if choose("select_tokens", why_not, backend) == "reference":
        mask, lengths = reference.select_tokens(scores, candidates, keep, min_keep, key_mask, segments, cu_seqlens)
        index, inverse = reference.compact(mask, lengths, width, layout)
    else:
        one_of_three = (
            keep if isinstance(keep, Tensor) else None,
            keep if isinstance(keep, float) else None,
            keep if isinstance(keep, int) else None,
        )
        place = LAYOUTS.index(layout)
        index, lengths, inverse = torch.ops.lyra.token_select_select(
            scores, candidates, key_mask, segments, *one_of_three, min_keep, width, place, cu_seqlens
        )
    _check_fits(lengths, width, layout)
    if capacity is None and samples:
        needed = int(lengths.sum() if layout == "packed" else lengths.max())
        if layout == "left":
            index = index[:, width - needed :]
            inverse = torch.where(inverse < 0, inverse, inverse - (width - needed))
        else:
            index = index[:, :needed]
    elif capacity is None:
        index = index[:, :0]
    if layout == "packed":
        index = index[0]
    return TokenSelection(index, lengths, inverse if len(shape) == 2 else inverse[0])


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
    if isinstance(fill, Real):
        fills = [fill] * len(tensors)
    elif not isinstance(fill, (list, tuple)):
        raise TypeError(f"fill: got {type(fill).__name__}, expected a number or a list of numbers")
    elif len(fill) != len(tensors):
        raise ValueError(f"fill: got {len(fill)} numbers, expected one, or one for each of {len(tensors)} tensors")
    else:
        fills = list(fill)
    planes = [_has_planes(i, tensor, inverse.shape, index.device) for i, tensor in enumerate(tensors)]
    for i, (tensor, value) in enumerate(zip(tensors, fills)):
        _check_fill(i, value, tensor.dtype)
    why_not = {**_why_not_compiled("gather", index), "reference": None}
    compiled = choose("gather_tokens", why_not, backend) != "reference"
    # Packed tokens are the one row of a batch of one.
    if packed_in := inverse.ndim == 1:
        inverse = inverse[None]
        tensors = [tensor.unsqueeze(int(p)) for tensor, p in zip(tensors, planes)]
    packed_out = index.ndim == 1
    index = index[None] if packed_out else index
    results = _Gather.apply(index, inverse, planes, fills, packed_out and not packed_in, compiled, *tensors)
    return tuple(result.squeeze(int(p)) for result, p in zip(results, planes)) if packed_out else results


class _Gather(torch.autograd.Function):
    """Moves the rows of all tensors to the places of ``index``; the derivative moves them back, by ``inverse``."""

    @staticmethod
    def forward(index, inverse, planes, fills, flat, compiled, *tensors: Tensor) -> tuple[Tensor, ...]:
        if compiled:
            return tuple(torch.ops.lyra.token_select_gather(tensors, index, planes, fills, flat))
        return tuple(reference.take(t, index, fill, p, flat) for t, fill, p in zip(tensors, fills, planes))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        index, inverse, ctx.planes, _, ctx.flat, ctx.compiled, *tensors = inputs
        ctx.save_for_backward(index, inverse)
        # Else one tensor that requires grad would make all of them require it.
        ctx.mark_non_differentiable(*(out for out, t in zip(output, tensors) if not t.requires_grad))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        index, inverse = ctx.saved_tensors
        given = [i for i, grad in enumerate(grads) if grad is not None]
        planes = [ctx.planes[i] for i in given]
        results: list[Tensor | None] = [None] * len(grads)
        if given:
            fills, wanted = [0] * len(given), [grads[i] for i in given]
            moved = _Gather.apply(inverse, index, planes, fills, ctx.flat, ctx.compiled, *wanted)
            for i, result in zip(given, moved):
                results[i] = result
        return None, None, None, None, None, None, *results


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
    differentiated. With ``capacity`` nothing is read back from a GPU. ``backend`` by name is asked of all three.

    Returns (TokenSelection, tuple of the gathered tensors).
    """
    scores = token_scores(
        query,
        key,
        query_mask=query_mask,
        key_mask=key_mask,
        key_limits=key_limits,
        key_bias=key_bias,
        head_weights=head_weights,
        scale=scale,
        causal=causal,
        lse=lse,
        backend=backend,
    )
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


def _why_not_compiled(raw_op: str, tensor: Tensor) -> dict[str, str | None]:
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


def _head_weights(weights: object, query: Tensor, samples: int) -> Tensor:
    """(samples, Hq) in the dtype of the scores, summing to 1."""
    heads = query.shape[1]
    shape = (heads,) if isinstance(weights, Tensor) and weights.ndim == 1 else (samples, heads)
    check_tensor("head_weights", weights, shape=shape, dtypes=FLOAT_DTYPES, device=query.device)
    if readable(weights):
        if not bool((weights.isfinite() & (weights >= 0)).all()):
            raise ValueError("head_weights: got a negative or non-finite weight, expected finite weights >= 0")
        if not bool((weights.sum(-1) > 0).all()):
            raise ValueError("head_weights: got weights that sum to 0, expected a positive sum")
    weights = weights.to(torch.float64 if query.dtype == torch.float64 else torch.float32)
    return (weights / weights.sum(-1, keepdim=True)).expand(samples, heads)


def _check_keep(keep: object, samples: int, segments: Tensor | None, device: torch.device) -> float | int | Tensor:
    """``keep`` as a float share, an int, or a tensor of int64 counts or float64 shares."""
    if isinstance(keep, Tensor):
        shape = (samples,) if segments is None or keep.ndim == 1 else (samples, "S")
        check_tensor("keep", keep, shape=shape, dtypes=(*INT_DTYPES, torch.float64), device=device)
        if readable(keep):
            share = keep.is_floating_point()
            bad = ~((keep >= 0) & (keep <= 1)) if share else keep < 0
            if bool(bad.any()):
                expected = "shares from 0 to 1" if share else "counts of at least 0"
                raise ValueError(f"keep: got {keep[bad][0].item()}, expected {expected}")
        return keep if keep.is_floating_point() else keep.long()
    if isinstance(keep, bool) or not isinstance(keep, Real):
        raise TypeError(f"keep: got {type(keep).__name__}, expected a float share, an int or a tensor")
    if isinstance(keep, Integral):
        _check_count("keep", keep)
        return int(keep)
    if not 0 <= keep <= 1:
        raise ValueError(f"keep: got {keep}, expected a share from 0 to 1, or an int for a number of tokens")
    return float(keep)


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: got {type(value).__name__}, expected an int")
    if value < 0:
        raise ValueError(f"{name}: got {value}, expected at least 0")


def _check_segments(segments: Tensor, candidates: Tensor, keep: float | int | Tensor) -> None:
    n = keep.shape[1] if isinstance(keep, Tensor) and keep.ndim == 2 else segments.shape[-1]
    bad = candidates & ((segments < 0) | (segments >= n))
    if bool(bad.any()):
        *sample, i = bad.nonzero()[0].tolist()
        name = f"candidate {i} of sample {sample[0]}" if sample else f"candidate {i}"
        raise ValueError(f"segments: {name} has {int(segments[bad][0])}, expected 0 to {n - 1}")


def _check_cu_seqlens(name: str, cu_seqlens: Tensor, tokens: int) -> None:
    if cu_seqlens.shape[0] == 0:
        raise ValueError(f"{name}: got no numbers, expected one more than there are samples")
    if readable(cu_seqlens):
        places = cu_seqlens.tolist()
        if places[0] < 0 or places[-1] > tokens or places != sorted(places):
            raise ValueError(f"{name}: got {places}, expected increasing places from 0 to {tokens}")


def _check_capacity(capacity: int, most: int) -> None:
    _check_count("capacity", capacity)
    if capacity > most:
        raise ValueError(f"capacity: got {capacity}, expected at most the {most} tokens of a sample")


def _check_fits(lengths: Tensor, capacity: int, layout: str) -> None:
    needed = lengths.sum().view(1) if layout == "packed" else lengths
    fits = (needed <= capacity).all()
    if not readable(lengths):
        torch._assert_async(fits, "capacity: a sample keeps more tokens than that")
    elif not bool(fits):
        b = int(needed.argmax())
        which = "the samples keep" if layout == "packed" else f"sample {b} keeps"
        raise ValueError(f"capacity: got {capacity}, but {which} {int(needed[b])} tokens")


@register_fake("token_select_scores")
def _(query, key, query_mask, key_mask, key_limits, key_bias, head_weights, scale, causal, lse, per_head, *packed):
    heads = (query.shape[1],) if per_head else ()
    return query.new_empty((query.shape[0], *heads, key.shape[2]), dtype=torch.float32)


@register_fake("token_select_select")
def _(scores, candidates, key_mask, segments, keep, share, count, min_keep, capacity, layout, cu_seqlens):
    samples = scores.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    rows = 1 if LAYOUTS[layout] == "packed" else samples
    shapes = ((rows, capacity), (samples,), tuple(scores.shape))
    return tuple(scores.new_empty(shape, dtype=torch.int64) for shape in shapes)


@register_fake("token_select_gather")
def _(tensors, index, planes, fill, flat):
    return [t.new_empty((*t.shape[:p], *index.shape, *t.shape[2 + p :])) for t, p in zip(tensors, planes)]
