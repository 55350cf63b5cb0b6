"""What the model is taught to reply: the words themselves, or what the language model answers to the typed question."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tqdm import tqdm

from .modeling import LyraForConditionalGeneration
from .processor import LyraProcessor

REPEAT = "Repeat what I said."
END = "<|im_end|>"
BATCH = 96


@torch.inference_mode()
def answer_questions(
    questions: list[str],
    model: LyraForConditionalGeneration,
    processor: LyraProcessor,
    cache: Path | None = None,
    max_new_tokens: int = 32,
) -> dict[str, str]:
    """Returns the greedy answers of the language model to typed questions, by question.

    An answer that came to its end within ``max_new_tokens`` carries the end mark, a cut one does not. ``cache`` is a
    JSON file that is read first and extended.
    """
    answers = json.loads(cache.read_text()) if cache and cache.exists() else {}
    todo = sorted({q for q in questions if q not in answers}, key=len)
    for start in tqdm(range(0, len(todo), BATCH), desc="typed answers", disable=not todo):
        batch = todo[start : start + BATCH]
        conversations = [[{"role": "user", "content": q}] for q in batch]
        inputs = processor.apply_chat_template(conversations, tokenize=True, add_generation_prompt=True)
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        texts = processor.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :])
        for question, text in zip(batch, texts):
            answer, end, _ = text.partition(END)
            answers[question] = answer + end
        if cache and (start // BATCH % 10 == 9 or start + BATCH >= len(todo)):
            cache.write_text(json.dumps(answers))
    return {q: answers[q] for q in questions}
