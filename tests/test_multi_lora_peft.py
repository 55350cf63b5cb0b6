"""apply_multi_lora on tiny models of peft and transformers: unpatched peft, one adapter at a time, is the oracle."""

from __future__ import annotations

import filecmp
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import lyra_ops
from lyra_ops.integrations import apply_multi_lora, is_routed, modality_adapters
from lyra_ops.integrations import multi_lora as integration
from lyra_ops.testing import assert_within_reference_error

accelerate = pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[1]
RANKS = {"image": 4, "speech": 3, "image+speech": 8}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MIXED = ["speech", None, "image+speech", "speech"]
IDS = torch.zeros(4, 7, dtype=torch.int64)


def llama(**options) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        **options,
    )
    return transformers.LlamaForCausalLM(config).double()


def with_adapters(model: nn.Module, **options) -> nn.Module:
    """A PeftModel with three adapters of unequal rank and scaling, none of them zero."""
    torch.manual_seed(1)
    for name, rank in RANKS.items():
        settings = {"r": rank, "lora_alpha": 6, "target_modules": LINEARS, "init_lora_weights": False} | options
        if name == "speech":  # one that does not reach all layers
            settings |= {"target_modules": ["q_proj", "v_proj"], "use_rslora": True}
        config = peft.LoraConfig(**settings)
        if isinstance(model, peft.PeftModel):
            model.add_adapter(name, config)
        else:
            model = peft.get_peft_model(model, config, adapter_name=name, autocast_adapter_dtype=False)
    return model.double()


def with_dora(model: nn.Module) -> nn.Module:
    """The same, scaled by output, too."""
    model = with_adapters(model, use_dora=True)
    for name, p in model.named_parameters():
        if "lora_magnitude_vector" in name:
            p.data.mul_(torch.rand_like(p) + 0.5)
    return model


def batch() -> dict[str, Tensor]:
    ids = torch.randint(1, 50, (4, 7), generator=torch.Generator().manual_seed(0))
    ids[1, :3] = 0
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def alone(model: nn.Module, inputs: dict[str, Tensor], sample: int, adapter: str | None) -> Tensor:
    """Logits of one sample, by unpatched peft with one adapter."""
    own = {name: value[sample : sample + 1] for name, value in inputs.items()}
    if adapter is None:
        with model.disable_adapter():
            return model(**own).logits
    model.set_adapter(adapter)
    return model(**own).logits


def real(logits: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    return logits[inputs["attention_mask"].bool()]


KINDS = pytest.mark.parametrize("adapted", [with_adapters, with_dora])


@KINDS
def test_mixed_batch_is_each_sample_by_its_own_adapter(adapted) -> None:
    inputs, model = batch(), adapted(llama()).eval()
    want = torch.cat([alone(model, inputs, b, name) for b, name in enumerate(MIXED)])
    if adapted is with_adapters:  # peft mixes no DoRA
        named = model(**inputs, adapter_names=[name or "__base__" for name in MIXED]).logits
        torch.testing.assert_close(real(named, inputs), real(want, inputs))
    routed = apply_multi_lora(model)
    with routed.route(MIXED):
        got = model(**inputs).logits
    torch.testing.assert_close(real(got, inputs), real(want, inputs))


@KINDS
def test_ids_per_token_in_one_layer(adapted) -> None:
    model, layer = one_layer(nn.Linear(6, 5), adapted)
    x, ids = torch.randn(2, 9, 6).double(), torch.randint(-1, 3, (2, 9))
    want = torch.empty(2, 9, 5).double()
    for e, name in enumerate(RANKS):
        model.set_adapter(name)
        want[ids == e] = layer(x)[ids == e]
    want[ids == -1] = layer.base_layer(x)[ids == -1]
    routed = apply_multi_lora(model)
    assert routed.names == tuple(RANKS)
    with routed.route(ids):
        torch.testing.assert_close(layer(x), want)
    with routed.route(ids.flatten()):
        torch.testing.assert_close(layer(x.flatten(0, 1)), want.flatten(0, 1))


@KINDS
def test_sums_of_adapters_per_sample_and_per_token(adapted) -> None:
    model, layer = one_layer(nn.Linear(6, 5), adapted)
    x, base = torch.randn(3, 4, 6).double(), layer.base_layer
    parts = {}
    for name in RANKS:
        model.set_adapter(name)
        parts[name] = layer(x) - base(x)
    routed = apply_multi_lora(model)
    with routed.route([{"image": 0.5, "speech": -2.0}, None, "speech"]):
        got = layer(x)
    want = base(x)
    want[0] += 0.5 * parts["image"][0] - 2 * parts["speech"][0]
    want[2] += parts["speech"][2]
    torch.testing.assert_close(got, want)

    ids, weights = torch.randint(-1, 3, (3, 4, 2)), torch.rand(3, 4, 2).double().requires_grad_()
    want = base(x)
    for e, name in enumerate(RANKS):
        want = want + ((ids == e) * weights).sum(-1, keepdim=True) * parts[name]
    with routed.route(ids, weights=weights):
        got = layer(x)
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(y.square().sum(), weights, retain_graph=True) for y in (got, want)]
    torch.testing.assert_close(*grads)
    with pytest.raises(ValueError, match="weights: got some beside names"), routed.route([None], weights=weights):
        pass
    with pytest.raises(ValueError, match="adapters: got 'video', expected None or one"), routed.route([{"video": 1}]):
        pass


@KINDS
@pytest.mark.parametrize("checkpointing", [None, "use_reentrant=False", "use_reentrant=True"])
def test_one_step_gives_the_gradients_of_separate_runs(checkpointing: str | None, adapted) -> None:
    inputs, model = batch(), adapted(llama()).train()
    weights = {name: p for name, p in model.named_parameters() if "lora_" in name}
    for p in weights.values():
        p.requires_grad_()
    want = dict.fromkeys(weights, 0.0)
    for b, adapter in enumerate(MIXED):
        if adapter is None:
            continue
        loss = real(alone(model, inputs, b, adapter), {k: v[b : b + 1] for k, v in inputs.items()}).square().sum()
        for p in weights.values():
            p.requires_grad_()
        for p in weights.values():
            p.grad = None
        loss.backward()
        for name, p in weights.items():
            want[name] = want[name] + (0.0 if p.grad is None else p.grad)
            p.grad = None
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "use_reentrant=True"})
    routed = apply_multi_lora(model)
    for p in weights.values():
        p.requires_grad_()
    with routed.route(MIXED):
        first = real(model(**inputs).logits, inputs).square().sum()
    with routed.route([None] * 4):  # another routing in between must not reach the recomputation of the first
        model(**inputs)
    first.backward()
    for name, p in weights.items():
        assert p.grad is not None, name
        torch.testing.assert_close(p.grad, torch.as_tensor(want[name]).expand_as(p).to(p.dtype), msg=name)
        assert bool(p.grad.any()) == (".image." not in name), name  # image has no tokens: zeros, not None


def groups_of(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Filled with the number of layers in each call of the op."""
    sizes: list[int] = []
    run = integration.run_checked

    def counting(x, bases, *rest):
        sizes.append(len(bases))
        return run(x, bases, *rest)

    monkeypatch.setattr(integration, "run_checked", counting)
    return sizes


def mixed_step(model: nn.Module, routed, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    with routed.route(MIXED):
        logits = real(model(**inputs).logits, inputs)
    logits.square().sum().backward()
    return logits, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_layers_with_one_input_run_at_once(monkeypatch: pytest.MonkeyPatch, reentrant: bool | None) -> None:
    """q, k and v, gate and up: seen by their input, not by name, from the second pass on; the results stay the same."""
    inputs, model = batch(), with_adapters(llama()).train()
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)
    if reentrant is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    routed, sizes = apply_multi_lora(model), groups_of(monkeypatch)
    first = mixed_step(model, routed, inputs)
    if reentrant is None:
        assert sizes == [1] * 14
    sizes.clear()
    again = mixed_step(model, routed, inputs)
    # "speech" is on q and v alone, so k goes its own way.
    assert sizes == [2, 1, 1, 2, 1] * (2 if reentrant is None else 4)
    assert torch.equal(first[0], again[0])
    torch.testing.assert_close(first[1], again[1])
    with torch.inference_mode(), routed.route(MIXED):
        assert torch.equal(real(model(**inputs).logits, inputs), first[0])


def two_layers() -> tuple[nn.Module, nn.Module, nn.Module]:
    """A model and its two layers, whose inputs the caller gives."""
    torch.manual_seed(0)
    layers = nn.ModuleDict({"q_proj": nn.Linear(6, 5), "v_proj": nn.Linear(6, 4)})
    model = with_adapters(layers, target_modules=["q_proj", "v_proj"]).eval()
    return model, model.base_model.model["q_proj"], model.base_model.model["v_proj"]


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_input_changed_between_two_layers(mode, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a residual stream that is added to in place; in inference mode tensors have no version."""
    model, one, other = two_layers()
    routed, sizes = apply_multi_lora(model), groups_of(monkeypatch)
    x = torch.randn(2, 3, 6).double()
    with routed.route(MIXED[:2]):
        one(x), other(x)
    for _ in range(3):
        with mode(), routed.route(MIXED[:2]):
            x = torch.randn(2, 3, 6).double()
            one(x)
            x += 1
            got = other(x)
            assert torch.equal(got, other(x.clone()))
    if mode is not torch.inference_mode:
        assert sizes == [1, 1, 2, 1, 1] + [1, 1, 1] * 2  # seen once that it changes, not tried again


def test_graph_or_dtype_wanted_between_two_layers() -> None:
    model, one, other = two_layers()
    model.float().requires_grad_(False)
    x, routed = torch.randn(2, 3, 6), apply_multi_lora(model)
    with routed.route(MIXED[:2]):
        one(x), other(x)
    with routed.route(MIXED[:2]):
        with torch.autocast("cpu", torch.bfloat16):
            one(x)
        assert other(x).dtype == torch.float32
    with routed.route(MIXED[:2]):
        one(x), other(x)
    with routed.route(MIXED[:2]):
        one(x)
        assert other(x.requires_grad_()).requires_grad


def test_layers_that_no_longer_share_their_input_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, one, other = two_layers()
    x, routed, sizes = torch.randn(2, 3, 6).double(), apply_multi_lora(model), groups_of(monkeypatch)

    def both(x: Tensor, x_of_other: Tensor) -> list[int]:
        sizes.clear()
        with routed.route(["image", "image+speech"]):
            got = one(x), other(x_of_other)
        with routed.route(["image", "image+speech"]):
            assert torch.equal(got[1], other(x_of_other))
        torch.testing.assert_close(got[0][0], alone_in(model, one, "image", x)[0])
        torch.testing.assert_close(got[1][0], alone_in(model, other, "image", x_of_other)[0])
        return sizes[:-1]

    assert both(x, x) == [1, 1]
    assert both(x, x) == [2]
    assert both(x, x.clone()) == [2, 1]  # the first cannot know yet
    assert both(x, x.clone()) == [1, 1]
    assert both(x, x) == [1, 1]
    with routed.route(["image", None]):
        one(x)
        x.add_(1)
        sizes.clear()
        got = other(x)
    assert sizes == [1]
    torch.testing.assert_close(got[0], alone_in(model, other, "image", x)[0])


def alone_in(model: nn.Module, layer: nn.Module, adapter: str, x: Tensor) -> Tensor:
    """What unpatched peft computes: outside of a route."""
    model.set_adapter(adapter)
    return layer(x)


def test_checkpointed_recomputation_really_happens_under_the_routing() -> None:
    inputs, model = batch(), with_adapters(llama()).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    routed = apply_multi_lora(model)
    seen = []
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.register_forward_hook(lambda *_: seen.append(routed._now))
    with routed.route(MIXED):
        loss = model(**inputs).logits.square().sum()
    loss.backward()
    assert len(seen) == 2 and seen[0] is seen[1] is not None


@KINDS
def test_generates_mixed_batches_with_a_cache(adapted) -> None:
    inputs, model = batch(), adapted(llama()).eval()
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": 49, "pad_token_id": 0}
    want = []
    for b, adapter in enumerate(MIXED):
        own = {name: value[b : b + 1] for name, value in inputs.items()}
        if adapter is None:
            with model.disable_adapter():
                want.append(model.generate(**own, **options))
        else:
            model.set_adapter(adapter)
            want.append(model.generate(**own, **options))
    routed = apply_multi_lora(model)
    with routed.route(MIXED):
        got = model.generate(**inputs, **options)
    per_token = torch.tensor([[-1 if name is None else list(RANKS).index(name)] * 7 for name in MIXED])
    with routed.route(per_token, new_tokens=MIXED):
        again = model.generate(**inputs, **options)
    for b, row in enumerate(want):
        assert got[b, : row.shape[1]].tolist() == row[0].tolist()
    assert torch.equal(got, again)


@KINDS
def test_compiles_as_a_whole_and_once_for_all_routes(adapted) -> None:
    torch.compiler.reset()  # shapes that other tests compiled Llama for would make this one's dynamic
    inputs, model = batch(), adapted(llama()).train()
    weights = {name: p.requires_grad_() for name, p in model.named_parameters() if "lora_" in name}
    routed, counter = apply_multi_lora(model), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model.base_model.model, fullgraph=True, backend=counter)
    for names in (MIXED, ["image"] * 4, [None, "image", "speech", "speech"]):
        gradients = []
        for run in (compiled, model):
            model.zero_grad()
            with routed.route(names):
                real(run(**inputs).logits, inputs).square().sum().backward()
            gradients.append({name: p.grad for name, p in weights.items()})
        torch.testing.assert_close(*gradients)
    assert counter.frame_count == 1


def test_removed_without_a_trace(tmp_path) -> None:
    inputs, model = batch(), with_adapters(llama()).eval()
    model.set_adapter("image")
    before, classes = model(**inputs).logits, [type(m) for m in model.modules()]
    model.save_pretrained(tmp_path / "before")
    routed = apply_multi_lora(model)
    assert torch.equal(model(**inputs).logits, before)  # outside of a route it is peft
    model.save_pretrained(tmp_path / "while")
    with pytest.raises(RuntimeError, match="in the middle"), routed.route(MIXED):
        raise RuntimeError("in the middle")
    assert torch.equal(model(**inputs).logits, before)
    routed.remove()
    routed.remove()
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(model(**inputs).logits, before)
    assert not any("_lyra" in key for m in model.modules() for key in m.__dict__)
    for name in RANKS:
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            assert filecmp.cmp(tmp_path / "before" / name / file, tmp_path / "while" / name / file, shallow=False)


def test_adapters_may_change_while_it_is_routable(tmp_path) -> None:
    inputs, model = batch(), with_adapters(llama()).eval()
    routed = apply_multi_lora(model)
    with routed.route(MIXED), torch.no_grad():
        before = model(**inputs).logits
        for p in model.parameters():
            p.mul_(1.01)  # packed banks must notice
        assert not torch.equal(model(**inputs).logits, before)
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path / "speech", adapter_name="loaded", autocast_adapter_dtype=False)
    model.delete_adapter("speech")
    assert routed.names == ("image", "image+speech", "loaded")
    known = "expected None or one of image, image.speech, loaded"
    with pytest.raises(ValueError, match=f"adapters: got 'speech', {known}"), routed.route(MIXED):
        pass
    with routed.route(["loaded"] * 4):
        got = model(**inputs).logits
    model.set_adapter("loaded")
    torch.testing.assert_close(real(got, inputs), real(model(**inputs).logits, inputs))
    merged = model.merge_and_unload(adapter_names=["loaded"])
    torch.testing.assert_close(real(merged(**inputs).logits, inputs), real(got, inputs))


def one_layer(base: nn.Module, adapted=with_adapters) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = adapted(nn.ModuleDict({"q_proj": base})).eval()
    return model, model.base_model.model["q_proj"]


def test_an_adapter_that_brings_new_layers_along() -> None:
    inputs, model = batch(), with_adapters(llama(), target_modules=["q_proj"]).eval()
    routed = apply_multi_lora(model)
    config = peft.LoraConfig(r=2, target_modules=LINEARS, init_lora_weights=False)
    model.add_adapter("wide", config)
    model.double()
    with routed.route(["wide"] * 4):
        got = model(**inputs).logits
    routed.remove()
    model.set_adapter("wide")
    torch.testing.assert_close(got, model(**inputs).logits)


def test_weights_written_through_data_between_routes() -> None:
    model, layer = one_layer(nn.Linear(6, 5))
    routed, x = apply_multi_lora(model), torch.randn(2, 3, 6).double()
    model.set_adapter("image")
    for _ in range(2):
        with routed.route(["image"] * 2), torch.no_grad():
            got = layer(x)
        torch.testing.assert_close(got, layer(x))
        layer.lora_A["image"].weight.data.mul_(3)  # leaves no trace in the tensor's version


def test_training_after_inference_mode_in_one_route() -> None:
    model, layer = one_layer(nn.Linear(6, 5))
    weight = layer.lora_A["image"].weight.requires_grad_()
    x, ids = torch.randn(2, 40, 6).double(), torch.arange(80).view(2, 40) % 4 - 1
    with apply_multi_lora(model).route(ids):
        with torch.inference_mode():
            layer(x)
        layer(x).sum().backward()
    assert weight.grad.any()


def test_a_merged_model_is_refused() -> None:
    model, layer = one_layer(nn.Linear(6, 5))
    model.set_adapter("image")
    routed, x = apply_multi_lora(model), torch.randn(2, 3, 6).double()
    want = layer(x)
    model.merge_adapter()
    with pytest.raises(ValueError, match="adapters: got a route while image is merged"), routed.route(["speech"] * 2):
        layer(x)
    torch.testing.assert_close(layer(x), want)
    model.unmerge_adapter()
    with routed.route(["image"] * 2):
        torch.testing.assert_close(layer(x), want)


class Halved(nn.Linear):
    """Stands for a quantised layer: what it computes is not x W^T."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).div(2)


class SavesItsResult(nn.Linear):
    """What it returns is needed by its backward, so it must not be written to."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).exp()


def offloaded(base: nn.Linear) -> nn.Linear:
    """As device_map leaves a layer for which the GPU had no room: its weight comes only when forward is called."""
    return accelerate.cpu_offload(base.double(), execution_device=torch.device("cpu"))


@pytest.mark.parametrize("make", [Halved, SavesItsResult, lambda *size: offloaded(nn.Linear(*size))])
def test_a_base_layer_with_a_forward_of_its_own_is_asked(make) -> None:
    model, layer = one_layer(nn.Linear(6, 5))
    base = make(6, 5)
    layer.base_layer = base if any(p.is_meta for p in base.parameters()) else base.double()
    weights = [layer.lora_A["image"].weight.requires_grad_(), layer.lora_B["image"].weight.requires_grad_()]
    x = torch.randn(2, 3, 6).double().requires_grad_()
    model.set_adapter("image")
    want = layer(x)
    with apply_multi_lora(model).route(["image", "image"]):
        got = layer(x)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*[torch.autograd.grad(y.square().sum(), [x, *weights]) for y in (got, want)])


def test_the_layer_of_peft_around_a_quantised_linear() -> None:
    from peft.tuners.lora.gptq import GPTQLoraLinear

    config = peft.LoraConfig(r=3, init_lora_weights=False)
    layer = GPTQLoraLinear(Halved(6, 5), "image", config=config, r=3, lora_alpha=5).double()
    model, x = nn.ModuleDict({"q_proj": layer}), torch.randn(2, 3, 6).double()
    want = torch.stack([layer(x[0]), layer.quant_linear_module(x[1])])
    routed = apply_multi_lora(model)
    with routed.route(["image", None]):
        torch.testing.assert_close(layer(x), want)
    routed.remove()
    assert type(layer) is GPTQLoraLinear


def quantised(kind: str) -> nn.Module:
    """A model of one such layer."""
    linear = nn.Linear(64, 96, bias=False, dtype=torch.bfloat16)
    model = nn.ModuleDict({"q_proj": linear})
    if kind == "torchao":
        quantization = pytest.importorskip("torchao.quantization")
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig(version=2))
        return model
    bnb, weight = pytest.importorskip("bitsandbytes").nn, linear.weight.data.clone()
    if kind == "bitsandbytes, 4 bits":
        model["q_proj"] = bnb.Linear4bit(64, 96, bias=False, compute_dtype=torch.bfloat16)
        model["q_proj"].weight = bnb.Params4bit(weight, requires_grad=False)
    else:
        model["q_proj"] = bnb.Linear8bitLt(64, 96, bias=False, has_fp16_weights=False)
        model["q_proj"].weight = bnb.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = "4" in kind, "8" in kind
    return model.to("cpu")  # this is when they quantise


@pytest.mark.parametrize("kind", ["torchao", "bitsandbytes, 4 bits", "bitsandbytes, 8 bits"])
def test_packages_that_quantise(kind: str) -> None:
    """Where they are installed."""
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(quantised(kind), config, adapter_name="image")
    model.add_adapter("speech", peft.LoraConfig(r=8, target_modules=["q_proj"], init_lora_weights=False))
    layer, x = model.base_model.model["q_proj"], torch.randn(3, 7, 64, dtype=torch.bfloat16, requires_grad=True)
    plain, exact = layer.base_layer(x).detach(), layer.base_layer(x).detach().double()
    for b, name in enumerate(["image", "speech"]):
        model.set_adapter(name)
        plain[b] = layer(x)[b]
        delta = layer.lora_B[name].weight.double() @ layer.lora_A[name].weight.double() * layer.scaling[name]
        exact[b] += x[b].double() @ delta.T
    weights = [p.requires_grad_() for name, p in model.named_parameters() if "lora_" in name]
    with apply_multi_lora(model).route(["image", "speech", None]):
        got = layer(x)
    assert_within_reference_error(got, plain, exact)
    assert all(g.any() for g in torch.autograd.grad(got.sum(), [x, *weights]))


def test_says_whether_it_is_routed() -> None:
    model, _ = one_layer(nn.Linear(6, 5))
    routed = apply_multi_lora(model)
    assert not is_routed(model)
    with routed.route([None]):
        assert is_routed(model)
    assert not is_routed(model)


def test_the_mixin_of_transformers() -> None:
    inputs, model = batch(), llama()
    torch.manual_seed(1)
    for name, rank in RANKS.items():
        model.add_adapter(peft.LoraConfig(r=rank, target_modules=LINEARS, init_lora_weights=False), name)
    model.double().eval()
    model.set_adapter("speech")
    want = model(**inputs).logits
    routed = apply_multi_lora(model)
    with routed.route(["speech"] * 4):
        torch.testing.assert_close(model(**inputs).logits, want)


def qwen2_vl() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.Qwen2VLConfig(
        text_config={
            "vocab_size": 60,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
        },
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4},
        image_token_id=55,
        vision_start_token_id=56,
        vision_end_token_id=57,
    )
    return transformers.Qwen2VLForConditionalGeneration(config).double()


def test_qwen2_vl_with_an_image_in_the_batch() -> None:
    model = with_adapters(qwen2_vl()).eval()
    ids = torch.randint(1, 50, (2, 8), generator=torch.Generator().manual_seed(0))
    ids[0, 1:7] = torch.tensor([56, 55, 55, 55, 55, 57])
    pixels = torch.randn(16, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(0)).double()
    image = {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]])}
    kinds = {"mm_token_type_ids": (ids == 55).int()}
    chosen = modality_adapters(
        {"image": ids == 55, "speech": torch.tensor([False, True])},
        {frozenset({"image"}): "image", frozenset({"speech"}): "speech"},
    )
    assert chosen == ["image", "speech"]
    want = []
    for b, name in enumerate(chosen):
        model.set_adapter(name)
        own = {"mm_token_type_ids": kinds["mm_token_type_ids"][b : b + 1]} | (image if b == 0 else {})
        want.append(model(input_ids=ids[b : b + 1], **own).logits)
    routed = apply_multi_lora(model)
    with routed.route(chosen):
        got = model(input_ids=ids, **image, **kinds).logits
    torch.testing.assert_close(got, torch.cat(want))


def test_modality_adapters_names_what_is_missing() -> None:
    with pytest.raises(ValueError, match="adapters: got none for sample 1 of text alone, expected one of image"):
        modality_adapters({"image": torch.tensor([True, False])}, {frozenset({"image"}): "image"})
    with pytest.raises(ValueError, match="present: got batch sizes {'image': 1, 'speech': 2}"):
        modality_adapters({"image": torch.tensor([True]), "speech": torch.tensor([True, False])}, {})
    with pytest.raises(TypeError, match=r"present\['image'\]: got list, expected a torch.Tensor"):
        modality_adapters({"image": [True]}, {})
    with pytest.raises(TypeError, match=r"present\['image'\]: got dtype int64, expected bool"):
        modality_adapters({"image": IDS}, {})
    with pytest.raises(ValueError, match=r"present\['image'\]: got shape \(1, 4, 7\), expected \(B,\) or \(B, L\)"):
        modality_adapters({"image": IDS.bool()[None]}, {})
    with pytest.raises(TypeError, match="adapters: got the key 'image', expected a frozenset of modalities"):
        modality_adapters({"image": torch.tensor([True])}, {"image": "image"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alora_invocation_tokens": [1]}, "adapter 'image': got ALoraLinearVariant, expected plain LoRA or DoRA"),
        ({"lora_bias": True}, "got lora_bias=True"),
    ],
)
def test_what_cannot_be_routed_is_refused(options: dict, message: str) -> None:
    model = with_adapters(llama(), **options).eval()
    with pytest.raises(ValueError, match=message), apply_multi_lora(model).route(["image"] * 4):
        model(**batch())


def test_unequal_dropout_is_refused_in_training_only() -> None:
    model = with_adapters(llama())
    for module in model.modules():
        if isinstance(module, nn.ModuleDict) and "image" in module and isinstance(module["image"], nn.Identity):
            module["image"] = nn.Dropout(0.5)
    routed = apply_multi_lora(model)
    with routed.route(MIXED):
        model.eval()(**batch())
        with pytest.raises(ValueError, match="lora_dropout: got"):
            model.train()(**batch())


def test_errors_of_apply() -> None:
    with pytest.raises(ValueError, match="model: got Linear without a LoRA layer"):
        apply_multi_lora(nn.Linear(2, 2))
    plain = llama()
    classes = [type(m) for m in plain.modules()]
    with pytest.raises(ValueError, match="model: got LlamaForCausalLM without a LoRA layer"):
        apply_multi_lora(plain)
    assert [type(m) for m in plain.modules()] == classes
    model = with_adapters(llama())
    routed = apply_multi_lora(model)
    with pytest.raises(ValueError, match="is routable already"):
        apply_multi_lora(model)
    with pytest.raises(TypeError, match="model: got str, expected a torch.nn.Module"):
        apply_multi_lora("model")
    for wrong in (-2, 3):
        ids = torch.tensor([[0, wrong]])
        with pytest.raises(ValueError, match="expected -1 .base alone. or one of 0 = image"), routed.route(ids):
            pass
    own_head = with_adapters(llama(), modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match="lm_head is peft's ModulesToSaveWrapper, which would follow the active"):
        apply_multi_lora(own_head)
    embedding = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["embed_tokens"]))
    with pytest.raises(ValueError, match="embed_tokens is peft's Embedding"):
        apply_multi_lora(embedding)


UNFIT = {  # what a user may give for four samples of seven tokens
    "adapters: got 'image', expected a list of names, one per sample, or a tensor of ids per token": ("image", {}),
    "adapters: got None, expected a list of names": (None, {}),
    "adapters: got array([[0]]), expected a list of names": (np.zeros((1, 1), int), {}),
    "adapters: got 1, expected a name, None or a dict of weights by name": ([1], {}),
    "adapters: got 'video', expected None or one of image, speech, image+speech": (["video"], {}),
    "adapters: got the weight nan for 'image', expected a finite number": ([{"image": float("nan")}], {}),
    "adapters: got the weight '1' for 'image', expected a finite number": ([{"image": "1"}], {}),
    "adapters: got names for 3 samples, expected them to fit a layer that sees tokens (4, 7)": ([None] * 3, {}),
    "adapters: got ids for tokens (7, 4), expected them to fit a layer that sees tokens (4, 7)": (IDS.T, {}),
    "adapters: got shape (4, 7, 1), expected (T,) or (B, L); with weights (T, S) or (B, L, S)": (IDS[..., None], {}),
    "adapters: got shape (7,), expected (T, S) or (B, L, S) beside weights": (IDS[0], {"weights": torch.ones(7)}),
    "weights: got shape (4, 7, 2), expected (4, 7, 1)": (IDS[..., None], {"weights": torch.ones(4, 7, 2)}),
    "new_tokens: got 'image', expected a list of names": (IDS, {"new_tokens": "image"}),
}


@pytest.mark.parametrize("message", UNFIT)
def test_errors_of_route(message: str) -> None:
    model = with_adapters(llama())
    given, options = UNFIT[message]
    routed = apply_multi_lora(model)
    with (
        pytest.raises((ValueError, TypeError), match="^" + re.escape(message)),
        routed.route(given, **options),
    ):
        model(**batch())
    assert not is_routed(model)


def test_ids_alone_do_not_tell_of_generated_tokens() -> None:
    model = with_adapters(llama()).eval()
    message = (
        "ids for tokens (4, 7), expected them to fit a layer that sees tokens (4, 1); new_tokens= names the adapters"
    )
    with pytest.raises(ValueError, match=re.escape(message)), apply_multi_lora(model).route(IDS):
        model.generate(**batch(), max_new_tokens=2)


EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "multi_lora.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example_of_the_docs(number: int, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with_adapters(llama()).save_pretrained("adapters")
    inputs = {"input_ids": IDS[:3] + 1, "labels": IDS[:3] + 1}
    names = {"base": llama(), "batch": inputs if "backward" in EXAMPLES[number] else {"input_ids": IDS[:3] + 1}}
    exec(EXAMPLES[number], names)
    if "backward" in EXAMPLES[number]:
        trained = names["optimizer"].param_groups[0]["params"]
        assert all(p.grad is not None for p in trained) and any(p.grad.any() for p in trained)


def test_importing_lyra_ops_imports_neither_peft_nor_transformers() -> None:
    import subprocess
    import sys

    code = (
        "import sys, lyra_ops; lyra_ops.integrations; sys.exit('peft' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert lyra_ops.__all__
