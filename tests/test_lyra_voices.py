import shutil

import numpy as np
import pytest

from lyra_model.corpus import Text
from lyra_model.synthesis import SAMPLE_RATE, read_shard, shard_paths, synthesize, to_speech_samples
from lyra_model.voices import TRAINING_VOICES, UNSEEN_VOICE, VoiceUnavailableError, draw_voice, seed_piper, speak

needs_espeak = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="no espeak-ng: apt install espeak-ng")
needs_flite = pytest.mark.skipif(shutil.which("flite") is None, reason="no flite: apt install flite")
ONE_OF_EACH = [
    "piper:joe",
    pytest.param("espeak:en-gb+f2", marks=needs_espeak),
    *(pytest.param(f"flite:{speaker}", marks=needs_flite) for speaker in ("awb", "rms", "kal16", "slt")),
]


@pytest.mark.parametrize("voice", ONE_OF_EACH)
def test_longer_texts_take_longer(voice):
    short, rate = speak("Good morning.", voice)
    long, _ = speak("Good morning, can you tell me how to get to the station?", voice)
    assert short.dtype == np.float32 and short.ndim == 1
    assert 0.1 < np.abs(short).max() <= 1
    assert 0.3 < len(short) / rate < 2.5
    assert len(long) > 2 * len(short)


@pytest.mark.parametrize("voice", ONE_OF_EACH)
def test_variation_changes_what_is_heard(voice):
    plain, _ = speak("Good morning.", voice)
    varied, _ = speak("Good morning.", voice, np.random.default_rng(3))
    assert len(plain) != len(varied) or not np.array_equal(plain, varied)


@pytest.mark.parametrize("voice", ONE_OF_EACH)
def test_several_sentences_and_a_leading_dash_are_spoken_whole(voice):
    one, _ = speak("- Two men came.", voice)
    two, _ = speak("- Two men came. Nobody knew them at all.", voice)
    assert len(two) > 1.5 * len(one)


def test_seeded_piper_repeats_itself():
    seed_piper(7)
    first = speak("Good morning.", "piper:joe")[0]
    second = speak("Good morning.", "piper:joe")[0]
    seed_piper(7)
    assert np.array_equal(speak("Good morning.", "piper:joe")[0], first)
    assert np.array_equal(speak("Good morning.", "piper:joe")[0], second)
    seed_piper(8)
    other = speak("Good morning.", "piper:joe")[0]
    assert len(other) != len(first) or not np.array_equal(other, first)


@pytest.mark.parametrize("voice", ["piper:jane", "flite:kai", "espeak:en-us+nobody", "festival:kal", "joe"])
def test_unknown_voices_are_refused(voice):
    with pytest.raises(ValueError, match=r"voice: got '.*', expected"):
        speak("Good morning.", voice)


@pytest.mark.parametrize("text", ["", " ", "...?"])
def test_nothing_to_say(text):
    with pytest.raises(ValueError, match="text: got"):
        speak(text, "piper:joe")


@pytest.mark.parametrize(("voice", "program"), [("flite:slt", "flite"), ("espeak:en-us+m1", "espeak-ng")])
def test_a_missing_program_is_named(voice, program, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(VoiceUnavailableError, match=f"apt install {program}"):
        speak("Good morning.", voice)


def test_the_unseen_voice_is_never_drawn():
    rng = np.random.default_rng(0)
    drawn = [draw_voice(rng) for _ in range(2000)]
    assert UNSEEN_VOICE not in drawn
    assert set(drawn) == set(TRAINING_VOICES)
    # 0.65 of 2,000 draws, with five standard deviations of a binomial count to either side.
    assert abs(drawn.count("piper:joe") - 1300) < 5 * (2000 * 0.65 * 0.35) ** 0.5


def test_silence_around_speech_is_trimmed_to_a_tenth_of_a_second():
    rate = 22050
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    silence = np.zeros(rate)
    samples = to_speech_samples(np.concatenate([silence, tone, silence]).astype(np.float32), rate)
    assert samples.dtype == np.int16
    # A second of tone and 0.1 s on either side; the resampler rings for less than a millisecond.
    assert abs(len(samples) - 1.2 * SAMPLE_RATE) < 0.001 * 2 * SAMPLE_RATE
    assert abs(int(np.abs(samples).max()) - 16384) < 164, "0.5 of full scale, within a hundredth"


def test_pure_silence_is_no_speech():
    with pytest.raises(ValueError, match="silence"):
        to_speech_samples(np.zeros(1000, np.float32), 16000)


TEXTS = [Text(f"the {word} door", "phrase") for word in ("red", "blue", "old", "new", "last")]
PIPER = ["piper:joe"] * len(TEXTS)


def _spoken(folder):
    return [utterance for shard in shard_paths(folder) for utterance in read_shard(shard)]


def _same(left, right):
    return len(left) == len(right) and all(
        a[1:] == b[1:] and np.array_equal(a.audio, b.audio) for a, b in zip(left, right, strict=True)
    )


def test_shards_hold_the_texts_in_order_and_extend(tmp_path, monkeypatch):
    monkeypatch.setattr("lyra_model.synthesis.SHARD_UTTERANCES", 2)
    synthesize(TEXTS, tmp_path / "all", voices=PIPER)
    whole = _spoken(tmp_path / "all")
    assert [(utterance.text, utterance.kind) for utterance in whole] == TEXTS
    assert all(0.4 < len(utterance.audio) / SAMPLE_RATE < 3 for utterance in whole)

    # Stopped after three texts, continued by two processes: the same five utterances.
    synthesize(TEXTS[:3], tmp_path / "part", voices=PIPER[:3])
    assert len(_spoken(tmp_path / "part")) == 3
    synthesize(TEXTS, tmp_path / "part", voices=PIPER, workers=2)
    assert _same(_spoken(tmp_path / "part"), whole)


def test_a_later_stretch_has_the_shards_that_the_whole_would_have(tmp_path, monkeypatch):
    monkeypatch.setattr("lyra_model.synthesis.SHARD_UTTERANCES", 2)
    synthesize(TEXTS, tmp_path / "all", voices=PIPER)
    synthesize(TEXTS[2:], tmp_path / "later", voices=PIPER[2:], start=2)
    names = [path.name for path in shard_paths(tmp_path / "later")]
    assert names == ["00001.npy", "00002.npy"]
    assert _same(_spoken(tmp_path / "later"), _spoken(tmp_path / "all")[2:])
    with pytest.raises(ValueError, match="start: got 3, expected a multiple of 2"):
        synthesize(TEXTS[3:], tmp_path / "later", voices=PIPER[3:], start=3)


def test_complete_shards_are_kept_and_strange_ones_refused(tmp_path):
    synthesize(TEXTS[:2], tmp_path, voices=PIPER[:2])
    (shard,) = shard_paths(tmp_path)
    made = shard.stat().st_mtime_ns
    synthesize(TEXTS[:2], tmp_path, voices=PIPER[:2])
    assert shard.stat().st_mtime_ns == made
    with pytest.raises(ValueError, match="other texts"):
        synthesize(TEXTS[1:3], tmp_path, voices=PIPER[:2])
    with pytest.raises(ValueError, match="voices: got 1 for 2 texts"):
        synthesize(TEXTS[:2], tmp_path, voices=PIPER[:1])
    shard.with_suffix(".jsonl").unlink()
    assert shard_paths(tmp_path) == [], "without its index a shard counts as unfinished"


@needs_espeak
@needs_flite
def test_training_speech_is_drawn_from_the_seed(tmp_path):
    for name, seed in (("first", 4), ("again", 4), ("other", 5)):
        synthesize(TEXTS, tmp_path / name, seed=seed)
    assert _same(_spoken(tmp_path / "first"), _spoken(tmp_path / "again"))
    assert not _same(_spoken(tmp_path / "first"), _spoken(tmp_path / "other"))
