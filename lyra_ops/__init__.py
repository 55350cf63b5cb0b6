"""Fast, exact ops for multimodal language models. Needs torch alone."""

from lyra_ops._backend import backend_of
from lyra_ops.soft_dtw import dtw_path, soft_dtw, soft_dtw_alignment, soft_dtw_from_cost

__all__ = ["backend_of", "dtw_path", "soft_dtw", "soft_dtw_alignment", "soft_dtw_from_cost"]
