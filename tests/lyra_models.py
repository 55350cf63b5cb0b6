"""A small random Lyra, its processor and the vocabulary that its projector reads speech in."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast, WhisperConfig, WhisperFeatureExtractor

import lyra_model
from lyra_model.nano import CHAT_TEMPLATE
from lyra_model.processor import SPEECH_TOKEN

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", SPEECH_TOKEN]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def bytes_tokenizer(vocabulary: list[str], specials: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    return tokenizer


def tiny_speech_tokenizer() -> Tokenizer:
    """Bytes, in another order than the language model's, and two tokens that begin a transcript."""
    return bytes_tokenizer(ALPHABET[::-1], ["<|begin|>", "<|speak|>"])


def tiny_lyra(projector: str) -> tuple[lyra_model.LyraForConditionalGeneration, lyra_model.LyraProcessor]:
    torch.manual_seed(0)
    backend = bytes_tokenizer(SPECIALS[:3] + ALPHABET, SPECIALS)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|endoftext|>", eos_token="<|im_end|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    reader = tiny_speech_tokenizer()
    prompt = [reader.token_to_id("<|begin|>"), reader.token_to_id("<|speak|>")]
    config = lyra_model.LyraConfig(
        LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=3 + len(ALPHABET), tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        ),
        WhisperConfig(
            d_model=24, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=48, num_mel_bins=80,
            decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=48, vocab_size=len(ALPHABET) + 2,
            pad_token_id=0,
        ),
        speech_token_id=tokenizer.convert_tokens_to_ids(SPEECH_TOKEN),
        projector=projector,
        projector_hidden_size=16,
        reader_prompt=prompt,
        reader_vocabulary=prompt[0],
        pad_seconds=6.0,
    )  # fmt: skip
    model = lyra_model.LyraForConditionalGeneration(config).eval()
    for parameter in model.parameters():  # the usual initial scale is so small that every answer is the same
        parameter.data.mul_(3)
    processor = lyra_model.LyraProcessor(WhisperFeatureExtractor(feature_size=80), tokenizer, pad_seconds=6.0)
    return model, processor
