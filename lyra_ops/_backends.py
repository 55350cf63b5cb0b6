"""Which implementation of an op runs: chosen by the device, or asked for by name, and never swapped in silence.

An op declares its implementations once, at import, and the object registers itself here:

    BACKENDS = Backends("soft_dtw", raw="soft_dtw_forward")
    ...
    backend = BACKENDS.choose(x.device, backend)     # "cuda", "triton", "cpu" or "reference"
"""

from __future__ import annotations

import importlib.util

import torch

from lyra_ops import _loader
from lyra_ops._checks import check_option

NAMES = ("cuda", "triton", "cpu", "reference")
_DEVICE = {"cuda": "cuda", "triton": "cuda", "cpu": "cpu"}

_ops: dict[str, Backends] = {}


class Backends:
    """The implementations of one op; the best that is usable on a device comes first.

    ``raw`` is the compiled op (of namespace ``lyra``) whose presence stands for the compiled backends, or None where
    the op has none yet; ``triton`` says whether the op has a Triton kernel.
    """

    def __init__(self, op: str, *, raw: str | None = None, triton: bool = False) -> None:
        self.op = op
        # Settled here, not in choose(), so that choose() is plain dictionary work that torch.compile can trace.
        self.missing: dict[str, str | None] = {
            "cuda": _loader.missing(raw, "cuda") if raw else f"{op} has no compiled kernel yet",
            "triton": _triton_missing() if triton else f"{op} has no Triton kernel",
            "cpu": _loader.missing(raw, "cpu") if raw else f"{op} has no compiled kernel yet",
            "reference": None,
        }
        _ops[op] = self

    def why_not(self, backend: str, device: str) -> str | None:
        """None if ``backend`` can serve tensors on ``device`` ("cpu", "cuda", ...), else the reason."""
        if backend != "reference" and _DEVICE[backend] != device:
            return f"it works on {_DEVICE[backend]} tensors, these are on {device}"
        return self.missing[backend]

    def choose(self, device: torch.device, backend: str | None = None) -> str:
        """The backend for tensors on ``device``; ValueError with the reason if the one asked for cannot serve."""
        if backend is not None:
            check_option("backend", backend, NAMES)
            if (reason := self.why_not(backend, device.type)) is not None:
                raise ValueError(f"backend: got {backend!r}, which cannot run {self.op} here: {reason}")
            return backend
        return next(name for name in NAMES if self.why_not(name, device.type) is None)


def registered() -> dict[str, Backends]:
    """The ops imported so far, by name."""
    return dict(_ops)


def backend_of(op: str, device: torch.device | str = "cpu", backend: str | None = None) -> str:
    """The backend that ``op`` ("soft_dtw", ...) uses for tensors on ``device``; see ``lyra env`` for the reasons."""
    check_option("op", op, sorted(_ops))
    return _ops[op].choose(torch.device(device), backend)


def _triton_missing() -> str | None:
    return None if importlib.util.find_spec("triton") else "triton is not installed: pip install triton"
