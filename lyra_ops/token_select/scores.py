"""How much attention each key gets from the query rows, without an attention map."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from lyra_ops._backend import choose, register_fake
from lyra_ops._checks import FLOAT_DTYPES, INT_DTYPES, check_tensor, readable
from lyra_ops.token_select import reference
from lyra_ops.token_select.checks import check_cu_seqlens, why_not_compiled


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
    options = query_mask, key_mask, key_limits, key_bias, head_weights, scale, causal, lse, per_head
    return run(*padded_arguments(query, key, *options, backend))


def padded_arguments(
    query, key, query_mask, key_mask, key_limits, key_bias, head_weights, scale, causal, lse, per_head, backend
) -> tuple[str, tuple]:
    """The backend that serves a call of `token_scores`, and the arguments of its raw op; all checked."""
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
    return _arguments(query, key, *given, head_weights, scale, causal, per_head, (None, None), backend)


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
    options = query_mask, key_mask, key_limits, key_bias, head_weights, scale, causal, lse, per_head
    return run(*packed_arguments(query, key, cu_seqlens_q, cu_seqlens_k, *options, backend))[0]


def packed_arguments(
    query,
    key,
    cu_seqlens_q,
    cu_seqlens_k,
    query_mask,
    key_mask,
    key_limits,
    key_bias,
    head_weights,
    scale,
    causal,
    lse,
    per_head,
    backend,
) -> tuple[str, tuple]:
    """As `padded_arguments`, of a call of `token_scores_packed`."""
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
    check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, rows)
    check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, length)
    if causal and readable(cu_seqlens_q):
        longer = cu_seqlens_q.diff() > cu_seqlens_k.diff()
        if bool(longer.any()):
            raise ValueError(f"causal: sample {int(longer.int().argmax())} has more query rows than keys")
    given = [None if tensor is None else tensor[None] for tensor, *_ in per_token.values()]
    query, key = query.transpose(0, 1)[None], key.transpose(0, 1)[None]
    packed = cu_seqlens_q, cu_seqlens_k
    return _arguments(query, key, *given, head_weights, scale, causal, per_head, packed, backend)


def _arguments(
    query, key, query_mask, key_mask, key_limits, key_bias, lse, head_weights, scale, causal, per_head, packed, backend
) -> tuple[str, tuple]:
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
    why_not = {**why_not_compiled("scores", query), "reference": None}
    most = 128 if query.dtype == torch.float32 else 256
    if query.device.type == "cpu" and query.dtype == torch.float64:
        why_not["cpu"] = "it computes in float32, and query is float64"
    elif why_not["cuda"] is None and dim > most:
        why_not["cuda"] = f"its tiles hold {most} channels of {query.dtype}, and query has {dim}"
    if query.device.type == "cuda" or backend == "triton":  # else nothing of Triton is imported
        from lyra_ops.token_select import triton

        why_not["triton"] = triton.why_not(query)
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
    return choose("token_scores", why_not, backend), (*arguments, *packed)


def run(chosen: str, arguments: tuple) -> Tensor:
    """The scores, by the backend and the arguments that `padded_arguments` gave."""
    if chosen == "triton":
        from lyra_ops.token_select import triton

        return triton.token_scores(*arguments)
    return (reference.token_scores if chosen == "reference" else torch.ops.lyra.token_select_scores)(*arguments)


def _check_given(arguments: dict[str, tuple], device: torch.device) -> None:
    for name, (tensor, shape, dtypes) in arguments.items():
        if tensor is not None:
            check_tensor(name, tensor, shape=shape, dtypes=dtypes, device=device)


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


@register_fake("token_select_scores")
def _(query, key, query_mask, key_mask, key_limits, key_bias, head_weights, scale, causal, lse, per_head, *packed):
    heads = (query.shape[1],) if per_head else ()
    return query.new_empty((query.shape[0], *heads, key.shape[2]), dtype=torch.float32)
