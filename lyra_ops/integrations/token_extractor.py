"""Drops modality tokens between the decoder blocks of a transformers model, in training and generation.

    extractor = lyra_ops.integrations.apply_token_extractor(model, blocks=4, keep=0.7)
    model.generate(**inputs)        # or model(**batch).loss.backward()
    extractor.remove()

At the end of every block but the last, each sample keeps the modality tokens that its text looks at most (Lyra, ICCV
2025, section 3.3). Text is always kept. Deeper layers compute and cache the kept tokens alone, at their old positions.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lyra_ops._checks import check_tensor
from lyra_ops.token_select import TokenSelection, gather_tokens, select_tokens, token_scores

POLICIES = ("text", "last_row", "random", "uniform")
_TOKEN_ID_NAMES = [f"{kind}_token_{end}" for kind in ("image", "video", "audio") for end in ("id", "index")]


def apply_token_extractor(
    model: nn.Module,
    blocks: int = 4,
    keep: float | Sequence[float] | Mapping[int, float] = 0.7,
    *,
    min_keep: int = 32,
    score: str = "text",
    modality_token_ids: Sequence[int] | None = None,
    seed: int = 0,
) -> TokenExtractor:
    """Makes ``model`` drop modality tokens between its decoder layers, in place.

    model               a transformers causal or conditional-generation model whose text layers all have full attention
    blocks              the layers are split into that many blocks; tokens are dropped after each but the last
    keep                share of the modality tokens still there that stays at each drop (floor); or one share for each
                        of the blocks - 1 drops; or {layer: share} for drops after these layers, whatever ``blocks`` is
                        ({n: 0.0}, with min_keep=0: no modality tokens after layer n)
    min_keep            least number of modality tokens that a drop leaves (published: 32)
    score               "text": attention from the text behind the first modality token that is neither padding nor
                        answer (label other than -100), not causal, as published; where there is no such row, from all
                        text, and without text from the last token. "last_row": from the prompt's last token (FastV's
                        row). Answers are not looked at either, which the published code does: so training keeps what
                        generation keeps. "random", "uniform" (evenly spaced): to compare with.
    modality_token_ids  ids in ``input_ids`` that mark modality tokens; default: those the config names. A model without
                        such ids takes its mask from ``with extractor.modality(mask):``.
    seed                of score="random"

    A dropped token has no logits: outputs are (B, kept, vocabulary), padded on the left, so ``logits[:, -1]`` is each
    sample's last token; a batch of which nothing is dropped comes out as it went in. ``extractor.positions`` (B, kept)
    says where each came from, -1 for padding. Labels are shifted first and gathered then, so every kept token is
    trained on the target it would have had.

    Raises ValueError for models and caches it cannot serve, saying why; TypeError for arguments of the wrong type.
    """
    return TokenExtractor(model, blocks, keep, min_keep, score, modality_token_ids, seed)


@dataclass
class _Stage:
    """What the layers between two drops see: ``key_mask`` grows with their cache, ``kwargs`` are of this forward."""

    key_mask: Tensor
    kwargs: dict[str, object] = field(default_factory=dict)


@dataclass
class _Prompt:
    """Per-token tensors of the tokens still there, each (B, L), and the stages that they went through."""

    modality: Tensor
    query: Tensor  # the rows that score
    keys: Tensor  # what they look at
    real: Tensor
    positions: Tensor
    targets: Tensor
    stages: list[_Stage] = field(default_factory=list)


class TokenExtractor:
    """A patched model; see `apply_token_extractor`."""

    def __init__(self, model, blocks, keep, min_keep, score, modality_token_ids, seed) -> None:
        self.model = model
        self.text_model = _text_model(model)
        self.shares = _shares(len(self.text_model.layers), blocks, keep)
        if score not in POLICIES:
            raise ValueError(f"score: got {score!r}, expected one of {', '.join(POLICIES)}")
        self.min_keep, self.score, self.seed = min_keep, score, seed
        ids = [getattr(model.config, name, None) for name in _TOKEN_ID_NAMES]
        self.modality_token_ids = (
            [i for i in ids if i is not None] if modality_token_ids is None else modality_token_ids
        )
        self._given: Tensor | None = None
        self._inputs: dict[str, object] = {}
        self._prompt: _Prompt | None = None
        self._prompts: weakref.WeakKeyDictionary[Cache, _Prompt] = weakref.WeakKeyDictionary()
        self._decoding = False
        self._captured: tuple[Tensor, Tensor] | None = None
        self._restore_attention = None
        self._signature = inspect.signature(type(model).forward)

        self._handles = [
            model.register_forward_pre_hook(self._on_model, with_kwargs=True),
            self.text_model.register_forward_pre_hook(self._on_text_model, with_kwargs=True),
            self.text_model.register_forward_hook(self._after_text_model),
        ]
        # Hooks stand outside gradient checkpointing, so the recomputation of a layer neither scores nor drops again.
        for i, layer in enumerate(self.text_model.layers):
            stage = sum(i > drop for drop in self.shares)
            if stage:
                self._handles.append(layer.register_forward_pre_hook(self._on_layer(stage), with_kwargs=True))
            if i in self.shares:
                self._handles.append(layer.register_forward_pre_hook(self._before_drop(layer), with_kwargs=True))
                self._handles.append(layer.register_forward_hook(self._after_drop(i), with_kwargs=True))
                self._handles.append(layer.register_forward_hook(self._release, always_call=True))
        self._own_loss = model.__dict__.get("_loss_function")
        loss_function = model.loss_function
        model.loss_function = lambda *args, **kwargs: self._loss(loss_function, *args, **kwargs)

    def remove(self) -> None:
        """The model as it was before."""
        for handle in self._handles:
            handle.remove()
        if self._own_loss is None:
            self.model.__dict__.pop("_loss_function", None)
        else:
            self.model.loss_function = self._own_loss
        self._handles.clear()
        self._prompt = None

    @property
    def positions(self) -> Tensor:
        """(B, kept) int64: the place in the prompt of each token that the last prefill left; -1 for padding."""
        if self._prompt is None:
            raise RuntimeError("positions: the model has not run yet")
        return self._prompt.positions

    @contextmanager
    def modality(self, mask: Tensor) -> Iterator[None]:
        """Within it, prompts take ``mask`` (B, L) bool, True for modality tokens, in place of token ids."""
        check_tensor("mask", mask, shape=("B", "L"), dtypes=(torch.bool,))
        self._given = mask
        try:
            yield
        finally:
            self._given = None

    def _on_model(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._inputs = self._signature.bind(module, *args, **kwargs).arguments

    def _on_text_model(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        inputs = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
        tokens = inputs.get("inputs_embeds")
        tokens = inputs.get("input_ids") if tokens is None else tokens
        mask = inputs.get("attention_mask")
        if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
            raise ValueError("attention_mask: got a prepared mask, expected (B, L) or None: it is rebuilt per layer")
        cache = _cache(inputs.get("kwargs", {}) | inputs)
        if cache is not None and any(layer.is_compileable for layer in getattr(cache, "layers", [])):
            raise ValueError("cache: got a static cache; its layers share one length, dropping needs a DynamicCache")
        batch, length = tokens.shape[:2]
        self._decoding = cache is not None and cache.get_seq_length() > 0
        if self._decoding:
            self._prompt = self._prompts.get(cache)
            if self._prompt is not None:
                self._extend(mask, batch, length, cache, tokens)
            return
        real = torch.ones(batch, length, dtype=torch.bool, device=tokens.device) if mask is None else mask.bool()
        self._prompt = self._begin(real)

    def _after_text_model(self, module: nn.Module, args: tuple, output: object) -> None:
        cache = _cache(vars(output))
        if cache is not None and self._prompt is not None:
            self._prompts[cache] = self._prompt

    def _begin(self, real: Tensor) -> _Prompt:
        ids, labels = self._inputs.get("input_ids"), self._inputs.get("labels")
        if self._given is not None:
            modality = self._given
            # generate repeats a prompt for each of its beams or returned sequences
            if real.shape[0] % modality.shape[0] == 0:
                modality = modality.repeat_interleave(real.shape[0] // modality.shape[0], dim=0)
            check_tensor("mask", modality, shape=tuple(real.shape), device=real.device)
        elif ids is None or not self.modality_token_ids:
            raise ValueError("modality tokens: no ids to find them by; run inside `with extractor.modality(mask):`")
        else:
            modality = torch.isin(ids, torch.tensor(self.modality_token_ids, device=ids.device))
        modality = modality & real
        prompt = real if labels is None else real & (labels == -100)
        prompt = torch.where(prompt.any(1, keepdim=True), prompt, real)
        text = prompt & ~modality
        last = prompt & (prompt.flip(1).cumsum(1).flip(1) == 1)
        query = last if self.score == "last_row" else text & (modality.cumsum(1) > 0)
        for fallback in (text, last):
            query = torch.where(query.any(1, keepdim=True), query, fallback)
        positions = torch.arange(real.shape[1], device=real.device).expand(real.shape).masked_fill(~real, -1)
        if labels is None:
            targets = torch.full_like(positions, -100)
        else:
            targets = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        return _Prompt(modality, query, prompt, real, positions, targets, [_Stage(real)])

    def _extend(self, mask: Tensor | None, batch: int, length: int, cache: Cache, tokens: Tensor) -> None:
        """The masks of a forward on top of a cache: what each stage kept, and the new tokens."""
        new = torch.ones(batch, length, dtype=torch.bool, device=tokens.device)
        if mask is not None:
            new = mask[:, -length:].bool()
        firsts = [0, *(i + 1 for i in self.shares)]
        for first, stage in zip(firsts, self._prompt.stages):
            cached = cache.get_seq_length(first)
            if cached != stage.key_mask.shape[1]:
                raise ValueError(
                    f"cache: layer {first} holds {cached} tokens, expected the {stage.key_mask.shape[1]} "
                    "that the extractor saw; a cache that was cropped or edited cannot be continued"
                )
            stage.key_mask = torch.cat([stage.key_mask, new], dim=1)
            stage.kwargs = {"attention_mask": self._attention_mask(stage.key_mask, length, tokens)}

    def _attention_mask(self, key_mask: Tensor, rows: int, like: Tensor) -> object:
        """Causal over the kept tokens, in whatever form the model's attention takes."""
        batch, length = key_mask.shape
        make = ALL_MASK_ATTENTION_FUNCTIONS[self.text_model.config._attn_implementation]
        return make(
            batch_size=batch,
            q_length=rows,
            kv_length=length,
            q_offset=length - rows,
            kv_offset=0,
            mask_function=causal_mask_function,
            attention_mask=key_mask,
            device=key_mask.device,
            dtype=like.dtype if like.is_floating_point() else self.text_model.dtype,
            config=self.text_model.config,
        )

    def _on_layer(self, stage: int):
        def hook(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            if self._prompt is None:
                return None
            return args, kwargs | self._prompt.stages[stage].kwargs

        return hook

    def _before_drop(self, layer: nn.Module):
        """Lends the attention registry a function that notes queries and keys, for this layer's forward alone."""

        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if self._prompt is None or self._decoding or self.score in ("random", "uniform"):
                return
            name = self.text_model.config._attn_implementation
            own = ALL_ATTENTION_FUNCTIONS._local_mapping.get(name)
            eager = getattr(sys.modules[type(layer.self_attn).__module__], "eager_attention_forward", None)
            attention = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)

            def noting(module: nn.Module, query: Tensor, key: Tensor, *args, **kwargs):
                if module is layer.self_attn:
                    self._captured = query.detach(), key.detach()
                return attention(module, query, key, *args, **kwargs)

            def restore() -> None:
                if own is None:
                    del ALL_ATTENTION_FUNCTIONS[name]
                else:
                    ALL_ATTENTION_FUNCTIONS[name] = own

            ALL_ATTENTION_FUNCTIONS[name] = noting
            self._restore_attention = restore

        return hook

    def _release(self, *_: object) -> None:
        if self._restore_attention is not None:
            self._restore_attention()
            self._restore_attention = None
        self._captured = None

    def _after_drop(self, i: int):
        def hook(layer: nn.Module, args: tuple, kwargs: dict, hidden: Tensor) -> Tensor | None:
            prompt = self._prompt
            if prompt is None or self._decoding:
                return None
            scores = self._scores(i, prompt)
            selection = select_tokens(
                scores, prompt.modality, keep=self.shares[i], min_keep=self.min_keep, key_mask=prompt.real
            )
            if torch.equal(selection.mask, prompt.real):
                prompt.stages.append(replace(prompt.stages[-1]))
                return None
            selection = _padded_left(selection)
            cos, sin = (_per_sample(x, hidden) for x in kwargs["position_embeddings"])
            position_ids = kwargs.get("position_ids")
            hidden, cos, sin = gather_tokens(selection, hidden, cos, sin)
            fills = {"modality": 0, "query": 0, "keys": 0, "real": 0, "positions": -1, "targets": -100}
            kept = gather_tokens(selection, *(getattr(prompt, name) for name in fills), fill=list(fills.values()))
            for name, tensor in zip(fills, kept):
                setattr(prompt, name, tensor)
            if position_ids is not None:
                (position_ids,) = gather_tokens(selection, position_ids.expand(*position_ids.shape[:-2], *scores.shape))
            mask = self._attention_mask(prompt.real, hidden.shape[1], hidden)
            prompt.stages.append(
                _Stage(
                    prompt.real,
                    {"attention_mask": mask, "position_embeddings": (cos, sin), "position_ids": position_ids},
                )
            )
            return hidden

        return hook

    def _scores(self, i: int, prompt: _Prompt) -> Tensor:
        rank = (prompt.modality.cumsum(1) - 1).clamp(min=0)
        if self.score == "random":
            draw = torch.rand(prompt.real.shape[1], generator=torch.Generator().manual_seed(self.seed + i))
            return draw.to(rank.device)[rank]
        if self.score == "uniform":
            n = prompt.modality.sum(1, keepdim=True).double()
            k = (self.shares[i] * n).floor().clamp(min=self.min_keep).minimum(n)
            n = n.clamp(min=1)
            return (((rank + 1) * k / n).floor() > (rank * k / n).floor()).float()
        if self._captured is None:
            raise RuntimeError(
                f"layer {i}: its attention did not go through transformers' attention registry; was it replaced?"
            )
        query, key = self._captured
        rows = int(prompt.query.sum(1).max())
        order = prompt.query.int().argsort(dim=1, descending=True, stable=True)[:, :rows]
        query = query.gather(2, order[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
        return token_scores(query, key, query_mask=prompt.query.gather(1, order), key_mask=prompt.keys)

    def _loss(self, loss_function, *args, logits: Tensor, labels: Tensor, **kwargs) -> Tensor:
        if self._prompt is not None:
            kwargs["shift_labels"] = self._prompt.targets[:, -logits.shape[1] :].contiguous()
        return loss_function(*args, logits=logits, labels=labels, **kwargs)


def _cache(named: Mapping[str, object]) -> Cache | None:
    """transformers renamed the argument and the field in 5.24."""
    return next((named[name] for name in ("cache", "past_key_values") if named.get(name) is not None), None)


def _text_model(model: nn.Module) -> nn.Module:
    """The decoder of a model, recognised by its parts, so that renamed copies of a family count as that family."""
    parts = ("embed_tokens", "layers", "norm", "rotary_emb")
    found = [module for module in model.modules() if all(hasattr(module, part) for part in parts)]
    if len(found) != 1:
        raise ValueError(
            f"model: found {len(found)} text decoders in {type(model).__name__}, expected one module with "
            f"{', '.join(parts)}; pass the part that holds it"
        )
    (text,) = found
    if hasattr(text, "_deepstack_process"):
        raise ValueError("model: its first layers add image features by place (DeepStack), which drops do not follow")
    for i, layer in enumerate(text.layers):
        if not all(hasattr(getattr(layer, "self_attn", None), part) for part in ("q_proj", "k_proj", "layer_idx")):
            raise ValueError(
                f"model: layer {i} ({type(layer).__name__}) has no full attention; "
                "a recurrent or linear-attention layer would mix dropped tokens into its state"
            )
    kinds = set(getattr(text.config, "layer_types", None) or []) - {"full_attention"}
    if kinds:
        raise ValueError(f"model: got layers of {', '.join(sorted(kinds))}, expected full attention in every layer")
    name = text.config._attn_implementation
    home = sys.modules[type(text.layers[0].self_attn).__module__]
    if name == "eager" and not hasattr(home, "eager_attention_forward"):
        raise ValueError("model: its module has no eager_attention_forward, so its scores cannot be seen; use sdpa")
    if name not in ALL_MASK_ATTENTION_FUNCTIONS or name.startswith("paged"):
        raise ValueError(f"model: attention {name!r} has no mask function, so padding could not be masked after a drop")
    return text


def _shares(layers: int, blocks: int, keep: float | Sequence[float] | Mapping[int, float]) -> dict[int, float]:
    """{layer: share} in the order of the layers."""
    if isinstance(keep, Mapping):
        shares = dict(sorted(keep.items()))
    else:
        if isinstance(blocks, bool) or not isinstance(blocks, int):
            raise TypeError(f"blocks: got {type(blocks).__name__}, expected an int")
        if not 1 <= blocks <= layers:
            raise ValueError(f"blocks: got {blocks}, expected 1 to the {layers} layers of the model")
        ends = [layers * b // blocks - 1 for b in range(1, blocks)]
        values = list(keep) if isinstance(keep, Sequence) else [keep] * len(ends)
        if len(values) != len(ends):
            raise ValueError(f"keep: got {len(values)} shares, expected one for each of {len(ends)} drops")
        shares = dict(zip(ends, values))
    for layer, share in shares.items():
        if not 0 <= layer < layers - 1:
            raise ValueError(f"keep: got layer {layer}, expected 0 to {layers - 2}: nothing follows the last layer")
        if isinstance(share, bool) or not isinstance(share, (float, int)):
            raise TypeError(f"keep: got {type(share).__name__}, expected a share from 0 to 1")
        if not 0 <= share <= 1:
            raise ValueError(f"keep: got {share}, expected a share from 0 to 1")
    return {layer: float(share) for layer, share in shares.items()}


def _padded_left(selection: TokenSelection) -> TokenSelection:
    """The last real token stays in the last column, where `generate` reads the next token's logits."""
    index, lengths, inverse = selection
    shift = (index.shape[1] - lengths)[:, None]
    place = torch.arange(index.shape[1], device=index.device) - shift
    index = index.gather(1, place.clamp(min=0)).masked_fill(place < 0, -1)
    return TokenSelection(index, lengths, torch.where(inverse < 0, inverse, inverse + shift))


def _per_sample(x: Tensor, hidden: Tensor) -> Tensor:
    """cos or sin (1 or B, L, D) as (B, L, D)."""
    return x.expand(hidden.shape[0], -1, -1)
