"""What LoraBank, LoraRouting, multi_lora_linear and multi_lora_linears say of bad input."""

from __future__ import annotations

import math
import re

import pytest
import torch

from lyra_ops import LoraBank, LoraRouting, multi_lora_linear, multi_lora_linears

A, B = torch.zeros(2, 4), torch.zeros(3, 2)
PACK_ERRORS = {
    "adapters: got list, expected a dict": [("a", (A, B, 1.0))],
    "adapters: got none, expected at least one": {},
    "adapters: got the name 0, expected a str": {0: (A, B, 1.0)},
    "adapters['a']: got ": {"a": (A, B)},
    "A of adapter 'a': got shape (4,), expected (r, K)": {"a": (A[0], B, 1.0)},
    "A of adapter 'a': got rank 0, expected 1 to 512": {"a": (A[:0], B[:, :0], 1.0)},
    "A of adapter 'a': got rank 513, expected 1 to 512": {"a": (torch.zeros(513, 4), torch.zeros(3, 513), 1.0)},
    "A of adapter 'a': got dtype int64": {"a": (A.long(), B, 1.0)},
    "B of adapter 'a': got shape (2, 3), expected (N, 2)": {"a": (A, B.T, 1.0)},
    "B of adapter 'a': got dtype float64, expected float32": {"a": (A, B.double(), 1.0)},
    "B of adapter 'a': got a tensor on meta, expected cpu": {"a": (A, B.to("meta"), 1.0)},
    "A of adapter 'b': got shape (2, 5), expected (r, 4)": {"a": (A, B, 1.0), "b": (torch.zeros(2, 5), B, 1.0)},
    "B of adapter 'b': got shape (7, 2), expected (3, 2)": {"a": (A, B, 1.0), "b": (A, torch.zeros(7, 2), 1.0)},
    "scaling of adapter 'a': got Tensor, expected a number": {"a": (A, B, torch.tensor(1.0))},
    "scaling of adapter 'a': got inf, expected a finite number": {"a": (A, B, math.inf)},
}


@pytest.mark.parametrize("message", PACK_ERRORS)
def test_pack_errors_name_the_adapter(message: str):
    with pytest.raises((ValueError, TypeError), match="^" + re.escape(message)):
        LoraBank.pack(PACK_ERRORS[message])


BANK = LoraBank.pack({"image": (A, B, 1.0), "speech": (A, B, 1.0)})
IDS = torch.zeros(2, 3, dtype=torch.int64)
ROUTING_ERRORS = {
    "adapter_ids: got 2 at (1, 2), expected -1 (base alone) or one of 0 = image, 1 = speech": (
        IDS + 2 * (torch.arange(6).view(2, 3) == 5),
        BANK,
    ),
    "adapter_ids: got -2 at (0,), expected -1": (torch.tensor([-2]), BANK),
    "adapter_ids: got dtype float32, expected int64 or int32": (IDS.float(), BANK),
    "adapter_ids: got shape (1, 2, 3), expected (T,) or (B, L); with weights (T, S) or (B, L, S)": (IDS[None], BANK),
    "adapter_ids: got list, expected a torch.Tensor": ([0], BANK),
    "adapter_ids: got a tensor on meta, expected cpu": (IDS.to("meta"), BANK),
    "bank: got dict, expected a LoraBank": (IDS, {}),
}


ROUTING_ERRORS |= {
    "weights: got shape (2, 3), expected (2, 3, 1)": (IDS[..., None], BANK, torch.ones(2, 3)),
    "weights: got dtype int64, expected float64": (IDS[..., None], BANK, IDS[..., None]),
    "adapter_ids: got shape (6,), expected (T, S) or (B, L, S) beside weights": (IDS.flatten(), BANK, torch.ones(6)),
}


@pytest.mark.parametrize("message", ROUTING_ERRORS)
def test_routing_errors_name_the_argument(message: str):
    with pytest.raises((ValueError, TypeError), match="^" + re.escape(message)):
        LoraRouting(*ROUTING_ERRORS[message])


X, W = torch.zeros(2, 3, 4), torch.zeros(3, 4)
ROUTING = LoraRouting(IDS, BANK)
OTHER = LoraRouting(IDS, LoraBank.pack({"speech": (A, B, 1.0)}))
LINEAR_ERRORS = {
    "x: got shape (4,), expected (T, K) or (B, L, K)": ((X[0, 0], W, BANK, ROUTING), {}),
    "x: got dtype int64": ((X.long(), W, BANK, ROUTING), {}),
    "weight: got shape (4, 3), expected (N, 4)": ((X, W.T, BANK, ROUTING), {}),
    "weight: got dtype bfloat16, expected float32": ((X, W.bfloat16(), BANK, ROUTING), {}),
    "bias: got shape (4,), expected (3,)": ((X, W, BANK, ROUTING, torch.zeros(4)), {}),
    "bias: got dtype bfloat16, expected float32": ((X, W, BANK, ROUTING, torch.zeros(3).bfloat16()), {}),
    "bank: got dict, expected a LoraBank": ((X, W, {}, ROUTING), {}),
    "bank's A: got shape (2, 4), expected (r, 5)": ((torch.zeros(2, 3, 5), torch.zeros(3, 5), BANK, ROUTING), {}),
    "bank's B: got shape (3, 2), expected (7, r)": ((X, torch.zeros(7, 4), BANK, ROUTING), {}),
    "routing: got Tensor, expected a LoraRouting": ((X, W, BANK, IDS), {}),
    "routing: got adapter_ids for tokens (2, 3), expected (3, 2) as x has": ((X.transpose(0, 1), W, BANK, ROUTING), {}),
    "routing: got adapter_ids for tokens (2, 3), expected (5,) as x has": ((torch.zeros(5, 4), W, BANK, ROUTING), {}),
    "routing: got one for the adapters speech, expected the bank's: image, speech": ((X, W, BANK, OTHER), {}),
    "dropout_p: got 1.5, expected 0 to 1": ((X, W, BANK, ROUTING), {"dropout_p": 1.5}),
    "dropout_p: got NoneType, expected a number": ((X, W, BANK, ROUTING), {"dropout_p": None}),
}


@pytest.mark.parametrize("message", LINEAR_ERRORS)
def test_linear_errors_name_the_argument(message: str):
    arguments, options = LINEAR_ERRORS[message]
    with pytest.raises((ValueError, TypeError), match="^" + re.escape(message)):
        multi_lora_linear(*arguments, **options)


LINEARS_ERRORS = {
    "banks: got 1, expected one for each of the 2 weights": ((X, (W, W), (BANK,), ROUTING), {}),
    "biases: got 1, expected one for each of the 2 weights": ((X, (W, W), (BANK, BANK), ROUTING, (None,)), {}),
    "weights: got none, expected at least one": ((X, (), (), ROUTING), {}),
    "weights[1]: got shape (4, 3), expected (N, 4)": ((X, (W, W.T), (BANK, BANK), ROUTING), {}),
    "biases[0]: got shape (4,), expected (3,)": ((X, (W,), (BANK,), ROUTING, (torch.zeros(4),)), {}),
}


@pytest.mark.parametrize("message", LINEARS_ERRORS)
def test_errors_of_layers_with_one_input_name_the_layer(message: str):
    arguments, options = LINEARS_ERRORS[message]
    with pytest.raises((ValueError, TypeError), match="^" + re.escape(message)):
        multi_lora_linears(*arguments, **options)
