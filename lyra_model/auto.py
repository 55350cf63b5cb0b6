"""The public classes of lyra_model, known to the Auto classes of transformers once this is imported."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, AutoModelForMultimodalLM, AutoProcessor

from . import nano
from .config import LyraConfig
from .modeling import LyraForConditionalGeneration
from .processor import LyraProcessor

AutoConfig.register("lyra", LyraConfig)
AutoProcessor.register(LyraConfig, LyraProcessor)
AutoModelForMultimodalLM.register(LyraConfig, LyraForConditionalGeneration)

__all__ = ["LyraConfig", "LyraForConditionalGeneration", "LyraProcessor", "load"]


def load(name: str | Path, **kwargs) -> tuple[LyraForConditionalGeneration, LyraProcessor]:
    """Returns (model, processor) of ``"nano"``, of a folder written by ``lyra train``, of a checkpoint or of a hub id.

    ``kwargs`` go to ``from_pretrained`` of the model.
    """
    if name == "nano":
        return nano.load_nano(**kwargs)
    if (Path(name) / nano.PROJECTOR_FILE).exists():
        return nano.load_nano(name, **kwargs)
    model = LyraForConditionalGeneration.from_pretrained(name, **kwargs).eval()
    return model, LyraProcessor.from_pretrained(name)
