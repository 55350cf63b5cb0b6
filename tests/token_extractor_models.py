"""Tiny random models of the families that the token extractor is tested on, and inputs for them."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

PAD, AUDIO_END, AUDIO_START, AUDIO, IMAGE, VISION_START, VISION_END, VIDEO = 0, 57, 58, 59, 60, 61, 62, 63
SPECIAL = [AUDIO_END, AUDIO_START, AUDIO, IMAGE, VISION_START, VISION_END, VIDEO]
LAYERS = 6
TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": PAD,
    "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
PLAIN = ("llama", "qwen2", "qwen3")
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen2_5_omni_thinker")
FAMILIES = (*PLAIN, *QWEN, "llava_onevision", "internvl")


def tiny(family: str, attention: str = "sdpa") -> nn.Module:
    torch.manual_seed(0)
    config = _config(family)
    if family == "qwen2_5_omni_thinker":
        model = transformers.Qwen2_5OmniThinkerForConditionalGeneration._from_config(
            config, attn_implementation=attention
        )
    else:
        auto = AutoModelForCausalLM if family in PLAIN else AutoModelForImageTextToText
        model = auto.from_config(config, attn_implementation=attention)
    # Larger weights than at initialisation: attention that differs from token to token, logits that depend on it.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name:
                parameter.mul_(8)
    # Eager attention takes its softmax in float32, whatever the model's dtype: float64's mask overflows there.
    return model.eval() if attention == "eager" else model.double().eval()


def _config(family: str) -> transformers.PreTrainedConfig:
    if family in PLAIN:
        config = AutoConfig.for_model(family, **TEXT, head_dim=8)
        config.image_token_id = IMAGE
        return config
    if family == "llava_onevision":
        vision = transformers.SiglipVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=4,
            patch_size=2, vision_use_head=False,
        )  # fmt: skip
        return AutoConfig.for_model(
            family, text_config=TEXT | {"model_type": "qwen2"}, vision_config=vision, image_token_index=IMAGE,
            video_token_index=VIDEO, image_grid_pinpoints=[[4, 4], [4, 8], [8, 4], [8, 8]],
        )  # fmt: skip
    if family == "internvl":
        vision = transformers.InternVLVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=[8, 8],
            patch_size=[2, 2],
        )  # fmt: skip
        return AutoConfig.for_model(
            family, text_config=TEXT | {"model_type": "qwen2"}, vision_config=vision, image_token_id=IMAGE
        )
    vision = {
        "depth": 1, "num_heads": 2, "patch_size": 2, "spatial_merge_size": 2, "temporal_patch_size": 1,
        "hidden_size": 16,
    }  # fmt: skip
    if family == "qwen2_vl":
        vision = vision | {"embed_dim": 16, "hidden_size": 32}
    else:
        vision = vision | {"out_hidden_size": 32, "intermediate_size": 16}
    if family == "qwen3_vl":
        vision = vision | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    text = TEXT | {"rope_parameters": MROPE}
    if family == "qwen3_vl":
        text = text | {"head_dim": 8}
    if family == "qwen2_5_omni_thinker":
        audio = transformers.Qwen2_5OmniAudioEncoderConfig(
            num_mel_bins=8, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=16, d_model=16, n_window=8,
            output_dim=32, max_source_positions=64,
        )  # fmt: skip
        return transformers.Qwen2_5OmniThinkerConfig(
            audio_config=audio, vision_config=vision, text_config=text, audio_token_index=AUDIO,
            image_token_index=IMAGE, video_token_index=VIDEO, audio_start_token_id=AUDIO_START,
            audio_end_token_id=AUDIO_END, vision_start_token_id=VISION_START, vision_end_token_id=VISION_END,
        )  # fmt: skip
    return AutoConfig.for_model(
        family, text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO,
        vision_start_token_id=VISION_START, vision_end_token_id=VISION_END,
    )  # fmt: skip


def sample(family: str, side: int, tail: int, seed: int) -> dict[str, Tensor]:
    """Text, an image (of side x side patches for Qwen), for Omni a sound, and a question of ``tail`` tokens."""
    g = torch.Generator().manual_seed(seed)
    noise = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    text = torch.randint(2, AUDIO_END, (3 + tail,), generator=g).tolist()
    inputs, count = {}, (side // 2) ** 2
    if family in QWEN:
        inputs = {"pixel_values": noise(side**2, 12), "image_grid_thw": torch.tensor([[1, side, side]])}
    elif family == "llava_onevision":
        height, width = {8: (4, 4), 10: (4, 8), 12: (8, 8)}[side]
        inputs["pixel_values"] = noise(1 + height * width // 16, 3, 4, 4)  # the whole image, then its tiles
        inputs["image_sizes"] = torch.tensor([[height, width]])
        count = 4 + (height // 2) * (width // 2 + 1)  # each row of patches ends with a token of its own
    elif family == "internvl":
        inputs["pixel_values"] = noise(side // 2, 3, 8, 8)
        count = 4 * (side // 2)
    ids = text[:3] + [VISION_START] + [IMAGE] * count + [VISION_END]
    if family == "qwen2_5_omni_thinker":
        frames = 4 * side
        inputs["input_features"] = nn.functional.pad(noise(1, 8, frames), (0, 48 - frames))
        inputs["feature_attention_mask"] = (torch.arange(48) < frames).long()[None]
        ids += [AUDIO_START] + [AUDIO] * side + [AUDIO_END]
    ids = torch.tensor([ids + text[3:]])
    if family in PLAIN:
        # Without a vision tower all image tokens are alike; other ids, given by mask, are not.
        ids = torch.where(ids == IMAGE, torch.randint(2, AUDIO_END, ids.shape, generator=g), ids)
    if family not in QWEN:
        inputs["position_ids"] = torch.arange(ids.shape[1])[None]
    if family in QWEN[:3]:
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | inputs


def film(family: str) -> dict[str, Tensor]:
    """Text, a video of three frames of four tokens each, and a question; of the families of Qwen."""
    frames = 3
    marked = frames if family == "qwen3_vl" else 1  # it marks each frame
    tokens = marked * [VISION_START, *[VIDEO] * (4 * frames // marked), VISION_END]
    ids = torch.tensor([[5, 6, 7, *tokens, 8, 9, 10]])
    g = torch.Generator().manual_seed(0)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values_videos": torch.randn(frames * 16, 12, generator=g, dtype=torch.float64),
        "video_grid_thw": torch.tensor([[frames, 4, 4]]),
    }
    if family == "qwen2_5_omni_thinker":
        return inputs | {"video_second_per_grid": torch.tensor([1.0])}
    return inputs | {"mm_token_type_ids": 2 * (ids == VIDEO).int()}


def batch_of(samples: list[dict[str, Tensor]], side: str) -> dict[str, Tensor]:
    """Per-token tensors are padded on that side; those of images and sounds stand one after the other."""
    length = max(s["input_ids"].shape[1] for s in samples)
    out = {}
    for name in samples[0]:
        rows = [s[name] for s in samples]
        if all(row.shape == s["input_ids"].shape for row, s in zip(rows, samples)):
            gaps = [length - row.shape[1] for row in rows]
            rows = [nn.functional.pad(row, (n, 0) if side == "left" else (0, n)) for row, n in zip(rows, gaps)]
        out[name] = torch.cat(rows)
    return out


def three(family: str, side: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    inputs = batch_of([sample(family, *s, seed=i) for i, s in enumerate(SIDES)], side)
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}


SIDES = ((8, 5), (12, 9), (10, 3))


def modality_of(inputs: dict[str, Tensor]) -> Tensor:
    """What stands for an image or a sound; in a plain text model, what lies between the vision marks."""
    ids = inputs["input_ids"]
    between = ((ids == VISION_START).cumsum(1) > 0) & ((ids == VISION_END).cumsum(1) == 0) & (ids != VISION_START)
    return between | (ids == AUDIO)


def longer(inputs: dict[str, Tensor], sequences: Tensor) -> dict[str, Tensor]:
    """The inputs of a prompt and the answer that was generated for it, for one forward."""
    new = sequences.shape[1] - inputs["input_ids"].shape[1]
    out = dict(inputs, input_ids=sequences)
    out["attention_mask"] = nn.functional.pad(inputs["attention_mask"], (0, new), value=1)
    if "mm_token_type_ids" in out:
        out["mm_token_type_ids"] = nn.functional.pad(inputs["mm_token_type_ids"], (0, new))
    if "position_ids" in out:
        out["position_ids"] = (out["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return out


def vendored(model: nn.Module, folder: Path) -> nn.Module:
    """The model as an instance of a copy of its source, with other class names, as projects that vendor it have it."""
    source = sys.modules[type(model).__module__]
    text = Path(source.__file__).read_text()
    for name in sorted(set(re.findall(r"^class (\w+)", text, re.M)), key=len, reverse=True):
        text = re.sub(rf"\b{name}\b", f"House{name}", text)
    text = text.replace("from ... import", "from transformers import").replace("from ...", "from transformers.")
    text = text.replace("from ..", "from transformers.models.")
    text = re.sub(r"^from \.configuration", f"from {source.__package__}.configuration", text, flags=re.M)
    (folder / "house_model.py").write_text(text)
    spec = importlib.util.spec_from_file_location("house_model", folder / "house_model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["house_model"] = module
    spec.loader.exec_module(module)
    copy = getattr(module, f"House{type(model).__name__}")(model.config).to(model.dtype).eval()
    copy.load_state_dict(model.state_dict())
    return copy
