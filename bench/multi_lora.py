"""multi_lora_linear beside peft: a frozen layer, and adapters of which each has its share of the tokens.

On a CPU in float32: square layers, 1 to 2048 tokens, 1 and 4 adapters of rank 64, and of rank 16 where the rank tells
most; and a bank that no token is routed to. On a GPU in bfloat16: training at 8192 tokens, decoding at 1 and 16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lyra_ops
from bench.harness import BOTH, FORWARD, Cost, Workload
from lyra_ops.multi_lora import BankKeeper

RANK, LOW_RANK, SCALING = 64, 16, 2.0
CPU_SIZES, CPU_TOKENS = (576, 1536, 3584), (1, 16, 512, 2048)
BASE = "the layer without adapters (not the same result)"
BOUND = "the layer and the adapters' products alone (not the same result)"


def workloads(device: str, quick: bool) -> Iterator[Workload]:
    if device == "cuda":
        shapes = [(3584, 8192, [FORWARD, BOTH]), (3584, 1, [FORWARD]), (3584, 16, [FORWARD])]
        low, idle = [], [(3584, 8192), (3584, 1)]
    else:
        shapes = [(size, tokens, [FORWARD, BOTH]) for size in CPU_SIZES for tokens in CPU_TOKENS]
        low, idle = [(576, 2048)], [(1536, 1), (1536, 2048)]
    if quick:
        shapes, low = [(size // 8, min(tokens, 64), both) for size, tokens, both in shapes[1:3]], [(72, 64)]
        idle = low
    for size, tokens, directions in shapes:
        for adapters in (1, 4):
            if adapters <= tokens:
                yield workload(device, size, tokens, adapters, directions)
    for size, tokens in low:
        for adapters in (1, 4):
            yield workload(device, size, tokens, adapters, [FORWARD, BOTH], rank=LOW_RANK)
    for size, tokens in idle:
        yield workload(device, size, tokens, 4, [FORWARD, BOTH], idle=True)


def in_runs(tokens: int, adapters: int) -> Tensor:
    """An adapter for each token, in two runs of random length per adapter, as modalities come."""
    if adapters == 1:
        return torch.zeros(tokens, dtype=torch.int64)
    cuts = torch.randperm(tokens - 1, generator=torch.Generator().manual_seed(0))[: 2 * adapters - 1].sort().values + 1
    runs = torch.tensor_split(torch.zeros(tokens, dtype=torch.int64), cuts.tolist())
    return torch.cat([run + k % adapters for k, run in enumerate(runs)])


def workload(
    device: str,
    size: int,
    tokens: int,
    adapters: int,
    directions: list[str],
    *,
    rank: int = RANK,
    idle: bool = False,
) -> Workload:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    ids = torch.full((tokens,), -1) if idle else in_runs(tokens, adapters)
    weight = (torch.randn(size, size, generator=torch.Generator().manual_seed(0)) / size**0.5).to(device, dtype)
    names, where = [f"adapter {e}" for e in range(adapters)], ids.to(device)

    def inputs() -> tuple[Tensor, ...]:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device, dtype=dtype) / shape[1] ** 0.5

        # x, then A and B of each adapter
        return normal(tokens, size), *(t for _ in names for t in (normal(rank, size), normal(size, rank)))

    implementations: dict[str, Callable[..., Tensor]] = {"lyra": ours(weight, names, where)}
    if device == "cuda" or (adapters > 1 and tokens <= 512):
        implementations["lyra (reference)"] = ours(weight, names, where, "reference")
    if find_spec("peft") and not idle:
        implementations |= peft_layers(weight, names, ids, rank)
    if adapters == 1:
        implementations["torch addmm"] = addmm(weight)
    elif not idle:
        implementations["torch, adapter by adapter"] = adapter_by_adapter(weight, where)
        if device == "cuda":
            implementations["torch, sorted, grouped_mm"] = grouped(weight, where, adapters)
        if device == "cpu":
            implementations[BOUND] = products_alone(weight, where, adapters)
    implementations[BASE] = lambda x, *ab: _Unused.apply(F.linear(x, weight), *ab)

    def plain(x: Tensor, *ab: Tensor) -> Tensor:
        """Products of the same sizes as ours and peft's, whose rounding depends on them."""
        return adapter_by_adapter(weight.to(x.dtype), where)(x, *ab)

    routed, present = int((ids >= 0).sum()), len(set(ids.tolist()) - {-1})
    numbers = 2 * tokens * size + size * size + 2 * present * rank * size
    flops = 2 * tokens * size * size + 4 * routed * rank * size
    costs = {
        FORWARD: Cost(numbers * weight.element_size(), flops),
        BOTH: Cost(3 * numbers * weight.element_size(), 2 * flops + 4 * routed * rank * size),
    }
    return Workload(
        name=f"{tokens} tokens, {size} x {size}, {adapters} adapters of rank {rank} ({present} with tokens)",
        inputs=inputs,
        implementations=implementations,
        plain=plain,
        costs={direction: costs[direction] for direction in directions},
        items=("tokens", tokens),
        budget=(5, 0.3),
    )


def ours(weight: Tensor, names: list[str], ids: Tensor, backend: str | None = None) -> Callable[..., Tensor]:
    keeper, zero = BankKeeper(), weight.new_zeros(1, 1)
    routing = lyra_ops.LoraRouting(ids, lyra_ops.LoraBank.pack(dict.fromkeys(names, (zero, zero, 1.0))))

    def run(x: Tensor, *ab: Tensor) -> Tensor:
        bank = keeper.bank({name: (a, b, SCALING) for name, a, b in zip(names, ab[::2], ab[1::2])})
        return lyra_ops.multi_lora_linear(x, weight, bank, routing, backend=backend)

    return run


def peft_layers(weight: Tensor, names: list[str], ids: Tensor, rank: int) -> dict[str, Callable[..., Tensor]]:
    """peft's layer with one adapter, or with an adapter's name per token; and the former routed by lyra_ops."""
    from lyra_ops.integrations import apply_multi_lora

    if len(names) > 1:
        layer, of_token = peft_layer(weight, names, rank), [names[e] for e in ids.tolist()]

        def named(x: Tensor, *ab: Tensor) -> Tensor:
            put(layer, ab)
            return layer(x[:, None], adapter_names=of_token)[:, 0]

        return {"peft (adapter_names)": named}

    plain, other = peft_layer(weight, names, rank), peft_layer(weight, names, rank)
    routed = apply_multi_lora(nn.ModuleList([other])).route(ids.to(weight.device))
    routed.__enter__()  # one route for all runs, as for all layers and tokens of a generation

    def alone(x: Tensor, *ab: Tensor) -> Tensor:
        put(plain, ab)
        return plain(x)

    def through(x: Tensor, *ab: Tensor) -> Tensor:
        put(other, ab)
        return routed and other(x)  # `routed` lives as long as this function

    found = {"peft": alone, "lyra (peft's layer, routed)": through}
    return found | ({"peft, compiled": torch.compile(alone)} if weight.device.type == "cuda" else {})


def peft_layer(weight: Tensor, names: list[str], rank: int) -> nn.Module:
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    base = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    base.weight = nn.Parameter(weight, requires_grad=False)
    config = LoraConfig(r=rank, lora_alpha=rank * SCALING)
    layer = Linear(base, names[0], config=config, r=rank, lora_alpha=rank * SCALING)
    for name in names[1:]:
        layer.update_layer(name, rank, rank * SCALING, config=config)
    return layer.to(weight.device, weight.dtype).eval()  # as in training, since there is no dropout


def put(layer: nn.Module, ab: tuple[Tensor, ...]) -> None:
    """The inputs as weights of the adapters, so that they get the gradients."""
    linears = [linear for name in layer.lora_A for linear in (layer.lora_A[name], layer.lora_B[name])]
    for linear, value in zip(linears, ab):
        linear._parameters["weight"] = value


def addmm(weight: Tensor) -> Callable[..., Tensor]:
    """One adapter the way Unsloth adds it: in place, behind the base layer."""
    return lambda x, a, b: F.linear(x, weight).addmm_(x @ a.T, b.T, alpha=SCALING)


def adapter_by_adapter(weight: Tensor, ids: Tensor) -> Callable[..., Tensor]:
    def run(x: Tensor, *ab: Tensor) -> Tensor:
        y = F.linear(x, weight)
        for e, (a, b) in enumerate(zip(ab[::2], ab[1::2])):
            mine = (ids == e).nonzero()[:, 0]
            y = y.index_add(0, mine, x[mine] @ a.T @ b.T, alpha=SCALING)
        return y

    return run


def products_alone(weight: Tensor, ids: Tensor, adapters: int) -> Callable[..., Tensor]:
    """As many tokens per adapter, but already side by side, and sizes known beforehand."""
    counts = torch.bincount(ids, minlength=adapters).tolist()

    def run(x: Tensor, *ab: Tensor) -> Tensor:
        y = F.linear(x, weight)
        parts = zip(y.split(counts), x.split(counts), ab[::2], ab[1::2])
        if torch.is_grad_enabled():
            return torch.cat([torch.addmm(own, rows @ a.T, b.T, alpha=SCALING) for own, rows, a, b in parts])
        for own, rows, a, b in parts:
            own.addmm_(rows @ a.T, b.T, alpha=SCALING)
        return y

    return run


def grouped(weight: Tensor, ids: Tensor, adapters: int) -> Callable[..., Tensor]:
    """Tokens sorted by adapter, then one grouped product per matrix."""

    def run(x: Tensor, *ab: Tensor) -> Tensor:
        order = ids.argsort()
        ends = torch.bincount(ids, minlength=adapters).cumsum(0).int()
        a, b = (torch.stack([t.T for t in matrices]) for matrices in (ab[::2], ab[1::2]))
        added = torch._grouped_mm(torch._grouped_mm(x[order], a, offs=ends), b, offs=ends) * SCALING
        return F.linear(x, weight).index_add(0, order, added)

    return run


class _Unused(torch.autograd.Function):
    """y, for which the other tensors have the gradient zero, of no memory and no time."""

    @staticmethod
    def forward(ctx, y: Tensor, *tensors: Tensor) -> Tensor:
        ctx.shapes = [t.shape for t in tensors]
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(grad.new_zeros(()).expand(shape) for shape in ctx.shapes)
