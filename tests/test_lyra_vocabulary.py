"""The projector that reads speech with Whisper's decoder: its formula, one speech token at a time."""

import pytest
import torch

pytest.importorskip("transformers")
from lyra_models import ALPHABET, tiny_lyra, tiny_speech_tokenizer

from lyra_model import LyraConfig, vocabulary


@pytest.fixture
def projector():
    model, processor = tiny_lyra("vocabulary")
    texts = [tiny_speech_tokenizer().decode([t]) for t in range(len(ALPHABET))]
    model.speech_projector.begin(model.get_input_embeddings().weight, texts, processor.tokenizer)
    for layer in (model.speech_projector.linear_2, model.speech_projector.linear_4):
        torch.nn.init.normal_(layer.weight, std=0.3)
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


def logits_of(projector, state, blank):
    return torch.cat([state @ projector.decoder.embed_tokens.weight[: len(ALPHABET)].T, blank], -1)


def first_reading(projector, stacked):
    z = projector.linear_2(torch.relu(projector.linear_1(stacked)))
    return 4 * stacked[:, 120:] + z[:, :24], z[:, 24:]


def next_reading(projector, stacked, last):
    """Of one window, a speech token at a time, by the whole decoder behind all that was read before it."""
    state, blank = first_reading(projector, stacked)
    read = logits_of(projector, *last).argmax(-1).tolist()
    frames = stacked[:, :120].reshape(-1, 24)
    text, context = [], []
    for t, token in enumerate(read):
        repeats = t > 0 and token == read[t - 1] != projector.blank
        ids = torch.tensor([projector.prompt + (text[:-1] if repeats else text)])
        if token != projector.blank and not repeats:
            text.append(token)
        context.append(projector.decoder(ids, encoder_hidden_states=frames[None]).last_hidden_state[0, -1])
    context = torch.stack(context)
    y = projector.linear_4(torch.relu(projector.linear_3(torch.cat([state / 4, context / 4, blank / 10], -1))))
    return (state + context) / 2 + y[:, :24], blank + y[:, 24:]


@torch.no_grad()
def test_the_second_reading_knows_what_was_read_before_in_the_same_window(projector, monkeypatch):
    monkeypatch.setattr(vocabulary, "WINDOWS", 2)
    lengths = [9, 4, 7, 1]
    stacked = torch.randn(sum(lengths), 144)
    stacked[[3, 4, 15]] = stacked[[2, 2, 14]]
    logits = logits_of(projector, *first_reading(projector, stacked))
    # A third of the speech tokens become blanks.
    projector.linear_2.bias[-1] += (logits[:, :-1].amax(-1) - logits[:, -1]).quantile(0.33)
    first = first_reading(projector, stacked)
    read = logits_of(projector, *first).argmax(-1)
    text = read != projector.blank
    assert 0 < text.sum() < len(read) and (text[1:] & (read[1:] == read[:-1])).any(), "no blanks or no repeats"
    got = projector.reread(stacked, first, first, lengths)
    expected = [next_reading(projector, w, first_reading(projector, w)) for w in stacked.split(lengths)]
    for part, whole in zip(got, map(torch.cat, zip(*expected))):
        torch.testing.assert_close(part, whole, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_speech_tokens_are_the_mixture_of_the_likeliest_rows(projector, monkeypatch):
    monkeypatch.setattr(vocabulary, "CHUNK", 4)
    stacked = torch.randn(14, 144)
    windows = stacked.split([6, 8])
    last = [first_reading(projector, window) for window in windows]
    for _ in range(2):
        last = [next_reading(projector, window, reading) for window, reading in zip(windows, last)]
    state, blank = map(torch.cat, zip(*last))
    logits = logits_of(projector, state, blank)
    top = logits.topk(8)
    read = [logits_of(projector, *reading).argmax(-1).tolist() for reading in last]
    said = [[t != projector.blank and (i == 0 or t != own[i - 1]) for i, t in enumerate(own)] for own in read]
    assert 1 < sum(said[1]) < len(read[1])
    # A window's first text is taken without the space before it: here "a" for "b".
    projector.unspaced[:2] = torch.tensor([1, 0])
    begins = [sum(own[: i + 1]) <= 1 for own in said for i in range(len(own))]
    rows = torch.where(torch.tensor(begins)[:, None], projector.unspaced[top.indices], top.indices)
    expected = torch.einsum("tk,tkd->td", (2 * top.values).softmax(-1), projector.rows.weight[rows])
    speech, new = projector(stacked, [6, 8])
    torch.testing.assert_close(speech, expected, rtol=1e-4, atol=1e-4)
    assert new.tolist() == said[0] + said[1]
    classes = torch.tensor([3, 250, 17])
    log_probs = projector.log_probs(state, blank, classes)
    expected = torch.cat([logits[:, -1:], logits[:, classes]], -1).log_softmax(-1)
    torch.testing.assert_close(log_probs, expected, rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_the_mixture_over_everything_but_the_unlikely(projector, monkeypatch):
    """With every token in the mixture the gradient is the whole softmax's."""
    monkeypatch.setattr(vocabulary, "MIXED", len(ALPHABET) + 1)
    stacked = torch.randn(3, 144)
    projector(stacked, [3])[0].square().sum().backward()
    learning = [p for name, p in projector.named_parameters() if name.startswith("linear_")]
    got = [p.grad.clone() for p in learning]
    projector.zero_grad()
    logits = logits_of(projector, *projector.readings(stacked, [3])[-1])
    ((2 * logits).softmax(-1) @ projector.rows.weight).square().sum().backward()
    for gradient, parameter in zip(got, learning):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_an_untrained_projector_says_the_embeddings_of_what_whisper_reads(projector):
    """Rows are the language model's embeddings of the same text, and greedy reading merges repeats."""
    tokenizer, word = tiny_speech_tokenizer(), projector.decoder.embed_tokens.weight
    word.copy_(torch.nn.functional.normalize(word, dim=-1))
    projector.reset()
    said = [tokenizer.token_to_id(letter) for letter in "hheee"]
    stacked = torch.zeros(len(said), 144)
    stacked[:, 120:] = 100 * word[said]
    assert tokenizer.decode(projector.greedy(stacked, reading=0)) == "he"
    assert projector.greedy(torch.zeros(3, 144), reading=0) == []


def test_a_window_too_long_for_the_decoder_is_refused():
    config = tiny_lyra("vocabulary")[0].config.to_dict()
    with pytest.raises(ValueError, match=r"window_seconds: got 60.0, .* up to 602 tokens .* takes 448"):
        LyraConfig(**config | {"window_seconds": 60.0})
    with pytest.raises(ValueError, match="readings: got 0, expected at least 1"):
        LyraConfig(**config | {"readings": 0})
