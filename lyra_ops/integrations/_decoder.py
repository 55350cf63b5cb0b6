"""Finds the decoder of a transformers model, and says why tokens cannot be dropped inside one that it cannot serve."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from numbers import Integral

from torch import nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from lyra_ops.token_select.checks import check_share

PARTS = ("embed_tokens", "layers", "norm", "rotary_emb")


def find_decoder(model: nn.Module) -> nn.Module:
    """The decoder of a model, recognised by its parts, so that renamed copies of a family count as that family."""
    if not hasattr(model, "config"):
        raise ValueError(
            f"model: {type(model).__name__} has no config, expected a transformers model; patch the one inside"
        )
    found = [module for module in model.modules() if all(hasattr(module, part) for part in PARTS)]
    if len(found) != 1:
        raise ValueError(
            f"model: found {len(found)} text decoders in {type(model).__name__}, expected one module with "
            f"{', '.join(PARTS)}; pass the part that holds it"
        )
    (text,) = found
    for i, layer in enumerate(text.layers):
        if not all(hasattr(getattr(layer, "self_attn", None), part) for part in ("q_proj", "k_proj", "layer_idx")):
            raise ValueError(
                f"model: layer {i} ({type(layer).__name__}) has no full attention; "
                "a recurrent or linear-attention layer would mix dropped tokens into its state"
            )
    kinds = set(getattr(text.config, "layer_types", None) or []) - {"full_attention"}
    if kinds:
        raise ValueError(f"model: got layers of {', '.join(sorted(kinds))}, expected full attention in every layer")
    check_attention(text)
    return text


def check_attention(text: nn.Module) -> None:
    """Looked at in each forward too, since a model's attention can be switched."""
    name = text.config._attn_implementation
    if name not in ALL_MASK_ATTENTION_FUNCTIONS or name.startswith("paged"):
        raise ValueError(f"model: attention {name!r} has no mask function, so padding could not be masked after a drop")
    home = sys.modules[type(text.layers[0].self_attn).__module__]
    if name == "eager" and not hasattr(home, "eager_attention_forward"):
        raise ValueError("model: its module has no eager_attention_forward, so its scores cannot be seen; use sdpa")


def check_cache(cache: object) -> None:
    if cache is None:
        return
    if not isinstance(cache, Cache):
        raise ValueError(
            f"cache: got {type(cache).__name__}, expected a DynamicCache; a paged one has no layer lengths"
        )
    for i, layer in enumerate(cache.layers):
        if not isinstance(layer, DynamicLayer):
            raise ValueError(
                f"cache: layer {i} is a {type(layer).__name__}, a static cache if generate made it; its layers share "
                "one length, dropping needs a DynamicCache"
            )


def check_early(i: int, layer: nn.Module) -> None:
    for part in ("self_attn.o_proj", "mlp"):
        try:
            layer.get_submodule(part)
        except AttributeError:
            raise ValueError(f"early: layer {i} ({type(layer).__name__}) has no {part}; use early=False") from None
    kinds = [p.kind for p in inspect.signature(type(layer).forward).parameters.values()]
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        raise ValueError(f"early: layer {i} ({type(layer).__name__}) takes no further arguments; use early=False")


Share = float | Sequence[float]


def drop_schedule(
    model: nn.Module, layers: int, blocks: int, keep: Share | Sequence[Share] | Mapping[int, Share]
) -> dict[int, float | tuple[float, ...]]:
    """{layer: share, or one per segment} in the order of the layers."""
    if isinstance(keep, Mapping):
        shares = dict(keep)
    else:
        if isinstance(blocks, bool) or not isinstance(blocks, int):
            raise TypeError(f"blocks: got {type(blocks).__name__}, expected an int")
        if not 1 <= blocks <= layers:
            raise ValueError(f"blocks: got {blocks}, expected 1 to the {layers} layers of the model")
        ends = [layers * b // blocks - 1 for b in range(1, blocks)]
        values = list(keep) if _several(keep) else [keep] * len(ends)
        if len(values) != len(ends):
            raise ValueError(f"keep: got {len(values)} shares, expected one for each of {len(ends)} drops")
        shares = dict(zip(ends, values))
    deep = len(getattr(getattr(model.config, "vision_config", None), "deepstack_visual_indexes", None) or ())
    for layer, share in shares.items():
        if not isinstance(layer, Integral) or not 0 <= layer < layers - 1:
            raise ValueError(f"keep: got layer {layer!r}, expected 0 to {layers - 2}: nothing follows the last layer")
        if layer < deep:
            raise ValueError(
                f"keep: got a drop after layer {layer}, expected layer {deep} or later: image features are added by "
                f"place behind each of the first {deep} layers (DeepStack)"
            )
        for one in share if _several(share) else [share]:
            check_share("keep", one)
    return {
        layer: tuple(map(float, share)) if _several(share) else float(share) for layer, share in sorted(shares.items())
    }


def _several(share: object) -> bool:
    return isinstance(share, Sequence) and not isinstance(share, str)
