"""The kernels of multi_lora on a GPU; what holds on every backend is tested through the public functions elsewhere."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from multi_lora_oracles import BF16, COMMON_CASES, FP16, Case, Problem, build_plan, expand, make, outer, shrink
from torch import Tensor

import lyra_ops
from lyra_ops import _loader
from lyra_ops.testing import assert_within_reference_error

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["cuda", "triton"])
def kernels(request: pytest.FixtureRequest) -> SimpleNamespace:
    ops = torch.ops.lyra
    if request.param == "triton":
        pytest.importorskip("triton")
        from lyra_ops.multi_lora import triton as ops
    else:
        assert _loader.missing("multi_lora_shrink_", "cuda") is None
    names = ("shrink_", "expand_", "outer", "add_outer_")
    return SimpleNamespace(**{name: getattr(ops, name, None) or getattr(ops, f"multi_lora_{name}") for name in names})


@pytest.fixture
def compiled_plan():
    assert _loader.missing("multi_lora_plan", "cuda") is None
    return torch.ops.lyra.multi_lora_plan


def on_gpu(p: Problem) -> Problem:
    moved = {name: t.cuda() for name, t in vars(p).items() if isinstance(t, Tensor)}
    # A copy of a strided x would be contiguous.
    wide = torch.empty(p.x.shape[0], p.x.stride(0), dtype=p.x.dtype, device="cuda")
    moved["x"] = wide[:, : p.x.shape[1]].copy_(p.x)
    return replace(p, **moved, plan={name: t.cuda() for name, t in p.plan.items()})


def run_shrink(kernels: SimpleNamespace, p: Problem) -> Tensor:
    h = torch.full_like(p.h, torch.nan)
    kernels.shrink_(h, p.x, p.bank, p.table, *p.plan.values(), p.seed, p.drop)
    return h


def run_expand(kernels: SimpleNamespace, p: Problem, y: Tensor) -> Tensor:
    y, plan = y.clone(), p.plan
    kernels.expand_(y, p.h, p.bank, p.table, p.scaling, plan["ids"], p.weights, plan["present"], p.seed, p.drop)
    return y


def run_outer(kernels: SimpleNamespace, p: Problem) -> Tensor:
    lists = (p.plan[name] for name in ("starts", "pairs", "chunks"))
    return kernels.outer(p.h, p.x, p.table, p.scaling, p.weights, *lists, p.seed, p.drop, p.rows)


def all_three(kernels: SimpleNamespace, p: Problem, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return run_shrink(kernels, p), run_expand(kernels, p, y), run_outer(kernels, p)


def base(p: Problem) -> Tensor:
    return torch.randn(p.x.shape, generator=torch.Generator().manual_seed(9)).to(p.x)


def same(got: Tensor, want: Tensor) -> bool:
    """The same bits, NaN included."""
    return torch.equal(got.contiguous().view(torch.uint8), want.contiguous().view(torch.uint8))


@pytest.mark.sanitize
@pytest.mark.parametrize("case", [*COMMON_CASES, Case(5, (512,), 1000, BF16, drop=65536)], ids=str)
def test_as_right_as_plain_torch(kernels, case):
    p = make(case)
    y = base(p)
    got = all_three(kernels, on_gpu(p), y.cuda())
    plain, exact = (
        (shrink(p, dtype), expand(p, y, dtype), outer(p, dtype)) for dtype in (torch.float32, torch.float64)
    )
    for name, ours, theirs, truth in zip(("shrink", "expand", "outer"), got, plain, exact):
        assert_within_reference_error(ours, theirs, truth, name=name)
    idle = (p.ids < 0).all(1)
    assert same(got[1].cpu()[idle], y[idle])


@pytest.mark.sanitize
@pytest.mark.parametrize(("tokens", "per_token", "adapters"), [(0, 1, 3), (1, 1, 1), (1300, 1, 4), (200, 3, 70)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_plan(compiled_plan, tokens, per_token, adapters, dtype):
    ids = torch.randint(adapters, (tokens, per_token), dtype=dtype)
    wrong = torch.tensor([-1, -5, adapters, adapters + 1000, torch.iinfo(dtype).max, torch.iinfo(dtype).min])
    ids = torch.where(torch.rand(ids.shape) < 0.3, wrong[ids % 6].to(dtype), ids)
    for got, want in zip(compiled_plan(ids.cuda(), adapters), build_plan(ids, adapters).values()):
        assert torch.equal(got.cpu(), want)


def plan_of(ids: Tensor) -> dict[str, Tensor]:
    """That of four adapters, in the order of `build_plan`."""
    return dict(zip(("ids", "starts", "pairs", "chunks", "present"), torch.ops.lyra.multi_lora_plan(ids, 4)))


def large(dtype: torch.dtype = BF16, tokens: int = 8192, size: int = 3584, drop: int | None = None) -> Problem:
    """Runs of four adapters of rank 64, some tokens without; made on the GPU, with the plan of the kernel."""
    p = on_gpu(make(Case(8, (64, 8, 320, 64), 16, dtype, drop=drop)))
    ids = torch.randint(-1, 4, (tokens // 64, 1), device="cuda").repeat_interleave(64, 0)
    plan = plan_of(ids)
    bank = torch.randn(p.rows, size, device="cuda", dtype=dtype) / size**0.5
    x, h = torch.randn(tokens, size, device="cuda", dtype=dtype), torch.randn(tokens, 1, 320, device="cuda")
    return replace(p, x=x, h=h, bank=bank, ids=ids, plan=plan)


@pytest.mark.parametrize("dtype", [BF16, FP16, torch.float32])
def test_large_sizes(kernels, dtype):
    p = large(dtype)
    y = torch.randn_like(p.x)
    h, added, summed = all_three(kernels, p, y)
    ids = p.ids.flatten()

    def formula(wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        shrunk, total = torch.full(h.shape, torch.nan, dtype=wide, device="cuda"), y.to(wide)
        grads = torch.zeros(summed.shape, dtype=wide, device="cuda")
        for e, (row, rank, _) in enumerate(p.table.tolist()):
            mine, rows = (ids == e).nonzero().flatten(), slice(row, row + rank)
            bank, x = p.bank[rows].to(wide), p.x[mine].to(wide)
            part = p.h[mine, 0, :rank].to(wide) * p.scaling[e].to(wide)
            if wide != torch.float64:
                part = part.to(dtype).to(wide)
            shrunk[mine, 0, :rank] = x @ bank.T
            total[mine] += part @ bank
            grads[rows] = part.T @ x
        return shrunk, total if wide == torch.float64 else total.to(dtype), grads

    for name, got, plain, exact in zip("hyg", (h, added, summed), formula(torch.float32), formula(torch.float64)):
        # What h holds of an adapter's neighbours is nobody's business.
        known = exact.isfinite()
        assert_within_reference_error(got[known], plain[known], exact[known], name=name)


def test_bitwise_the_same_each_time(kernels):
    p = large(drop=6554)
    y = torch.randn_like(p.x)
    first = all_three(kernels, p, y)
    for _ in range(10):
        for got, want in zip(all_three(kernels, p, y), first):
            assert same(got, want)


@pytest.mark.parametrize("size", [576, 3584, 18944])
def test_a_token_gets_the_same_alone_and_in_any_batch(kernels, size):
    p = large(tokens=9000 // 64 * 64, size=size)
    p.h = run_shrink(kernels, p).nan_to_num()
    y = torch.randn_like(p.x)
    added = run_expand(kernels, p, y)
    for tokens in (slice(0, 1), slice(100, 117), slice(64, 2000)):
        ids = p.ids[tokens].contiguous()
        plan = plan_of(ids)
        part = replace(p, x=p.x[tokens], h=p.h[tokens], ids=ids, plan=plan)
        assert same(run_shrink(kernels, part).nan_to_num(), p.h[tokens])
        assert same(run_expand(kernels, part, y[tokens]), added[tokens])


def test_can_be_captured_in_a_graph(kernels):
    p = large(tokens=640)
    p.seed, p.drop = torch.tensor([1], device="cuda"), 9000
    y = torch.randn_like(p.x)

    def step() -> tuple[Tensor, ...]:
        p.plan = plan_of(p.ids)
        return all_three(kernels, p, y)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for fill in (None, 0, -1):  # other ids, one adapter for all, none for all
        p.ids.copy_(torch.randint(-1, 4, p.ids.shape) if fill is None else torch.full(p.ids.shape, fill))
        p.seed.add_(1)
        graph.replay()
        for got, want in zip(captured, step()):
            assert same(got.nan_to_num(), want.nan_to_num())


def test_never_waits_for_the_gpu(kernels):
    p, y = large(tokens=640), torch.randn(640, 3584, device="cuda", dtype=BF16)
    all_three(kernels, p, y)
    torch.cuda.set_sync_debug_mode("error")
    try:
        plan_of(p.ids)
        all_three(kernels, p, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_works_on_the_current_stream(kernels):
    p = large(tokens=640)
    y = torch.randn_like(p.x)
    want, x = all_three(kernels, p, y), p.x.clone()
    p.x.fill_(torch.nan)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)  # whoever does not wait for this stream reads NaN
        p.x.copy_(x)
        got = all_three(kernels, p, y)
        torch.cuda.current_stream().synchronize()
    for ours, truth in zip(got, want):
        assert same(ours, truth)


@pytest.mark.sanitize
@pytest.mark.parametrize("kernels", ["cuda"], indirect=True)
def test_errors_name_the_argument(kernels):
    p = on_gpu(make(Case(7, (3, 4), 16, BF16)))
    with pytest.raises(RuntimeError, match="bank"):
        run_shrink(kernels, replace(p, bank=p.bank.float()))
    with pytest.raises(RuntimeError, match="h: got shape"):
        run_shrink(kernels, replace(p, h=p.h[:-1]))
    with pytest.raises(RuntimeError, match="y: got dtype"):
        run_expand(kernels, replace(p, bank=p.bank.double()), base(p).double())
    with pytest.raises(RuntimeError, match="drop"):
        run_outer(kernels, replace(p, drop=70000))


@pytest.mark.sanitize
def test_gradients_accumulate(kernels):
    p = make(COMMON_CASES[4])
    before, q = torch.randn(p.rows, p.x.shape[1]), on_gpu(p)
    got, lists = before.cuda(), (q.plan[name] for name in ("starts", "pairs", "chunks"))
    kernels.add_outer_(got, q.h, q.x, q.table, q.scaling, q.weights, *lists, q.seed, q.drop)
    plain, exact = (before.to(dtype) + outer(p, dtype) for dtype in (torch.float32, torch.float64))
    assert_within_reference_error(got, plain, exact)


def test_operators_are_registered_as_they_behave(compiled_plan):
    p = on_gpu(make(Case(70, (8, 3), 40, BF16, per_token=2, drop=9000)))
    h, y, plan = p.h.nan_to_num(), p.x.nan_to_num(), tuple(p.plan.values())
    ops, tests = torch.ops.lyra, ("test_schema", "test_faketensor")
    for op, arguments in (
        (compiled_plan, (p.ids, 2)),
        (ops.multi_lora_shrink_, (h, y, p.bank, p.table, *plan, p.seed, p.drop)),
        (ops.multi_lora_expand_, (y, h, p.bank, p.table, p.scaling, plan[0], p.weights, plan[4], p.seed, p.drop)),
        (ops.multi_lora_outer, (h, y, p.table, p.scaling, p.weights, *plan[1:4], p.seed, p.drop, p.rows)),
        (
            ops.multi_lora_add_outer_,
            (p.bank.float(), h, y, p.table, p.scaling, p.weights, *plan[1:4], p.seed, p.drop),
        ),
    ):
        torch.library.opcheck(op, arguments, test_utils=tests)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_device_of_its_input(kernels):
    p = make(Case(70, (8, 3), 40, BF16))
    there = on_gpu(p)
    moved = {name: t.to("cuda:1") for name, t in vars(there).items() if isinstance(t, Tensor)}
    there = replace(there, **moved, plan={name: t.to("cuda:1") for name, t in there.plan.items()})
    for got, want in zip(
        all_three(kernels, there, base(p).to("cuda:1")), all_three(kernels, on_gpu(p), base(p).cuda())
    ):
        assert same(got.cpu(), want.cpu())


RANKS = {"image": (64, 2.0), "speech": (13, 0.5), "both": (320, -0.25)}


def step(
    backend: str, dtype: torch.dtype, master: torch.dtype, dropout_p: float, weighted: bool, exact: bool = False
) -> list[Tensor]:
    """y and all gradients of one layer of 96 inputs and 80 outputs; drawn anew from the same seeds at each call."""
    g = torch.Generator().manual_seed(0)

    def leaf(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        t = (torch.randn(*shape, generator=g) / shape[-1] ** 0.5).to("cuda", dtype)
        return (t.double() if exact else t).requires_grad_()

    x, weight = leaf(3, 70, 96), leaf(80, 96)
    adapters = {
        name: (leaf(rank, 96, dtype=master), leaf(80, rank, dtype=master), scaling)
        for name, (rank, scaling) in RANKS.items()
    }
    slots = (2,) if weighted else ()
    ids = torch.randint(-1, 2, (3, 70, *slots), generator=g).cuda()  # nobody has the third
    weights = leaf(3, 70, 2, dtype=torch.float32) if weighted else None
    bank = lyra_ops.LoraBank.pack(adapters)
    routing = lyra_ops.LoraRouting(ids, bank, weights)
    torch.manual_seed(1)  # of the dropout mask
    y = lyra_ops.multi_lora_linear(x, weight, bank, routing, dropout_p=dropout_p, training=True, backend=backend)
    inputs = [x, weight, *(t for a in adapters.values() for t in a[:2]), *([weights] if weighted else [])]
    upstream = torch.randn(y.shape, generator=g).to(dtype).to(y)
    return [y.detach(), *torch.autograd.grad(y, inputs, upstream)]


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("dtype", "master"), [(torch.float32, torch.float32), (BF16, BF16), (BF16, torch.float32), (FP16, torch.float32)]
)
def test_the_whole_op(backend, dtype, master, weighted, dropout_p):
    got = step(backend, dtype, master, dropout_p, weighted)
    plain = step("reference", dtype, master, dropout_p, weighted)
    exact = step("reference", dtype, master, dropout_p, weighted, exact=True)
    for ours, theirs, truth in zip(got, plain, exact):
        assert_within_reference_error(ours, theirs, truth)
    for absent in got[7:9]:
        assert (absent == 0).all()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic):
    bank = lyra_ops.LoraBank.pack(
        {
            name: (torch.randn(r, 96, device="cuda"), torch.randn(80, r, device="cuda"), s)
            for name, (r, s) in RANKS.items()
        }
    )
    weight = torch.randn(80, 96, device="cuda")

    def layer(x: Tensor, ids: Tensor) -> Tensor:
        return lyra_ops.multi_lora_linear(x, weight, bank, lyra_ops.LoraRouting(ids, bank))

    x, ids = torch.randn(70, 96, device="cuda", requires_grad=True), torch.randint(-1, 3, (70,), device="cuda")
    got, want = torch.compile(layer, fullgraph=True, dynamic=dynamic)(x, ids), layer(x, ids)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (got, want)))


def test_a_training_step_can_be_captured_in_a_graph():
    bank = lyra_ops.LoraBank.pack(
        {
            name: (torch.randn(r, 96, device="cuda").requires_grad_(), torch.randn(80, r, device="cuda"), s)
            for name, (r, s) in RANKS.items()
        }
    )
    weight, x = torch.randn(80, 96, device="cuda"), torch.randn(70, 96, device="cuda", requires_grad=True)
    ids = torch.randint(-1, 3, (70,), device="cuda")

    def run() -> tuple[Tensor, ...]:
        y = lyra_ops.multi_lora_linear(x, weight, bank, lyra_ops.LoraRouting(ids, bank))
        return y, *torch.autograd.grad(y.square().sum(), [x, bank.adapters[0][0]])

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for fill in (None, 1, -1):
        ids.copy_(torch.randint(-1, 3, ids.shape) if fill is None else torch.full(ids.shape, fill))
        graph.replay()
        for got, want in zip(captured, run()):
            assert same(got, want)


def few_tokens(dtype: torch.dtype, tokens: int, inputs: int = 3584, outputs: int = 3584):
    g = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=g) / shape[-1] ** 0.5).to("cuda", dtype)

    bank = lyra_ops.LoraBank.pack({name: (normal(r, inputs), normal(outputs, r), s) for name, (r, s) in RANKS.items()})
    ids = torch.randint(-1, 3, (tokens,), generator=g).cuda()
    return normal(tokens, inputs), normal(outputs, inputs), normal(outputs), bank, ids


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 16])
def test_few_tokens_in_one_launch(tokens, dtype):
    x, weight, bias, bank, ids = few_tokens(dtype, tokens)

    def run(*, exact: bool = False, backend: str | None = None) -> Tensor:
        wide = torch.float64 if exact else dtype
        adapters = zip(bank.names, bank.adapters, bank.scalings)
        given = lyra_ops.LoraBank.pack({name: (a.to(wide), b.to(wide), s) for name, (a, b), s in adapters})
        routing = lyra_ops.LoraRouting(ids, given)
        layer = (x.to(wide), weight.to(wide), given, routing, bias.to(wide))
        return lyra_ops.multi_lora_linear(*layer, backend=backend)

    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        got = run(backend="cuda")
    assert sum("decode_kernel" in event.key for event in profile.key_averages()) == 1
    assert_within_reference_error(got, run(backend="reference"), run(exact=True, backend="reference"))


def test_few_tokens_in_a_graph_alone_and_together():
    x, weight, bias, bank, ids = few_tokens(BF16, 16)
    routing = lyra_ops.LoraRouting(ids, bank)

    def run(tokens: slice = slice(None), own: lyra_ops.LoraRouting | None = None) -> Tensor:
        routing = own or lyra_ops.LoraRouting(ids[tokens], bank)
        return lyra_ops.multi_lora_linear(x[tokens], weight, bank, routing, bias)

    with torch.no_grad():
        together = run()
        for t in range(16):
            assert same(run(slice(t, t + 1)), together[t : t + 1])
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            run(own=routing)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        for fill in (None, 1, -1):
            ids.copy_(torch.randint(-1, 3, ids.shape) if fill is None else torch.full(ids.shape, fill))
            for _ in range(20):
                graph.replay()
            assert same(captured, run())
