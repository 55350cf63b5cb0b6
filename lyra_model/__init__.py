"""The slim omni model: speech and text in, text out, on top of lyra_ops.

Importing it is free: transformers comes in with the first use of a name below, so that `lyra env` and `lyra --help`
answer at once and without it. That first use also makes the model known to transformers' Auto classes.
"""

from __future__ import annotations

from typing import Any

__all__ = ["LyraConfig", "LyraForConditionalGeneration", "LyraProcessor", "load"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lyra_model import auto

    return getattr(auto, name)
