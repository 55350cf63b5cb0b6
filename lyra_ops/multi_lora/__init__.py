"""A linear layer whose low-rank adapter is chosen per token (the paper's multi-modality LoRA).

bank = LoraBank.pack({"image": (A_i, B_i, 2.0), "speech": (A_s, B_s, 0.5)})     # one per layer
routing = LoraRouting(adapter_ids, bank)                                        # one per step, for all layers
y = multi_lora_linear(x, weight, bank, routing)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor

from lyra_ops._backend import choose
from lyra_ops._checks import FLOAT_DTYPES, INT_DTYPES, check_tensor, readable
from lyra_ops.multi_lora import cpu, reference

MAX_RANK = 512


@dataclass(frozen=True, eq=False)
class LoraBank:
    """The adapters of one linear layer, row after row without padding to a common rank. Made by `LoraBank.pack`.

    R is the sum of the ranks, E the number of adapters; adapter e is the e-th name.

    a        (R, K)  the A matrices, one below the other
    b        (R, N)  the transposed B matrices, one below the other
    owner    (R,) int32: the adapter that each row belongs to
    scaling  (R,) float32 (float64 for float64 adapters): the scaling of that adapter
    names    E names; a token's adapter id is a place in this tuple
    ranks    E ranks
    scalings E scalings

    The bank holds no parameters: it is made from them, so gradients flow back to each adapter's own A and B wherever
    these live (peft modules, say), and saving, merging and optimizers know nothing of it. Pack anew after the adapters
    changed; while they are frozen, pack once.
    """

    a: Tensor
    b: Tensor
    owner: Tensor
    scaling: Tensor
    names: tuple[str, ...]
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]

    @classmethod
    def pack(cls, adapters: Mapping[str, tuple[Tensor, Tensor, float]]) -> LoraBank:
        """Packs {name: (A, B, scaling)} with A (r, K) and B (N, r), as peft keeps lora_A.weight and lora_B.weight.

        Ranks r may differ, 1 to 512; scaling is a number (alpha / r, or alpha / sqrt(r) for rslora). All adapters share
        K, N, the floating dtype and the device; they may be strided views. Differentiable; no device sync.

        Raises TypeError or ValueError that names the adapter.
        """
        if not isinstance(adapters, Mapping):
            raise TypeError(f"adapters: got {type(adapters).__name__}, expected a dict of name: (A, B, scaling)")
        if not adapters:
            raise ValueError("adapters: got none, expected at least one")
        first = None
        for name, adapter in adapters.items():
            checked = _check_adapter(name, adapter, first)
            first = first or checked
        a, b, scalings = zip(*adapters.values())
        ranks, scalings = tuple(t.shape[0] for t in a), tuple(float(s) for s in scalings)
        wide = torch.promote_types(a[0].dtype, torch.float32)
        # Filled on the device: a table copied from the host would make the host wait at every step of a training.
        owner = [a[0].new_full((rank,), e, dtype=torch.int32) for e, rank in enumerate(ranks)]
        scaling = [a[0].new_full((rank,), s, dtype=wide) for rank, s in zip(ranks, scalings)]
        return cls(
            a=torch.cat(a),
            b=torch.cat([t.T for t in b]),
            owner=torch.cat(owner),
            scaling=torch.cat(scaling),
            names=tuple(adapters),
            ranks=ranks,
            scalings=scalings,
        )


class BankKeeper:
    """Packs the adapters of a layer, and packs frozen ones again only when one of them has changed.

    What has changed is told from where a tensor lies, its dtype and its version: optimizers, load_state_dict, ``.to()``
    and swapped tensors are seen, but not what is written through ``.data`` into the same memory.
    """

    def __init__(self) -> None:
        self._kept: tuple[object, LoraBank, list[Tensor]] | None = None

    def bank(self, adapters: Mapping[str, tuple[Tensor, Tensor, float]]) -> LoraBank:
        """`LoraBank.pack`, or what it returned before; while gradients are wanted always the former."""
        weights = [t for a, b, _ in adapters.values() for t in (a, b)]
        trained = torch.is_grad_enabled() and any(t.requires_grad for t in weights)
        # Inference tensors have no version.
        if trained or torch.compiler.is_compiling() or any(t.is_inference() for t in weights):
            return LoraBank.pack(adapters)
        key = (
            torch.is_inference_mode_enabled(),  # what is packed there cannot be used with autograd later
            [(name, scaling) for name, (_, _, scaling) in adapters.items()],
            [(t.data_ptr(), t.device, t.dtype, t.shape, t.stride(), t._version) for t in weights],
        )
        if self._kept is None or self._kept[0] != key:
            # The aliases keep the memory taken, so that nothing new can lie where the key says these did.
            self._kept = (key, LoraBank.pack(adapters), [t.detach() for t in weights])
        return self._kept[1]

    def __deepcopy__(self, memo: dict) -> BankKeeper:
        return BankKeeper()

    def __reduce__(self) -> tuple:
        return BankKeeper, ()


class LoraRouting:
    """Which adapter each token goes through: one for all layers of a step.

    adapter_ids  (T,) or (B, L), int64 or int32: places in ``bank.names``; -1: the base layer alone
    bank         one bank of the adapters; the banks of other layers, whatever their ranks, serve with the same routing
                 if they have the same names in the same order

    Built without a device sync. Raises ValueError for an id out of range on the CPU; on a GPU such a token gets the
    base layer alone. Raises TypeError for anything that is no integer tensor.
    """

    def __init__(self, adapter_ids: Tensor, bank: LoraBank) -> None:
        if not isinstance(bank, LoraBank):
            raise TypeError(f"bank: got {type(bank).__name__}, expected a LoraBank")
        shape = ("B", "L") if isinstance(adapter_ids, Tensor) and adapter_ids.ndim == 2 else ("T",)
        check_tensor("adapter_ids", adapter_ids, shape=shape, dtypes=INT_DTYPES, device=bank.a.device)
        if readable(adapter_ids):
            bad = (adapter_ids < -1) | (adapter_ids >= len(bank.names))
            if bool(bad.any()):
                at = tuple(bad.nonzero()[0].tolist())
                known = ", ".join(f"{e} = {name}" for e, name in enumerate(bank.names))
                raise ValueError(
                    f"adapter_ids: got {int(adapter_ids[at])} at {at}, expected -1 (base alone) or one of {known}"
                )
        self.adapter_ids = adapter_ids
        self.names = bank.names
        self.plan = cpu.Plan(adapter_ids, len(bank.names)) if readable(adapter_ids) else None


def multi_lora_linear(
    x: Tensor,
    weight: Tensor,
    bank: LoraBank,
    routing: LoraRouting,
    bias: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    training: bool = False,
    backend: str | None = None,
) -> Tensor:
    """The linear layer plus, for each token, the adapter that the routing gives it.

        y_t = W x_t + bias + s_a B_a A_a dropout(x_t),    a = adapter_ids[t];    y_t = W x_t + bias where a = -1

    x          (T, K) or (B, L, K) floating point, any strides; (B, L) ids serve (B L, K) too
    weight     (N, K), dtype of x unless autocast is on
    bank       adapters (r, K) and (N, r) of any floating dtype. They are rounded to the dtype of y where they are used:
               float32 master adapters train beside a 16-bit layer, and no activation is widened for them.
    routing    ids for the tokens of x
    bias       (N,), dtype of weight
    dropout_p  probability, from 0 to 1, of dropping an element of x on its way into the adapter, with inverse scaling;
               only if ``training``. As in peft the base layer sees all of x.

    Returns y (T, N) or (B, L, N) in the dtype of torch.nn.functional.linear(x, weight). Differentiable in x, A, B, and
    in weight and bias where they require grad. Adapters without tokens get zero gradients, not None, so that no rank of
    a data-parallel group waits for another. Deterministic: the same bits from run to run. A token in another batch gets
    the same bits only if the matrix product of torch gives them, which it does not promise.

    ``backend``: None chooses; "cpu" multiplies each adapter with its own tokens, "reference" all adapters with all
    tokens, everywhere and under torch.compile.

    Raises TypeError or ValueError for arguments that do not fit together.

    Source: Lyra (ICCV 2025), section 3.2, whose code switches one adapter per request; peft's LoRA layer (the same sum,
    with ``adapter_names`` per sample, in inference only).
    """
    _check_x(x)
    dtypes = FLOAT_DTYPES if torch.is_autocast_enabled(x.device.type) else (x.dtype,)
    check_tensor("weight", weight, shape=("N", x.shape[-1]), dtypes=dtypes, device=x.device)
    if bias is not None:
        check_tensor("bias", bias, shape=(weight.shape[0],), dtypes=(weight.dtype,), device=x.device)
    _check_adapters(x, weight.shape[0], bank, routing, dropout_p)
    backend = _choose(x, routing, backend)
    return _add(F.linear(x, weight, bias), x, bank, routing, dropout_p if training else 0.0, backend)


def add_adapters(
    y: Tensor,
    x: Tensor,
    bank: LoraBank,
    routing: LoraRouting,
    *,
    dropout_p: float = 0.0,
    training: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Adds the adapters' part of `multi_lora_linear` to y, in place: for base layers that have a forward of their own.

    y (T, N) or (B, L, N), what the base layer made of x; the other arguments, and the errors, are those of
    `multi_lora_linear`. Returns y.
    """
    _check_x(x)
    check_tensor("y", y, shape=(*x.shape[:-1], "N"), dtypes=FLOAT_DTYPES, device=x.device)
    _check_adapters(x, y.shape[-1], bank, routing, dropout_p)
    return _add(y, x, bank, routing, dropout_p if training else 0.0, _choose(x, routing, backend))


def _add(y: Tensor, x: Tensor, bank: LoraBank, routing: LoraRouting, dropout_p: float, backend: str) -> Tensor:
    # Two dimensions, because batched matrix products of a strided x are many times slower.
    tokens = (y.flatten(0, -2), x.flatten(0, -2), bank.a, bank.b, bank.owner, bank.scaling)
    ids = routing.adapter_ids.flatten()
    if backend == "cpu":
        done = cpu.add_adapters(*tokens, bank.ranks, bank.scalings, ids, routing.plan, dropout_p)
    else:
        done = reference.add_adapters(*tokens, ids, dropout_p)
    return done.view(y.shape)


def _check_adapter(name: object, adapter: object, like: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Checks one adapter, and that it fits ``like``, the A and B of the first one; returns its own A and B."""
    if not isinstance(name, str):
        raise TypeError(f"adapters: got the name {name!r}, expected a str")
    if not isinstance(adapter, (tuple, list)) or len(adapter) != 3:
        raise TypeError(f"adapters[{name!r}]: got {adapter!r:.80}, expected (A, B, scaling)")
    a, b, scaling = adapter
    like_a, like_b = like or (a, b)
    of = f"of adapter {name!r}"
    check_tensor(f"A {of}", a, shape=("r", "K"), dtypes=FLOAT_DTYPES)
    rank = a.shape[0]
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(f"A {of}: got rank {rank}, expected 1 to {MAX_RANK}")
    check_tensor(f"B {of}", b, shape=("N", rank), dtypes=(a.dtype,), device=a.device)
    check_tensor(f"A {of}", a, shape=("r", like_a.shape[1]), dtypes=(like_a.dtype,), device=like_a.device)
    check_tensor(f"B {of}", b, shape=(like_b.shape[0], rank))
    if isinstance(scaling, bool) or not isinstance(scaling, Real):
        raise TypeError(f"scaling {of}: got {type(scaling).__name__}, expected a number")
    if not abs(scaling) < math.inf:
        raise ValueError(f"scaling {of}: got {scaling}, expected a finite number")
    return a, b


def _choose(x: Tensor, routing: LoraRouting, backend: str | None) -> str:
    if x.device.type != "cpu":
        why_not_cpu = f"the tensors are on {x.device.type}"
    elif torch.compiler.is_compiling() or routing.plan is None:
        why_not_cpu = "the sizes of its products depend on the ids, which torch.compile cannot know"
    else:
        why_not_cpu = None
    return choose("multi_lora_linear", {"cpu": why_not_cpu, "reference": None}, backend)


def _check_x(x: object) -> None:
    check_tensor("x", x, dtypes=FLOAT_DTYPES)
    if x.ndim not in (2, 3):
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (T, K) or (B, L, K)")


def _check_adapters(x: Tensor, outputs: int, bank: object, routing: object, dropout_p: object) -> None:
    if not isinstance(bank, LoraBank):
        raise TypeError(f"bank: got {type(bank).__name__}, expected a LoraBank")
    if not isinstance(routing, LoraRouting):
        raise TypeError(f"routing: got {type(routing).__name__}, expected a LoraRouting")
    check_tensor("bank.a", bank.a, shape=("R", x.shape[-1]), device=x.device)
    check_tensor("bank.b", bank.b, shape=("R", outputs))
    if routing.names != bank.names:
        got, expected = ", ".join(routing.names), ", ".join(bank.names)
        raise ValueError(f"routing: got one for the adapters {got}, expected the bank's: {expected}")
    ids = routing.adapter_ids
    if ids.device != x.device:
        raise ValueError(f"routing: got adapter_ids on {ids.device}, expected {x.device}")
    tokens, shape = tuple(x.shape[:-1]), tuple(ids.shape)
    # Flattened tokens fit as well, but never (L, B) to (B, L).
    if tokens != shape and tokens != (ids.numel(),):
        raise ValueError(f"routing: got adapter_ids of shape {shape}, expected {tokens} as x has")
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, Real):
        raise TypeError(f"dropout_p: got {type(dropout_p).__name__}, expected a number")
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p: got {dropout_p}, expected 0 to 1")
