"""Where the barriers of headers stand, and whether a check fails without one of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest


def barriers(*headers: Path) -> dict[str, tuple[Path, int, int, str]]:
    """{name: switch of `build_switched`} that leaves out a barrier, or a wait for copies or warps."""
    found = {}
    for header in headers:
        text = header.read_text()
        for match in re.finditer(r"(__sync\w+|warp_arrive|warp_await|wait_for_copies)(<[^<>]+>)?(?=\()", text):
            line = text.count("\n", 0, match.start()) + 1
            value = match[1].endswith("_or")
            instead = f"(WITHOUT ? own_value : {match[0]})" if value else f"if (!WITHOUT) {match[0]}"
            found[f"{match[1]}-{header.name}-{line}"] = header, *match.span(), instead
    return found


def assert_needed(number: int, monkeypatch: pytest.MonkeyPatch, checks: Iterable[Callable[[], None]]) -> None:
    """Some check of a module of `build_switched` fails while that one of its switches is on."""
    monkeypatch.setenv("LYRA_WITHOUT", str(number))
    with pytest.raises((AssertionError, RuntimeError)):
        for check in checks:
            check()
