"""token_select on a GPU, what only a GPU can show; what holds on every backend is tested in test_token_select.py."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from token_select_oracles import CASES, Case, made
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import lyra_ops
from lyra_ops.testing import assert_within_reference_error
from lyra_ops.token_select import triton

pytestmark = pytest.mark.gpu
RAW = torch.ops.lyra


def on_gpu(value: object) -> object:
    if isinstance(value, Tensor):
        return value.cuda()
    return tuple(map(on_gpu, value)) if isinstance(value, tuple) else value


def scores_by(backend: str, case: Case, inputs: dict) -> Tensor:
    options = (*inputs["masks"], inputs["limits"], inputs["bias"], inputs["weights"], inputs["scale"], case.causal)
    given = (inputs["query"], inputs["key"], *options, inputs["lse"], case.per_head)
    raw = triton.token_scores if backend == "triton" else RAW.token_select_scores
    return raw(*given, None, None)


BACKENDS = pytest.mark.parametrize("backend", ["cuda", "triton"])


# --- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.sanitize
@BACKENDS
@pytest.mark.parametrize("case", CASES, ids=str)
def test_scores_as_right_as_plain_torch(case: Case, backend: str):
    inputs = made(case)
    got = scores_by(backend, case, {name: on_gpu(value) for name, value in inputs.items()})
    assert_within_reference_error(got.cpu(), inputs["plain"], inputs["exact"])


LONG = [
    Case(64, 32768, dim=128, heads=28, kv_heads=4),
    Case(64, 5000, dim=128, heads=28, kv_heads=4, causal=True, masked=True, batch=3),
    Case(300, 9000, dim=64, heads=6, kv_heads=2, dtype=torch.float16, weights=True),
    Case(17, 3000, dim=256, heads=8, kv_heads=4, per_head=True),
    Case(16, 4000, dim=128, heads=4, kv_heads=4, dtype=torch.float32),
]


@BACKENDS
@pytest.mark.parametrize("case", LONG, ids=str)
def test_scores_of_long_samples(case: Case, backend: str):
    inputs = made(case)
    got = scores_by(backend, case, {name: on_gpu(value) for name, value in inputs.items()})
    assert_within_reference_error(got.cpu(), inputs["plain"], inputs["exact"])
    if not case.weights:
        torch.testing.assert_close(got.sum(-1), torch.ones_like(got.sum(-1)))


def test_scores_of_131072_keys_by_the_backward_of_attention():
    query = torch.randn(1, 28, 64, 128, device="cuda", dtype=torch.bfloat16)
    key = torch.randn(1, 4, 131072, 128, device="cuda", dtype=torch.bfloat16)
    got = lyra_ops.token_scores(query, key, backend="cuda")
    repeated = key.repeat_interleave(7, dim=1).float()
    value = torch.zeros_like(repeated, requires_grad=True)
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):  # without a matrix
        F.scaled_dot_product_attention(query.float(), repeated, value).sum().backward()
    exact = torch.zeros(131072, device="cuda", dtype=torch.float64)
    for head in range(28):
        logits = query[0, head].double() @ key[0, head // 7].double().T * 128**-0.5
        exact += logits.softmax(-1).sum(0)
    columns, exact = value.grad[0, ..., 0].sum(0) / (28 * 64), exact / (28 * 64)
    assert_within_reference_error(got[0], columns, exact)


@BACKENDS
def test_scores_bitwise_the_same_each_time_and_alone_or_in_a_batch(backend: str):
    case = Case(40, 3000, dim=128, heads=28, kv_heads=4, batch=3)
    inputs = {name: on_gpu(value) for name, value in made(case).items()}
    first = scores_by(backend, case, inputs)
    for _ in range(20):
        assert torch.equal(scores_by(backend, case, inputs), first)
    for b in range(3):
        alone = {**inputs, "query": inputs["query"][b : b + 1], "key": inputs["key"][b : b + 1]}
        assert torch.equal(scores_by(backend, case, alone)[0], first[b])


@pytest.mark.sanitize
def test_packed_scores_are_those_of_each_sample():
    rows, keys = [5, 0, 70, 9], [600, 3, 40, 1100]
    query = torch.randn(1, 4, sum(rows), 64, device="cuda", dtype=torch.bfloat16)
    key = torch.randn(1, 2, sum(keys), 64, device="cuda", dtype=torch.bfloat16)
    ends = [torch.tensor([0, *n]).cumsum(0).int().cuda() for n in (rows, keys)]
    masks = (None,) * 5
    got = RAW.token_select_scores(query, key, *masks, 0.125, False, None, False, *ends)
    for b, (q, k) in enumerate(zip(query.split(rows, 2), key.split(keys, 2))):
        part = got[:, int(ends[1][b]) : int(ends[1][b + 1])]
        assert torch.equal(part, RAW.token_select_scores(q, k, *masks, 0.125, False, None, False, None, None))


# --- select ----------------------------------------------------------------------------------------------------------


@pytest.mark.sanitize
@pytest.mark.parametrize("length", [1, 33, 576, 5000, 40000, 131072])
@pytest.mark.parametrize("values", ["random", "few", "equal", "special"])
@pytest.mark.parametrize("keep", [0.5, 0, 100, 1.0])
def test_select_as_by_a_sort(length: int, values: str, keep: float):
    g = torch.Generator().manual_seed(length)
    scores = torch.rand(2, length, generator=g) ** 8
    if values != "random":
        some = {"few": [0.0, 0.25, -0.5], "equal": [0.125], "special": [0.0, -0.0, math.inf, -math.inf, math.nan, 1.0]}
        scores = torch.tensor(some[values])[torch.randint(len(some[values]), scores.shape, generator=g)]
    candidates, key_mask = torch.rand(2, length, generator=g) < 0.8, torch.rand(2, length, generator=g) < 0.9
    got, want = (
        lyra_ops.select_tokens(s, c, keep=keep, key_mask=m, min_keep=3, capacity=length, backend=backend)
        for (s, c, m), backend in (
            (on_gpu((scores, candidates, key_mask)), "cuda"),
            ((scores, candidates, key_mask), "reference"),
        )
    )
    for ours, theirs in zip(got, want):
        assert torch.equal(ours.cpu(), theirs)


@pytest.mark.sanitize
@pytest.mark.parametrize("layout", ["right", "left", "packed"])
@pytest.mark.parametrize("segments", [1, 3, 20, 700])
@pytest.mark.parametrize("length", [700, 20000])
def test_select_by_segments(length: int, segments: int, layout: str):
    g = torch.Generator().manual_seed(length + segments)
    scores = torch.randint(-9, 9, (3, length), generator=g) / 8
    candidates = torch.rand(3, length, generator=g) < 0.8
    of = torch.randint(segments, (3, length), generator=g)
    keep = torch.rand(3, segments, generator=g, dtype=torch.float64)
    options = {"min_keep": 2, "layout": layout, "capacity": 3 * length if layout == "packed" else length}
    got = lyra_ops.select_tokens(
        *on_gpu((scores, candidates)), keep=keep.cuda(), segments=of.cuda(), backend="cuda", **options
    )
    want = lyra_ops.select_tokens(scores, candidates, keep=keep, segments=of, backend="reference", **options)
    for ours, theirs in zip(got, want):
        assert torch.equal(ours.cpu(), theirs)


# --- gather ----------------------------------------------------------------------------------------------------------


@pytest.mark.sanitize
@pytest.mark.parametrize("layout", ["right", "left", "packed"])
def test_gather_and_its_gradient(layout: str):
    length = 777
    candidates = torch.ones(3, length, dtype=torch.bool)
    selection = lyra_ops.select_tokens(torch.rand(3, length), candidates, keep=0.4, layout=layout, backend="reference")
    tensors = [
        torch.randn(3, length, 896).bfloat16(),
        torch.randn(3, 2, length, 64).transpose(1, 2),
        torch.randint(0, 99, (3, 3, length)),
        torch.rand(3, length) < 0.5,
        torch.randn(3, length, 7, 3, dtype=torch.complex64)[..., ::2],
    ]
    results = []
    for place, backend in (("cuda", "cuda"), ("cpu", "reference")):
        leaves = [t.to(place).requires_grad_() if t.is_floating_point() else t.to(place) for t in tensors]
        out = lyra_ops.gather_tokens(type(selection)(*(t.to(place) for t in selection)), *leaves, backend=backend)
        loss = sum((o.float() * torch.arange(o.numel(), device=place).view(o.shape) % 7).sum() for o in out[:2])
        loss.backward()
        results.append([*out, *(t.grad for t in leaves if t.requires_grad)])
    for ours, theirs in zip(*results):
        assert torch.equal(ours.detach().cpu(), theirs.detach())


def test_gather_of_more_than_two_to_the_31_bytes():
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free GPU memory")
    tensor = torch.randint(0, 100, (1, 700_000, 4096), device="cuda", dtype=torch.int8)
    candidates = torch.ones(1, 700_000, dtype=torch.bool, device="cuda")
    selection = lyra_ops.select_tokens(torch.rand(1, 700_000, device="cuda"), candidates, keep=0.9)
    (got,) = lyra_ops.gather_tokens(selection, tensor, backend="cuda")
    assert torch.equal(got[0], tensor[0, selection.index[0]])


# --- all of it -------------------------------------------------------------------------------------------------------


def step_by_step(query: Tensor, key: Tensor, hidden: Tensor) -> tuple[Tensor, ...]:
    candidates = torch.arange(key.shape[2], device=key.device).expand(key.shape[0], -1) >= 10
    scores = lyra_ops.token_scores(query, key, backend="cuda")
    selection = lyra_ops.select_tokens(scores, candidates, keep=0.5, capacity=key.shape[2], backend="cuda")
    (kept,) = lyra_ops.gather_tokens(selection, hidden, backend="cuda")
    return (*selection, kept)


def whole_call(query: Tensor, key: Tensor, hidden: Tensor) -> tuple[Tensor, ...]:
    candidates = torch.arange(key.shape[2], device=key.device).expand(key.shape[0], -1) >= 10
    selection, (kept,) = lyra_ops.extract_tokens(
        query, key, candidates, hidden, keep=0.5, capacity=key.shape[2], backend="cuda"
    )
    return (*selection, kept)


def inputs(length: int) -> tuple[Tensor, ...]:
    shapes = (2, 4, 16, 64), (2, 2, length, 64), (2, length, 256)
    return tuple(torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)


@pytest.mark.sanitize
@pytest.mark.parametrize("length", [1, 576, 4096, 4097, 30000])
@pytest.mark.parametrize("options", [{}, {"layout": "left"}, {"layout": "packed"}, {"given": True}], ids=str)
def test_the_whole_call_is_bitwise_the_three_steps(length: int, options: dict):
    query, key, hidden = inputs(length)
    positions = torch.randint(0, 99, (3, 2, length), device="cuda")
    query_mask, key_mask, candidates = (torch.rand(2, n, device="cuda") < 0.8 for n in (16, length, length))
    key[~key_mask[:, None].expand(2, 2, length)] = torch.nan
    scoring = {"query_mask": query_mask, "key_mask": key_mask, "backend": "cuda"}
    if options.get("given"):
        scoring |= {"lse": torch.randn(2, 4, 16, device="cuda"), "causal": length >= 16}
    layout = options.get("layout", "right")
    selecting = {"keep": torch.tensor([3, length // 2], device="cuda"), "min_keep": 2, "layout": layout}
    selecting |= {"bias": torch.rand(2, length, device="cuda") / length}
    selecting["capacity"] = 2 * length if layout == "packed" else length
    got, moved = lyra_ops.extract_tokens(query, key, candidates, hidden, positions, **scoring, **selecting)
    scores = lyra_ops.token_scores(query, key, **scoring)
    want = lyra_ops.select_tokens(scores, candidates, key_mask=key_mask, backend="cuda", **selecting)
    for ours, theirs in zip((*got, *moved), (*want, *lyra_ops.gather_tokens(want, hidden, positions))):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("length", "launches"), [(576, 3), (4096, 3), (16384, 5)])
def test_the_launches_of_the_whole_call(length: int, launches: int):
    given = inputs(length)
    whole_call(*given)
    torch.cuda.synchronize()
    candidates = torch.ones(2, length, dtype=torch.bool, device="cuda")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        lyra_ops.extract_tokens(*given[:2], candidates, given[2], keep=99, capacity=99, backend="cuda")
        torch.cuda.synchronize()
    launched = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(launched) == launches, launched


@pytest.mark.parametrize("length", [576, 30000])
def test_the_whole_call_can_be_captured_in_a_graph_and_never_waits(length: int):
    given = inputs(length)
    whole_call(*given)
    torch.cuda.set_sync_debug_mode("error")
    try:
        whole_call(*given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        whole_call(*given)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = whole_call(*given)
    for old, new in zip(given, inputs(length)):
        old.copy_(new)
    graph.replay()
    for ours, theirs in zip(captured, whole_call(*given)):
        assert torch.equal(ours, theirs)


def test_works_on_the_current_stream():
    truth = inputs(5000)
    given = tuple(torch.full_like(t, math.nan) for t in truth)
    want = whole_call(*truth)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)  # whoever does not wait for this stream reads NaN
        for old, new in zip(given, truth):
            old.copy_(new)
        got = whole_call(*given)
        torch.cuda.current_stream().synchronize()
    for ours, theirs in zip(got, want):
        assert torch.equal(ours, theirs)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_device_of_its_input():
    given = inputs(700)
    want = whole_call(*given)
    for ours, theirs in zip(whole_call(*(t.to("cuda:1") for t in given)), want):
        assert ours.device.index == 1
        assert torch.equal(ours.cpu(), theirs.cpu())


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic: bool):
    given = inputs(600)
    compiled: Callable = torch.compile(whole_call, fullgraph=True, dynamic=dynamic)
    for ours, theirs in zip(compiled(*given), whole_call(*given)):
        assert torch.equal(ours, theirs)


# --- a model ---------------------------------------------------------------------------------------------------------

FAMILY = pytest.mark.parametrize("family", ["llama", "qwen2_vl", "qwen3_vl"])


@FAMILY
def test_a_model_drops_what_it_drops_on_a_cpu(family: str):
    pytest.importorskip("transformers")
    from token_extractor_models import modality_of, three, tiny

    from lyra_ops.integrations import apply_token_extractor

    logits, positions = {}, {}
    for name, device, dtype in (("exact", "cpu", torch.float64), ("plain", "cpu", None), ("ours", "cuda", None)):
        model = tiny(family).to(device, dtype or torch.float32)
        inputs = {k: on_gpu(v) if device == "cuda" else v for k, v in three(family, "left", model.dtype).items()}
        extractor = apply_token_extractor(model, blocks=3, keep=0.5, min_keep=0)
        with torch.no_grad(), extractor.modality(modality_of(inputs)):
            logits[name] = model(**inputs).logits.cpu()
        positions[name] = extractor.positions.cpu()
    assert torch.equal(positions["ours"], positions["exact"])
    there = positions["exact"] >= 0
    assert_within_reference_error(logits["ours"][there], logits["plain"][there], logits["exact"][there])


@FAMILY
def test_a_model_generates_with_flash_attention(family: str):
    """Whose scores are those of sdpa but for rounding, which may swap tokens: as many are dropped, and text stays."""
    pytest.importorskip("transformers")
    pytest.importorskip("flash_attn")
    from token_extractor_models import modality_of, three, tiny

    from lyra_ops.integrations import apply_token_extractor

    model = tiny(family).to("cuda", torch.bfloat16)
    inputs = {k: on_gpu(v) for k, v in three(family, "left", torch.bfloat16).items()}
    extractor = apply_token_extractor(model, blocks=3, keep=0.5, min_keep=0)
    kept = []
    for attention in ("sdpa", "flash_attention_2"):
        extractor.text_model.set_attn_implementation(attention)
        with extractor.modality(modality_of(inputs)):
            model.generate(**inputs, max_new_tokens=4, do_sample=False)
        kept.append(extractor.positions)
    assert torch.equal(kept[0] >= 0, kept[1] >= 0)
    text = inputs["attention_mask"].bool() & ~modality_of(inputs)
    for b in range(3):
        assert set(text[b].nonzero()[:, 0].tolist()) <= set(kept[1][b].tolist())


def test_agrees_with_the_reference_on_the_gpu():
    query, key, _ = inputs(3000)
    got = lyra_ops.token_scores(query, key, causal=True, backend="cuda")
    plain, exact = (
        lyra_ops.token_scores(query.to(dtype), key.to(dtype), causal=True, backend="reference")
        for dtype in (torch.float32, torch.float64)
    )
    assert_within_reference_error(got, plain, exact)
