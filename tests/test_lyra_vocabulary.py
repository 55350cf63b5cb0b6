"""The projector that reads speech with Whisper's decoder: its formula, one speech token at a time."""

import pytest
import torch

pytest.importorskip("transformers")
from lyra_models import ALPHABET, tiny_lyra, tiny_speech_tokenizer

from lyra_model import vocabulary


@pytest.fixture
def projector():
    model, processor = tiny_lyra("vocabulary")
    texts = [*(tiny_speech_tokenizer().decode([t]) or " " for t in range(len(ALPHABET))), " "]
    ids = processor.tokenizer(texts, add_special_tokens=False)["input_ids"]
    model.speech_projector.begin(model.get_input_embeddings().weight, ids)
    torch.nn.init.normal_(model.speech_projector.linear_2.weight, std=0.3)
    model.speech_projector.linear_2.bias.data[-1] = 0.1
    return model.speech_projector


def states(projector, frames):
    """The decoder on the frames around each speech token, cut out by hand."""
    rows = []
    for t in range(len(frames) // 5):
        start = max(0, min(5 * t - 5, len(frames) - 30))
        around = frames[start : start + 30]
        if len(frames) < 30:  # the last frame is repeated
            around = torch.cat([frames, frames[-1:].expand(30 - len(frames), -1)])
        out = projector.decoder(input_ids=torch.tensor([projector.prompt]), encoder_hidden_states=around[None])
        rows.append(out.last_hidden_state[0, -1])
    return torch.stack(rows)


@pytest.mark.parametrize("lengths", [(60, 35), (10,)])
@torch.no_grad()
def test_stack_reads_the_frames_around_each_token_of_its_own_window(projector, lengths, monkeypatch):
    monkeypatch.setattr(vocabulary, "CHUNK", 4)
    windows = [torch.randn(n, 24) for n in lengths]
    got = projector.stack(windows)
    frames = torch.cat([w.reshape(-1, 120) for w in windows])
    read = torch.cat([states(projector, w) for w in windows])
    torch.testing.assert_close(got, torch.cat([frames, 0.25 * read], -1), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_speech_tokens_are_the_mixture_of_the_likeliest_rows(projector, monkeypatch):
    monkeypatch.setattr(vocabulary, "CHUNK", 4)
    stacked = torch.randn(2, 7, 144)
    z = projector.linear_2(torch.relu(projector.linear_1(stacked)))
    words = projector.decoder.embed_tokens.weight[: len(ALPHABET)]
    logits = torch.cat([(4 * stacked[..., 120:] + z[..., :24]) @ words.T, z[..., 24:]], -1)
    top = logits.topk(8)
    expected = torch.einsum("...k,...kd->...d", top.values.softmax(-1), projector.rows.weight[top.indices])
    torch.testing.assert_close(projector(stacked), expected, rtol=1e-4, atol=1e-5)
    classes = torch.tensor([3, 250, 17])
    log_probs = projector.log_probs(stacked, classes)
    expected = torch.cat([logits[..., -1:], logits[..., classes]], -1).log_softmax(-1)
    torch.testing.assert_close(log_probs, expected, rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_the_mixture_over_everything_but_the_unlikely(projector, monkeypatch):
    """With every token in the mixture the gradient is the whole softmax's."""
    monkeypatch.setattr(vocabulary, "MIXED", len(ALPHABET) + 1)
    stacked = torch.randn(3, 144)
    projector(stacked).square().sum().backward()
    got = projector.linear_2.weight.grad.clone()
    projector.zero_grad()
    state, blank = projector.read(stacked)
    logits = torch.cat([state @ projector.decoder.embed_tokens.weight[: len(ALPHABET)].T, blank], -1)
    (logits.softmax(-1) @ projector.rows.weight).square().sum().backward()
    torch.testing.assert_close(got, projector.linear_2.weight.grad, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_an_untrained_projector_says_the_embeddings_of_what_whisper_reads(projector):
    """Rows are the language model's embeddings of the same text, and greedy reading merges repeats."""
    tokenizer, word = tiny_speech_tokenizer(), projector.decoder.embed_tokens.weight
    word.copy_(torch.nn.functional.normalize(word, dim=-1))
    projector.reset()
    said = [tokenizer.token_to_id(letter) for letter in "hheee"]
    stacked = torch.zeros(len(said), 144)
    stacked[:, 120:] = 100 * word[said]
    assert tokenizer.decode(projector.greedy(stacked)) == "he"
    assert projector.greedy(torch.zeros(3, 144)) == []
