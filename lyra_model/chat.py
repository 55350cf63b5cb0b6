"""Asking a model: conversations in, replies out, in batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from .modeling import LyraForConditionalGeneration
from .processor import LyraProcessor

MAX_NEW_TOKENS = 48


def user_message(audio: str | Path | np.ndarray | None = None, text: str | None = None) -> list[dict]:
    """A conversation of one user turn: a clip, a text, or a clip and then a text."""
    text = (text or "").strip()
    if audio is None and not text:
        raise ValueError("question: got neither audio nor text, expected at least one of them")
    parts = [] if audio is None else [{"type": "audio", "audio": audio}]
    return [{"role": "user", "content": parts + ([{"type": "text", "text": text}] if text else [])}]


@torch.inference_mode()
def reply(
    model: LyraForConditionalGeneration,
    processor: LyraProcessor,
    conversations: list[list[dict]],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> list[str]:
    """Greedy replies to conversations of one kind (speech, text or both): the adapters work for a whole batch.

    Raises ValueError where prompt and reply are longer than what the language model was trained on.
    """
    inputs = processor.apply_chat_template(conversations, tokenize=True, add_generation_prompt=True)
    length = inputs["input_ids"].shape[1]
    most = model.config.get_text_config().max_position_embeddings - max_new_tokens
    if length > most:
        raise ValueError(
            f"question: got {length} tokens, expected at most {most}, which leaves room for an answer of "
            f"{max_new_tokens}"
        )
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    texts = processor.tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)
    return [text.strip() for text in texts]
