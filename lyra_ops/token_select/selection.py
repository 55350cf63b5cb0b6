"""Which tokens stay: the best candidates by score, and all that are no candidates."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import NamedTuple

import torch
from torch import Tensor

from lyra_ops._backend import choose, register_fake
from lyra_ops._checks import FLOAT_DTYPES, INT_DTYPES, check_option, check_tensor, readable
from lyra_ops.token_select import reference
from lyra_ops.token_select.checks import check_cu_seqlens, why_not_compiled

LAYOUTS = ("right", "left", "packed")


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
    check_cu_seqlens("cu_seqlens", cu_seqlens, scores.shape[0])
    return _select(
        scores, candidates, keep, min_keep, key_mask, bias, segments, capacity, "packed", cu_seqlens, backend
    )


def _select(scores, candidates, keep, min_keep, key_mask, bias, segments, capacity, layout, cu_seqlens, backend):
    shape = tuple(scores.shape)
    samples = shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    segments, keep, most, width = checked_selection(
        shape, samples, scores.device, candidates, keep, min_keep, key_mask, bias, segments, capacity, layout
    )
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if bias is not None:
        scores = scores + bias

    rows = (t if t is None or t.ndim == 2 else t[None] for t in (scores, candidates, key_mask, segments))
    scores, candidates, key_mask, segments = rows
    why_not = {**why_not_compiled("select", scores), "reference": None}
    if choose("select_tokens", why_not, backend) == "reference":
        mask, lengths = reference.select_tokens(scores, candidates, keep, min_keep, key_mask, segments, cu_seqlens)
        index, inverse = reference.compact(mask, lengths, width, layout)
    else:
        index, lengths, inverse = torch.ops.lyra.token_select_select(
            scores,
            candidates,
            key_mask,
            segments,
            *one_of_three(keep),
            min_keep,
            width,
            LAYOUTS.index(layout),
            cu_seqlens,
        )
    if width < most:
        check_fits(lengths, width, layout)
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


def checked_selection(
    shape, samples, device, candidates, keep, min_keep, key_mask, bias, segments, capacity, layout
) -> tuple[Tensor | None, float | int | Tensor, int, int]:
    """Segments as int64, keep as `check_keep` says, the greatest width that index may have, and the one it gets."""
    check_tensor("candidates", candidates, shape=shape, dtypes=(torch.bool,), device=device)
    if key_mask is not None:
        check_tensor("key_mask", key_mask, shape=shape, dtypes=(torch.bool,), device=device)
    if bias is not None:
        bias_shape = shape[-1:] if isinstance(bias, Tensor) and bias.ndim == 1 else shape
        check_tensor("bias", bias, shape=bias_shape, dtypes=FLOAT_DTYPES, device=device)
    if segments is not None:
        check_tensor("segments", segments, shape=shape, dtypes=INT_DTYPES, device=device)
        segments = segments.long()
    keep = check_keep(keep, samples, segments, device)
    check_count("min_keep", min_keep)
    if segments is not None and readable(segments):
        n = keep.shape[1] if isinstance(keep, Tensor) and keep.ndim == 2 else shape[-1]
        check_segments(segments, candidates if key_mask is None else candidates & key_mask, n)
    most = math.prod(shape) if layout == "packed" else shape[1]
    if capacity is not None:
        _check_capacity(capacity, most)
    return segments, keep, most, most if capacity is None else capacity


def one_of_three(keep: float | int | Tensor) -> tuple[Tensor | None, float | None, int | None]:
    """``keep`` as the raw ops take it: keep, share, count."""
    return (
        keep if isinstance(keep, Tensor) else None,
        keep if isinstance(keep, float) else None,
        keep if isinstance(keep, int) else None,
    )


def check_keep(keep: object, samples: int, segments: Tensor | None, device: torch.device) -> float | int | Tensor:
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
        check_count("keep", keep)
        return int(keep)
    if not 0 <= keep <= 1:
        raise ValueError(f"keep: got {keep}, expected a share from 0 to 1, or an int for a number of tokens")
    return float(keep)


def check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: got {type(value).__name__}, expected an int")
    if value < 0:
        raise ValueError(f"{name}: got {value}, expected at least 0")


def check_segments(segments: Tensor, candidates: Tensor, n: int) -> None:
    bad = candidates & ((segments < 0) | (segments >= n))
    if bool(bad.any()):
        *sample, i = bad.nonzero()[0].tolist()
        name = f"candidate {i} of sample {sample[0]}" if sample else f"candidate {i}"
        raise ValueError(f"segments: {name} has {int(segments[bad][0])}, expected 0 to {n - 1}")


def _check_capacity(capacity: int, most: int) -> None:
    check_count("capacity", capacity)
    if capacity > most:
        raise ValueError(f"capacity: got {capacity}, expected at most the {most} tokens of a sample")


def check_fits(lengths: Tensor, capacity: int, layout: str) -> None:
    if not readable(lengths):
        needed = lengths.sum() if layout == "packed" else lengths
        torch._assert_async((needed <= capacity).all(), "capacity: a sample keeps more tokens than that")
        return
    kept = lengths.tolist()
    kept = [sum(kept)] if layout == "packed" else kept
    most = max(kept, default=0)
    if most > capacity:
        which = "the samples keep" if layout == "packed" else f"sample {kept.index(most)} keeps"
        raise ValueError(f"capacity: got {capacity}, but {which} {most} tokens")


@register_fake("token_select_select")
def _(scores, candidates, key_mask, segments, keep, share, count, min_keep, capacity, layout, cu_seqlens):
    samples = scores.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    rows = 1 if LAYOUTS[layout] == "packed" else samples
    shapes = ((rows, capacity), (samples,), tuple(scores.shape))
    return tuple(scores.new_empty(shape, dtype=torch.int64) for shape in shapes)
