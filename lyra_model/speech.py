"""The speech path: waveform -> log-mel windows -> Whisper encoder -> stacked frames -> projector -> speech tokens.

Lyra, arXiv 2412.09501, section 3.4: 30 s windows give 1500 encoder frames, stacked by 5 into 300 tokens, and the
tokens of all windows follow each other. Here the padding behind the end of the audio makes no tokens: a clip of t
seconds gives ceil(10 t) of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from .config import LyraConfig

SAMPLE_RATE = 16_000
ENCODER_STRIDE = 320  # samples per encoder frame: a mel hop of 160, then a convolution of stride 2


@dataclass
class SpeechWindows:
    """The log-mel windows of some clips, in order.

    ``features`` (W, mel bins, frames) is padded to the longest window, ``frames`` (W,) counts the mel frames that
    belong to each window (its padding by silence included), ``tokens`` (W,) the speech tokens it yields, and
    ``clip_tokens`` holds the number of tokens of each clip.
    """

    features: Tensor
    frames: Tensor
    tokens: Tensor
    clip_tokens: list[int]


def cut_windows(
    clips: list[np.ndarray],
    extractor: WhisperFeatureExtractor,
    *,
    frames_per_token: int = 5,
    window_seconds: float = 30.0,
    pad_seconds: float = 30.0,
) -> SpeechWindows:
    """Cuts 16 kHz mono clips into log-mel windows, each padded with silence to a multiple of ``pad_seconds``."""
    window, pad, per_token = (
        round(window_seconds * SAMPLE_RATE),
        round(pad_seconds * SAMPLE_RATE),
        ENCODER_STRIDE * frames_per_token,
    )
    if pad % per_token or window % pad:
        raise ValueError(
            f"pad_seconds: got {pad_seconds}, expected a multiple of {per_token / SAMPLE_RATE} s that divides "
            f"window_seconds ({window_seconds})"
        )
    mels, tokens, clip_tokens = [], [], []
    for clip in clips:
        pieces = [clip[start : start + window] for start in range(0, len(clip), window)]
        for piece in pieces:
            padded = -(-len(piece) // pad) * pad
            mel = extractor(
                piece, sampling_rate=SAMPLE_RATE, padding="max_length", max_length=padded, return_tensors="pt"
            )
            mels.append(mel["input_features"][0])
        counts = [-(-len(piece) // per_token) for piece in pieces]
        tokens += counts
        clip_tokens.append(sum(counts))
    frames = torch.tensor([mel.shape[-1] for mel in mels])
    features = torch.zeros(len(mels), mels[0].shape[0], int(frames.max()))
    for row, mel in zip(features, mels):
        row[:, : mel.shape[-1]] = mel
    return SpeechWindows(features, frames, torch.tensor(tokens), clip_tokens)


def encode_windows(encoder: WhisperEncoder, features: Tensor) -> Tensor:
    """Whisper's encoder on windows of any even number of mel frames F up to its 3000: (W, bins, F) -> (W, F/2, d).

    ``WhisperEncoder.forward`` refuses windows shorter than 30 s; positions are absolute, so a short window simply uses
    the first of them.
    """
    hidden = nn.functional.gelu(encoder.conv1(features))
    hidden = nn.functional.gelu(encoder.conv2(hidden)).transpose(1, 2)
    hidden = hidden + encoder.embed_positions.weight[: hidden.shape[1]]
    for layer in encoder.layers:
        hidden = layer(hidden, attention_mask=None)
    return encoder.layer_norm(hidden)


class SpeechProjector(nn.Module):
    """Stacks ``frames_per_token`` encoder frames and maps them to the LLM's width: Linear, ReLU, Linear."""

    def __init__(self, config: LyraConfig):
        super().__init__()
        stacked = config.speech_config.d_model * config.frames_per_token
        self.frames_per_token = config.frames_per_token
        self.linear_1 = nn.Linear(stacked, config.projector_hidden_size)
        self.linear_2 = nn.Linear(config.projector_hidden_size, config.text_config.hidden_size)
        self.dropout = nn.Dropout(0.0)

    def reset(self) -> None:
        """Where training begins."""
        self.linear_1.reset_parameters()
        self.linear_2.reset_parameters()

    def stack(self, windows: list[Tensor]) -> Tensor:
        """Encoder frames (F_w, d) of windows -> (sum of F_w / frames_per_token, frames_per_token x d)."""
        frames = torch.cat(windows)
        return frames.reshape(-1, frames.shape[-1] * self.frames_per_token)

    def forward(self, stacked: Tensor, lengths: list[int] | None = None) -> tuple[Tensor, None]:
        """(..., frames_per_token x d) -> (..., LLM width) speech tokens, whichever windows they are of; all count."""
        return self.linear_2(torch.relu(self.linear_1(self.dropout(stacked)))), None
