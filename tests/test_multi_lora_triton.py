"""The Triton kernels of multi_lora without a GPU: run by the interpreter, and compiled for one."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
from multi_lora_oracles import BF16, COMMON_CASES, Case, Problem, expand, make, outer, shrink
from torch import Tensor

from lyra_ops.testing import assert_within_reference_error

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def interp(test):
    """Marks a test that the interpreter runs."""
    return pytest.mark.interp(pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")(test))


@pytest.fixture(scope="module")
def kernels() -> SimpleNamespace:
    pytest.importorskip("triton")
    from lyra_ops.multi_lora import triton

    return triton


def run_shrink(kernels, p: Problem) -> Tensor:
    h = torch.full(p.h.shape, torch.nan)
    kernels.shrink_(h, p.x, p.bank, p.table, *p.plan.values(), p.seed, p.drop)
    return h


def run_expand(kernels, p: Problem, y: Tensor) -> Tensor:
    y, plan = y.clone(), p.plan
    kernels.expand_(y, p.h, p.bank, p.table, p.scaling, plan["ids"], p.weights, plan["present"], p.seed, p.drop)
    return y


def run_outer(kernels, p: Problem) -> Tensor:
    lists = (p.plan[name] for name in ("starts", "pairs", "chunks"))
    return kernels.outer(p.h, p.x, p.table, p.scaling, p.weights, *lists, p.seed, p.drop, p.rows)


@interp
@pytest.mark.parametrize("case", [*COMMON_CASES, Case(5, (16,), 200, BF16, drop=65536)], ids=str)
def test_as_right_as_plain_torch(kernels, case):
    p = make(case)
    y = torch.randn(p.x.shape, generator=torch.Generator().manual_seed(9)).to(p.x.dtype)
    results = {"shrink": run_shrink(kernels, p), "expand": run_expand(kernels, p, y), "outer": run_outer(kernels, p)}
    truths = {"shrink": shrink, "expand": lambda p, dtype: expand(p, y, dtype), "outer": outer}
    for name, got in results.items():
        plain, exact = truths[name](p, torch.float32), truths[name](p, torch.float64)
        assert_within_reference_error(got, plain, exact, name=name)
    idle = (p.ids < 0).all(1)
    assert torch.equal(results["expand"][idle].view(torch.int8), y[idle].view(torch.int8))


@interp
def test_no_tokens(kernels):
    p = make(Case(0, (4, 2), 24, BF16))
    assert run_shrink(kernels, p).shape == (0, 1, 7)
    assert run_expand(kernels, p, p.x).shape == (0, 24)
    assert torch.equal(run_outer(kernels, p), torch.zeros(6, 24))


@interp
def test_operators_are_registered_as_they_behave(kernels):
    p = make(Case(9, (4, 2), 24, drop=9000))
    tests = ("test_schema", "test_faketensor")
    h, y = torch.zeros(p.h.shape), p.x.nan_to_num()
    p.h = p.h.nan_to_num()
    plan = tuple(p.plan.values())
    torch.library.opcheck(kernels.shrink_, (h, y, p.bank, p.table, *plan, p.seed, p.drop), test_utils=tests)
    expanded = (y, p.h, p.bank, p.table, p.scaling, plan[0], None, plan[4], p.seed, p.drop)
    torch.library.opcheck(kernels.expand_, expanded, test_utils=tests)
    summed = (p.h, y, p.table, p.scaling, None, *plan[1:4], p.seed, p.drop, p.rows)
    torch.library.opcheck(kernels.outer, summed, test_utils=tests)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("name", ["_shrink_kernel", "_expand_kernel", "_outer_kernel"])
def test_compiles_for_a_gpu(kernels, name):
    triton = pytest.importorskip("triton")
    kernel = getattr(kernels, name)
    sizes = {"MASKED": True, "WEIGHTED": True, "WIDE": False, "TOKENS": 64, "PAIRS": 64, "RANKS": 64, "COLUMNS": 64}
    constants = {name: value for name, value in sizes.items() if name in kernel.arg_names}
    types = dict.fromkeys(("x", "y", "z", "bank"), "*bf16") | dict.fromkeys(("h", "out", "scaling", "weights"), "*fp32")
    types |= dict.fromkeys(("table", "ids", "starts", "pairs", "chunks", "present"), "*i32") | {"seed": "*i64"}
    signature = {arg: "constexpr" if arg in constants else types.get(arg, "i32") for arg in kernel.arg_names}
    source = triton.compiler.ASTSource(kernel, signature, constants)
    target = triton.backends.compiler.GPUTarget("cuda", 80, 32)
    assert "mma.sync" in triton.compile(source, target=target).asm["ptx"]
