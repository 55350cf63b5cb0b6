"""Loads the compiled ops, `_C.so`, and remembers why where it cannot.

Importing `lyra_ops` never fails for want of the library: the reference backend serves, and whoever asks for a compiled
backend by name is told the reason kept here.
"""

from __future__ import annotations

import functools
import json
import struct
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
    if (damage := _damage(LIBRARY)) is not None:
        return f"{LIBRARY} {damage}: {HOW_TO_BUILD}"
    try:
        torch.ops.load_library(str(LIBRARY))
    except (OSError, RuntimeError) as error:
        return _explain(str(error.__cause__ or error))  # torch hides the linker's message behind its own
    return None


@functools.cache
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


def _damage(library: Path) -> str | None:
    """What is wrong with the file itself; the dynamic linker would die of a file cut short instead of saying so."""
    with open(library, "rb") as file:
        header = file.read(64)
    if len(header) < 64 or header[:4] != b"\x7fELF":
        return "is not a shared library (broken copy or download)"
    sections_at, entry_size, entries = struct.unpack_from("<Q", header, 40) + struct.unpack_from("<HH", header, 58)
    if (whole := sections_at + entry_size * entries) > (size := library.stat().st_size):
        return f"is cut short: {size} bytes of {whole} (broken copy or download)"
    return None


def _explain(error: str) -> str:
    """The dynamic linker's message with the likely cause and what to do."""
    error = error.strip().splitlines()[0]
    if "wrong ELF" in error or "ELF load command" in error:
        cause = "made for another kind of machine"
    elif "GLIBC" in error:
        cause = "built on a newer Linux than this one"
    else:
        info = build_info()
        target, built_with = info.get("torch_abi_target", "2.10"), info.get("torch", "unknown")
        cause = f"built for torch >= {target} with torch {built_with}; this is torch {torch.__version__}"
    return f"{error} ({cause}): {HOW_TO_BUILD}"
