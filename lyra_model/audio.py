"""Audio files in and out: anything libsndfile reads becomes 16 kHz mono."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile
import soxr

from .speech import SAMPLE_RATE

SILENCE = 10 ** (-60 / 20)  # peak amplitude below which a clip counts as silent: -60 dB of full scale


def load_audio(source: str | Path | np.ndarray, sampling_rate: int | None = None) -> np.ndarray:
    """Returns 16 kHz mono float32 samples in [-1, 1].

    ``source`` is a file (wav, flac, ogg, mp3, ...; any rate, any number of channels, which are averaged) or an array of
    samples, (T,) or (T, channels), at ``sampling_rate`` Hz (16000 unless said). Raises FileNotFoundError, or ValueError
    where the audio is unreadable, empty, not finite or silent: nothing could be understood in it.
    """
    if isinstance(source, (str, Path)):
        name = str(source).removeprefix("file://")
        if not Path(name).is_file():
            raise FileNotFoundError(f"audio: no file {name}")
        if not Path(name).stat().st_size:
            raise ValueError(f"audio: {name} is empty")
        try:
            samples, sampling_rate = soundfile.read(name, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise ValueError(f"audio: {name} is broken or no audio file ({error})") from error
    else:
        name, samples = "the array", np.asarray(source)
        if samples.ndim not in (1, 2) or samples.dtype.kind not in "fiu":
            raise ValueError(
                f"audio: got an array of shape {samples.shape} and dtype {samples.dtype}, "
                "expected (T,) or (T, channels) samples"
            )
        scale = 1.0 if samples.dtype.kind == "f" else 1.0 / np.iinfo(samples.dtype).max
        samples = samples.reshape(len(samples), -1).astype(np.float32) * np.float32(scale)
    samples = samples.mean(axis=1)
    if not len(samples):
        raise ValueError(f"audio: {name} is empty")
    if not np.isfinite(samples).all():
        raise ValueError(f"audio: {name} holds NaN or infinite samples")
    if np.abs(samples).max() < SILENCE:
        raise ValueError(f"audio: {name} is silent (peak below -60 dB)")
    rate = sampling_rate or SAMPLE_RATE
    return samples if rate == SAMPLE_RATE else soxr.resample(samples, rate, SAMPLE_RATE)


def save_audio(path: str | Path, samples: np.ndarray, sampling_rate: int) -> None:
    """Writes mono float32 samples; the ending of ``path`` names the format."""
    soundfile.write(str(path), samples, sampling_rate)
