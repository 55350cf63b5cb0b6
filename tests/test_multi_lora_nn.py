"""MultiLoraLinear, the module around multi_lora_linear."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lyra_ops
from lyra_ops import LoraRouting
from lyra_ops.nn import MultiLoraLinear

IDS = torch.tensor([[0, 0, 1, -1], [1, 1, 0, -1]])


def layer(base_dtype: torch.dtype = torch.float64, **options) -> MultiLoraLinear:
    """With adapters that are not zero."""
    torch.manual_seed(0)
    made = MultiLoraLinear(nn.Linear(12, 7, dtype=base_dtype), {"image": (3, 2.0), "speech": (5, 0.25)}, **options)
    for b in made.lora_B.values():
        nn.init.normal_(b)
    return made


def each(layer: MultiLoraLinear, x: Tensor, ids: Tensor = IDS) -> Tensor:
    """What peft's formula gives with one adapter at a time, token by token."""
    y = layer.base(x)
    for e, name in enumerate(layer.lora_A):
        delta = layer.scaling[name] * (layer.lora_B[name] @ layer.lora_A[name])
        y = y + (ids == e)[..., None] * (x @ delta.T)
    return y


def test_a_new_layer_is_its_base():
    base = nn.Linear(12, 7)
    made = lyra_ops.nn.MultiLoraLinear(base, {"image": (3, 2.0), "speech": (512, 0.25)})
    x = torch.randn(2, 4, 12)
    assert torch.equal(made(x, LoraRouting(IDS, made.bank())), base(x))
    assert all(a.any() for a in made.lora_A.values())


def test_each_token_goes_through_its_adapter_and_the_base_is_frozen():
    made, x = layer(), torch.randn(2, 4, 12, dtype=torch.float64, requires_grad=True)
    adapters = [*made.lora_A.values(), *made.lora_B.values()]
    assert [p for p in made.parameters() if p.requires_grad] == adapters
    results = []
    for y in (made(x, LoraRouting(IDS, made.bank())), each(made, x)):
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *adapters])])
    for got, expected in zip(*results):
        torch.testing.assert_close(got, expected)


def test_trains_float32_adapters_beside_a_16_bit_base():
    made = layer(torch.bfloat16, dtype=torch.float32)
    x, target = torch.randn(2, 4, 12, dtype=torch.bfloat16), torch.randn(2, 4, 7)
    before = made.base.weight.clone()
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=0.05)
    routing = LoraRouting(IDS, made.bank())
    losses = []
    for _ in range(30):
        y = made(x, routing)
        assert y.dtype == torch.bfloat16
        loss = (y.float() - target)[IDS >= 0].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert torch.equal(made.base.weight, before)


def test_dropout_only_in_training():
    made, x = layer(dropout_p=0.5), torch.randn(2, 4, 12, dtype=torch.float64)
    routing = LoraRouting(IDS, made.bank())
    torch.testing.assert_close(made.eval()(x, routing), each(made, x))
    dropped = made.train()(x, routing)
    assert not torch.allclose(dropped[IDS >= 0], each(made, x)[IDS >= 0])
    assert torch.equal(dropped[IDS < 0], made.base(x)[IDS < 0])


def test_state_dict_and_copies():
    made, x = layer(), torch.randn(2, 4, 12, dtype=torch.float64)
    assert list(made.state_dict()) == [
        *("base.weight", "base.bias"),
        *("lora_A.image", "lora_A.speech", "lora_B.image", "lora_B.speech"),
    ]
    routing = LoraRouting(IDS, made.bank())
    expected = made(x, routing)
    other = MultiLoraLinear(nn.Linear(12, 7, dtype=torch.float64), {"image": (3, 2.0), "speech": (5, 0.25)})
    other.load_state_dict(made.state_dict())
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    for same in (other, copy.deepcopy(made), torch.load(file, weights_only=False)):
        assert torch.equal(same(x, routing), expected)


def write(made: MultiLoraLinear) -> None:
    made.lora_A["image"].copy_(made.lora_A["image"] + 1)


def swap(made: MultiLoraLinear) -> None:
    torch.utils.swap_tensors(made.lora_A["image"], nn.Parameter(made.lora_A["image"] + 1, requires_grad=False))


def set_data(made: MultiLoraLinear) -> None:
    made.lora_A["image"].data = made.lora_A["image"] + 1


def replace(made: MultiLoraLinear) -> None:
    """New memory of the same size, which the allocator likes to place where the old was."""
    shape = made.lora_A["image"].shape
    del made.lora_A["image"]
    del made.lora_A["speech"]  # the order of names counts
    made.lora_A["image"] = nn.Parameter(torch.ones(shape, dtype=torch.float64), requires_grad=False)
    made.lora_A["speech"] = nn.Parameter(torch.ones(5, 12, dtype=torch.float64), requires_grad=False)


def load(made: MultiLoraLinear) -> None:
    made.load_state_dict({key: value + 1 for key, value in made.state_dict().items()})


def rescale(made: MultiLoraLinear) -> None:
    made.scaling["image"] = 7.0


@pytest.mark.parametrize("change", [write, swap, set_data, replace, load, rescale])
@torch.no_grad()
def test_rows_of_frozen_adapters_are_kept_until_they_change(change: Callable[[MultiLoraLinear], None]):
    made, x = layer().requires_grad_(False), torch.randn(2, 4, 12, dtype=torch.float64)
    before = made.bank().rows(torch.float64)
    assert made.bank().rows(torch.float64) is before
    made(x, LoraRouting(IDS, made.bank()))
    change(made)
    assert made.bank().rows(torch.float64) is not before
    for backend in ("cpu", "reference"):
        got = lyra_ops.multi_lora_linear(
            x, made.base.weight, made.bank(), LoraRouting(IDS, made.bank()), made.base.bias, backend=backend
        )
        torch.testing.assert_close(got, each(made, x))


def test_moving_packs_anew_and_an_inference_pass_leaves_training_alone():
    made, x = layer(torch.float32), torch.randn(2, 4, 12)
    for mode in (torch.inference_mode(), torch.no_grad()):
        with mode:
            made(x, LoraRouting(IDS, made.bank()))
            made.bank().rows(torch.float32)
    made(x, LoraRouting(IDS, made.bank())).sum().backward()
    assert made.lora_A["image"].grad is not None
    assert made.bank().rows(torch.float32).a.requires_grad
    made.requires_grad_(False)
    assert not made.bank().rows(torch.float32).a.requires_grad
    assert made.double().bank().adapters[0][0].dtype == torch.float64
    torch.testing.assert_close(made(x.double(), LoraRouting(IDS, made.bank())), each(made, x.double()))


def test_compiles_as_a_whole():
    made, x = layer(), torch.randn(2, 4, 12, dtype=torch.float64)
    compiled = torch.compile(lambda x, ids: made(x, LoraRouting(ids, made.bank())), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, IDS), each(made, x))


BASE = nn.Linear(12, 7)
ERRORS = {
    "base: got Embedding, expected a torch.nn.Linear": ((nn.Embedding(3, 4), {"image": (3, 2.0)}), {}),
    "adapters: got list, expected a dict of name: (rank, scaling)": ((BASE, ["image"]), {}),
    "adapters: got none, expected at least one": ((BASE, {}), {}),
    "adapters: got the name 'a.b', expected a str without a dot": ((BASE, {"a.b": (3, 2.0)}), {}),
    "adapters: got the name 'keys', which torch.nn.ParameterDict uses itself": ((BASE, {"keys": (3, 2.0)}), {}),
    "adapters: got the name 'training', which": ((BASE, {"training": (3, 2.0)}), {}),
    "adapters['a']: got 3, expected (rank, scaling)": ((BASE, {"a": 3}), {}),
    "rank of adapter 'a': got float, expected an int": ((BASE, {"a": (3.0, 2.0)}), {}),
    "rank of adapter 'a': got 0, expected 1 or more": ((BASE, {"a": (0, 2.0)}), {}),
    "A of adapter 'a': got rank 513, expected 1 to 512": ((BASE, {"a": (513, 2.0)}), {}),
    "scaling of adapter 'a': got str, expected a number": ((BASE, {"a": (3, "2")}), {}),
    "dropout_p: got 1.5, expected 0 to 1": ((BASE, {"a": (3, 1.0)}), {"dropout_p": 1.5}),
    "dtype: got torch.int32, expected a floating torch.dtype": ((BASE, {"a": (3, 1.0)}), {"dtype": torch.int32}),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_the_argument(message: str):
    arguments, options = ERRORS[message]
    with pytest.raises((ValueError, TypeError), match="^" + re.escape(message)):
        MultiLoraLinear(*arguments, **options)
