"""Score, select and gather in one call."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lyra_ops.token_select.gather import gather_tokens
from lyra_ops.token_select.scores import token_scores
from lyra_ops.token_select.selection import TokenSelection, select_tokens


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
