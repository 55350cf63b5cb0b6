"""apply_token_extractor on tiny random models, against the unpatched model with dropped keys masked layer by layer."""

from __future__ import annotations

import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import transformers
from token_extractor_models import (
    AUDIO,
    FAMILIES,
    IMAGE,
    MROPE,
    QWEN,
    SIDES,
    SPECIAL,
    TEXT,
    VIDEO,
    batch_of,
    film,
    longer,
    modality_of,
    sample,
    three,
    tiny,
    vendored,
)
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import lyra_model
from lyra_ops.integrations import apply_token_extractor
from lyra_ops.testing import assert_within_reference_error
from lyra_ops.token_select import policies, select_tokens, token_scores

# transformers renamed it in 5.24.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


@pytest.fixture(params=FAMILIES)
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
    inputs = three(family, side, model.dtype)
    with torch.no_grad():
        want = model(**inputs).logits
    extractor = apply_token_extractor(model, blocks=3, keep=1.0)
    got = run(model, extractor, inputs).logits
    assert torch.equal(got, want)


def test_eager_attention_drops_what_sdpa_drops(family):
    logits = {}
    for name, model in (
        ("exact", tiny(family)),
        ("plain", tiny(family).float()),
        ("eager", tiny(family, "eager")),
    ):
        extractor = apply_token_extractor(model, blocks=3, keep=0.5, min_keep=0)
        logits[name] = run(model, extractor, three(family, "left", model.dtype)).logits[extractor.positions >= 0]
    assert_within_reference_error(logits["eager"], logits["plain"], logits["exact"])


def test_dropping_is_masking_the_dropped_keys_in_later_layers(family):
    model = tiny(family)
    inputs = three(family, "left")
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


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("asking", ["text", "speech", "last_row"])
def test_the_kept_tokens_are_those_of_the_published_formula(asking, early):
    """With a spoken instruction, its tokens take the place of the text's, and stay. FastV looks from the last row."""
    spoken = asking == "speech"
    model = tiny("llama")
    inputs = sample("llama", 12, 9, seed=3)
    modality = modality_of(inputs)[0]
    rows = ~modality & (modality.cumsum(0) > 0)
    asks = torch.zeros_like(modality)
    if spoken:
        asks[5:9] = True
        assert modality[5:9].all()
        rows, dropped_from = asks, modality & ~asks
    else:
        dropped_from = modality
    if asking == "last_row":
        rows[:-1] = False
    score = "last_row" if asking == "last_row" else "text"
    extractor = apply_token_extractor(model, keep={2: 0.4}, min_keep=0, score=score, early=early)
    seen = {}
    layer = model.model.layers[2]
    layer.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs, x=args[0]), with_kwargs=True)
    with torch.no_grad(), extractor.modality(modality[None], query=asks[None] if spoken else None):
        model(**inputs)

    attention, x = layer.self_attn, layer.input_layernorm(seen["x"])
    split = lambda y: y.view(*y.shape[:2], -1, attention.head_dim).transpose(1, 2)  # noqa: E731
    rotary = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    q, k = rotary(split(attention.q_proj(x)), split(attention.k_proj(x)), *seen["position_embeddings"])
    p = (q[0, :, rows] @ k[0].repeat_interleave(2, dim=0).mT / attention.head_dim**0.5).softmax(-1).mean((0, 1))
    places = dropped_from.nonzero()[:, 0]
    best = places[p[places].argsort(descending=True)[: int(0.4 * len(places))]]
    want = torch.cat([(~dropped_from).nonzero()[:, 0], best]).sort().values
    assert torch.equal(extractor.positions[0], want)


def heads_that_look(query, key, candidates, **options):
    """The half of the heads that look at the candidates most."""
    each = token_scores(query, key, per_head=True, **options)
    return token_scores(query, key, head_weights=policies.top_heads(each, candidates), **options)


def test_a_score_of_ones_own():
    model, inputs, seen = tiny("qwen2_vl"), three("qwen2_vl", "left"), []

    def score(query, key, candidates, **options):
        seen.append((query, key, candidates, options))
        return heads_that_look(query, key, candidates, **options)

    extractor = apply_token_extractor(model, keep={2: 0.4}, min_keep=0, score=score)
    got = run(model, extractor, inputs).logits
    ((query, key, candidates, options),) = seen
    assert torch.equal(candidates, modality_of(inputs))
    assert options.keys() == {"query_mask", "key_mask", "scale"}
    want = select_tokens(heads_that_look(query, key, candidates, **options), candidates, keep=0.4, layout="left",
                         key_mask=inputs["attention_mask"].bool()).index  # fmt: skip
    assert torch.equal(extractor.positions, want)
    extractor.remove()
    extractor = apply_token_extractor(model, keep={2: 0.4}, min_keep=0)
    run(model, extractor, inputs)
    assert not torch.equal(extractor.positions, want), "all heads keep the same"
    extractor.remove()

    for b, one in enumerate(sample("qwen2_vl", *s, seed=i) for i, s in enumerate(SIDES)):
        extractor = apply_token_extractor(model, keep={2: 0.4}, min_keep=0, score=heads_that_look)
        alone = run(model, extractor, one).logits[0]
        assert close(got[b, -alone.shape[0] :], alone)
        extractor.remove()
    apply_token_extractor(model, keep={2: 0.4}, score=lambda query, key, candidates, **_: key)
    with pytest.raises(ValueError, match="^score: got shape"):
        model(**inputs)


@pytest.mark.parametrize("keep", [0.5, [0.25, 1.0]])
def test_budgets_per_segment(keep):
    """Two images in each sample, say, or an image and a sound."""
    model, inputs = tiny("llama"), three("llama", "left")
    modality = modality_of(inputs)
    half = modality.sum(1, keepdim=True) // 3
    segments = (modality & (modality.cumsum(1) > half)).int()
    extractor = apply_token_extractor(model, keep={1: keep, 3: keep}, min_keep=0)
    with extractor.modality(modality, segments=segments):
        out = model.generate(**inputs, max_new_tokens=2, num_beams=2, do_sample=False, return_dict_in_generate=True)
    assert out.sequences.shape == (3, inputs["input_ids"].shape[1] + 2)
    with torch.no_grad(), extractor.modality(modality, segments=segments):
        model(**inputs)
    shares = keep if isinstance(keep, list) else [keep, keep]
    for b, places in enumerate(extractor.positions):
        places = places[places >= 0]
        for segment, share in enumerate(shares):
            n = int((modality[b] & (segments[b] == segment)).sum())
            left = int((modality[b, places] & (segments[b, places] == segment)).sum())
            assert left == int(int(n * share) * share) and n
        assert (~modality[b, places]).sum() == (inputs["attention_mask"][b].bool() & ~modality[b]).sum()

    if isinstance(keep, list):
        with pytest.raises(ValueError, match=r"segments: keep has a share for each, .* extractor.modality\(segments="):
            run(model, extractor, inputs)
        with (
            pytest.raises(ValueError, match="segments: candidate .* has 2, expected 0 to 1"),
            extractor.modality(modality, segments=2 * segments),
        ):
            model(**inputs)


def test_evenly_spaced_tokens_have_no_segments():
    model, inputs = tiny("llama"), sample("llama", 8, 5, seed=0)
    extractor = apply_token_extractor(model, score="uniform")
    with (
        pytest.raises(ValueError, match="segments: score='uniform' spaces the tokens of a sample evenly"),
        extractor.modality(modality_of(inputs), segments=torch.zeros_like(inputs["input_ids"])),
    ):
        model(**inputs)


def test_a_spoken_question_asks_in_a_batch():
    """Images are dropped by what the sound looks at; the text, which has no part in it, may be anything."""
    family = "qwen2_5_omni_thinker"
    model = tiny(family)
    extractor = apply_token_extractor(model, blocks=3, keep=0.5, min_keep=0)
    samples = [sample(family, *s, seed=i) for i, s in enumerate(SIDES)]
    inputs = batch_of(samples, "left")
    with torch.no_grad(), extractor.modality(query=inputs["input_ids"] == AUDIO):
        got = model(**inputs).logits
    kept = extractor.positions
    for b, one in enumerate(samples):
        with torch.no_grad(), extractor.modality(query=one["input_ids"] == AUDIO):
            want = model(**one).logits[0]
        places = extractor.positions[0]
        assert set((one["input_ids"][0] == AUDIO).nonzero()[:, 0].tolist()) <= set(places.tolist())
        gap = inputs["input_ids"].shape[1] - one["input_ids"].shape[1]
        assert torch.equal(kept[b][kept[b] >= 0] - gap, places)
        assert close(got[b, -want.shape[0] :], want)


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


@pytest.mark.parametrize("side", ["left", "right"])
def test_early_drop_is_late_drop(family, side):
    model, inputs = tiny(family), three(family, side)
    labels = inputs["input_ids"].masked_fill(modality_of(inputs) | (inputs["attention_mask"] == 0), -100)
    rows, logits, positions, gradients = {}, {}, {}, {}
    for early in (True, False):
        extractor = apply_token_extractor(model, blocks=3, keep=0.5, min_keep=0, early=early)
        layer = extractor.text_model.layers[1]
        seen = rows[early] = {}
        watch = [
            part.register_forward_hook(lambda m, args, out, name=name, seen=seen: seen.update({name: args[0].shape[1]}))
            for name, part in (("o_proj", layer.self_attn.o_proj), ("mlp", layer.mlp), ("q", layer.self_attn.q_proj))
        ]
        with torch.no_grad(), extractor.modality(modality_of(inputs)):
            logits[early] = model(**inputs).logits
        positions[early] = extractor.positions
        model.zero_grad()
        with extractor.modality(modality_of(inputs)):
            model(**inputs, labels=labels, use_cache=False).loss.backward()
        gradients[early] = {n: p.grad.clone() for n, p in extractor.text_model.named_parameters() if p.grad is not None}
        for handle in watch:
            handle.remove()
        extractor.remove()
    assert torch.equal(positions[True], positions[False])
    assert close(logits[True], logits[False])
    assert gradients[True].keys() == gradients[False].keys() and gradients[True]
    for name in gradients[True]:
        assert close(gradients[True][name], gradients[False][name]), name
    length = inputs["input_ids"].shape[1]
    assert rows[False] == {"o_proj": length, "mlp": length, "q": length}
    assert rows[True]["q"] == length and rows[True]["o_proj"] == rows[True]["mlp"] < length


def test_early_drop_gives_the_same_bits():
    """One row more or less does not change how a row is multiplied, at sizes where the library does not switch."""
    model, inputs = tiny("llama"), three("llama", "left")
    got = []
    for early in (True, False):
        extractor = apply_token_extractor(model, blocks=3, keep=0.5, min_keep=0, early=early)
        got.append(run(model, extractor, inputs).logits)
        extractor.remove()
    assert torch.equal(*got)


def test_generating_is_recomputing(family):
    """Greedy tokens and their logits, batch 3 with images, against one forward over prompt and answer together."""
    model = tiny(family)
    extractor = apply_token_extractor(model, blocks=3, keep=0.5, min_keep=0)
    inputs = three(family, "left")
    with extractor.modality(modality_of(inputs)):
        out = model.generate(
            **inputs, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True,
            suppress_tokens=SPECIAL,
        )  # fmt: skip
    lengths = [getattr(out, CACHE).get_seq_length(i) for i in range(6)]
    assert lengths[0] == lengths[1] > lengths[2] == lengths[3] > lengths[4] == lengths[5]

    prompt = inputs["input_ids"].shape[1]
    full = longer(inputs, out.sequences)
    labels = out.sequences.clone()
    labels[:, :prompt] = -100  # the answer does not ask
    with torch.no_grad(), extractor.modality(nn.functional.pad(modality_of(inputs), (0, 6))):
        want = model(**full, labels=labels).logits[:, -7:-1]
    got = torch.stack(out.logits, dim=1)
    assert got.dtype == torch.float32  # as generate stores them
    assert_within_reference_error(got, want.float(), want)


def test_a_compiled_model_drops_what_it_drops_uncompiled():
    """With breaks in its graph, where numbers of tokens are read back."""
    model = tiny("llama")
    extractor = apply_token_extractor(model, keep={1: 0.5}, min_keep=0)
    compiled = torch.compile(model, backend="eager")
    inputs = three("llama", "left")
    assert torch.equal(run(compiled, extractor, inputs).logits, run(model, extractor, inputs).logits)


def test_beams_generate(family):
    model = tiny(family)
    extractor = apply_token_extractor(model, blocks=3, keep=0.5, min_keep=0)
    inputs = three(family, "left")
    with extractor.modality(modality_of(inputs)):
        got = model.generate(**inputs, max_new_tokens=4, num_beams=2, do_sample=False)
    assert got.shape == (3, inputs["input_ids"].shape[1] + 4)


def test_the_loss_is_that_of_the_kept_tokens_own_targets(family):
    """Also where the target itself is dropped, or stands behind a gap."""
    model = tiny(family)
    extractor = apply_token_extractor(model, blocks=3, keep=0.5, min_keep=0)
    inputs = three(family, "right")
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


def test_lyra_drops_speech_and_leaves_the_loss_to_its_language_model():
    torch.manual_seed(0)
    config = lyra_model.LyraConfig(
        transformers.LlamaConfig(**TEXT),
        transformers.WhisperConfig(d_model=24, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=24),
        speech_token_id=AUDIO,
        projector_hidden_size=16,
    )
    model = lyra_model.LyraForConditionalGeneration(config).eval()
    ids = torch.tensor([[5, 6, *[AUDIO] * 10, 7, 8, 9, 10]])
    labels = ids.masked_fill(ids == AUDIO, -100)
    with torch.no_grad():
        whole = model(input_ids=ids, labels=labels).loss
        extractor = apply_token_extractor(model, keep={2: 0.0}, min_keep=0)
        out = model(input_ids=ids, labels=labels)
        want = out.logits[0, [0, 2, 3, 4]].log_softmax(-1)[range(4), [6, 8, 9, 10]].mean().neg()
        torch.testing.assert_close(out.loss, want)
        extractor.remove()
        assert torch.equal(model(input_ids=ids, labels=labels).loss, whole)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(family, reentrant):
    model = tiny(family)
    extractor = apply_token_extractor(model, blocks=3, keep=0.5, min_keep=0)
    inputs = three(family, "left")
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


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_does_not_score_again(reentrant):
    model, inputs, scored = tiny("llama").train(), three("llama", "left"), []
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})

    def score(query, key, candidates, **options):
        scored.append(query.shape)
        return token_scores(query, key, **options)

    extractor = apply_token_extractor(model, keep={1: 0.5, 3: 0.5}, min_keep=0, score=score)
    with extractor.modality(modality_of(inputs)):
        model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
    assert len(scored) == 2 and model.model.layers[1].mlp.up_proj.weight.grad.any()


@pytest.mark.parametrize("reentrant", [False, True])
def test_two_forwards_before_one_backward(reentrant):
    """Each recomputation drops what its own forward dropped."""
    model = tiny("llama")
    extractor = apply_token_extractor(model, blocks=3, keep=0.5, min_keep=0)
    batches = [three("llama", "left"), sample("llama", 14, 6, seed=8)]

    def gradients():
        model.zero_grad()
        total = 0
        for inputs in batches:
            labels = inputs["input_ids"].masked_fill(modality_of(inputs) | (inputs["attention_mask"] == 0), -100)
            with extractor.modality(modality_of(inputs)):
                total = total + model(**inputs, labels=labels, use_cache=False).loss
        total.backward()
        return [p.grad.clone() for p in model.parameters()]

    model.train()
    want = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for ours, theirs in zip(gradients(), want):
        assert torch.equal(ours, theirs)


def test_a_cache_made_by_a_plain_forward_is_continued():
    model = tiny("llama")
    extractor = apply_token_extractor(model, blocks=3, keep=0.5, min_keep=0)
    inputs = three("llama", "left")
    with extractor.modality(modality_of(inputs)):
        want = model.generate(**inputs, max_new_tokens=2, do_sample=False)[:, -1]
    out = run(model, extractor, inputs, use_cache=True)
    mask = nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    place = mask.sum(1, keepdim=True) - 1
    with torch.no_grad():
        ids = out.logits[:, -1:].argmax(-1)
        full = model(ids, attention_mask=mask, position_ids=place, **{CACHE: getattr(out, CACHE)})
    assert torch.equal(full.logits[:, -1].argmax(-1), want)


def test_a_cropped_cache_is_refused():
    model = tiny("llama")
    extractor = apply_token_extractor(model, blocks=3, keep=0.5, min_keep=0)
    inputs = sample("llama", 8, 5, seed=0)
    cache = getattr(run(model, extractor, inputs, use_cache=True), CACHE)
    cache.crop(-1)
    with pytest.raises(ValueError, match="cropped"):
        model(torch.tensor([[3]]), **{CACHE: cache})


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


@pytest.mark.parametrize("family", QWEN)
def test_videos_are_found_and_dropped(family):
    """In generation, against one forward over prompt and answer together."""
    model, inputs = tiny(family), film(family)
    extractor = apply_token_extractor(model, blocks=3, keep=0.5, min_keep=0)
    out = model.generate(
        **inputs, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True,
        suppress_tokens=SPECIAL,
    )  # fmt: skip
    kept, ids = extractor.positions[0], inputs["input_ids"][0]
    assert (ids[kept] == VIDEO).sum() == 3  # of 12, half of a half
    assert torch.equal(ids[kept][ids[kept] != VIDEO], ids[ids != VIDEO])
    labels = out.sequences.clone()
    labels[:, : len(ids)] = -100
    with torch.no_grad():
        want = model(**longer(inputs, out.sequences), labels=labels).logits[:, -4:-1]
    assert_within_reference_error(torch.stack(out.logits, dim=1), want.float(), want)


def by_sample(module, query, key, value, attention_mask, scaling=None, **_):
    """Attention that is told of padding by a mask (B, L), as flash-attn is, and looks at each sample's real tokens."""
    out = torch.zeros_like(query)
    for b in range(query.shape[0]):
        real = torch.arange(key.shape[2]) if attention_mask is None else attention_mask[b].nonzero()[:, 0]
        first = key.shape[2] - query.shape[2]
        rows = real[real >= first] - first
        mask = torch.ones(len(rows), len(real), dtype=torch.bool).tril(len(real) - len(rows))
        q, k, v = query[b : b + 1, :, rows], key[b : b + 1, :, real], value[b : b + 1, :, real]
        out[b][:, rows] = scaled_dot_product_attention(q, k, v, mask, scale=scaling, enable_gqa=True)[0]
    return out.transpose(1, 2), None


@pytest.mark.parametrize("family", ["llama", "qwen2_vl", "qwen3_vl"])
def test_attention_that_takes_masks_of_tokens(family, monkeypatch):
    """The form of flash-attn's masks, in prefill and at decode."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "by_sample", by_sample)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "by_sample", flash_attention_mask)
    model, inputs = tiny(family), three(family, "left")
    extractor = apply_token_extractor(model, blocks=3, keep=0.5, min_keep=0)
    options = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    found = []
    for attention in ("sdpa", "by_sample"):
        extractor.text_model.set_attn_implementation(attention)
        with extractor.modality(modality_of(inputs)):
            out = model.generate(**inputs, **options)
        found.append((out.sequences, extractor.positions, torch.stack(out.logits)))
    (sequences, positions, logits), (same, places, ours) = found
    assert torch.equal(same, sequences) and torch.equal(places, positions)
    assert torch.allclose(ours, logits, rtol=1e-6, atol=1e-6)  # generate keeps float32


@pytest.mark.parametrize(
    "keep",
    [
        policies.pyramid_schedule([1, 2, 4]),
        policies.omnidrop_schedule(6),  # behind every layer but the last
        policies.seats_schedule(0.25, n_layers=6, entering=0.5, drops=(2, 3), late=5),
    ],
    ids=["pyramid", "omnidrop", "seats"],
)
def test_published_schedules_run(keep):
    model, inputs = tiny("llama"), three("llama", "left")
    extractor = apply_token_extractor(model, keep=keep, min_keep=0)
    with extractor.modality(modality_of(inputs)):
        out = model.generate(**inputs, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    counts = modality_of(inputs).sum(1)
    for layer in range(6):
        kept = counts + (inputs["attention_mask"].sum(1) - modality_of(inputs).sum(1)) + 1
        assert getattr(out, CACHE).get_seq_length(layer) == kept.max()
        counts = (counts * keep.get(layer, 1.0)).floor().long()


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


def test_one_model_in_two_threads_is_refused():
    model, inputs = tiny("llama"), sample("llama", 12, 9, seed=3)
    extractor = apply_token_extractor(model, keep={1: 0.5}, min_keep=0)
    want = run(model, extractor, inputs).logits
    with ThreadPoolExecutor(1) as pool, extractor.modality(modality_of(inputs)), torch.no_grad():

        def call_meanwhile(*_):
            with pytest.raises(RuntimeError, match="^model: runs in another thread"):
                pool.submit(lambda: model(**inputs)).result()

        model.model.layers[2].register_forward_pre_hook(call_meanwhile)
        assert torch.equal(model(**inputs).logits, want)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_models_in_threads_leave_each_other_alone(attention):
    """The registry is one for all. The second enters its layer while the first is in its own, and leaves later."""
    first, second = (tiny(family, attention) for family in ("llama", "qwen2"))
    inputs = {m: sample(f, 12, 9, seed=3) for m, f in ((first, "llama"), (second, "qwen2"))}
    extractors = {m: apply_token_extractor(m, keep={1: 0.5}, min_keep=0) for m in inputs}
    want = {m: run(m, extractors[m], inputs[m]).logits for m in inputs}
    inside, done = threading.Event(), threading.Event()

    def wait_for_the_second(*_):
        inside.wait(10)

    def let_the_first_leave(*_):
        inside.set()
        done.wait(10)

    first.model.layers[1].self_attn.register_forward_pre_hook(wait_for_the_second)
    first.model.layers[1].register_forward_hook(lambda *_: done.set())
    second.model.layers[1].self_attn.register_forward_pre_hook(let_the_first_leave)
    with ThreadPoolExecutor(2) as pool:
        got = [pool.submit(run, m, extractors[m], inputs[m]) for m in inputs]
        for m, out in zip(inputs, got):
            assert torch.equal(out.result().logits, want[m])
    assert not ALL_ATTENTION_FUNCTIONS._local_mapping


def test_a_renamed_copy_is_recognised(family, tmp_path):
    original = tiny(family, "eager")
    model = vendored(original, tmp_path)
    assert type(model).__name__.startswith("House")
    inputs = three(family, "left", model.dtype)
    want = run(original, apply_token_extractor(original, blocks=3, keep=0.5, min_keep=0), inputs).logits
    got = run(model, apply_token_extractor(model, blocks=3, keep=0.5, min_keep=0), inputs).logits
    assert got.shape[1] < inputs["input_ids"].shape[1] and torch.equal(got, want)


def test_what_it_cannot_serve_it_refuses():
    sliding = AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(
            "qwen2", **TEXT, use_sliding_window=True, sliding_window=8, max_window_layers=2
        )
    )
    with pytest.raises(ValueError, match="sliding_attention"):
        apply_token_extractor(sliding)
    hybrid = transformers.AutoConfig.for_model("qwen3_next", **TEXT, head_dim=8)
    with pytest.raises(ValueError, match="linear"):
        apply_token_extractor(AutoModelForCausalLM.from_config(hybrid))
    with pytest.raises(ValueError, match="DeepStack"):
        apply_token_extractor(tiny("qwen3_vl"), keep={0: 0.5})
    text = transformers.Qwen3VLTextModel(transformers.Qwen3VLTextConfig(**TEXT, head_dim=8, rope_parameters=MROPE))
    alone = apply_token_extractor(text, keep={0: 0.5})
    deep = {"visual_pos_masks": torch.ones(1, 4).bool(), "deepstack_visual_embeds": [torch.zeros(4, 32)]}
    with pytest.raises(ValueError, match="layer 0"), alone.modality(torch.ones(1, 4).bool()):
        text(inputs_embeds=torch.zeros(1, 4, 32), **deep)
    with pytest.raises(ValueError, match="DataParallel has no config, .* patch the one inside"):
        apply_token_extractor(nn.DataParallel(tiny("llama")))
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
    with (
        pytest.raises(ValueError, match="query"),
        extractor.modality(modality_of(inputs), query=torch.ones(1, 3).bool()),
    ):
        model(**inputs)
    packed = torch.cat([torch.arange(12), torch.arange(13)])[None]
    with pytest.raises(ValueError, match="packed"), extractor.modality(modality_of(inputs)):
        model(inputs["input_ids"], position_ids=packed)
    with pytest.raises(ValueError, match="PagedAttentionCache"), extractor.modality(modality_of(inputs)):
        model(inputs["input_ids"], cache=object.__new__(PagedAttentionCache))
    model.set_attn_implementation("paged|eager")
    with pytest.raises(ValueError, match="paged"), extractor.modality(modality_of(inputs)):
        model(**inputs)
    with pytest.raises(ValueError, match="paged"):
        apply_token_extractor(model)


ARGUMENTS = {
    "keep: got str, expected a share from 0 to 1": {"keep": "0.7"},
    "keep: got 1.5, expected a share from 0 to 1": {"keep": {1: [0.5, 1.5]}},
    "keep: got layer '1', expected 0 to 4": {"keep": {"1": 0.5}},
    "keep: got layer 1.0, expected 0 to 4": {"keep": {1.0: 0.5}},
    "min_keep: got -1, expected at least 0": {"min_keep": -1},
    "min_keep: got NoneType, expected an int": {"min_keep": None},
    "score: got 'best', expected one of 'text', 'last_row', 'random', 'uniform' or a function": {"score": "best"},
    "modality_token_ids: got 5, expected a list of ints": {"modality_token_ids": 5},
    "modality_token_ids: got ['<image>'], expected a list of ints": {"modality_token_ids": ["<image>"]},
    "seed: got str, expected an int": {"seed": "a"},
}


@pytest.mark.parametrize("message", ARGUMENTS)
def test_errors_name_the_argument_before_the_model_runs(message):
    with pytest.raises((ValueError, TypeError), match="^" + re.escape(message)):
        apply_token_extractor(tiny("llama"), **ARGUMENTS[message])


def test_shares_of_numpy_and_ids_of_a_tensor():
    model, inputs = tiny("qwen2_vl"), sample("qwen2_vl", 12, 5, seed=0)
    extractor = apply_token_extractor(
        model, keep={2: np.float32(0.5)}, min_keep=0, modality_token_ids=torch.tensor([IMAGE])
    )
    with torch.no_grad():
        model(**inputs)
    assert extractor.positions.shape[1] == inputs["input_ids"].shape[1] - 18


def test_adapters_of_peft():
    """PeftModel.generate calls the model inside, not PeftModel.forward."""
    peft = pytest.importorskip("peft")
    model, inputs = tiny("qwen2_vl"), three("qwen2_vl", "left")
    options = {"max_new_tokens": 3, "do_sample": False}
    extractor = apply_token_extractor(model, blocks=3, keep=0.5, min_keep=0)
    tokens, logits = model.generate(**inputs, **options), run(model, extractor, inputs).logits
    extractor.remove()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM"))
    wrapped = wrapped.double().eval()
    before = dict(wrapped.__dict__)
    extractor = apply_token_extractor(wrapped, blocks=3, keep=0.5, min_keep=0)
    assert torch.equal(wrapped.generate(**inputs, **options), tokens)
    out = wrapped(**inputs, labels=inputs["input_ids"])  # adapters begin as zeros
    assert torch.equal(wrapped(**inputs).logits, logits)
    out.loss.backward()
    assert all(p.grad is not None for n, p in wrapped.named_parameters() if "lora_B" in n and "visual" not in n)
    extractor.remove()
    assert wrapped.__dict__.keys() == before.keys()


def test_a_model_is_patched_once():
    model = tiny("llama")
    inputs = sample("llama", 8, 5, seed=0)
    extractor = apply_token_extractor(model, keep={1: 0.5}, min_keep=0)
    with pytest.raises(ValueError, match="remove"):
        apply_token_extractor(model, keep={1: 0.5}, min_keep=0)
    once = run(model, extractor, inputs).logits
    extractor.remove()
    extractor.remove()  # does nothing
    again = run(model, apply_token_extractor(model, keep={1: 0.5}, min_keep=0), inputs).logits
    assert torch.equal(once, again)


def test_layers_that_cannot_drop_early_are_named():
    model = tiny("llama")
    del model.model.layers[1].mlp
    with pytest.raises(ValueError, match=r"layer 1 \(LlamaDecoderLayer\) has no mlp; use early=False"):
        apply_token_extractor(model, keep={1: 0.5})
    apply_token_extractor(model, keep={1: 0.5}, early=False)

    model = tiny("llama")
    layer = model.model.layers[1]
    layer.forward = lambda x, **kwargs: (
        x + layer.self_attn(x, kwargs["position_embeddings"], kwargs["attention_mask"])[0]
    )
    extractor = apply_token_extractor(model, keep={1: 0.5}, min_keep=0)
    with pytest.raises(RuntimeError, match="early=False"):
        run(model, extractor, sample("llama", 8, 5, seed=0))
