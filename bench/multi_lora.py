"""multi_lora_linear beside peft: a frozen layer, and adapters of rank 64 of which each has its share of the tokens."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import torch
import torch.nn.functional as F

import lyra_ops
from bench.harness import BOTH, FORWARD, Cost, Workload

RANK = 64
SIZES = (576, 1536, 3584)
TOKENS = (1, 16, 512, 2048)


def workloads(device: str, quick: bool) -> Iterator[Workload]:
    for size in SIZES[:1] if quick else SIZES:
        for tokens in TOKENS[1:3] if quick else TOKENS:
            for adapters in (1, 4):
                if adapters <= tokens:
                    yield workload(device, size, tokens, adapters)


def workload(device: str, size: int, tokens: int, adapters: int) -> Workload:
    """Square, float32 on a CPU, bfloat16 on a GPU; tokens in runs of random length, as modalities come."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    cuts = torch.randperm(tokens - 1, generator=generator)[: 2 * adapters - 1].sort().values + 1
    runs = torch.tensor_split(torch.zeros(tokens, dtype=torch.int64), cuts.tolist()) if adapters > 1 else ()
    ids = torch.cat([run + k % adapters for k, run in enumerate(runs)]) if runs else torch.zeros(tokens).long()
    present = len(ids.unique())
    weight = torch.randn(size, size, generator=generator).to(device, dtype) / size**0.5
    scaling = 2.0

    def inputs() -> tuple[torch.Tensor, ...]:
        x = torch.randn(tokens, size, device=device, dtype=dtype)
        a = torch.randn(adapters, RANK, size, device=device, dtype=dtype) / size**0.5
        b = torch.randn(adapters, size, RANK, device=device, dtype=dtype) / RANK**0.5
        return x, a, b

    where = ids.to(device)
    names = [f"adapter {e}" for e in range(adapters)]
    zero = torch.zeros(1, 1)
    routing = lyra_ops.LoraRouting(
        where, lyra_ops.LoraBank.pack({name: (zero.to(device, dtype), zero.to(device, dtype), 1.0) for name in names})
    )

    def ours(backend: str | None):
        frozen: list[tuple[torch.Tensor, lyra_ops.LoraBank]] = []

        def run(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            if torch.is_grad_enabled() or not frozen or frozen[0][0] is not a:  # one that is not trained is packed once
                bank = lyra_ops.LoraBank.pack({name: (a[e], b[e], scaling) for e, name in enumerate(names)})
                frozen[:] = [(a, bank)]
            return lyra_ops.multi_lora_linear(x, weight, frozen[0][1], routing, backend=backend)

        return run

    def base(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        # 0 * a[0, 0, 0]: a gradient for all inputs, of no cost
        return F.linear(x, weight) + 0 * (a[0, 0, 0] + b[0, 0, 0])

    def each_and_mask(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, weight.to(x.dtype))  # the float64 run of the gate comes here, too
        for e in range(adapters):
            y = y + (where == e)[:, None] * (x @ a[e].T @ b[e].T * scaling)
        return y

    implementations = {"lyra": ours(None), "lyra (all adapters on all tokens)": ours("reference")}
    if find_spec("peft"):
        implementations |= peft_layers(weight, adapters, scaling, ids)
    implementations |= {"torch, adapter by adapter and mask": each_and_mask}
    numbers = tokens * size * 2 + size * size + adapters * 2 * RANK * size
    flops = 2 * tokens * size * size + 4 * tokens * RANK * size
    return Workload(
        name=f"{tokens} tokens, {size} x {size}, {adapters} adapters of rank {RANK} ({present} with tokens)",
        inputs=inputs,
        implementations=implementations | {"the layer without adapters (not the same result)": base},
        plain=each_and_mask,
        costs={
            FORWARD: Cost(numbers * weight.element_size(), flops),
            BOTH: Cost(3 * numbers * weight.element_size(), 2 * flops + 4 * tokens * RANK * size),
        },
        items=("tokens", tokens),
    )


def peft_layers(weight: torch.Tensor, adapters: int, scaling: float, ids: torch.Tensor) -> dict:
    """peft's own layer with one adapter, or with the name of an adapter per token."""
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    names = [f"adapter {e}" for e in range(adapters)]
    config = LoraConfig(r=RANK, lora_alpha=RANK * scaling)
    module = Linear(layer, names[0], config=config, r=RANK, lora_alpha=RANK * scaling)
    for name in names[1:]:
        module.update_layer(name, RANK, RANK * scaling, config=config)
    module.to(weight.device, weight.dtype).eval()
    of_token = [names[e] for e in ids.tolist()]

    def run(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        for e, name in enumerate(names):
            for linear, value in ((module.lora_A[name], a[e]), (module.lora_B[name], b[e])):
                del (
                    linear.weight
                )  # a view of the input takes the parameter's place, so that the input gets the gradient
                linear.weight = value
        if adapters == 1:
            return module(x)
        return module(x[:, None], adapter_names=of_token)[:, 0]

    for name in names:
        for linear in (module.lora_A[name], module.lora_B[name]):
            del linear.weight
            linear.weight = None
    return {"peft" if adapters == 1 else "peft (adapter_names)": run}
