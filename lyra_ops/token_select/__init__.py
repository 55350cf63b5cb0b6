"""Drops the modality tokens that a text query does not look at: score, select, gather (the paper's LMME).

    scores = token_scores(query, key, query_mask=..., key_mask=...)                 # (B, L)
    selection = select_tokens(scores, candidates, keep=0.7, min_keep=32)            # which tokens stay
    hidden, position_ids = gather_tokens(selection, hidden, position_ids)           # (B, K, D), (3, B, K)

That is the rule of the published Lyra code. No attention map is built, so it runs beside any attention implementation.
"""

from lyra_ops.token_select.extract import extract_tokens, extract_tokens_packed
from lyra_ops.token_select.gather import gather_tokens
from lyra_ops.token_select.scores import token_scores, token_scores_packed
from lyra_ops.token_select.selection import TokenSelection, select_tokens, select_tokens_packed

__all__ = [
    "TokenSelection",
    "extract_tokens",
    "extract_tokens_packed",
    "gather_tokens",
    "select_tokens",
    "select_tokens_packed",
    "token_scores",
    "token_scores_packed",
]
