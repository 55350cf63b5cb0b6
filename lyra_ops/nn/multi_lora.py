"""A linear layer with several adapters, for models that do not use peft."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lyra_ops._checks import FLOAT_DTYPES
from lyra_ops.multi_lora import BankKeeper, LoraBank, LoraRouting, check_dropout, multi_lora_linear


class MultiLoraLinear(nn.Module):
    """A frozen nn.Linear with adapters that are chosen per token (`lyra_ops.multi_lora_linear`).

        layer = MultiLoraLinear(nn.Linear(512, 256), {"image": (16, 2.0), "speech": (64, 0.25)})
        y = layer(x, LoraRouting(ids, layer.bank()))        # one routing serves all layers with these adapters

    base       the layer that is adapted. It is taken as it is, and its weight and bias are frozen.
    adapters   {name: (rank, scaling)}; rank 1 to 512; scaling is alpha / rank, or alpha / sqrt(rank) for rslora. Names
               hold no dot, since they stand in the keys of the state dict: ``lora_A.<name>`` (rank, K) and
               ``lora_B.<name>`` (N, rank) beside ``base.weight`` (N, K).
    dropout_p  probability of dropping an element of x on its way into the adapters while the module is in training
    dtype      of the adapters, a floating one; None: that of the base layer. float32 adapters train beside a 16-bit
               layer, and no activation is widened for them.

    A new adapter changes nothing: as in peft, A is drawn from U(-1/sqrt(K), 1/sqrt(K)) and B is zero.

    Raises TypeError or ValueError that names the argument; unfit ranks and scalings when the layer is made.
    """

    def __init__(
        self,
        base: nn.Linear,
        adapters: Mapping[str, tuple[int, float]],
        *,
        dropout_p: float = 0.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(base, nn.Linear):
            raise TypeError(f"base: got {type(base).__name__}, expected a torch.nn.Linear")
        if not isinstance(adapters, Mapping):
            raise TypeError(f"adapters: got {type(adapters).__name__}, expected a dict of name: (rank, scaling)")
        if dtype is not None and dtype not in FLOAT_DTYPES:
            raise TypeError(f"dtype: got {dtype!r}, expected a floating torch.dtype")
        check_dropout(dropout_p)
        self.base = base.requires_grad_(False)
        self.dropout_p = dropout_p
        self.scaling: dict[str, float] = {}
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        like = {"device": base.weight.device, "dtype": dtype or base.weight.dtype}
        for name, adapter in adapters.items():
            if not isinstance(name, str) or not name or "." in name:
                raise ValueError(f"adapters: got the name {name!r}, expected a str without a dot")
            if hasattr(self.lora_A, name):
                raise ValueError(f"adapters: got the name {name!r}, which torch.nn.ParameterDict uses itself")
            if not isinstance(adapter, (tuple, list)) or len(adapter) != 2:
                raise TypeError(f"adapters[{name!r}]: got {adapter!r:.80}, expected (rank, scaling)")
            rank, self.scaling[name] = adapter
            if isinstance(rank, bool) or not isinstance(rank, int):
                raise TypeError(f"rank of adapter {name!r}: got {type(rank).__name__}, expected an int")
            if rank < 1:
                raise ValueError(f"rank of adapter {name!r}: got {rank}, expected 1 or more")
            self.lora_A[name] = nn.Parameter(torch.empty(rank, base.in_features, **like))
            self.lora_B[name] = nn.Parameter(torch.zeros(base.out_features, rank, **like))
        self._keeper = BankKeeper()
        self.reset_parameters()
        self.bank()  # says what is wrong with the ranks and scalings

    def reset_parameters(self) -> None:
        """Draws the adapters anew; the base layer stays."""
        for name, a in self.lora_A.items():
            nn.init.uniform_(a, -1 / math.sqrt(a.shape[1]), 1 / math.sqrt(a.shape[1]))
            nn.init.zeros_(self.lora_B[name])

    def bank(self) -> LoraBank:
        """The adapters as they are now: what a `LoraRouting` is made with."""
        return self._keeper.bank({name: (a, self.lora_B[name], self.scaling[name]) for name, a in self.lora_A.items()})

    def forward(self, x: Tensor, routing: LoraRouting) -> Tensor:
        """x (T, K) or (B, L, K), and the ids of its tokens; returns y (T, N) or (B, L, N)."""
        return multi_lora_linear(
            x, self.base.weight, self.bank(), routing, self.base.bias, dropout_p=self.dropout_p, training=self.training
        )

    def extra_repr(self) -> str:
        adapters = {name: (a.shape[0], self.scaling[name]) for name, a in self.lora_A.items()}
        return f"adapters={adapters}, dropout_p={self.dropout_p}"
