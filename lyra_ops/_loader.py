"""Loads the compiled ops, `_C.so`, and remembers why where it cannot.

Importing `lyra_ops` never fails for want of the library: the reference backend serves, and whoever asks for a compiled
backend by name is told the reason kept here.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("_C.so")
HOW_TO_BUILD = "build it with `make build` in the source tree, or reinstall the package with pip"


@functools.cache
def build_info() -> dict[str, str]:
    """What the library was built from and with; empty where no build left its record."""
    try:
        return json.loads(LIBRARY.with_name("build_info.json").read_text())
    except (OSError, ValueError):
        return {}


@functools.cache
def failure() -> str | None:
    """Loads the library on the first call; returns None, or why there are no compiled ops."""
    if not LIBRARY.exists():
        return f"{LIBRARY} does not exist: {HOW_TO_BUILD}"
    try:
        torch.ops.load_library(str(LIBRARY))
    except (OSError, RuntimeError) as error:
        return _explain(str(error))
    return None


def missing(op: str, device: str) -> str | None:
    """None if the raw op ``lyra::<op>`` is compiled for ``device`` ("cpu" or "cuda"), else why not."""
    if (reason := failure()) is not None:
        return reason
    key = {"cpu": "CPU", "cuda": "CUDA"}[device]
    if hasattr(torch.ops.lyra, op) and torch._C._dispatch_has_kernel_for_dispatch_key(f"lyra::{op}", key):
        return None
    if device == "cuda" and (reason := build_info().get("cuda_missing")):
        return f"the library has no CUDA kernels: {reason}"
    commit = build_info().get("commit", "unknown")
    return f"the library (built from commit {commit}) has no {key} implementation of {op}: {HOW_TO_BUILD}"


def _explain(error: str) -> str:
    """Words for the dynamic linker's message, with what to do about it."""
    info = build_info()
    built = f"built for torch >= {info.get('torch_abi_target', '2.10')} (with {info.get('torch', 'unknown')}), "
    skew = built + f"this is torch {torch.__version__}"
    error = error.strip().splitlines()[0]
    if "undefined symbol" in error:
        return f"{error} ({skew}): {HOW_TO_BUILD}"
    if any(sign in error for sign in ("file too short", "invalid ELF", "cannot read", "wrong ELF", "ELF load command")):
        return f"{error} (the file is damaged or for another machine): {HOW_TO_BUILD}"
    if "GLIBC" in error:
        return f"{error} (built on a newer Linux than this one): {HOW_TO_BUILD}"
    return f"{error} ({skew}): {HOW_TO_BUILD}"
