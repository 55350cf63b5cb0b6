"""DoRA in apply_multi_lora, one layer at a time: unpatched peft, one adapter at a time, is the oracle."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lyra_ops.integrations import apply_multi_lora
from lyra_ops.testing import assert_within_reference_error

peft = pytest.importorskip("peft")

from test_multi_lora_peft import Halved, one_layer, with_dora  # noqa: E402


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dora_beside_lora_in_one_layer(dtype: torch.dtype) -> None:
    """Values and gradients at most as wrong as those of peft, one adapter at a time."""
    torch.manual_seed(0)
    model = peft.get_peft_model(
        nn.ModuleDict({"q_proj": nn.Linear(96, 80)}),
        peft.LoraConfig(r=13, target_modules=["q_proj"], init_lora_weights=False, use_dora=True),
        adapter_name="scaled",
    )
    model.add_adapter("plain", peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    layer = model.base_model.model["q_proj"]
    layer.lora_magnitude_vector["scaled"].weight.data.mul_(torch.rand(80) + 0.5)
    model.to(dtype)
    x, upstream, ids = torch.randn(64, 96).to(dtype), torch.randn(64, 80).to(dtype), torch.randint(-1, 2, (64,))
    weights = [p for name, p in model.named_parameters() if "lora_" in name]

    def results(run) -> list[Tensor]:
        given = x.to(weights[0].dtype).requires_grad_()
        for p in weights:
            p.requires_grad_()
        y = run(given)
        return [y, *torch.autograd.grad(y, [given, *weights], upstream.to(y.dtype))]

    def separately(x: Tensor) -> Tensor:
        y = layer.base_layer(x)
        for e, name in enumerate(["scaled", "plain"]):
            model.set_adapter(name)
            for p in weights:
                p.requires_grad_()
            y = torch.where((ids == e)[:, None], layer(x), y)
        return y

    theirs = results(separately)
    with apply_multi_lora(model).route(ids):
        ours = results(layer)
    model.double()
    layer.__class__ = peft.tuners.lora.Linear
    for got, plain, exact in zip(ours, theirs, results(separately)):
        assert_within_reference_error(got, plain, exact)
        if dtype != torch.float32:  # where rounding the results counts, not the order of a sum
            assert (got.double() - exact).norm() <= (plain.double() - exact).norm()


def test_dora_notices_what_is_written_to_its_weights() -> None:
    model, layer = one_layer(nn.Linear(6, 5), with_dora)
    model.requires_grad_(False).set_adapter("image")
    alike, x = copy.deepcopy(layer), torch.randn(2, 3, 6).double()
    with apply_multi_lora(model).route(["image"] * 2), torch.no_grad():
        for part in ("lora_magnitude_vector.image", "base_layer", "lora_A.image", "lora_B.image"):
            layer(x)
            for one in (layer, alike):
                one.get_submodule(part).weight[0].mul_(3)
            torch.testing.assert_close(layer(x), alike(x))


def test_dora_is_refused_where_it_would_be_another_product() -> None:
    model, layer = one_layer(nn.Linear(6, 5), with_dora)
    layer.lora_dropout["image"] = nn.Dropout(0.5)
    layer.lora_dropout["speech"] = layer.lora_dropout["image+speech"] = nn.Dropout(0.5)
    x = torch.randn(2, 3, 6).double()
    with apply_multi_lora(model).route(["image", None]):
        layer(x)
        model.train()
        with pytest.raises(ValueError, match="lora_dropout: got .* in training with DoRA"):
            layer(x)
        model.eval()
        layer.base_layer = Halved(6, 5).double()
        with pytest.raises(ValueError, match="adapter 'image': got DoRA around Halved with a forward of its own"):
            layer(x)
