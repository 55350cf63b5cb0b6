"""Conversations to model inputs: chat template, speech windows, one placeholder for each speech token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin

from .audio import load_audio
from .speech import cut_windows

SPEECH_TOKEN = "<|speech|>"


class LyraProcessor(ProcessorMixin):
    """Joins the Whisper feature extractor and the tokenizer of the language model.

    A conversation is a list of messages ``{"role": ..., "content": text or parts}``; a part is
    ``{"type": "text", "text": ...}`` or ``{"type": "audio", "audio": path or array}`` (``path`` and ``url`` of a local
    file do as well, ``sampling_rate`` goes with an array). Parts follow each other on lines of their own, as in the
    published prompts.
    """

    def __init__(
        self,
        feature_extractor=None,
        tokenizer=None,
        frames_per_token: int = 5,
        window_seconds: float = 30.0,
        pad_seconds: float = 30.0,
        chat_template: str | None = None,
        **kwargs,
    ):
        self.frames_per_token = frames_per_token
        self.window_seconds = window_seconds
        self.pad_seconds = pad_seconds
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template, **kwargs)

    def __call__(
        self,
        text: str | Sequence[str],
        audio: Sequence[np.ndarray] | None = None,
        *,
        padding_side: str = "left",
        return_tensors: str = "pt",
        **kwargs,
    ) -> BatchFeature:
        """Tokenizes prompts that hold one ``<|speech|>`` for each of the 16 kHz mono clips in ``audio``, in order."""
        texts = [text] if isinstance(text, str) else list(text)
        clips = [] if audio is None else list(audio)
        wanted = sum(t.count(SPEECH_TOKEN) for t in texts)
        if wanted != len(clips):
            raise ValueError(f"audio: got {len(clips)} clips, expected {wanted}, one for each {SPEECH_TOKEN} in text")
        inputs = {}
        if clips:
            windows = cut_windows(
                clips,
                self.feature_extractor,
                frames_per_token=self.frames_per_token,
                window_seconds=self.window_seconds,
                pad_seconds=self.pad_seconds,
            )
            counts = iter(windows.clip_tokens)
            texts = [_expand(t, counts) for t in texts]
            inputs = {
                "input_features": windows.features,
                "feature_frames": windows.frames,
                "speech_tokens": windows.tokens,
            }
        encoded = self.tokenizer(
            texts,
            padding=True,
            padding_side=padding_side,
            add_special_tokens=False,
            return_tensors=return_tensors,
            **kwargs,
        )
        return BatchFeature({**encoded, **inputs})

    def apply_chat_template(
        self,
        conversation: list,
        *,
        tokenize: bool = False,
        return_dict: bool = True,
        add_generation_prompt: bool = False,
        **kwargs,
    ) -> str | list[str] | BatchFeature:
        """Renders one conversation or a batch of them; with ``tokenize=True`` returns the model's inputs.

        Beside speech these hold ``user_text`` (B,), whether there is text of the user's in a conversation, too.
        """
        batched = bool(conversation) and isinstance(conversation[0], (list, tuple))
        rendered, clips, texts = [], [], []
        for messages in conversation if batched else [conversation]:
            flat = [{**m, "content": _flatten(m["content"], clips)} for m in messages]
            texts.append(any(m["role"] == "user" and m["content"].replace(SPEECH_TOKEN, "").strip() for m in flat))
            rendered.append(
                self.tokenizer.apply_chat_template(flat, tokenize=False, add_generation_prompt=add_generation_prompt)
            )
        if not tokenize:
            return rendered if batched else rendered[0]
        inputs = self(rendered, clips or None, **kwargs)
        if clips:
            inputs["user_text"] = torch.tensor(texts)
        return inputs if return_dict else inputs["input_ids"]

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "input_features", "feature_frames", "speech_tokens", "user_text"]


def _flatten(content: str | list[dict], clips: list[np.ndarray]) -> str:
    if isinstance(content, str):
        return content
    parts = []
    for part in content:
        kind = part.get("type")
        if kind == "text":
            parts.append(part["text"])
        elif kind == "audio":
            source = next((part[key] for key in ("audio", "path", "url") if part.get(key) is not None), None)
            if source is None:
                raise ValueError(f"audio part: got keys {sorted(part)}, expected one of audio, path, url")
            clips.append(load_audio(source, part.get("sampling_rate")))
            parts.append(SPEECH_TOKEN)
        else:
            raise ValueError(f"content part: got type {kind!r}, expected 'text' or 'audio'")
    return "\n".join(parts)


def _expand(text: str, counts) -> str:
    pieces = text.split(SPEECH_TOKEN)
    return pieces[0] + "".join(SPEECH_TOKEN * next(counts) + piece for piece in pieces[1:])
