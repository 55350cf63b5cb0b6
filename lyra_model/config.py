"""The configuration of a Lyra model: which parts it is made of and how they are joined."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, WhisperConfig

ENCODER_FRAMES = 50  # per second, of Whisper


class LyraConfig(PreTrainedConfig):
    """Configuration of :class:`lyra_model.LyraForConditionalGeneration`.

    Args:
        text_config: configuration of the language model, any causal LM of transformers.
        speech_config: configuration of the Whisper encoder.
        speech_token_id: id of the placeholder that stands for one speech token in ``input_ids``.
        frames_per_token: encoder frames stacked into one speech token; 5 turns 50 frames/s into 10 tokens/s.
        projector: what makes speech tokens of encoder frames: "mlp", the published one of two layers, or "vocabulary",
            a mixture of the language model's embeddings (:class:`lyra_model.vocabulary.VocabularyProjector`).
        projector_hidden_size: hidden width of the two-layer projector.
        window_seconds: longest piece of audio encoded at once; longer audio is cut into such windows.
        pad_seconds: a window is padded with silence to the next multiple of this. Whisper was trained with 30; 6 is
            several times faster on short questions at almost the same features.
        reader_prompt: of "vocabulary": ids that Whisper's decoder has before it as it reads a speech token.
        reader_frames: of "vocabulary": encoder frames before and after those of the speech token that it attends to.
        reader_vocabulary: of "vocabulary": number of Whisper's text tokens, the first of its vocabulary.
        readings: of "vocabulary": how often speech is read, from the second time on as text; at least 1.
        adapters: the inputs that peft adapters work on: "speech", all that hold speech, or "speech and text", those
            with text of the user's beside it.

    ``frames_per_token`` 5, ``projector_hidden_size`` 2048 and 30 s windows are the published model's
    (Lyra, arXiv 2412.09501, section 3.4; code of dvlab-research/Lyra).
    """

    model_type = "lyra"
    sub_configs: ClassVar = {"text_config": AutoConfig, "speech_config": WhisperConfig}

    def __init__(
        self,
        text_config: PreTrainedConfig | dict | None = None,
        speech_config: WhisperConfig | dict | None = None,
        *,
        speech_token_id: int = 0,
        frames_per_token: int = 5,
        projector: str = "mlp",
        projector_hidden_size: int = 2048,
        window_seconds: float = 30.0,
        pad_seconds: float = 30.0,
        reader_prompt: Sequence[int] = (),
        reader_frames: tuple[int, int] = (5, 20),
        reader_vocabulary: int = 0,
        readings: int = 3,
        adapters: str = "speech",
        **kwargs,
    ):
        if isinstance(text_config, dict):
            text_config = CONFIG_MAPPING[text_config.get("model_type", "llama")](**text_config)
        if isinstance(speech_config, dict):
            speech_config = WhisperConfig(**speech_config)
        self.text_config = CONFIG_MAPPING["llama"]() if text_config is None else text_config
        self.speech_config = WhisperConfig() if speech_config is None else speech_config
        self.speech_token_id = speech_token_id
        self.frames_per_token = frames_per_token
        if projector not in ("mlp", "vocabulary"):
            raise ValueError(f"projector: got {projector!r}, expected 'mlp' or 'vocabulary'")
        if projector == "vocabulary" and not (reader_prompt and reader_vocabulary):
            raise ValueError(
                "projector: 'vocabulary' needs reader_prompt and reader_vocabulary, got "
                f"{list(reader_prompt)} and {reader_vocabulary}"
            )
        if adapters not in ("speech", "speech and text"):
            raise ValueError(f"adapters: got {adapters!r}, expected 'speech' or 'speech and text'")
        if readings < 1:
            raise ValueError(f"readings: got {readings}, expected at least 1")
        positions = len(reader_prompt) + math.ceil(window_seconds * ENCODER_FRAMES / frames_per_token)
        if projector == "vocabulary" and positions > self.speech_config.max_target_positions:
            raise ValueError(
                f"window_seconds: got {window_seconds}, with {frames_per_token} frames per token up to {positions} "
                f"tokens in a window; Whisper's decoder takes {self.speech_config.max_target_positions}"
            )
        self.projector = projector
        self.projector_hidden_size = projector_hidden_size
        self.window_seconds = window_seconds
        self.pad_seconds = pad_seconds
        self.reader_prompt = list(reader_prompt)
        self.reader_frames = list(reader_frames)
        self.reader_vocabulary = reader_vocabulary
        self.readings = readings
        self.adapters = adapters
        super().__init__(**kwargs)

    def get_text_config(self, *args, **kwargs) -> PreTrainedConfig:
        return self.text_config
