"""token_scores in Triton: in the interpreter, and compiled; on a GPU test_token_select_gpu.py runs the same kernels."""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from token_select_oracles import CASES, Case, made
from torch import Tensor

from lyra_ops.testing import assert_within_reference_error

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def interp(test: Callable) -> Callable:
    return pytest.mark.interp(pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")(test))


def run(case: Case, inputs: dict) -> Tensor:
    pytest.importorskip("triton")
    from lyra_ops.token_select import triton

    options = (*inputs["masks"], inputs["limits"], inputs["bias"], inputs["weights"], inputs["scale"])
    return triton.token_scores(inputs["query"], inputs["key"], *options, case.causal, inputs["lse"], case.per_head)


@interp
@pytest.mark.parametrize("case", CASES, ids=str)
def test_formula(case: Case):
    inputs = made(case)
    got = run(case, inputs)
    assert_within_reference_error(got, inputs["plain"], inputs["exact"])
    if case.masked:
        real = inputs["masks"][1]
        assert (got.mT[~real] == 0).all() if case.per_head else (got[~real] == 0).all()


@interp
def test_strided_views():
    case = Case(20, 90, heads=4, kv_heads=2)
    inputs = made(case)
    want = run(case, inputs)
    for name in ("query", "key"):
        inputs = {**inputs, name: inputs[name].transpose(1, 2)[..., None].repeat(1, 1, 1, 1, 2)[..., 0].transpose(1, 2)}
    assert torch.equal(run(case, inputs), want)


@interp
def test_alone_and_in_a_batch_bitwise():
    case = Case(21, 600, dim=8, heads=4, kv_heads=2)
    alone = made(case)
    want = run(case, alone)[0]
    batch, pads = {**alone}, {"query": (7, 40), "key": (100, 9)}
    for name, pad in pads.items():
        wide = F.pad(alone[name], (0, 0, *pad), value=math.nan)
        batch[name] = torch.cat([torch.full_like(wide, 0.5), wide])
    batch["masks"] = tuple(
        F.pad(torch.ones(2, alone[name].shape[2], dtype=torch.bool), pad) for name, pad in pads.items()
    )
    assert torch.equal(run(case, batch)[1, 100:700], want)


@interp
def test_nan_stays_in_its_sample():
    case = Case(5, 90, batch=2)
    clean = made(case)
    want = run(case, clean)
    bad = {**clean, "key": clean["key"].clone()}
    bad["key"][0, 0, 70, 3] = math.nan
    got = run(case, bad)
    assert got[0].isnan().all()
    assert torch.equal(got[1], want[1])


@interp
def test_nothing_counts():
    case = Case(5, 40, batch=2)
    for rows, keys in ((False, True), (True, False)):
        masks = (torch.full((2, 5), rows), torch.full((2, 40), keys))
        assert (run(case, {**made(case), "masks": masks}) == 0).all()


@interp
def test_says_why_it_cannot():
    from lyra_ops.token_select import triton

    assert triton.why_not(torch.zeros(1, 1, 1, 64)) is None
    assert "float64" in triton.why_not(torch.zeros(1, 1, 1, 64, dtype=torch.float64))
    assert "256 channels" in triton.why_not(torch.zeros(1, 1, 1, 512))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("name", ["_norms_kernel", "_merge_kernel", "_shares_kernel"])
@pytest.mark.parametrize("per_head", [False, True])
def test_compiles_for_a_gpu(name: str, per_head: bool):
    triton = pytest.importorskip("triton")
    from lyra_ops.token_select import triton as kernels

    kernel = getattr(kernels, name)
    sizes = {"PER_HEAD": per_head, "SPLIT": 512, "ROWS": 64, "KEYS": 64, "D": 128, "WIDE": False}
    constants = {name: value for name, value in sizes.items() if name in kernel.arg_names}
    types = dict.fromkeys(("query", "key"), "*bf16") | dict.fromkeys(("scale",), "fp32") | {"has_bias": "i1"}
    types |= dict.fromkeys(("row_list", "key_list", "numbers", "ends"), "*i32")
    types |= dict.fromkeys(("scores", "base", "factor", "part_largest", "part_sum", "weights", "bias"), "*fp32")
    signature = {arg: "constexpr" if arg in constants else types.get(arg, "i32") for arg in kernel.arg_names}
    source = triton.compiler.ASTSource(kernel, signature, constants)
    target = triton.backends.compiler.GPUTarget("cuda", 80, 32)
    assert ("mma.sync" in triton.compile(source, target=target).asm["ptx"]) == (name != "_merge_kernel")
