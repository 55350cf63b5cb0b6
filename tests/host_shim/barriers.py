"""Where a header's barriers stand, and whether a check fails without one of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType

import pytest


def barriers(header: Path) -> dict[str, int]:
    """{name: place} of the header's statements that are a barrier or a wait for copies."""
    text = header.read_text()
    found = re.finditer(r"(\w+ = )?(__sync\w+|wait_for_copies)(<0>)?\(", text)
    return {f"{match[2]}-line{text.count(chr(10), 0, match.start()) + 1}": match.start() for match in found}


def assert_needed(
    number: int,
    kernels: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    checks: Iterable[Callable[[ModuleType], None]],
    orders: Iterable[tuple[str, int]],
) -> None:
    """Some check fails while the kernels, of `build_with_switches`, leave out that one of their switches."""
    monkeypatch.setenv("LYRA_WITHOUT", str(number))
    with pytest.raises((AssertionError, RuntimeError)):
        for check in checks:
            for order in orders:
                kernels.configure(*order)
                check(kernels)
