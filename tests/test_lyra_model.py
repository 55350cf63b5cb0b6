"""The small model end to end, on tiny random weights: batches, windows, checkpoints, errors."""

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from lyra_models import tiny_lyra

import lyra_model
from lyra_model.processor import SPEECH_TOKEN
from lyra_model.speech import cut_windows, encode_windows


def tone(seconds: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (0.1 * rng.standard_normal(round(seconds * 16000))).astype(np.float32)


@pytest.fixture(scope="module", params=["mlp", "vocabulary"])
def tiny(request):
    return tiny_lyra(request.param)


def conversation(clip=None, text=None):
    parts = [] if clip is None else [{"type": "audio", "audio": clip}]
    return [{"role": "user", "content": parts + ([{"type": "text", "text": text}] if text else [])}]


def ask(tiny, conversations, **kwargs):
    model, processor = tiny
    inputs = processor.apply_chat_template(conversations, tokenize=True, add_generation_prompt=True)
    output = model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0, **kwargs)
    return output[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize(
    "seconds, tokens", [(0.05, 1), (0.1, 1), (2.34, 24), (29.9, 299), (30.0, 300), (30.05, 301), (61.0, 610)]
)
def test_a_clip_gives_ten_tokens_a_second_and_none_for_padding(tiny, seconds, tokens):
    model, processor = tiny
    inputs = processor.apply_chat_template(conversation(tone(seconds)), tokenize=True)
    assert int((inputs["input_ids"] == model.config.speech_token_id).sum()) == tokens
    fields = [inputs[name] for name in ("input_features", "feature_frames", "speech_tokens")]
    assert model.get_speech_features(*fields).shape == (tokens, 32)


def test_thirty_second_windows_equal_the_encoder_of_transformers(tiny):
    model, processor = tiny
    windows = cut_windows([tone(7)], processor.feature_extractor, pad_seconds=30.0)
    assert windows.features.shape == (1, 80, 3000) and windows.tokens.tolist() == [70]
    with torch.no_grad():
        theirs = model.speech_encoder(windows.features).last_hidden_state
        ours = encode_windows(model.speech_encoder, windows.features)
    torch.testing.assert_close(ours, theirs)


def test_a_batch_answers_as_its_samples_alone(tiny):
    conversations = [
        conversation(tone(1.7, 1)),
        conversation(tone(8.2, 2), "Repeat."),
        conversation(tone(31, 3), "What?"),
    ]
    assert ask(tiny, conversations) == [ask(tiny, [c])[0] for c in conversations]


def test_speech_changes_the_answer_and_padding_content_does_not(tiny):
    model, processor = tiny
    inputs = processor.apply_chat_template([conversation(tone(2)), conversation(tone(9))], tokenize=True)
    with torch.no_grad():
        logits = model(**inputs).logits
        padded = inputs["input_features"].clone()
        padded[0, :, 600:] = torch.nan  # behind the first clip's own 6 s window
        torch.testing.assert_close(model(**{**inputs, "input_features": padded}).logits, logits)
        other = processor.apply_chat_template([conversation(tone(2, 5)), conversation(tone(9, 6))], tokenize=True)
        assert not torch.allclose(model(**other).logits, logits)


def test_generation_with_and_without_cache_agree(tiny):
    assert ask(tiny, [conversation(tone(3))]) == ask(tiny, [conversation(tone(3))], use_cache=False)


def test_speech_that_says_nothing_new_is_as_if_it_were_not_there(monkeypatch):
    """Logits and answers equal those of the other speech tokens alone, in a batch padded on the left."""
    model, processor = tiny_lyra("vocabulary")
    clips = [tone(1.1, 1), tone(2.3, 2)]
    inputs = processor.apply_chat_template([conversation(c) for c in clips], tokenize=True, add_generation_prompt=True)
    new = torch.rand(34, generator=torch.Generator().manual_seed(0)) < 0.4
    projector = model.speech_projector
    monkeypatch.setattr(projector, "tokens", lambda *args, tokens=projector.tokens: (tokens(*args)[0], new))
    fields = {name: inputs[name] for name in ("input_features", "feature_frames", "speech_tokens")}
    with torch.no_grad():
        logits = model(**inputs).logits
        output = model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=0)
        speech = model.get_speech_features(**fields)
        for row, (own, kept) in enumerate(zip(speech.split([11, 23]), new.split([11, 23]))):
            ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
            shown = torch.ones_like(ids, dtype=torch.bool)
            shown[ids == model.config.speech_token_id] = kept
            embeds = model.embed(ids[None], own)[:, shown]
            alone = model(inputs_embeds=embeds).logits[0]
            torch.testing.assert_close(logits[row, -len(ids) :][shown], alone, rtol=1e-4, atol=1e-4)
            answer = model.generate(inputs_embeds=embeds, max_new_tokens=5, do_sample=False, pad_token_id=0)
            assert output[row, inputs["input_ids"].shape[1] :].tolist() == answer[0].tolist()
            assert output[row, : inputs["input_ids"].shape[1]].tolist() == inputs["input_ids"][row].tolist()


def test_beams_of_a_batch_are_those_of_its_samples(tiny):
    conversations = [conversation(tone(2, 1), "Hm?"), conversation(tone(31, 3))]
    assert ask(tiny, conversations, num_beams=3) == [ask(tiny, [c], num_beams=3)[0] for c in conversations]


def test_checkpoint_round_trip_through_auto_classes(tiny, tmp_path):
    from transformers import AutoModelForMultimodalLM, AutoProcessor

    model, processor = tiny
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = lyra_model.load(tmp_path)
    assert type(AutoModelForMultimodalLM.from_pretrained(tmp_path)) is type(model)
    assert AutoProcessor.from_pretrained(tmp_path).pad_seconds == 6.0
    question = [conversation(tone(4), "Hm?")]
    assert ask(loaded, question) == ask(tiny, question)


def test_adapter_works_on_speech_only(tiny, tmp_path):
    pytest.importorskip("peft")
    from peft import LoraConfig

    model, processor = tiny
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    adapted = lyra_model.load(tmp_path)
    target = r"language_model\..*\.q_proj"
    adapted[0].add_adapter(LoraConfig(r=4, target_modules=target, init_lora_weights=False, lora_alpha=64), "speech")
    assert ask(adapted, [conversation(text="Typed?")]) == ask(tiny, [conversation(text="Typed?")])
    spoken = ask(adapted, [conversation(tone(2))])
    assert spoken != ask(tiny, [conversation(tone(2))])
    adapted[0].save_pretrained(tmp_path / "whole")
    processor.save_pretrained(tmp_path / "whole")
    assert ask(lyra_model.load(tmp_path / "whole"), [conversation(tone(2))]) == spoken


def test_adapter_works_on_speech_with_text_only(tmp_path):
    """Where the configuration says so; a prompt that came from no conversation counts as one with text."""
    pytest.importorskip("peft")
    from peft import LoraConfig

    model, processor = tiny_lyra("vocabulary")
    model.config.adapters = "speech and text"
    alone, both = [conversation(tone(2))], [conversation(tone(2), "Hm?")]
    plain, plain_both = ask((model, processor), alone), ask((model, processor), both)
    target = r"language_model\..*\.q_proj"
    model.add_adapter(LoraConfig(r=4, target_modules=target, init_lora_weights=False, lora_alpha=64), "speech")
    assert ask((model, processor), alone) == plain
    assert ask((model, processor), both) != plain_both
    assert ask((model, processor), alone) == plain, "the adapter stays on"
    with pytest.raises(ValueError, match="user_text: got speech with and without text beside it"):
        ask((model, processor), alone + both)
    inputs = processor.apply_chat_template(alone, tokenize=True, add_generation_prompt=True)
    del inputs["user_text"]
    output = model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
    assert output[:, inputs["input_ids"].shape[1] :].tolist() != plain
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert ask(lyra_model.load(tmp_path), alone) == plain


def test_placeholders_and_clips_must_match(tiny):
    model, processor = tiny
    with pytest.raises(ValueError, match="audio: got 0 clips, expected 1"):
        processor(f"hello {SPEECH_TOKEN}")
    with pytest.raises(ValueError, match="content part: got type 'smell'"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "smell"}]}])
    inputs = processor.apply_chat_template(conversation(tone(2)), tokenize=True)
    ids = inputs["input_ids"].clone()
    ids[0, (ids[0] == model.config.speech_token_id).nonzero()[0]] = 5
    with pytest.raises(ValueError, match=r"got 19 speech placeholders .* expected 20"):
        model(**{**inputs, "input_ids": ids})
    with pytest.raises(ValueError, match="pad_seconds: got 7"):
        cut_windows([tone(1)], processor.feature_extractor, pad_seconds=7.0)
