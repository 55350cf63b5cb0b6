"""Which implementation serves a call: chosen here for every op, and told to whoever asks.

Backends: ``cuda`` (compiled), ``triton``, ``cpu`` (compiled), ``reference`` (plain torch, any device, any call).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar

import torch

from lyra_ops import _loader
from lyra_ops._checks import check_option

BACKENDS = ("cuda", "triton", "cpu", "reference")

_only_asked = ContextVar("only_asked", default=False)


class _Answer(Exception):
    """Carries the choice out of an op that was only asked for it."""


def choose(op: str, why_not: Mapping[str, str | None], backend: str | None) -> str:
    """Returns ``backend`` or, where it is None, the first of BACKENDS that can serve the call.

    ``why_not`` says per backend why it cannot serve this call, None where it can; a backend it does not name does not
    exist for the op. An op calls this after it has checked its arguments and before it works.
    """
    if backend is None:
        chosen = next(name for name in BACKENDS if why_not.get(name, "") is None)
    else:
        check_option("backend", backend, BACKENDS)
        reason = why_not.get(backend, f"{op} has no such implementation")
        if reason is not None:
            raise ValueError(f"backend: {backend!r} cannot serve this call of {op}: {reason}")
        chosen = backend
    if not torch.compiler.is_compiling() and _only_asked.get():
        raise _Answer(chosen)
    return chosen


@torch.compiler.assume_constant_result
def missing_kernel(raw_op: str, device: str) -> str | None:
    """None if the library holds the raw op ``lyra::<raw_op>`` for ``device`` ("cpu" or "cuda"), else why not."""
    return _loader.missing(raw_op, device)


def register_fake(raw_op: str) -> Callable[[Callable], Callable]:
    """`torch.library.register_fake` of ``lyra::<raw_op>``; nothing where the library has no such op."""
    declared = _loader.failure() is None and hasattr(torch.ops.lyra, raw_op)
    return torch.library.register_fake(f"lyra::{raw_op}") if declared else lambda fake: fake


def backend_of(op: Callable, /, *args: object, **kwargs: object) -> str:
    """Name of the backend that ``op(*args, **kwargs)`` would run on; nothing is computed.

    >>> lyra_ops.backend_of(lyra_ops.soft_dtw_from_cost, torch.rand(2, 5, 4))
    'cpu'

    Raises what the call would raise: ValueError with the reason where ``backend=`` names one that cannot serve it.
    """
    token = _only_asked.set(True)
    try:
        op(*args, **kwargs)
    except _Answer as answer:
        return answer.args[0]
    finally:
        _only_asked.reset(token)
    raise TypeError(f"op: got {getattr(op, '__name__', op)!r}, expected a function of lyra_ops that has backends")
