"""Drops modality tokens between the decoder blocks of a transformers model, in training and generation.

    extractor = lyra_ops.integrations.apply_token_extractor(model, blocks=4, keep=0.7)
    model.generate(**inputs)        # or model(**batch).loss.backward()
    extractor.remove()

At the end of every block but the last, each sample keeps the modality tokens that its text looks at most (Lyra, ICCV
2025, section 3.3). Text is always kept. Deeper layers compute and cache the kept tokens alone, at their old positions.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from numbers import Integral

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import PreTrainedModel

from lyra_ops._checks import FLOAT_DTYPES, INT_DTYPES, check_tensor
from lyra_ops.integrations._attention import watch
from lyra_ops.integrations._decoder import Share, check_attention, check_cache, check_early, drop_schedule, find_decoder
from lyra_ops.token_select import TokenSelection, gather_tokens, policies, select_tokens, token_scores
from lyra_ops.token_select.selection import check_count

POLICIES = ("text", "last_row", "random", "uniform")
_PATCHED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_DROP = "token_drop"  # the argument by which a drop reaches the inside of its layer
_TOKEN_ID_NAMES = [f"{kind}_token_{end}" for kind in ("image", "video", "audio", "speech") for end in ("id", "index")]


def apply_token_extractor(
    model: nn.Module,
    blocks: int = 4,
    keep: Share | Sequence[Share] | Mapping[int, Share] = 0.7,
    *,
    min_keep: int = 32,
    score: str | Callable[..., Tensor] = "text",
    early: bool = True,
    modality_token_ids: Sequence[int] | None = None,
    seed: int = 0,
) -> TokenExtractor:
    """Makes ``model`` drop modality tokens between its decoder layers, in place.

    model               a transformers causal or conditional-generation model whose text layers all have full attention
    blocks              the layers are split into that many blocks; tokens are dropped after each but the last
    keep                share of the modality tokens still there that stays at each drop (floor); or one share for each
                        of the blocks - 1 drops; or {layer: share} for drops after these layers, whatever ``blocks`` is
                        ({n: 0.0}, with min_keep=0: no modality tokens after layer n). In place of a share, a list of
                        them, one for each of the segments that `TokenExtractor.modality` is given.
    min_keep            least number of modality tokens that a drop leaves (published: 32); with segments, of each
    score               "text": attention from the text behind the first modality token that is neither padding nor
                        answer (label other than -100), not causal, as published; where there is no such row, from all
                        text, and without text from the last token. "last_row": from the prompt's last token (FastV's
                        row). Answers are not looked at either, which the published code does: so training keeps what
                        generation keeps. "random", "uniform" (evenly spaced): to compare with. Or a function of your
                        own, score(query, key, candidates, query_mask=, key_mask=, scale=) -> (B, L) float: the rows of
                        "text" (B, Hq, rows, D), all keys (B, Hkv, L, D), and which of them may go (B, L); the rest as
                        `token_scores` takes it.
    early               the tokens of a drop are left out right behind the attention of the block's last layer, whose
                        o_proj and mlp see the kept ones alone. Both act on each token by itself, so nothing else
                        changes. False: left out behind the whole layer, as published.
    modality_token_ids  ids in ``input_ids`` that mark modality tokens; default: those the config names. A model without
                        such ids takes its mask from ``with extractor.modality(mask):``.
    seed                of score="random"

    A dropped token has no logits: outputs are (B, kept, vocabulary), padded on the left, so ``logits[:, -1]`` is each
    sample's last token; a batch of which nothing is dropped comes out as it went in. ``extractor.positions`` (B, kept)
    says where each came from, -1 for padding. Labels are shifted first and gathered then, so every kept token is
    trained on the target it would have had.

    Raises ValueError for models and caches it cannot serve, saying why; TypeError for arguments of the wrong type.
    """
    return TokenExtractor(model, blocks, keep, min_keep, score, early, modality_token_ids, seed)


@dataclass
class _Drop:
    """What one layer drops in one forward, for that forward's recomputation under gradient checkpointing, too."""

    selection: TokenSelection | None = None  # None: all stay
    decided: bool = False
    inside: bool = False  # it has reached the inside of the layer


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
    segments: Tensor | None
    stages: list[_Stage] = field(default_factory=list)


class TokenExtractor:
    """A patched model; see `apply_token_extractor`."""

    def __init__(self, model, blocks, keep, min_keep, score, early, modality_token_ids, seed) -> None:
        self.model = model
        self.text_model = find_decoder(model)
        layers = self.text_model.layers
        self.shares = drop_schedule(model, len(layers), blocks, keep)
        if not callable(score) and score not in POLICIES:
            named = ", ".join(map(repr, POLICIES))
            raise ValueError(f"score: got {score!r}, expected one of {named} or a function")
        check_count("min_keep", min_keep)
        if not isinstance(seed, int):
            raise TypeError(f"seed: got {type(seed).__name__}, expected an int")
        if early:
            for i in self.shares:
                check_early(i, layers[i])
        if self.text_model in _PATCHED:
            raise ValueError("model: drops tokens already; remove() its extractor first")
        self.min_keep, self.score, self.early, self.seed = min_keep, score, early, seed
        self.modality_token_ids = _token_ids(model.config, modality_token_ids)
        self._given: tuple[Tensor | None, ...] = (None, None, None)
        self._entered: tuple[nn.Module, int] | None = None  # by which part, in which thread the call that runs came in
        self._inputs: dict[str, object] = {}
        self._prompt: _Prompt | None = None
        self._prompts: weakref.WeakKeyDictionary[Cache, _Prompt] = weakref.WeakKeyDictionary()
        self._decoding = False
        self._drop = _Drop()  # of the layer that runs
        self._end_watch: Callable[[], None] | None = None

        _PATCHED.add(self.text_model)
        # Not all calls enter by the outermost: generate of a peft model calls the one inside.
        around = [m for m in model.modules() if self.text_model in m.modules() and "input_ids" in _parameters(m)]
        self._handles = [handle for part in around for handle in self._inputs_hooks(part)]
        self._handles += [
            self.text_model.register_forward_pre_hook(self._on_text_model, with_kwargs=True),
            self.text_model.register_forward_hook(self._after_text_model),
        ]
        # Hooks of a layer stand outside gradient checkpointing, those of its parts inside. So its recomputation does
        # not score again; what was dropped reaches it as the keyword argument that the first run had.
        for i, layer in enumerate(layers):
            stage = sum(i > drop for drop in self.shares)
            if stage:
                self._handles.append(layer.register_forward_pre_hook(self._on_layer(stage), with_kwargs=True))
            if i in self.shares:
                self._handles.append(layer.register_forward_pre_hook(self._before_drop(i, layer), with_kwargs=True))
                self._handles.append(layer.register_forward_hook(self._after_drop(i), with_kwargs=True))
                self._handles.append(layer.register_forward_hook(self._release, always_call=True))
                if early:
                    self._handles += _drop_inside(layer)
        takes_labels = [m for m in model.modules() if isinstance(m, PreTrainedModel) and "labels" in _parameters(m)]
        self._own_losses = [(part, part.__dict__.get("_loss_function")) for part in takes_labels]
        for part, _ in self._own_losses:
            part.loss_function = self._on_kept_tokens(part.loss_function)

    def remove(self) -> None:
        """The model as it was before."""
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        _PATCHED.discard(self.text_model)
        for part, own in self._own_losses:
            if own is None:
                part.__dict__.pop("_loss_function", None)
            else:
                part.loss_function = own
        self._own_losses.clear()
        self._prompt = None

    @property
    def positions(self) -> Tensor:
        """(B, kept) int64: the place in the prompt of each token that the last prefill left; -1 for padding."""
        if self._prompt is None:
            raise RuntimeError("positions: the model has not run yet")
        return self._prompt.positions

    @contextmanager
    def modality(
        self, mask: Tensor | None = None, *, query: Tensor | None = None, segments: Tensor | None = None
    ) -> Iterator[None]:
        """Within it, prompts take these masks, (B, L) bool, in place of what is found by token ids.

        mask      True for modality tokens: those that may be dropped
        query     True for the tokens that ask, such as those of a spoken instruction; they are looked from (in place of
                  the text), and always kept
        segments  (B, L) int: modality tokens of one number (image, frame window, modality) compete among themselves,
                  and each number keeps its share
        """
        for name, given, dtypes in (
            ("mask", mask, (torch.bool,)),
            ("query", query, (torch.bool,)),
            ("segments", segments, INT_DTYPES),
        ):
            if given is not None:
                check_tensor(name, given, shape=("B", "L"), dtypes=dtypes)
        self._given = (mask, query, segments)
        try:
            yield
        finally:
            self._given = (None, None, None)

    def _inputs_hooks(self, part: nn.Module) -> list:
        """Hooks that note the inputs of a call that enters by this part."""

        def enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if self._entered is None:
                self._entered, self._inputs = (module, threading.get_ident()), _named(module, args, kwargs)
            elif self._entered[1] != threading.get_ident():
                raise RuntimeError("model: runs in another thread; one that drops tokens serves one call at a time")

        def leave(module: nn.Module, *_: object) -> None:
            if self._entered == (module, threading.get_ident()):
                self._entered, self._inputs = None, {}

        return [
            part.register_forward_pre_hook(enter, with_kwargs=True),
            part.register_forward_hook(leave, always_call=True),
        ]

    def _on_text_model(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        inputs = _named(module, args, kwargs)
        tokens = inputs.get("inputs_embeds")
        tokens = inputs.get("input_ids") if tokens is None else tokens
        mask, cache = inputs.get("attention_mask"), _cache(inputs)
        check_attention(module)
        check_cache(cache)
        if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
            raise ValueError("attention_mask: got a prepared mask, expected (B, L) or None: it is rebuilt per layer")
        batch, length = tokens.shape[:2]
        self._decoding = cache is not None and cache.get_seq_length() > 0
        if self._decoding:
            self._prompt = self._prompts.get(cache)
            if self._prompt is not None:
                self._extend(mask, batch, length, cache, tokens)
            return
        first, deep = min(self.shares, default=length), len(inputs.get("deepstack_visual_embeds") or ())
        if first < deep:
            raise ValueError(
                f"keep: got a drop after layer {first}, but image features are added up to layer {deep - 1}"
            )
        if mask is None and _packed(inputs.get("position_ids")):
            raise ValueError("position_ids: got packed sequences, expected one sequence per row")
        real = torch.ones(batch, length, dtype=torch.bool, device=tokens.device) if mask is None else mask.bool()
        self._prompt = self._begin(real)

    def _after_text_model(self, module: nn.Module, args: tuple, output: object) -> None:
        cache = _cache(vars(output))
        if cache is not None and self._prompt is not None:
            self._prompts[cache] = self._prompt

    def _begin(self, real: Tensor) -> _Prompt:
        ids, labels = self._inputs.get("input_ids"), self._inputs.get("labels")
        names = "mask", "query", "segments"
        modality, asks, segments = (self._fit(name, given, real) for name, given in zip(names, self._given))
        if segments is None and any(isinstance(share, tuple) for share in self.shares.values()):
            raise ValueError(
                "segments: keep has a share for each, and none are given; run inside "
                "`with extractor.modality(segments=...):`"
            )
        if segments is not None and self.score == "uniform":
            raise ValueError("segments: score='uniform' spaces the tokens of a sample evenly, whatever their segment")
        if modality is None:
            if ids is None or not self.modality_token_ids:
                raise ValueError("modality tokens: no ids to find them by; run inside `with extractor.modality(mask):`")
            modality = torch.isin(ids, torch.tensor(self.modality_token_ids, device=ids.device))
        if asks is not None:
            modality = modality & ~asks
        modality = modality & real
        prompt = real if labels is None else real & (labels == -100)
        prompt = torch.where(prompt.any(1, keepdim=True), prompt, real)
        text = prompt & ~modality
        last = policies.last_row(prompt)
        query = last if self.score == "last_row" else text & (modality.cumsum(1) > 0)
        if asks is not None:
            query = asks & real
        for fallback in (text, last):
            query = torch.where(query.any(1, keepdim=True), query, fallback)
        positions = torch.arange(real.shape[1], device=real.device).expand(real.shape).masked_fill(~real, -1)
        if labels is None:
            targets = torch.full_like(positions, -100)
        else:
            targets = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        return _Prompt(modality, query, prompt, real, positions, targets, segments, [_Stage(real)])

    def _fit(self, name: str, given: Tensor | None, real: Tensor) -> Tensor | None:
        """generate repeats a prompt for each of its beams or returned sequences."""
        if given is None:
            return None
        if real.shape[0] % given.shape[0] == 0:
            given = given.repeat_interleave(real.shape[0] // given.shape[0], dim=0)
        return check_tensor(name, given, shape=tuple(real.shape), device=real.device)

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

    def _before_drop(self, i: int, layer: nn.Module):
        def look(query: Tensor, key: Tensor, scale: float | None) -> None:
            self._decide(i, self._scores(query.detach(), key.detach(), scale))

        def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            if self._prompt is None or self._decoding:
                return None
            self._drop = _Drop()
            if self.score in ("random", "uniform"):
                self._decide(i, self._blind_scores(i))
            else:
                name = self.text_model.config._attn_implementation
                self._end_watch = watch(layer.self_attn, name, look)
            return (args, kwargs | {_DROP: self._drop}) if self.early else None

        return hook

    def _release(self, *_: object) -> None:
        if self._end_watch is not None:
            self._end_watch()
            self._end_watch = None
        self._drop = _Drop()

    def _after_drop(self, i: int):
        def hook(layer: nn.Module, args: tuple, kwargs: dict, hidden: Tensor) -> Tensor | None:
            if self._prompt is None or self._decoding:
                return None
            if not self._drop.decided:
                raise RuntimeError(
                    f"layer {i}: its attention did not go through transformers' attention registry; was it replaced?"
                )
            if self.early and not self._drop.inside:
                raise RuntimeError(f"layer {i}: hands no keyword arguments to its attention; use early=False")
            if self._drop.selection is None:
                self._prompt.stages.append(replace(self._prompt.stages[-1]))
                return None
            return self._leave_out(self._drop.selection, hidden, kwargs)

        return hook

    def _decide(self, i: int, scores: Tensor) -> None:
        prompt, keep = self._prompt, self.shares[i]
        if isinstance(keep, tuple):
            keep = torch.tensor([keep], dtype=torch.float64, device=scores.device).repeat(scores.shape[0], 1)
        # On the left, so that the last real token stays in the last column, where `generate` reads logits.
        selection = select_tokens(
            scores,
            prompt.modality,
            keep=keep,
            min_keep=self.min_keep,
            key_mask=prompt.real,
            segments=prompt.segments,
            layout="left",
        )
        self._drop.decided = True
        if not torch.equal(selection.mask, prompt.real):
            self._drop.selection = selection

    def _leave_out(self, selection: TokenSelection, hidden: Tensor, kwargs: dict) -> Tensor:
        """The kept rows of the layer's output; later layers get the kept rows of all else."""
        prompt, batch = self._prompt, hidden.shape[0]
        cos, sin = (x.expand(batch, -1, -1) for x in kwargs["position_embeddings"])
        fills = {"modality": 0, "query": 0, "keys": 0, "real": 0, "positions": -1, "targets": -100}
        if prompt.segments is not None:
            fills["segments"] = 0
        tensors = [hidden, cos, sin, *(getattr(prompt, name) for name in fills)]
        fill = [0, 0, 0, *fills.values()]
        position_ids = kwargs.get("position_ids")
        if position_ids is not None:
            tensors, fill = [*tensors, position_ids.expand(batch, -1)], [*fill, 0]
        hidden, cos, sin, *kept = gather_tokens(selection, *tensors, fill=fill)
        for name, tensor in zip(fills, kept):
            setattr(prompt, name, tensor)
        if position_ids is not None:
            position_ids = kept[-1]
        arguments = {
            "attention_mask": self._attention_mask(prompt.real, hidden.shape[1], hidden),
            "position_embeddings": (cos, sin),
            "position_ids": position_ids,
        }
        prompt.stages.append(_Stage(prompt.real, arguments))
        return hidden

    def _scores(self, query: Tensor, key: Tensor, scale: float | None) -> Tensor:
        prompt = self._prompt
        rows = int(prompt.query.sum(1).max())
        order = prompt.query.int().argsort(dim=1, descending=True, stable=True)[:, :rows]
        query = query.gather(2, order[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
        options = {"query_mask": prompt.query.gather(1, order), "key_mask": prompt.keys, "scale": scale}
        if not callable(self.score):
            return token_scores(query, key, **options)
        scores = self.score(query, key, prompt.modality, **options)
        return check_tensor("score", scores, shape=tuple(prompt.modality.shape), dtypes=FLOAT_DTYPES)

    def _blind_scores(self, i: int) -> Tensor:
        """Those that look at no token."""
        modality = self._prompt.modality
        if self.score == "random":
            return policies.random_scores(modality, seed=self.seed + i)
        return policies.uniform_scores(modality, self.shares[i], min_keep=self.min_keep)

    def _on_kept_tokens(self, loss_function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def loss(*args, logits: Tensor, labels: Tensor, **kwargs) -> Tensor:
            if self._prompt is not None:
                kwargs["shift_labels"] = self._prompt.targets[:, -logits.shape[1] :].contiguous()
            return loss_function(*args, logits=logits, labels=labels, **kwargs)

        return loss


def _drop_inside(layer: nn.Module) -> list:
    """Hooks by which a drop reaches o_proj and mlp: they get the kept tokens; zeros come out for the others."""
    now = [_Drop()]

    def receive(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        now[0] = kwargs.pop(_DROP, _Drop())
        now[0].inside = True
        return args, kwargs

    def keep(module: nn.Module, args: tuple) -> tuple | None:
        selection = now[0].selection
        return None if selection is None else (*gather_tokens(selection, args[0]), *args[1:])

    def put_back(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        selection = now[0].selection
        if selection is None:
            return None
        back = TokenSelection(selection.inverse, selection.lengths, selection.index)
        return gather_tokens(back, output)[0]

    handles = [layer.self_attn.register_forward_pre_hook(receive, with_kwargs=True)]
    for part in (layer.self_attn.o_proj, layer.mlp):
        handles += [part.register_forward_pre_hook(keep), part.register_forward_hook(put_back)]
    return handles


def _token_ids(config: object, given: Sequence[int] | Tensor | None) -> list[int]:
    if given is None:
        ids = [getattr(config, name, None) for name in _TOKEN_ID_NAMES]
        return [i for i in ids if i is not None]
    ids = given.tolist() if isinstance(given, Tensor) else given
    if isinstance(ids, (str, bytes)) or not isinstance(ids, Sequence) or not all(isinstance(i, Integral) for i in ids):
        raise TypeError(f"modality_token_ids: got {given!r}, expected a list of ints")
    return list(ids)


def _parameters(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(type(module).forward).parameters


def _named(module: nn.Module, args: tuple, kwargs: dict) -> dict[str, object]:
    """All arguments of a call of ``forward`` by name."""
    named = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
    return named.get("kwargs", {}) | named


def _cache(named: Mapping[str, object]) -> Cache | None:
    """transformers renamed the argument and the field in 5.24."""
    return next((named[name] for name in ("cache", "past_key_values") if named.get(name) is not None), None)


def _packed(position_ids: Tensor | None) -> bool:
    """Whether places start anew within a row. Multi-axis ids tell it by a text plane before the other three."""
    if position_ids is not None and position_ids.ndim == 3:
        position_ids = position_ids[0] if position_ids.shape[0] == 4 else None
    return position_ids is not None and bool((position_ids.diff(dim=-1) < 0).any())
