"""`lyra env` tells the truth: each case is a real package copy with a real fault, asked in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lyra_ops import _loader

ROOT = Path(__file__).parents[1]
USE = """
import torch, lyra_ops
cost = torch.ones(1, 3, 3)
assert lyra_ops.soft_dtw_from_cost(cost).isfinite()
try:
    lyra_ops.soft_dtw_from_cost(cost, backend="cpu")
except ValueError as error:
    print(error)
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder with a copy of lyra_ops to import from; returns where its library is."""
    shutil.copytree(ROOT / "lyra_ops", tmp_path / "lyra_ops", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "lyra_ops" / "_C.so"


def python(library: Path, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, **environment}
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, cwd=library.parents[1], env=environ)


def report(library: Path, **environment: str) -> str:
    done = python(library, "-m", "lyra_ops.env", **environment)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) <= 50, "more than one screen"
    return " ".join(done.stdout.split())


def check_reference_serves_and_cpu_says(library: Path, reason: str) -> None:
    used = python(library, "-c", USE)
    assert used.returncode == 0, used.stderr
    assert used.stdout.startswith("backend: ")
    assert reason in used.stdout


def test_sound_library(package: Path) -> None:
    told = report(package)
    assert f"torch {torch.__version__}" in told
    assert f"built from {_loader.build_info()['commit']}" in told
    assert "soft_dtw on cpu cpu usable: cpu, reference" in told


def test_no_library(package: Path) -> None:
    package.unlink()
    told = report(package)
    assert "NOT LOADED" in told
    assert "_C.so does not exist: build it with `make build`" in told
    assert "soft_dtw on cpu reference" in told
    check_reference_serves_and_cpu_says(package, "does not exist")


# The ELF header, program headers and most of the code are there at 40 %, which a plain dlopen dies of by SIGBUS.
@pytest.mark.parametrize("share", [0, 0.4, 0.999])
def test_library_cut_short(package: Path, share: float) -> None:
    whole = package.read_bytes()
    package.write_bytes(whole[: int(len(whole) * share)])
    told = report(package)
    assert "NOT LOADED" in told
    assert "broken copy or download" in told
    assert "build it with `make build`" in told
    check_reference_serves_and_cpu_says(package, "broken copy or download")


def test_library_overwritten(package: Path) -> None:
    content = bytearray(package.read_bytes())
    content[64:4096] = bytes(4096 - 64)
    package.write_bytes(content)
    assert "NOT LOADED" in report(package)
    check_reference_serves_and_cpu_says(package, "_C.so")


def test_library_for_another_torch(package: Path, tmp_path: Path) -> None:
    """A stand-in that needs a torch function which this torch does not have."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler to make the stand-in with")
    source = tmp_path / "other.cpp"
    source.write_text('extern "C" int torch_of_tomorrow(); int value = torch_of_tomorrow();')
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", package], check=True)
    told = report(package)
    assert "undefined symbol: torch_of_tomorrow" in told
    assert f"this is torch {torch.__version__}" in told
    check_reference_serves_and_cpu_says(package, "undefined symbol: torch_of_tomorrow")


def test_neither_nvcc_nor_gpu(package: Path) -> None:
    told = report(package, PATH="/nonexistent", CUDA_VISIBLE_DEVICES="")
    assert "nvcc not found" in told
    assert "GPU none that torch can use" in told
    assert "GPU: none found; the CPU ops are complete" in told


def test_proof_of_a_kernel_path_is_the_newest_run(package: Path) -> None:
    for name, date, passed in (
        ("old-gpu", "2026-01-01T00:00:00+00:00", 7),
        ("new-gpu", "2026-02-01T00:00:00+00:00", 9),
    ):
        run = {"device": name, "commit": "abc", "date": date}
        run["tests"] = {"soft_dtw/cuda": {"passed": passed, "failed": 0, "skipped": 0}}
        folder = package.parents[1] / "bench" / "results" / name
        folder.mkdir(parents=True)
        (folder / "gpu-check.json").write_text(json.dumps(run))
    assert "cuda: 9 passed, 0 failed, 0 skipped on new-gpu at abc (2026-02-01)" in report(package)


def test_unproven_path_is_called_so(package: Path) -> None:
    if _loader.missing("soft_dtw_forward", "cuda"):
        pytest.skip("the library under test holds CPU ops only")
    assert "cuda: never run on a GPU" in report(package)


def test_json_holds_every_reason(package: Path) -> None:
    package.unlink()
    told = json.loads(python(package, "-m", "lyra_ops.env", "--json").stdout)
    assert "does not exist" in told["ops"]["soft_dtw"]["unusable"]["cpu"]["cpu"]
    assert told["ops"]["soft_dtw"]["chosen"] == {"cpu": "reference", "cuda": "reference"}
