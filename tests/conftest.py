"""What every test gets: uninitialised memory is NaN, GPU tests are skipped out loud, and their outcomes can be kept."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
OPS = [file.parent.name for file in ROOT.glob("lyra_ops/*/reference.py")]


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """torch fills what it allocates with NaN, also for C++ callers, so an element that a kernel leaves out is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu-report", type=Path, help="write the outcomes of the GPU tests per kernel path to this file")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    outcomes: dict[str, Counter] = defaultdict(Counter)
    for category in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(category, ()):
            # A test counts once: by its call, or by the set-up that kept it from being called.
            if "gpu" in getattr(report, "keywords", ()) and report.when != "teardown":  # a file that fails has none
                outcomes[kernel_path(report.nodeid)][report.outcome] += 1
    total = sum(outcomes.values(), Counter())
    if total:
        told = ", ".join(f"{total[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped"))
        hint = "" if total["passed"] + total["failed"] else " - `make gpu-check` on a GPU machine runs them"
        terminalreporter.write_line(f"GPU TESTS: {told}{hint}")
    if path := config.getoption("gpu_report"):
        none = {"passed": 0, "failed": 0, "skipped": 0}
        path.write_text(json.dumps({name: {**none, **count} for name, count in outcomes.items()}))


def kernel_path(test: str) -> str:
    """`soft_dtw/cuda`: the op by the test file's name, the backend by the test's name or parameters, or cuda."""
    name = Path(test.split("::")[0]).stem.removeprefix("test_")
    op = next((op for op in OPS if name.startswith(op)), name)
    compiled = (ROOT / "csrc" / op / f"{op}.cu").exists()
    told = [backend for backend in ("triton", "reference") if backend in test]
    return f"{op}/{(told or ['cuda' if compiled else 'reference'])[0]}"
