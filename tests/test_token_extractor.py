"""apply_token_extractor on tiny random models, against the unpatched model with dropped keys masked layer by layer."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lyra_ops.integrations import apply_token_extractor
from lyra_ops.testing import assert_within_reference_error

IMAGE, VISION_START, VISION_END, PAD = 60, 61, 62, 0
TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": PAD, "bos_token_id": 1,
    "eos_token_id": None,
}  # fmt: skip
MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
PLAIN, VISION = ("llama", "qwen2"), ("qwen2_vl", "qwen2_5_vl")


def tiny(family: str, attention: str = "sdpa") -> nn.Module:
    torch.manual_seed(0)
    if family in PLAIN:
        config = transformers.AutoConfig.for_model(family, **TEXT)
        config.image_token_id = IMAGE
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    else:
        own = (
            {"embed_dim": 16, "hidden_size": 32} if family == "qwen2_vl" else {"hidden_size": 16, "out_hidden_size": 32}
        )
        vision = dict(depth=1, num_heads=2, patch_size=2, spatial_merge_size=2, temporal_patch_size=1, **own)
        config = transformers.AutoConfig.for_model(
            family, text_config=TEXT | {"rope_parameters": MROPE}, vision_config=vision, image_token_id=IMAGE,
            video_token_id=63, vision_start_token_id=VISION_START, vision_end_token_id=VISION_END,
        )  # fmt: skip
        model = transformers.AutoModelForImageTextToText.from_config(config, attn_implementation=attention)
    # Larger weights than at initialisation: attention that differs from token to token, logits that depend on it.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name:
                parameter.mul_(8)
    # Eager attention takes its softmax in float32, whatever the model's dtype: float64's mask overflows there.
    return model.eval() if attention == "eager" else model.double().eval()


def sample(family: str, image_side: int, tail: int, seed: int) -> dict[str, Tensor]:
    """Text, an image of (image_side / 2)^2 tokens, and a question of ``tail`` tokens."""
    g = torch.Generator().manual_seed(seed)
    text = torch.randint(2, 60, (3 + tail,), generator=g).tolist()
    n = (image_side // 2) ** 2
    ids = torch.tensor([text[:3] + [VISION_START] + [IMAGE] * n + [VISION_END] + text[3:]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family in VISION:
        inputs["pixel_values"] = torch.randn(image_side**2, 12, generator=g, dtype=torch.float64)
        inputs["image_grid_thw"] = torch.tensor([[1, image_side, image_side]])
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    else:
        # Without a vision tower all image tokens are alike; other ids, given by mask, are not.
        inputs["input_ids"] = torch.where(ids == IMAGE, torch.randint(2, 60, ids.shape, generator=g), ids)
        inputs["position_ids"] = torch.arange(ids.shape[1])[None]
    return inputs


def batch_of(samples: list[dict[str, Tensor]], side: str) -> dict[str, Tensor]:
    length = max(s["input_ids"].shape[1] for s in samples)
    out = {}
    for name in samples[0]:
        if name in ("pixel_values", "image_grid_thw"):
            out[name] = torch.cat([s[name] for s in samples])
            continue
        gaps = [length - s[name].shape[1] for s in samples]
        rows = [nn.functional.pad(s[name], (n, 0) if side == "left" else (0, n)) for s, n in zip(samples, gaps)]
        out[name] = torch.cat(rows)
    return out


def modality_of(inputs: dict[str, Tensor]) -> Tensor:
    """What lies between the vision marks."""
    ids = inputs["input_ids"]
    return ((ids == VISION_START).cumsum(1) > 0) & ((ids == VISION_END).cumsum(1) == 0) & (ids != VISION_START)


SIDES = ((8, 5), (12, 9), (10, 3))


@pytest.fixture(params=PLAIN + VISION)
def family(request) -> str:
    return request.param


def run(model, extractor, inputs, **kwargs):
    with torch.no_grad(), extractor.modality(modality_of(inputs)):
        return model(**inputs, **kwargs)


def close(got: Tensor, want: Tensor) -> bool:
    """float64 against float64 in another order of summation."""
    return torch.allclose(got, want, rtol=1e-9, atol=1e-9 * want.abs().max().item())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_keeping_all_changes_nothing(family, attention, side):
    model = tiny(family, attention)
    inputs = batch_of([sample(family, *s, seed=i) for i, s in enumerate(SIDES)], side)
    inputs = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    with torch.no_grad():
        want = model(**inputs).logits
    extractor = apply_token_extractor(model, keep=1.0)
    got = run(model, extractor, inputs).logits
    assert torch.equal(got, want)


def test_eager_attention_drops_what_sdpa_drops(family):
    inputs = batch_of([sample(family, *s, seed=i) for i, s in enumerate(SIDES)], "left")
    logits = {}
    for name, model in (
        ("exact", tiny(family)),
        ("plain", tiny(family).float()),
        ("eager", tiny(family, "eager")),
    ):
        feed = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        extractor = apply_token_extractor(model, blocks=3, keep=0.5, min_keep=0)
        logits[name] = run(model, extractor, feed).logits[extractor.positions >= 0]
    assert_within_reference_error(logits["eager"], logits["plain"], logits["exact"])


def test_dropping_is_masking_the_dropped_keys_in_later_layers(family):
    model = tiny(family)
    inputs = batch_of([sample(family, *s, seed=i) for i, s in enumerate(SIDES)], "left")
    extractor = apply_token_extractor(model, blocks=3, keep=0.5, min_keep=0)
    kept = {}
    watch = [
        extractor.text_model.layers[i].register_forward_hook(lambda *_, i=i: kept.update({i: extractor.positions}))
        for i in extractor.shares
    ]
    got = run(model, extractor, inputs).logits
    positions = extractor.positions
    for handle in watch:
        handle.remove()
    extractor.remove()
    assert list(kept) == [1, 3]
    assert positions.shape[1] < kept[1].shape[1] < inputs["input_ids"].shape[1]

    real = inputs["attention_mask"].bool()
    length = real.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()

    def only(i):
        def hook(layer, args, kwargs):
            seen = real.clone()
            for drop, places in kept.items():
                if i > drop:
                    stays = torch.zeros(real.shape[0], length + 1, dtype=torch.bool)
                    seen &= stays.scatter(1, places % (length + 1), True)[:, :length]
            mask = causal & seen[:, None, None] | torch.eye(length, dtype=torch.bool)
            return args, kwargs | {"attention_mask": mask}

        return hook

    for i, layer in enumerate(extractor.text_model.layers):
        layer.register_forward_pre_hook(only(i), with_kwargs=True)
    with torch.no_grad():
        want = model(**inputs).logits
    for b in range(3):
        there = positions[b] >= 0
        assert close(got[b][there], want[b][positions[b][there]])


def test_the_kept_tokens_are_those_of_the_published_formula():
    model = tiny("llama")
    inputs = sample("llama", 12, 9, seed=3)
    modality = modality_of(inputs)[0]
    extractor = apply_token_extractor(model, keep={2: 0.4}, min_keep=0)
    seen = {}
    layer = model.model.layers[2]
    layer.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs, x=args[0]), with_kwargs=True)
    run(model, extractor, inputs)

    attention, x = layer.self_attn, layer.input_layernorm(seen["x"])
    split = lambda y: y.view(*y.shape[:2], -1, attention.head_dim).transpose(1, 2)  # noqa: E731
    rotary = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    q, k = rotary(split(attention.q_proj(x)), split(attention.k_proj(x)), *seen["position_embeddings"])
    rows = ~modality & (modality.cumsum(0) > 0)
    p = (q[0, :, rows] @ k[0].repeat_interleave(2, dim=0).mT / attention.head_dim**0.5).softmax(-1).mean((0, 1))
    places = modality.nonzero()[:, 0]
    best = places[p[places].argsort(descending=True)[: int(0.4 * len(places))]]
    want = torch.cat([(~modality).nonzero()[:, 0], best]).sort().values
    assert torch.equal(extractor.positions[0], want)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("score", ["text", "last_row", "random", "uniform"])
def test_a_padded_batch_is_its_samples(family, score, side):
    model = tiny(family)
    extractor = apply_token_extractor(model, blocks=3, keep=0.5, min_keep=2, score=score)
    samples = [sample(family, *s, seed=i) for i, s in enumerate(SIDES)]
    got = run(model, extractor, batch_of(samples, side)).logits
    for b, one in enumerate(samples):
        want = run(model, extractor, one).logits[0]
        assert close(got[b, -want.shape[0] :], want)


def test_generating_is_recomputing(family):
    """Greedy tokens and their logits, batch 3 with images, against one forward over prompt and answer together."""
    model = tiny(family)
    extractor = apply_token_extractor(model, blocks=3, keep=0.5, min_keep=0)
    inputs = batch_of([sample(family, *s, seed=i) for i, s in enumerate(SIDES)], "left")
    with extractor.modality(modality_of(inputs)):
        out = model.generate(
            **inputs, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True,
            suppress_tokens=[IMAGE, VISION_START, VISION_END, 63],
        )  # fmt: skip
    lengths = [out.cache.get_seq_length(i) for i in range(6)]
    assert lengths[0] == lengths[1] > lengths[2] == lengths[3] > lengths[4] == lengths[5]

    prompt = inputs["input_ids"].shape[1]
    full = dict(
        inputs, input_ids=out.sequences, attention_mask=nn.functional.pad(inputs["attention_mask"], (0, 6), value=1)
    )
    if "mm_token_type_ids" in full:
        full["mm_token_type_ids"] = nn.functional.pad(inputs["mm_token_type_ids"], (0, 6))
    labels = out.sequences.clone()
    labels[:, :prompt] = -100  # the answer does not ask
    if "position_ids" in full:
        full["position_ids"] = (full["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), extractor.modality(nn.functional.pad(modality_of(inputs), (0, 6))):
        want = model(**full, labels=labels).logits[:, -7:-1]
    got = torch.stack(out.logits, dim=1)
    assert got.dtype == torch.float32  # as generate stores them
    assert_within_reference_error(got, want.float(), want)


def test_beams_generate(family):
    model = tiny(family)
    extractor = apply_token_extractor(model, blocks=3, keep=0.5, min_keep=0)
    inputs = batch_of([sample(family, *s, seed=i) for i, s in enumerate(SIDES)], "left")
    with extractor.modality(modality_of(inputs)):
        got = model.generate(**inputs, max_new_tokens=4, num_beams=2, do_sample=False)
    assert got.shape == (3, inputs["input_ids"].shape[1] + 4)


def test_the_loss_is_that_of_the_kept_tokens_own_targets(family):
    """Also where the target itself is dropped, or stands behind a gap."""
    model = tiny(family)
    extractor = apply_token_extractor(model, blocks=3, keep=0.5, min_keep=0)
    inputs = batch_of([sample(family, *s, seed=i) for i, s in enumerate(SIDES)], "right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, :4] = -100
    out = run(model, extractor, inputs, labels=labels)
    total, count = 0.0, 0
    for b in range(3):
        for j, place in enumerate(extractor.positions[b].tolist()):
            if 0 <= place < labels.shape[1] - 1 and labels[b, place + 1] != -100:
                total -= out.logits[b, j].float().log_softmax(-1)[labels[b, place + 1]]
                count += 1
    torch.testing.assert_close(out.loss, (total / count).to(out.loss.dtype))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(family, reentrant):
    model = tiny(family)
    extractor = apply_token_extractor(model, blocks=3, keep=0.5, min_keep=0)
    inputs = batch_of([sample(family, *s, seed=i) for i, s in enumerate(SIDES)], "left")
    labels = inputs["input_ids"].masked_fill(modality_of(inputs) | (inputs["attention_mask"] == 0), -100)

    def gradients():
        model.zero_grad()
        with extractor.modality(modality_of(inputs)):
            model(**inputs, labels=labels, use_cache=False).loss.backward()
        text = extractor.text_model.named_parameters()
        return {name: p.grad.clone() for name, p in text if p.grad is not None}

    model.train()
    want = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    got = gradients()
    assert want.keys() == got.keys() and want
    for name in want:
        assert torch.equal(got[name], want[name]), name


def test_a_cache_made_by_a_plain_forward_is_continued():
    model = tiny("llama")
    extractor = apply_token_extractor(model, blocks=3, keep=0.5, min_keep=0)
    inputs = batch_of([sample("llama", *s, seed=i) for i, s in enumerate(SIDES)], "left")
    with extractor.modality(modality_of(inputs)):
        want = model.generate(**inputs, max_new_tokens=2, do_sample=False)[:, -1]
    out = run(model, extractor, inputs, use_cache=True)
    mask = nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    place = mask.sum(1, keepdim=True) - 1
    with torch.no_grad():
        ids = out.logits[:, -1:].argmax(-1)
        full = model(ids, attention_mask=mask, cache=out.cache, position_ids=place)
    assert torch.equal(full.logits[:, -1].argmax(-1), want)


def test_a_cropped_cache_is_refused():
    model = tiny("llama")
    extractor = apply_token_extractor(model, blocks=3, keep=0.5, min_keep=0)
    inputs = sample("llama", 8, 5, seed=0)
    cache = run(model, extractor, inputs, use_cache=True).cache
    cache.crop(-1)
    with pytest.raises(ValueError, match="cropped"):
        model(torch.tensor([[3]]), cache=cache)


def test_a_schedule_ends_with_no_modality_token():
    model = tiny("llama")
    extractor = apply_token_extractor(model, keep={1: 0.5, 3: 0.0}, min_keep=0)
    inputs = sample("llama", 8, 5, seed=0)
    run(model, extractor, inputs)
    assert torch.equal(extractor.positions[0], (~modality_of(inputs)[0]).nonzero()[:, 0])


def test_token_ids_of_the_config_find_the_modality():
    model = tiny("qwen2_vl")
    inputs = sample("qwen2_vl", 12, 5, seed=0)
    extractor = apply_token_extractor(model, blocks=3, keep=0.5, min_keep=0)
    with torch.no_grad():
        model(**inputs)
    assert extractor.positions.shape[1] == inputs["input_ids"].shape[1] - 36 + 9


def test_remove_restores_the_model(family):
    model = tiny(family)
    inputs = sample(family, 8, 5, seed=0)
    before = dict(model.__dict__)
    with torch.no_grad():
        want = model(**inputs, labels=inputs["input_ids"])
    extractor = apply_token_extractor(model, blocks=3, keep=0.25, min_keep=0)
    run(model, extractor, inputs)
    extractor.remove()
    with torch.no_grad():
        got = model(**inputs, labels=inputs["input_ids"])
    assert torch.equal(got.logits, want.logits) and torch.equal(got.loss, want.loss)
    assert model.__dict__.keys() == before.keys()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in extractor.text_model.layers)
    assert not transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS._local_mapping


def test_a_failing_layer_leaves_the_attention_registry_clean():
    model = tiny("llama")
    extractor = apply_token_extractor(model, blocks=3, keep=0.5)
    model.model.layers[1].mlp.forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        run(model, extractor, sample("llama", 8, 5, seed=0))
    assert not transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS._local_mapping


def test_a_renamed_copy_is_recognised(tmp_path, monkeypatch):
    """The family's source as a module of another name, as projects that vendor it have it."""
    source = transformers.models.llama.modeling_llama
    text = Path(source.__file__).read_text().replace("Llama", "House").replace("from ...", "from transformers.")
    text = text.replace(
        "from .configuration_llama import HouseConfig", "from transformers import LlamaConfig as HouseConfig"
    )
    (tmp_path / "vendored_house.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    copy = importlib.import_module("vendored_house")
    original = tiny("llama", "eager")
    config = original.config
    model = copy.HouseForCausalLM(config).eval()
    model.load_state_dict(original.state_dict())
    inputs = batch_of([sample("llama", *s, seed=i) for i, s in enumerate(SIDES)], "left")
    want = run(original, apply_token_extractor(original, keep=0.5, min_keep=0), inputs).logits
    got = run(model, apply_token_extractor(model, keep=0.5, min_keep=0), inputs).logits
    assert torch.equal(got, want)


def test_what_it_cannot_serve_it_refuses():
    sliding = AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(
            "qwen2", **TEXT, use_sliding_window=True, sliding_window=8, max_window_layers=2
        )
    )
    with pytest.raises(ValueError, match="sliding_attention"):
        apply_token_extractor(sliding)
    deepstack = transformers.Qwen3VLTextConfig(**TEXT, head_dim=8, rope_parameters=MROPE)
    with pytest.raises(ValueError, match="DeepStack"):
        apply_token_extractor(transformers.Qwen3VLTextModel(deepstack))
    model = tiny("llama")
    for keep, error in (("0.7", TypeError), (1.5, ValueError), ([0.5], ValueError), ({5: 0.5}, ValueError)):
        with pytest.raises(error, match="keep"):
            apply_token_extractor(model, keep=keep)
    with pytest.raises(ValueError, match="blocks"):
        apply_token_extractor(model, blocks=7)
    with pytest.raises(ValueError, match="score"):
        apply_token_extractor(model, score="best")
    extractor = apply_token_extractor(model, modality_token_ids=[])
    inputs = sample("llama", 8, 5, seed=0)
    with pytest.raises(ValueError, match="modality"):
        model(**inputs)
    with pytest.raises(ValueError, match="static cache"), extractor.modality(modality_of(inputs)):
        model.generate(**inputs, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(ValueError, match="attention_mask"), extractor.modality(modality_of(inputs)):
        model(inputs["input_ids"], attention_mask=torch.ones(1, 1, 25, 25))
