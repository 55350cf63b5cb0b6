"""peft's LoRA layers, routed: every token of a batch through the adapter of its own, in training and generation.

    routed = lyra_ops.integrations.apply_multi_lora(model)     # a PeftModel, or a transformers model with adapters
    with routed.route(["image", "speech", None]):              # one name per sample; None: the base model
        loss = model(**batch).loss
    routed.remove()

The parameters stay peft's own, in their places: optimizers, saving, loading, merging, adding and deleting adapters and
data parallelism know nothing of it. Outside of `route` the model computes what peft computes.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Real

import torch
from peft.tuners import lora
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from lyra_ops._checks import check_tensor, readable
from lyra_ops.multi_lora import LoraBank, LoraRouting, add_adapters, check_ids, dora, run_checked
from lyra_ops.multi_lora.function import Base

# What one sample goes through: the base model alone, an adapter, or a sum of adapters with their weights.
Choice = str | None | Mapping[str, float]

# peft's layers around quantised linears. By name, because peft defines some of them only beside their packages.
QUANTISED = (
    "AqlmLoraLinear",
    "AwqLoraLinear",
    "EetqLoraLinear",
    "GPTQLoraLinear",
    "HqqLoraLinear",
    "IncLoraLinear",
    "Linear4bit",
    "Linear8bitLt",
    "TorchaoLoraLinear",
)


def apply_multi_lora(model: nn.Module) -> RoutedLora:
    """Makes all LoRA layers of ``model`` routable, in place; the result routes, and removes itself.

    Layers are peft's ``lora.Linear`` (peft >= 0.18) and its twins for quantised linears: an ``nn.Linear`` runs fused
    with its adapters, any other base runs its own forward, to which the adapters are added. Adapters may differ in
    rank, scaling (rslora too) and layers: one that a layer does not have adds nothing there. ``model`` may be a part,
    such as ``model.language_model``; adapters outside of it stay peft's.

    Raises ValueError for a model without LoRA layers or one that is routable already, for adapters of other kinds
    (embeddings, convolutions, modules_to_save) and, when they are used, for adapters whose variant (aLoRA, ..), bias or
    dropout cannot share one product. DoRA is routed around an ``nn.Linear``, not in training with dropout.
    """
    routed = RoutedLora(model)
    if not routed.names:
        routed.remove()
        raise ValueError(f"model: got {type(model).__name__} without a LoRA layer, expected one with peft adapters")
    return routed


def is_routed(model: nn.Module) -> bool:
    """Whether ``model`` is run within a `RoutedLora.route` at the moment."""
    handles = {id(m._lyra_routed): m._lyra_routed for m in model.modules() if "_lyra_routed" in m.__dict__}
    return any(routed._now is not None for routed in handles.values())


class RoutedLora:
    """Handle of a model whose LoRA layers are routable; made by `apply_multi_lora`."""

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
        self._model = model
        self._now: _Assignment | None = None
        self._followers: dict[_RoutedLinear, list[_RoutedLinear]] = {}  # layers that were given the same input
        self._take_over()

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters of the model in the order of their ids: that in which peft has added them."""
        layers = [m for m in self._model.modules() if isinstance(m, _RoutedLinear)]
        return tuple(dict.fromkeys(name for layer in layers for name in layer.lora_A))

    @contextmanager
    def route(
        self,
        adapters: Sequence[Choice] | Tensor,
        *,
        weights: Tensor | None = None,
        new_tokens: Sequence[Choice] | None = None,
    ) -> Iterator:
        """Within this context every token goes through its own adapter, forward and backward.

        Args:
            adapters: a name per sample, None for the base model alone, a dict of weights by name for a sum of adapters;
                or int ids (B, L) or (T,) per token, places in `names`, -1 for the base model alone. (T,) serves models
                whose layers see (1, T, K) or (T, K).
            weights: with ids (B, L, S) or (T, S), which then are S adapters per token: their weights, of that shape.
            new_tokens: with ids, the adapters of each sample for the tokens that are generated after the L given ones.

        Backward may run after the context has been left, also under gradient checkpointing of transformers layers,
        whose recomputation finds the routing of its forward again. (Own calls of torch.utils.checkpoint: run backward
        inside.) Contexts may be nested; an exception leaves no trace.

        Frozen adapters, and those under no_grad, are packed once per route; that their weights are written to in place
        is noticed, but not through ``.data``.

        Raises ValueError for a name or an id that does not exist (ids on a GPU are not read back: such a token gets the
        base model alone); layers raise it for ids that fit no tokens of theirs and for adapters that are merged.
        """
        self._take_over()
        names = self.names
        if isinstance(adapters, Tensor):
            ids = adapters
            check_ids("adapters", ids, weights)
            if readable(ids) and ids.numel() and not -1 <= int(ids.min()) <= int(ids.max()) < len(names):
                known = ", ".join(f"{e} = {name}" for e, name in enumerate(names))
                got = f"{int(ids.min())} to {int(ids.max())}"
                raise ValueError(f"adapters: got ids from {got}, expected -1 (base alone) or one of {known}")
            after = None if new_tokens is None else self._ids("new_tokens", new_tokens)
            assignment = _Assignment(names, self._known(), per_token=_Ids(ids, weights), per_sample=after)
        elif new_tokens is not None or weights is not None:
            extra = "new_tokens" if weights is None else "weights"
            raise ValueError(f"{extra}: got some beside names per sample, expected them beside ids per token")
        else:
            assignment = _Assignment(names, self._known(), per_token=None, per_sample=self._ids("adapters", adapters))
        with self._using(assignment):
            yield

    def remove(self) -> None:
        """Gives the model back as it was; nothing happens the second time."""
        self._followers.clear()
        for module in self._model.modules():
            if module.__dict__.get("_lyra_routed") is self:
                module.__class__ = module.__dict__.pop("_lyra_before")
                del module.__dict__["_lyra_routed"]

    def _take_over(self) -> None:
        """Makes routable what is not yet: every layer at first, later those that another adapter has brought along."""
        found = []
        for name, module in self._model.named_modules():
            owner = module.__dict__.get("_lyra_routed")
            if owner not in (None, self):
                raise ValueError(f"model: {name} is routable already; call remove() on what apply_multi_lora returned")
            if isinstance(module, AuxiliaryTrainingWrapper) or (
                isinstance(module, BaseTunerLayer) and not _is_linear(module)
            ):
                raise ValueError(
                    f"model: {name} is peft's {type(module).__name__}, which would follow the active adapter, "
                    "expected LoRA on linear layers alone"
                )
            if owner is None and isinstance(module, (BaseTunerLayer, GradientCheckpointingLayer)):
                found.append(module)
        for module in found:
            module.__dict__["_lyra_before"] = type(module)
            module.__dict__["_lyra_routed"] = self
            module.__class__ = _routed_class(type(module))

    def _forget(self, first: _RoutedLinear, layer: _RoutedLinear) -> None:
        """``layer`` has not been given the input of ``first``."""
        if layer in self._followers.get(first, ()):
            self._followers[first].remove(layer)

    def _known(self) -> dict[_RoutedLinear, list[_RoutedLinear]]:
        return {first: list(others) for first, others in self._followers.items()}

    def _ids(self, argument: str, choices: Sequence[Choice]) -> _Ids:
        places = {name: e for e, name in enumerate(self.names)}
        if isinstance(choices, str) or not isinstance(choices, Sequence):
            or_ids = ", or a tensor of ids per token" if argument == "adapters" else ""
            raise TypeError(f"{argument}: got {choices!r:.80}, expected a list of names, one per sample{or_ids}")
        for c in choices:
            if c is not None and not isinstance(c, (str, Mapping)):
                raise TypeError(f"{argument}: got {c!r:.80}, expected a name, None or a dict of weights by name")
        sums = [c if isinstance(c, Mapping) else {} if c is None else {c: 1.0} for c in choices]
        for name, weight in (item for weights in sums for item in weights.items()):
            if name not in places:
                raise ValueError(f"{argument}: got {name!r}, expected None or one of {', '.join(self.names)}")
            if not isinstance(weight, Real) or not math.isfinite(weight):
                raise ValueError(f"{argument}: got the weight {weight!r:.80} for {name!r}, expected a finite number")
        if not any(isinstance(c, Mapping) for c in choices):
            return _Ids(torch.tensor([places.get(c, -1) for c in choices], dtype=torch.int64), None)
        slots = max(map(len, sums))
        ids, weights = torch.full((len(sums), slots), -1), torch.zeros(len(sums), slots)
        for b, of_sample in enumerate(sums):
            for s, (name, weight) in enumerate(of_sample.items()):
                ids[b, s], weights[b, s] = places[name], weight
        return _Ids(ids, weights)

    @contextmanager
    def _using(self, assignment: _Assignment | None) -> Iterator:
        before, self._now = self._now, assignment
        try:
            yield
        finally:
            self._now = before
            while assignment is not None and assignment.waiting:
                layer, (first, *_) = assignment.waiting.popitem()
                self._forget(first, layer)


@dataclass
class _Ids:
    """Ids of tokens or samples; with weights, S of them each, in a dimension behind."""

    ids: Tensor
    weights: Tensor | None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.ids.shape if self.weights is None else self.ids.shape[:-1])

    def map(self, function: Callable[[Tensor], Tensor]) -> _Ids:
        return _Ids(function(self.ids), None if self.weights is None else function(self.weights))


@dataclass
class _Assignment:
    """The ids of one `route`, and the routings made of them, which all layers of the same adapters share."""

    names: tuple[str, ...]
    followers: dict  # those known when the route began
    per_token: _Ids | None  # (B, L) or (T,)
    per_sample: _Ids | None  # (B,)
    routings: dict = field(default_factory=dict)
    prepared: dict = field(default_factory=dict)  # by layer
    waiting: dict = field(default_factory=dict)  # by layer: what it will return when it is called with a certain input
    last: tuple | None = None  # the last layer's input, weakly, its state, and the first layer that was given it

    def routing(self, x: Tensor, bank: LoraBank) -> LoraRouting:
        shape = x.shape[:-1]
        key = (shape, bank.names, x.device, _in_inference_mode())
        if key not in self.routings:
            found = self._ids(tuple(shape)).map(lambda t: t.to(x.device))
            self.routings[key] = LoraRouting(self._places(found.ids, bank.names), bank, found.weights)
        return self.routings[key]

    def _ids(self, shape: tuple[int, ...]) -> _Ids:
        if self.per_token is not None and self.per_token.shape in (shape, (math.prod(shape),)):
            ndim = len(self.per_token.shape)
            return self.per_token.map(lambda t: t.reshape(*shape, *t.shape[ndim:]))
        if self.per_sample is not None and len(shape) == 2 and (shape[0],) == self.per_sample.shape:
            return self.per_sample.map(lambda t: t[:, None].expand(*shape, *t.shape[1:]))
        got = []
        if self.per_token is not None:
            got.append(f"ids for tokens {self.per_token.shape}")
        if self.per_sample is not None:
            got.append(f"names for {self.per_sample.shape[0]} samples")
        expected = f"expected them to fit a layer that sees tokens {tuple(shape)}"
        if self.per_sample is None:
            expected += "; new_tokens= names the adapters of those that are generated"
        raise ValueError(f"adapters: got {' and '.join(got)}, {expected}")

    def _places(self, ids: Tensor, present: tuple[str, ...]) -> Tensor:
        """The ids as places in ``present``, -1 where the adapter is not there. Copies nothing to the device."""
        places = ids
        for e, name in enumerate(self.names):
            place = present.index(name) if name in present else -1
            if place != e:
                places = torch.where(ids == e, place, places)
        return places


@dataclass
class _Prepared:
    """What a layer needs in a route, found once and taken again while the layer's adapters are the same tensors."""

    sources: list[tuple[dict, Tensor]]  # the parameters of a module of peft, and the weight that was among them
    scaling: dict[str, float]  # of the layer, as it was
    bank: LoraBank
    dropouts: dict[str, float]
    magnitudes: dict[str, Tensor]  # of those that are DoRA

    def holds(self, scaling: dict[str, float]) -> bool:
        return self.scaling == scaling and all(own.get("weight") is weight for own, weight in self.sources)


class _RoutedLinear:
    """A layer of peft; while a route is set, each token goes through its own adapter. Mixed in by a change of class."""

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        assignment = self._lyra_routed._now
        if assignment is None or self.disable_adapters or kwargs.get("adapter_names") is not None:
            return super().forward(x, *args, **kwargs)
        if self in assignment.waiting and not (args or kwargs):
            first, given, state, y = assignment.waiting.pop(self)
            if given is x and state == _state_of(x):
                return y
            self._lyra_routed._forget(first, self)
        prepared = self._prepared(assignment)
        if prepared.bank is None:
            return super().forward(x, *args, **kwargs)
        if self.merged_adapters:
            merged = ", ".join(self.merged_adapters)
            raise ValueError(f"adapters: got a route while {merged} is merged, expected unmerge_adapter() before")
        if self.training and len(set(prepared.dropouts.values())) > 1:
            raise ValueError(f"lora_dropout: got {prepared.dropouts}, expected the same for all adapters of a batch")
        bank, base = prepared.bank, self._modules["base_layer"]
        routing, dropout_p = assignment.routing(x, bank), next(iter(prepared.dropouts.values()))
        if prepared.magnitudes:
            return self._run_dora(x, prepared, routing)
        if _is_plain(base) and not (args or kwargs):
            if torch.compiler.is_compiling() or x.is_inference() or (self.training and dropout_p):
                return self._run([self], x, assignment, routing, dropout_p)[0]
            return self._run_with_followers(x, assignment, routing)
        y = base(x, *args, **kwargs)
        # What a foreign autograd function returns may be a view that must not be written to, or be kept for backward.
        y = y.clone() if y.requires_grad else y
        return add_adapters(y, x, bank, routing, dropout_p=dropout_p, training=self.training)

    def _run_dora(self, x: Tensor, prepared: _Prepared, routing: LoraRouting) -> Tensor:
        base, bank, (name, *_) = self.base_layer, prepared.bank, prepared.magnitudes
        if not _is_plain(base):
            raise ValueError(
                f"adapter {name!r}: got DoRA around {type(base).__name__} with a forward of its own, expected nn.Linear"
            )
        if self.training and any(prepared.dropouts.values()):
            # There peft gives the base layer inputs with dropout, too, for each adapter others.
            raise ValueError(f"lora_dropout: got {prepared.dropouts} in training with DoRA ({name}), expected 0")
        magnitudes = [prepared.magnitudes.get(name) for name in bank.names]
        return dora.linear(x, base.weight, base.bias, bank, magnitudes, routing)

    def _run_with_followers(self, x: Tensor, assignment: _Assignment, routing: LoraRouting) -> Tensor:
        """Runs the layers that are called one after the other with one input (q, k and v; gate and up) at once.

        Which ones these are is seen when they are called, whatever they are called: a layer that is given the very
        tensor that the layer before it was given follows that one. From the next route on, or at once where there is no
        graph that a recomputation would have to make again, the first computes what the others will return. They
        return it if they are given that tensor, unchanged, and else run by themselves. Not with dropout, where every
        layer has a mask of its own, and not for inference tensors, which do not tell whether they have been changed.
        """
        followers = self._lyra_routed._followers
        state, first = _state_of(x), self
        if assignment.last and assignment.last[0]() is x and assignment.last[1] == state:
            first = assignment.last[2]
        if first is not self:
            known = followers.setdefault(first, [])
            known += [self] if self not in known else []
        assignment.last = (weakref.ref(x), state, first)
        mine = (assignment.followers if torch.is_grad_enabled() else followers).get(self, ())
        for layer in [layer for layer in mine if assignment.waiting.pop(layer, None)]:  # not called since the last time
            self._lyra_routed._forget(self, layer)
        together = [self, *(layer for layer in mine if layer._can_run_with(assignment, routing))]
        y, *others = self._run(together, x, assignment, routing, 0.0)
        assignment.waiting.update({layer: (self, x, state, y) for layer, y in zip(together[1:], others)})
        return y

    def _can_run_with(self, assignment: _Assignment, routing: LoraRouting) -> bool:
        prepared = self._prepared(assignment)
        return (
            prepared.bank is not None
            and prepared.bank.names == routing.names
            and not prepared.magnitudes
            and _is_plain(self.base_layer)
            and not (self._forward_pre_hooks or "forward" in vars(self))  # which may bring its weights
            and not (self.disable_adapters or self.merged_adapters)
            and not (self.training and any(prepared.dropouts.values()))
        )

    @staticmethod
    def _run(
        layers: list[_RoutedLinear], x: Tensor, assignment: _Assignment, routing: LoraRouting, dropout_p: float
    ) -> Sequence[Tensor]:
        # Past nn.Module.__getattr__, which takes a microsecond each time.
        weights = [layer._modules["base_layer"]._parameters for layer in layers]
        bases = [Base(of_base["weight"], of_base["bias"], None) for of_base in weights]
        banks = [assignment.prepared[layer].bank for layer in layers]
        return run_checked(x, bases, banks, routing, dropout_p, layers[0].training, None)

    def _prepared(self, assignment: _Assignment) -> _Prepared:
        prepared = assignment.prepared.get(self)
        if prepared is None or not prepared.holds(self.scaling):
            prepared = assignment.prepared[self] = self._prepare(assignment)
        return prepared

    def _prepare(self, assignment: _Assignment) -> _Prepared:
        """Raises for what cannot be routed; without a bank where the layer has none of the adapters."""
        present = [name for name in self.lora_A if name in assignment.names]
        for name in present:
            variant = type(self.lora_variant[name]) if name in self.lora_variant else DoraLinearVariant
            if variant is not DoraLinearVariant:
                raise ValueError(f"adapter {name!r}: got {variant.__name__}, expected plain LoRA or DoRA")
            if self.lora_B[name].bias is not None:
                raise ValueError(f"adapter {name!r}: got lora_bias=True, expected False")
        modules = [module for name in present for module in (self.lora_A[name], self.lora_B[name])]
        columns = {name: self.lora_magnitude_vector[name] for name in present if name in self.lora_variant}
        adapters = {n: (self.lora_A[n].weight, self.lora_B[n].weight, self.scaling[n]) for n in present}
        return _Prepared(
            sources=[(module._parameters, module.weight) for module in (*modules, *columns.values())],
            scaling=dict(self.scaling),
            bank=LoraBank.pack(adapters) if present else None,
            dropouts={name: getattr(self.lora_dropout[name], "p", 0.0) for name in present},
            magnitudes={name: module.weight for name, module in columns.items()},
        )


class _RoutedBlock:
    """A layer that transformers may checkpoint: it takes the routing along, so that its recomputation has it, too."""

    def __call__(self, *args: object, **kwargs: object) -> object:
        if self.gradient_checkpointing and self.training:
            kwargs["_lyra_assignment"] = self._lyra_routed._now
        return super().__call__(*args, **kwargs)

    def forward(self, *args: object, **kwargs: object) -> object:
        if "_lyra_assignment" not in kwargs:
            return super().forward(*args, **kwargs)
        with self._lyra_routed._using(kwargs.pop("_lyra_assignment")):
            return super().forward(*args, **kwargs)


@functools.cache
def _routed_class(before: type) -> type:
    return type(before.__name__, (_RoutedLinear if issubclass(before, BaseTunerLayer) else _RoutedBlock, before), {})


def _state_of(x: Tensor) -> tuple:
    """Differs where what was made of x would have to be made anew: x was written to, or graph or dtype would differ."""
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return x._version, x.requires_grad, torch.is_grad_enabled(), autocast


def _in_inference_mode() -> bool:
    """Tensors made in inference mode cannot be saved for backward, so none is kept for what comes after it."""
    return not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()


def _is_linear(layer: BaseTunerLayer) -> bool:
    if isinstance(layer, _RoutedLinear) or type(layer) is lora.Linear:
        return True
    return isinstance(layer, lora.LoraLayer) and type(layer).__name__ in QUANTISED


def _is_plain(base: nn.Module) -> bool:
    """Whether calling ``base`` is F.linear and nothing else: no hooks, offloading, sharding or packed weight."""
    hooked = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
    weight = base._parameters.get("weight")
    return type(base) is nn.Linear and type(weight) is nn.Parameter and "forward" not in vars(base) and not hooked


def modality_adapters(present: Mapping[str, Tensor], adapters: Mapping[frozenset[str], str | None]) -> list[str | None]:
    """The paper's M(x): which adapter the combination of modalities in each sample selects.

    >>> modality_adapters(
    ...     {"image": torch.tensor([[True, False], [False, False]]), "speech": torch.tensor([True, False])},
    ...     {frozenset(): None, frozenset({"image", "speech"}): "image+speech"},
    ... )
    ['image+speech', None]

    Args:
        present: per modality a bool tensor (B, L), which tokens are of it, or (B,), which samples hold it.
        adapters: name of the adapter (None: the base model) by combination.

    Returns a name per sample, for `RoutedLora.route`. Raises ValueError for a combination without an adapter and for
    modalities of different batch sizes; TypeError for what is no mask and for keys that are no frozenset.

    Source: Lyra (arXiv 2412.09501), section 3.2.
    """
    for key in adapters:
        if not isinstance(key, frozenset):
            raise TypeError(f"adapters: got the key {key!r:.80}, expected a frozenset of modalities")
    found = {}
    for name, mask in present.items():
        check_tensor(f"present[{name!r}]", mask, dtypes=(torch.bool,))
        if mask.ndim not in (1, 2):
            raise ValueError(f"present[{name!r}]: got shape {tuple(mask.shape)}, expected (B,) or (B, L)")
        found[name] = (mask if mask.ndim == 1 else mask.any(dim=1)).tolist()
    sizes = {name: len(samples) for name, samples in found.items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"present: got batch sizes {sizes}, expected one or more modalities of the same")
    chosen = []
    for sample in range(next(iter(sizes.values()))):
        combination = frozenset(name for name, samples in found.items() if samples[sample])
        if combination not in adapters:
            known = ", ".join("+".join(sorted(key)) or "text alone" for key in adapters)
            got = "+".join(sorted(combination)) or "text alone"
            raise ValueError(f"adapters: got none for sample {sample} of {got}, expected one of {known}")
        chosen.append(adapters[combination])
    return chosen
