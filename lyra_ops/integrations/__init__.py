"""One-line patches of other people's models; each is imported when used, so `import lyra_ops` needs torch alone."""

from __future__ import annotations

import importlib

_HOMES = {
    "RoutedLora": "multi_lora",
    "TokenExtractor": "token_extractor",
    "apply_multi_lora": "multi_lora",
    "apply_token_extractor": "token_extractor",
    "is_routed": "multi_lora",
    "modality_adapters": "multi_lora",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
