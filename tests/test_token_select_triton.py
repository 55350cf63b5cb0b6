"""token_scores and gather_tokens in Triton, interpreted and compiled; test_token_select_gpu.py runs them on a GPU."""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from token_select_oracles import CASES, Case, made
from torch import Tensor

import lyra_ops
from lyra_ops.testing import assert_within_reference_error

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def interp(test: Callable) -> Callable:
    return pytest.mark.interp(pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")(test))


def run(case: Case, inputs: dict) -> Tensor:
    pytest.importorskip("triton")
    from lyra_ops.token_select import triton

    options = (*inputs["masks"], inputs["limits"], inputs["bias"], inputs["weights"], inputs["scale"])
    options = (*options, case.causal, inputs["lse"], case.per_head, *inputs.get("cu", (None, None)))
    return triton.token_scores(inputs["query"], inputs["key"], *options)


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


PACKED = [
    Case(5, 90, batch=3, masked=True, heads=4, kv_heads=2),
    Case(9, 70, batch=2, causal=True, masked=True, limits=True, bias=True),
    Case(9, 70, batch=2, lse=True, weights=True, masked=True, heads=4, kv_heads=2),
    Case(4, 600, dim=8, batch=2, per_head=True, causal=True),
]


@interp
@pytest.mark.parametrize("case", PACKED, ids=str)
def test_packed_samples_are_those_of_a_batch_bitwise(case: Case):
    inputs = made(case)
    want = run(case, inputs)
    g = torch.Generator().manual_seed(3)

    def packed(t: Tensor | None, dim: int) -> Tensor | None:
        """The samples one after the other, with a few tokens that belong to none on either side."""
        if t is None:
            return None
        row = torch.cat(list(t), dim - 1)[None]
        around = torch.randint(0, 2, (*row.shape[:dim], 3, *row.shape[dim + 1 :]), generator=g).to(row.dtype)
        return torch.cat([around, row, around], dim)

    b, rows, keys = case.batch, case.rows, case.length
    cu = tuple((torch.arange(b + 1) * n + 3).int() for n in (rows, keys))
    if case.batch == 3:  # and one sample without tokens
        cu = tuple(torch.cat([c[:2], c[1:]]) for c in cu)
    many = {
        **inputs,
        **{name: packed(inputs[name], 2) for name in ("query", "key", "lse")},
        **{name: packed(inputs[name], 1) for name in ("limits", "bias")},
        "masks": tuple(packed(mask, 1) for mask in inputs["masks"]),
        "cu": cu,
    }
    got = run(case, many)
    assert torch.equal(got[0, ..., 3:-3], torch.cat(list(want), -1))
    assert (got[0, ..., :3] == 0).all() and (got[0, ..., -3:] == 0).all()


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


def moving() -> list[Tensor]:
    """Tensors (B, L, ...), the last one (P, B, L)."""
    g = torch.Generator().manual_seed(5)
    return [
        torch.randn(3, 21, 300, generator=g),
        torch.randn(3, 21, 8, generator=g).bfloat16(),
        torch.randn(3, 2, 21, 12, generator=g).half().transpose(1, 2),  # keys: heads outside of tokens
        torch.rand(3, 21, generator=g) < 0.5,
        torch.randint(0, 99, (3, 21, 3), generator=g).to(torch.uint8)[..., ::2],
        torch.randn(3, 21, 2, 3, 2, generator=g, dtype=torch.complex128).transpose(2, 4),
        torch.randn(3, 21, 0, generator=g),
        torch.randint(-(2**40), 2**40, (4, 3, 21), generator=g),
    ]


@interp
@pytest.mark.parametrize("flat", [False, True])
def test_gather(flat: bool):
    from lyra_ops.token_select import reference, triton

    g = torch.Generator().manual_seed(6)
    index = torch.randint(-1, 63 if flat else 21, (2 if flat else 3, 17), generator=g)
    tensors = moving()
    planes, fill = [False] * 7 + [True], [-1.5, 2.0, 0.0, 1.0, 255.0, -3.0, 0.0, -100.0]
    got = triton.gather_tokens(tensors, index, planes, fill, flat)
    for t, p, value, out in zip(tensors, planes, fill, got):
        assert torch.equal(out, reference.take(t, index, value, p, flat))


@interp
@pytest.mark.parametrize("layout", ["right", "left", "packed"])
def test_gather_by_the_face_and_its_gradient(layout: str):
    candidates = torch.ones(3, 21, dtype=torch.bool)
    selection = lyra_ops.select_tokens(torch.rand(3, 21), candidates, keep=0.4, layout=layout, backend="reference")
    results = []
    for backend in ("triton", "reference"):
        leaves = [t.clone().requires_grad_(t.is_floating_point()) for t in moving()]
        out = lyra_ops.gather_tokens(selection, *leaves, fill=1, backend=backend)
        torch.autograd.backward(out[:3], [torch.arange(o.numel()).view(o.shape).to(o.dtype) for o in out[:3]])
        results.append([*out, *(leaf.grad for leaf in leaves[:3])])
    for ours, theirs in zip(*results):
        assert torch.equal(ours, theirs)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["_norms_kernel", "_merge_kernel", "_shares_kernel", "_gather_kernel"])
def test_compiles_for_a_gpu(name: str, packed: bool):
    triton = pytest.importorskip("triton")
    from lyra_ops.token_select import triton as kernels

    kernel = getattr(kernels, name)
    sizes = {"PER_HEAD": packed, "SPLIT": 512, "ROWS": 64, "KEYS": 64, "D": 128, "WIDE": False, "PACKED": packed}
    sizes |= {"FLAT": packed, "CHANNELS": 64}
    constants = {name: value for name, value in sizes.items() if name in kernel.arg_names}
    types = dict.fromkeys(("query", "key"), "*bf16") | dict.fromkeys(("scale",), "fp32") | {"has_bias": "i1"}
    types |= dict.fromkeys(("row_list", "key_list", "numbers", "ends"), "*i32")
    types |= dict.fromkeys(("starts_q", "starts_k", "index"), "*i64") | {"first_splits": "*i32"}
    types |= dict.fromkeys(("to", "tensor"), "*i16")
    types |= dict.fromkeys(("scores", "base", "factor", "part_largest", "part_sum", "weights", "bias"), "*fp32")
    signature = {arg: "constexpr" if arg in constants else types.get(arg, "i32") for arg in kernel.arg_names}
    source = triton.compiler.ASTSource(kernel, signature, constants)
    target = triton.backends.compiler.GPUTarget("cuda", 80, 32)
    multiplies = name in ("_norms_kernel", "_shares_kernel")
    assert ("mma.sync" in triton.compile(source, target=target).asm["ptx"]) == multiplies
