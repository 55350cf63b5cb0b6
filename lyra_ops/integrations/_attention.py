"""Shows the queries and keys of one attention module, through the registry of functions that all models share."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_LOCK = threading.Lock()
_WATCHERS: dict[nn.Module, Callable[[Tensor, Tensor, float | None], None]] = {}
_OWN: dict[str, Callable | None] = {}  # what the registry held of its own under a name that is lent
_LOANS: dict[str, int] = {}


def watch(module: nn.Module, name: str, watcher: Callable[[Tensor, Tensor, float | None], None]) -> Callable[[], None]:
    """``watcher(query, key, scaling)`` before each attention of ``module``, until the function returned is called.

    Until then the registry has, under ``name``, a function that watches and calls the one it had. Models in other
    threads go through it, too, and may watch and end in any order.
    """
    with _LOCK:
        if name not in _LOANS:
            watching = _watching(ALL_ATTENTION_FUNCTIONS.get_interface(name, None))
            _OWN[name] = ALL_ATTENTION_FUNCTIONS._local_mapping.get(name)
            ALL_ATTENTION_FUNCTIONS[name] = watching
        _LOANS[name] = _LOANS.get(name, 0) + 1
        _WATCHERS[module] = watcher

    def end() -> None:
        with _LOCK:
            del _WATCHERS[module]
            _LOANS[name] -= 1
            if _LOANS[name] == 0:
                del _LOANS[name]
                own = _OWN.pop(name)
                if own is None:
                    del ALL_ATTENTION_FUNCTIONS[name]
                else:
                    ALL_ATTENTION_FUNCTIONS[name] = own

    return end


def _watching(function: Callable | None) -> Callable:
    def attention(module: nn.Module, query: Tensor, key: Tensor, *args, **kwargs):
        watcher = _WATCHERS.get(module)
        if watcher is not None:
            watcher(query, key, kwargs.get("scaling"))
        # Under "eager" the registry has nothing: each family brings its own.
        inner = function or sys.modules[type(module).__module__].eager_attention_forward
        return inner(module, query, key, *args, **kwargs)

    return attention
