"""The CPU sweeps give the same bits with AVX-512, AVX2 and neither.

The library holds one function for each (`LYRA_SIMD`) and takes, when it is loaded, the one that fits the CPU. Here the
same source is compiled for each instruction set that this CPU has, so nothing in the library has to choose.
"""

from __future__ import annotations

import ctypes
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from soft_dtw_oracles import assert_gradient_close, random
from torch import Tensor

import lyra_ops

ROOT = Path(__file__).parents[1]
NEEDED = {
    "x86-64": set(),
    "x86-64-v3": {"avx2", "fma", "bmi2"},
    "x86-64-v4": {"avx2", "fma", "bmi2", "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
}
pytestmark = pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() != "x86_64", reason="the instruction sets are those of x86-64"
)


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Callable[..., tuple[Tensor, ...]]]:
    flags = set(Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0].split())
    folder, found = tmp_path_factory.mktemp("simd"), {}
    include = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}"]
    options = ["-shared", "-fPIC", "-O2", "-ftree-vectorize", "-std=c++20", "-ffp-contract=off", "-Wno-psabi"]
    for name in (name for name, needed in NEEDED.items() if needed <= flags):
        source, library = ROOT / "tests" / "host_shim" / "soft_dtw_stripes.cpp", folder / f"{name}.so"
        subprocess.run(["g++", *options, f"-march={name}", *include, str(source), "-o", str(library)], check=True)
        found[name] = caller(ctypes.CDLL(str(library)).sweep)
    return found


def caller(function) -> Callable[..., tuple[Tensor, ...]]:
    pointer, whole = ctypes.c_void_p, ctypes.c_int64
    function.restype = ctypes.c_double
    function.argtypes = [pointer, whole, whole, ctypes.c_double, whole, pointer]
    function.argtypes += [ctypes.c_int, ctypes.c_bool, pointer, pointer]

    def sweep(
        cost: Tensor, gamma: float, band: int, drop: Tensor | None, store: int, chained: bool
    ) -> tuple[Tensor, ...]:
        grad, of_drop = torch.empty_like(cost), torch.empty(len(cost))
        given = None if drop is None else drop.data_ptr()
        results = grad.data_ptr(), of_drop.data_ptr()
        value = function(cost.data_ptr(), *cost.shape, gamma, band, given, store, chained, *results)
        return torch.tensor(value, dtype=torch.float32), grad, of_drop if drop is not None else of_drop[:0]

    return sweep


@pytest.mark.parametrize("store", [16, 8])
@pytest.mark.parametrize("dropping", [False, True])
@pytest.mark.parametrize(("n", "m", "gamma", "band"), [(120, 64, 1.0, -1), (37, 90, 0.05, 9), (9, 5, 30.0, -1)])
def test_all_instruction_sets_give_the_same_bits(sweeps, n, m, gamma, band, dropping: bool, store: int) -> None:
    cost = random(n, m, dtype=torch.float32).square()
    drop = random(n, seed=1, dtype=torch.float32).abs() if dropping else None
    of_library = lyra_ops_gradient(cost, gamma, band, drop, store)
    for name, sweep in sweeps.items():
        for chained in (False, True):
            for got, want in zip(sweep(cost, gamma, band, drop, store, chained), of_library, strict=True):
                assert torch.equal(got, want), (name, chained)
    exact = lyra_ops.soft_dtw_alignment(
        cost[None].double(),
        gamma=gamma,
        band=band if band >= 0 else None,
        drop_cost=None if drop is None else drop[None].double(),
        backend="reference",
    )
    assert_gradient_close(of_library[1][None], exact, store)


def lyra_ops_gradient(cost: Tensor, gamma: float, band: int, drop: Tensor | None, store: int) -> tuple[Tensor, ...]:
    lengths = torch.tensor([cost.shape[0]]), torch.tensor([cost.shape[1]])
    drops = None if drop is None else drop[None]
    value, grad, of_drop, _ = torch.ops.lyra.soft_dtw_gradient(
        cost[None], *lengths, gamma, None, band, None, None, drops, store, False
    )
    return value[0], grad[0], of_drop.flatten()
