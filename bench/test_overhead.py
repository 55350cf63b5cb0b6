"""What a call costs beside its arithmetic: every op on inputs so small that checks and dispatch are all there is.

    python -m pytest bench/test_overhead.py --benchmark-json=overhead.json

`torch_...` stand beside them to compare with: a torch op of a similar number of arguments.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import lyra_ops

COST = torch.rand(2, 4, 3)
LENGTHS = torch.tensor([4, 3]), torch.tensor([3, 2])
QUERY, KEY = torch.randn(1, 4, 2, 16), torch.randn(1, 2, 12, 16)
SCORES, CANDIDATES = torch.rand(1, 12), torch.ones(1, 12, dtype=torch.bool)
SELECTION = lyra_ops.select_tokens(SCORES, CANDIDATES, keep=0.5)
HIDDEN, WEIGHT = torch.randn(1, 12, 16), torch.randn(16, 16)
BANK = lyra_ops.LoraBank.pack({"a": (torch.randn(4, 16), torch.randn(16, 4), 1.0)})
ROUTING = lyra_ops.LoraRouting(torch.zeros(1, 12, dtype=torch.int64), BANK)

# name: what is called, with the tensor whose gradient is wanted (None where there is none)
CALLS: dict[str, tuple[Callable[..., torch.Tensor], torch.Tensor | None]] = {
    "torch_ctc_loss": (
        lambda x: torch.nn.functional.ctc_loss(
            x, torch.ones(2, 2, dtype=torch.int64), torch.tensor([4, 4]), torch.tensor([2, 2]), reduction="none"
        ),
        torch.randn(4, 2, 5).log_softmax(-1),
    ),
    "soft_dtw_from_cost": (lambda cost: lyra_ops.soft_dtw_from_cost(cost, *LENGTHS, gamma=0.1), COST),
    "torch_attention": (
        lambda query: torch.nn.functional.scaled_dot_product_attention(query, KEY, KEY, enable_gqa=True),
        None,
    ),
    "token_scores": (lambda query: lyra_ops.token_scores(query, KEY), None),
    "select_tokens": (lambda _: lyra_ops.select_tokens(SCORES, CANDIDATES, keep=0.5), None),
    "gather_tokens": (lambda hidden: lyra_ops.gather_tokens(SELECTION, hidden)[0], HIDDEN),
    "torch_linear": (lambda x: torch.nn.functional.linear(x, WEIGHT), HIDDEN),
    "multi_lora_linear": (lambda x: lyra_ops.multi_lora_linear(x, WEIGHT, BANK, ROUTING), HIDDEN),
}


@pytest.mark.parametrize("name", CALLS)
def test_forward(benchmark, name: str):
    function, leaf = CALLS[name]
    with torch.no_grad():
        benchmark(function, QUERY if leaf is None else leaf)


@pytest.mark.parametrize("name", [name for name, (_, leaf) in CALLS.items() if leaf is not None])
def test_forward_and_backward(benchmark, name: str):
    function, leaf = CALLS[name]
    leaf = leaf.clone().requires_grad_()
    ones = torch.ones_like(function(leaf))
    benchmark(lambda: torch.autograd.grad(function(leaf), leaf, ones))
