"""The Lyra model: a causal language model that reads speech tokens at placeholders in its input."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from lyra_ops import integrations

from .config import LyraConfig
from .speech import SpeechProjector, encode_windows
from .vocabulary import VocabularyProjector

ENCODER_BATCH = 8  # windows encoded at once: bounds the memory of hours of audio
SPEECH_FIELDS = ("input_features", "feature_frames", "speech_tokens")


class LyraForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Speech encoder, projector and language model joined (Lyra, arXiv 2412.09501, figure 2).

    Speech enters as the fields that :class:`lyra_model.LyraProcessor` makes: ``input_features`` (W, bins, F) log-mel
    windows, ``feature_frames`` (W,) mel frames and ``speech_tokens`` (W,) speech tokens of each window; their tokens
    replace, in order, the embeddings of ``config.speech_token_id`` in ``input_ids``. Those that say nothing new, by the
    projector's own reading, are hidden from the language model and take no position.

    Peft adapters belong to inputs with speech, or with speech and text (``config.adapters``): :meth:`generate` runs
    them for such inputs only.
    """

    config_class = LyraConfig
    config: LyraConfig
    base_model_prefix = "lyra"
    main_input_name = "input_ids"
    input_modalities = ("audio", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _no_split_modules: ClassVar = ["WhisperEncoderLayer"]

    def __init__(self, config: LyraConfig):
        super().__init__(config)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.speech_encoder = WhisperEncoder._from_config(config.speech_config)
        projector = VocabularyProjector if config.projector == "vocabulary" else SpeechProjector
        self.speech_projector = projector(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def encode_speech(self, input_features: Tensor, feature_frames: Tensor) -> list[Tensor]:
        """Returns the encoder frames (F_w, d) of each window.

        Windows of one length are encoded together, never padded to a longer one: silence behind a window changes its
        features, so a clip must not depend on what else is in the batch.
        """
        frames: list[Tensor | None] = [None] * len(feature_frames)
        lengths = feature_frames.tolist()
        dtype = self.speech_encoder.conv1.weight.dtype
        for length in sorted(set(lengths)):
            same = [w for w, n in enumerate(lengths) if n == length]
            for chunk in (same[i : i + ENCODER_BATCH] for i in range(0, len(same), ENCODER_BATCH)):
                for w, encoded in zip(
                    chunk, encode_windows(self.speech_encoder, input_features[chunk, :, :length].to(dtype))
                ):
                    frames[w] = encoded
        return frames

    def get_speech_features(self, input_features: Tensor, feature_frames: Tensor, speech_tokens: Tensor) -> Tensor:
        """Returns the speech tokens of all windows one after the other: (sum of ``speech_tokens``, LLM width)."""
        return self._hear(input_features, feature_frames, speech_tokens)[0]

    def _hear(
        self, input_features: Tensor, feature_frames: Tensor, speech_tokens: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Speech tokens, and which of them say something new, None for all."""
        per_token, dtype = self.config.frames_per_token, self.speech_projector.linear_1.weight.dtype
        frames = self.encode_speech(input_features, feature_frames)
        kept = [f[: n * per_token].to(dtype) for f, n in zip(frames, speech_tokens.tolist())]
        return self.speech_projector(self.speech_projector.stack(kept), speech_tokens.tolist())

    def embed(self, input_ids: Tensor, speech: Tensor | None = None) -> Tensor:
        """Embeds ``input_ids`` (B, L) and puts ``speech`` (S, LLM width), in order, at the S placeholders."""
        placeholder = input_ids == self.config.speech_token_id
        # The placeholder may lie outside the language model's vocabulary: look up row 0 there, then replace it.
        embeds = self.get_input_embeddings()(input_ids.masked_fill(placeholder, 0))
        if speech is None:
            return embeds
        if not torch.compiler.is_compiling() and int(placeholder.sum()) != len(speech):
            raise ValueError(
                f"input_ids: got {int(placeholder.sum())} speech placeholders (id {self.config.speech_token_id}), "
                f"expected {len(speech)}, one for each speech token"
            )
        return embeds.masked_scatter(placeholder[..., None], speech.to(embeds.dtype))

    def join(self, input_ids: Tensor, attention_mask: Tensor | None, **speech: Tensor) -> tuple[Tensor, Tensor | None]:
        """Embeds ``input_ids`` (B, L) and the ``speech`` fields; in the mask (B, L) what says nothing new is hidden."""
        tokens, new = self._hear(**speech)
        embeds = self.embed(input_ids, tokens)
        if new is None:
            return embeds, attention_mask
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        shown = torch.ones_like(attention_mask).masked_scatter(
            input_ids == self.config.speech_token_id, new.to(attention_mask.dtype)
        )
        return embeds, attention_mask * shown

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        input_features: Tensor | None = None,
        feature_frames: Tensor | None = None,
        speech_tokens: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        user_text: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """``prompt_embeds`` (B, P, LLM width) stand for the first P of ``input_ids``, speech included; ``user_text`` is
        for :meth:`generate` alone, which chooses adapters by it."""
        if input_features is not None:
            inputs_embeds, attention_mask = self.join(
                input_ids,
                attention_mask,
                input_features=input_features,
                feature_frames=feature_frames,
                speech_tokens=speech_tokens,
            )
            if position_ids is None and attention_mask is not None:
                position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        elif prompt_embeds is not None:
            inputs_embeds = torch.cat([prompt_embeds, self.embed(input_ids[:, prompt_embeds.shape[1] :])], dim=1)
        elif inputs_embeds is None:
            inputs_embeds = self.embed(input_ids)
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            labels=labels,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    def prepare_inputs_for_generation(
        self, *args, inputs_embeds: Tensor | None = None, is_first_iteration: bool = False, **kwargs
    ) -> dict:
        inputs = super().prepare_inputs_for_generation(
            *args, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        if not is_first_iteration and kwargs.get("use_cache", True):
            inputs.pop("prompt_embeds", None)  # in the cache after the first step
        return inputs

    def generate(self, inputs: Tensor | None = None, *args, **kwargs):
        """``GenerationMixin.generate``; the peft adapters work on the inputs of ``config.adapters`` and rest on others.

        The choice is made for the whole batch, as in the published code (section 3.2's M(x) per request), but where
        ``lyra_ops.integrations.apply_multi_lora`` routes, its route is kept to. Inputs without ``user_text``, of a
        prompt that was not rendered from a conversation, count as ones with text.
        """
        speaks, user_text = kwargs.get("input_features") is not None, kwargs.pop("user_text", None)
        if self._hf_peft_config_loaded:
            routed = integrations.is_routed(self)
            works = speaks
            if speaks and self.config.adapters == "speech and text" and user_text is not None:
                works = bool(user_text.any())
                if not routed and works != bool(user_text.all()):
                    raise ValueError(
                        "user_text: got speech with and without text beside it, expected one kind in a batch, since "
                        "the adapters work for all of it; lyra_ops.integrations.apply_multi_lora routes each sample"
                    )
            (self.enable_adapters if works or routed else self.disable_adapters)()
        if speaks:
            # Once, before the first step: every step needs the mask that comes of it.
            speech = {name: kwargs.pop(name) for name in SPEECH_FIELDS}
            ids = kwargs["input_ids"] if inputs is None else inputs
            with torch.no_grad():
                kwargs["prompt_embeds"], kwargs["attention_mask"] = self.join(
                    ids, kwargs.get("attention_mask"), **speech
                )
        return super().generate(inputs, *args, **kwargs)

    def save_pretrained(self, save_directory, **kwargs) -> None:
        """Writes the whole model, and a loaded adapter beside it as a peft directory that ``from_pretrained`` finds."""
        if not self._hf_peft_config_loaded:
            return super().save_pretrained(save_directory, **kwargs)
        super().save_pretrained(save_directory, **kwargs)  # with an adapter loaded, transformers writes that alone
        base = {k.replace(".base_layer", ""): v for k, v in self.state_dict().items() if ".lora_" not in k}
        self._hf_peft_config_loaded = False
        try:
            super().save_pretrained(save_directory, state_dict=base, **kwargs)
        finally:
            self._hf_peft_config_loaded = True
