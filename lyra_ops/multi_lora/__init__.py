"""A linear layer whose low-rank adapter is chosen per token (the paper's multi-modality LoRA).

bank = LoraBank.pack({"image": (A_i, B_i, 2.0), "speech": (A_s, B_s, 0.5)})     # one per layer
routing = LoraRouting(adapter_ids, bank)                                        # one per step, for all layers
y = multi_lora_linear(x, weight, bank, routing)
q, k, v = multi_lora_linears(x, (wq, wk, wv), (bank_q, bank_k, bank_v), routing)   # layers with one input
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor, nn

from lyra_ops._backend import choose, missing_kernel
from lyra_ops._checks import FLOAT_DTYPES, INT_DTYPES, check_tensor, readable
from lyra_ops.multi_lora import cpu, decode, dropout, few, fused, reference
from lyra_ops.multi_lora.bank import BankKeeper, LoraBank
from lyra_ops.multi_lora.function import Base, Call, linears
from lyra_ops.multi_lora.plan import Plan

__all__ = ["BankKeeper", "LoraBank", "LoraRouting", "add_adapters", "multi_lora_linear", "multi_lora_linears"]


class LoraRouting:
    """Which adapters each token goes through: one routing for all layers of a step.

    adapter_ids  (T,) or (B, L), int64 or int32: places in ``bank.names``; -1: the base layer alone
    bank         one bank of the adapters; the banks of other layers, whatever their ranks, serve with the same routing
                 if they have the same names in the same order
    weights      None: each token goes through one adapter. Else floating point of the shape of adapter_ids, which is
                 then (T, S) or (B, L, S): each token goes through the sum of S adapters, each with its weight. They may
                 require grad.

    Built without a device sync. Raises ValueError for an id out of range on the CPU; on a GPU such a token gets the
    base layer alone. Raises TypeError for ids that are no integer tensor.
    """

    def __init__(self, adapter_ids: Tensor, bank: LoraBank, weights: Tensor | None = None) -> None:
        if not isinstance(bank, LoraBank):
            raise TypeError(f"bank: got {type(bank).__name__}, expected a LoraBank")
        shape = check_ids("adapter_ids", adapter_ids, weights, bank.adapters[0][0].device)
        if readable(adapter_ids):
            bad = (adapter_ids < -1) | (adapter_ids >= len(bank.names))
            if bool(bad.any()):
                at = tuple(bad.nonzero()[0].tolist())
                known = ", ".join(f"{e} = {name}" for e, name in enumerate(bank.names))
                raise ValueError(
                    f"adapter_ids: got {int(adapter_ids[at])} at {at}, expected -1 (base alone) or one of {known}"
                )
        self.adapter_ids = adapter_ids
        self.weights = weights
        self.names = bank.names
        self.shape = shape
        self.pairs = adapter_ids.flatten()[:, None] if weights is None else adapter_ids.flatten(0, -2)
        self.blocks = cpu.plan(self.pairs) if readable(adapter_ids) else None
        self.few = self.blocks is not None and few.fits(self.pairs, self.blocks)
        self._plan: Plan | None = None
        self._counters: Tensor | None = None

    def plan(self) -> Plan:
        """What the kernels of `fused` read, made at the first call."""
        if self._plan is None:
            self._plan = fused.plan(self.pairs, len(self.names))
        return self._plan

    def counters(self) -> Tensor:
        """What the warps of a launch of `decode` count in, zero between two: one launch at a time."""
        if self._counters is None:
            self._counters = self.pairs.new_zeros(3, dtype=torch.int32)
        return self._counters


def check_ids(argument: str, ids: object, weights: object, device: torch.device | None = None) -> torch.Size:
    """The shape of the tokens of ids (T,) or (B, L), or, beside weights of their shape, (T, S) or (B, L, S)."""
    check_tensor(argument, ids, dtypes=INT_DTYPES, device=device)
    shape = ids.shape if weights is None else ids.shape[:-1]
    if len(shape) not in (1, 2):
        known = "(T,) or (B, L); with weights (T, S) or (B, L, S)"
        expected = known if weights is None else "(T, S) or (B, L, S) beside weights"
        raise ValueError(f"{argument}: got shape {tuple(ids.shape)}, expected {expected}")
    if weights is not None:
        check_tensor("weights", weights, shape=ids.shape, dtypes=FLOAT_DTYPES, device=device)
    return shape


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

    and with weights w_t1 .. w_tS the sum over a = adapter_ids[t, i] of w_ti times the third term.

    x          (T, K) or (B, L, K) floating point, any strides; (B, L) ids serve (B L, K) too
    weight     (N, K), dtype of x unless autocast is on
    bank       adapters (r, K) and (N, r) of any floating dtype. They are rounded to the dtype of y where they are used:
               float32 master adapters train beside a 16-bit layer, and no activation is widened for them.
    routing    ids for the tokens of x
    bias       (N,), dtype of weight
    dropout_p  probability, from 0 to 1, of dropping an element of x on its way into the adapters, with inverse scaling;
               only if ``training``. As in peft the base layer sees all of x. The probability is rounded to a multiple
               of 2^-16; the mask is drawn from torch's generator, is the same for the adapters of one token, and is not
               stored but computed again in the backward pass.

    Returns y (T, N) or (B, L, N) in the dtype of torch.nn.functional.linear(x, weight). Differentiable in x, A, B, and
    in weight, bias and the routing's weights where they require grad. Adapters without tokens get zero gradients, not
    None, so that no rank of a data-parallel group waits for another. Deterministic: the same bits from run to run. A
    token in another batch gets the same bits only if the matrix product of torch gives them, which it does not promise.

    ``backend``: None chooses; "cuda" and "triton" are three kernels around the product of the base layer, for all
    floating dtypes but float64; with "cuda" up to 16 tokens of 16 bits without a graph take one launch, product and
    all, for which a routing serves one stream at a time; "cpu" multiplies each adapter with its own tokens; "reference"
    all adapters with all tokens, on any device, and on a CPU under torch.compile.

    Raises TypeError or ValueError for arguments that do not fit together.

    Source: Lyra (ICCV 2025), section 3.2, whose code switches one adapter per request; peft's LoRA layer (the same sum,
    with ``adapter_names`` per sample, in inference only).
    """
    if not _fit(x, weight, bias, bank, routing, dropout_p):
        _check_x(x)
        _check_base(x, weight, bias, "weight", "bias")
        _check_adapters(x, weight.shape[0], bank, routing, dropout_p)
    return run_checked(x, (Base(weight, bias, None),), (bank,), routing, dropout_p, training, backend)[0]


def multi_lora_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    banks: Sequence[LoraBank],
    routing: LoraRouting,
    biases: Sequence[Tensor | None] | None = None,
    *,
    dropout_p: float = 0.0,
    training: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """`multi_lora_linear` for several layers with one input (q, k and v; gate and up), which then is read once.

    Layer j has ``weights[j]`` (N_j, K), ``banks[j]`` and ``biases[j]``; the other arguments and the errors are those of
    `multi_lora_linear`. Returns a tuple of y_j. The layers share one dropout mask.
    """
    weights, banks = list(weights), list(banks)
    biases = [None] * len(weights) if biases is None else list(biases)
    for name, given in (("banks", banks), ("biases", biases)):
        if len(given) != len(weights):
            raise ValueError(f"{name}: got {len(given)}, expected one for each of the {len(weights)} weights")
    if not weights:
        raise ValueError("weights: got none, expected at least one")
    _check_x(x)
    for j, (weight, bias, bank) in enumerate(zip(weights, biases, banks)):
        _check_base(x, weight, bias, f"weights[{j}]", f"biases[{j}]")
        _check_adapters(x, weight.shape[0], bank, routing, dropout_p)
    bases = [Base(weight, bias, None) for weight, bias in zip(weights, biases)]
    return tuple(run_checked(x, bases, banks, routing, dropout_p, training, backend))


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
    """y plus the adapters' part of `multi_lora_linear`: for base layers that have a forward of their own.

    y (T, N) or (B, L, N), what the base layer made of x; it is used up, since the sum takes its memory where it can.
    The other arguments, and the errors, are those of `multi_lora_linear`.
    """
    _check_x(x)
    check_tensor("y", y, shape=(*x.shape[:-1], "N"), dtypes=FLOAT_DTYPES, device=x.device)
    _check_adapters(x, y.shape[-1], bank, routing, dropout_p)
    # torch.compile cannot ask for views; what it makes of the copy is up to it.
    if not y.is_contiguous() or (y.requires_grad and (torch.compiler.is_compiling() or y._is_view())):
        y = y.clone(memory_format=torch.contiguous_format)
    return run_checked(x, (Base(None, None, y),), (bank,), routing, dropout_p, training, backend)[0]


def run_checked(
    x: Tensor,
    bases: Sequence[Base],
    banks: Sequence[LoraBank],
    routing: LoraRouting,
    dropout_p: float,
    training: bool,
    backend: str | None,
) -> Sequence[Tensor]:
    """y of each base layer and its bank, for arguments that are known to fit together."""
    # Autocast's dtype, and two dimensions, because batched matrix products of a strided x are many times slower.
    dtype = bases[0].y.dtype if bases[0].weight is None else _dtype_of_linear(x)
    backend = _choose(x, dtype, routing, backend)
    drop = dropout.units(dropout_p) if training else 0
    seed = dropout.new_seed(x.device) if drop else None
    tokens = x if x.ndim == 2 else x.flatten(0, -2)
    tokens = tokens if x.dtype == dtype else tokens.to(dtype)
    weights = routing.weights
    if weights is not None:
        weights = weights.flatten(0, -2).to(torch.promote_types(dtype, torch.float32)).contiguous()
    if backend == "cpu" and few.takes(routing, dtype):
        ys = linears(Call(few, banks, routing, seed, drop), tokens, weights, bases)
    elif backend == "cpu":
        ys = cpu.linears(Call(cpu, banks, routing, seed, drop), tokens, weights, bases)
    elif backend == "reference":
        if torch.is_grad_enabled() and any(bank.sums for bank in banks):
            raise ValueError("bank: got one that accumulates its gradients, which the backend 'reference' cannot")
        ys = []
        for base, bank in zip(bases, banks):
            y = base(tokens) if base.y is None else base.y.flatten(0, -2)
            ys.append(reference.add_adapters(y, tokens, bank.rows(dtype), routing.pairs, weights, seed, drop))
    elif backend == "cuda" and decode.takes(tokens, bases, seed):
        ys = decode.linears(bases, banks, routing, tokens, weights)
    else:
        ys = linears(Call(fused.engine(backend), banks, routing, seed, drop), tokens, weights, bases)
    return ys if x.ndim == 2 else [y.view(*x.shape[:-1], y.shape[-1]) for y in ys]


def _dtype_of_linear(x: Tensor) -> torch.dtype:
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _choose(x: Tensor, dtype: torch.dtype, routing: LoraRouting, backend: str | None) -> str:
    if backend is None and x.is_cpu and routing.blocks is not None and not torch.compiler.is_compiling():
        return choose("multi_lora_linear", ON_CPU, None)
    device, why_not = x.device.type, {"cuda": None, "triton": None, "cpu": None, "reference": None}
    if device != "cpu":
        why_not["cpu"] = f"the tensors are on {device}"
    elif torch.compiler.is_compiling() or routing.blocks is None:
        why_not["cpu"] = "the sizes of its products depend on the ids, which torch.compile cannot know"
    if device != "cuda":
        why_not["cuda"] = why_not["triton"] = f"the tensors are on {device}"
    elif dtype == torch.float64:
        why_not["cuda"] = why_not["triton"] = "it does not compute in float64"
    else:
        why_not["cuda"] = missing_kernel("multi_lora_shrink_", "cuda")
        why_not["triton"] = fused.triton_missing()
    if backend == "triton" and fused.INTERPRETED:  # on any device, but only for who asks for it
        why_not["triton"] = fused.triton_missing()
    return choose("multi_lora_linear", why_not, backend)


ON_CPU = {"cpu": None}


def _fit(x, weight, bias, bank, routing, dropout_p) -> bool:
    """Whether the arguments are what they are nearly always; if not, the checks say what is wrong, if anything is.

    At one token the checks would take a tenth of the call.
    """
    if not (
        type(bank) is LoraBank and type(routing) is LoraRouting and type(x) is Tensor and isinstance(weight, Tensor)
    ):
        return False
    (a, b), shape, dtype = bank.adapters[0], x.shape, x.dtype
    return (
        (shape[:-1] == routing.shape or (len(shape) == 2 and shape[0] == len(routing.pairs)))
        and weight.ndim == 2
        and weight.shape[1] == shape[-1] == a.shape[1]
        and weight.shape[0] == b.shape[0]
        and dtype == weight.dtype
        and dtype in FLOAT_DTYPES
        and x.is_cpu
        and weight.is_cpu
        and a.is_cpu
        and routing.blocks is not None
        and routing.names == bank.names
        and (bias is None or (type(bias) is nn.Parameter and bias.is_cpu and bias.dtype == dtype
                              and bias.shape == weight.shape[:1]))
        and dropout_p == 0.0
    )  # fmt: skip


def _check_x(x: object) -> None:
    check_tensor("x", x, dtypes=FLOAT_DTYPES)
    if x.ndim not in (2, 3):
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (T, K) or (B, L, K)")


def _check_base(x: Tensor, weight: object, bias: object, weight_name: str, bias_name: str) -> None:
    dtypes = FLOAT_DTYPES if torch.is_autocast_enabled(x.device.type) else (x.dtype,)
    check_tensor(weight_name, weight, shape=("N", x.shape[-1]), dtypes=dtypes, device=x.device)
    if bias is not None:
        check_tensor(bias_name, bias, shape=(weight.shape[0],), dtypes=(weight.dtype,), device=x.device)


def _check_adapters(x: Tensor, outputs: int, bank: object, routing: object, dropout_p: object) -> None:
    if not isinstance(bank, LoraBank):
        raise TypeError(f"bank: got {type(bank).__name__}, expected a LoraBank")
    if not isinstance(routing, LoraRouting):
        raise TypeError(f"routing: got {type(routing).__name__}, expected a LoraRouting")
    a, b = bank.adapters[0]
    check_tensor("bank's A", a, shape=("r", x.shape[-1]), device=x.device)
    check_tensor("bank's B", b, shape=(outputs, "r"))
    if routing.names != bank.names:
        got, expected = ", ".join(routing.names), ", ".join(bank.names)
        raise ValueError(f"routing: got one for the adapters {got}, expected the bank's: {expected}")
    if routing.pairs.device != x.device:
        raise ValueError(f"routing: got adapter_ids on {routing.pairs.device}, expected {x.device}")
    tokens = tuple(x.shape[:-1])
    # Flattened tokens fit as well, but never (L, B) to (B, L).
    if tokens != routing.shape and tokens != (len(routing.pairs),):
        raise ValueError(f"routing: got adapter_ids for tokens {tuple(routing.shape)}, expected {tokens} as x has")
    check_dropout(dropout_p)


def check_dropout(dropout_p: object) -> None:
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, Real):
        raise TypeError(f"dropout_p: got {type(dropout_p).__name__}, expected a number")
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p: got {dropout_p}, expected 0 to 1")
