"""Fast, exact ops for multimodal language models. Needs torch alone."""

from lyra_ops import integrations, nn
from lyra_ops._backend import backend_of
from lyra_ops.multi_lora import LoraBank, LoraRouting, multi_lora_linear, multi_lora_linears
from lyra_ops.soft_dtw import dtw_path, soft_dtw, soft_dtw_alignment, soft_dtw_from_cost
from lyra_ops.soft_dtw.losses import SoftDTW, SoftDTWLoss, soft_dtw_divergence
from lyra_ops.soft_dtw.packed import soft_dtw_alignment_packed, soft_dtw_packed
from lyra_ops.soft_dtw.statistics import SoftDTWStatistics, pair_cost, soft_dtw_statistics
from lyra_ops.token_select import (
    TokenSelection,
    extract_tokens,
    extract_tokens_packed,
    gather_tokens,
    select_tokens,
    select_tokens_packed,
    token_scores,
    token_scores_packed,
)

__all__ = [
    "LoraBank",
    "LoraRouting",
    "SoftDTW",
    "SoftDTWLoss",
    "SoftDTWStatistics",
    "TokenSelection",
    "backend_of",
    "dtw_path",
    "extract_tokens",
    "extract_tokens_packed",
    "gather_tokens",
    "integrations",
    "multi_lora_linear",
    "multi_lora_linears",
    "nn",
    "pair_cost",
    "select_tokens",
    "select_tokens_packed",
    "soft_dtw",
    "soft_dtw_alignment",
    "soft_dtw_alignment_packed",
    "soft_dtw_divergence",
    "soft_dtw_from_cost",
    "soft_dtw_packed",
    "soft_dtw_statistics",
    "token_scores",
    "token_scores_packed",
]
