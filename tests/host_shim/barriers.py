"""Kernels without one of their barriers each, to see that a check fails then."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType

import pytest


def mutants(header: Path) -> dict[str, str]:
    """The header without each of its barriers, and without each wait for copies."""
    source = header.read_text()
    made = {}
    for match in re.finditer(r"(__sync\w+|wait_for_copies)(<0>)?(?=\()", source):
        start, end = match.span()
        rest = source[end:].removeprefix("()")  # f(x) leaves (x)
        made[f"{match[1]}-line{source.count(chr(10), 0, start) + 1}"] = source[:start] + rest
    return made


def assert_needed(
    name: str,
    header: Path,
    build: Callable[..., ModuleType],
    source: str,
    folder: Path,
    checks: Iterable[Callable[[ModuleType], None]],
    orders: Iterable[tuple[str, int]],
) -> None:
    """Some check of the module made of tests/host_shim/<source> fails with that mutant of the header."""
    copy = folder / header.parent.name
    shutil.copytree(header.parent, copy)
    (copy / header.name).write_text(mutants(header)[name])
    mutant = build(source, first=folder)
    with pytest.raises((AssertionError, RuntimeError)):
        for check in checks:
            for order in orders:
                mutant.configure(*order)
                check(mutant)
