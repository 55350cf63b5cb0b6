"""What soft_dtw says of bad input."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lyra_ops import soft_dtw, soft_dtw_from_cost


def cost_of(*shape: int, **kwargs) -> Tensor:
    return torch.zeros(shape, **kwargs)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: soft_dtw_from_cost([1.0]), TypeError, "cost: got list, expected a torch.Tensor"),
        (lambda: soft_dtw_from_cost(cost_of(3, 4)), ValueError, "cost: got shape (3, 4), expected (B, N, M)"),
        (lambda: soft_dtw_from_cost(cost_of(1, 3, 4, dtype=torch.int64)), TypeError, "cost: got dtype int64"),
        (lambda: soft_dtw_from_cost(cost_of(2, 3, 0)), ValueError, "cost's columns: sample 0 has length 0"),
        (
            lambda: soft_dtw_from_cost(cost_of(2, 3, 4), torch.tensor([3, 0])),
            ValueError,
            "x_lengths: sample 1 has length 0, expected 1 to 3",
        ),
        (
            lambda: soft_dtw_from_cost(cost_of(2, 3, 4), None, torch.tensor([5, 4])),
            ValueError,
            "y_lengths: sample 0 has length 5, expected 1 to 4",
        ),
        (lambda: soft_dtw_from_cost(cost_of(2, 3, 4), torch.tensor([3])), ValueError, "x_lengths: got shape (1,)"),
        (lambda: soft_dtw_from_cost(cost_of(1, 3, 4), torch.tensor([3.0])), TypeError, "x_lengths: got dtype float32"),
        (lambda: soft_dtw_from_cost(cost_of(1, 3, 4), ["3"]), TypeError, "x_lengths: got ['3'], expected a tensor or"),
        (
            lambda: soft_dtw_from_cost(cost_of(1, 3, 4).to_sparse()),
            TypeError,
            "cost: got layout sparse_coo, expected strided",
        ),
        (
            lambda: soft_dtw(torch.nested.nested_tensor([cost_of(3, 4)], layout=torch.jagged), cost_of(1, 3, 4)),
            TypeError,
            "x: got a nested tensor, expected a padded one",
        ),
        (
            lambda: soft_dtw(cost_of(2, 3, 4), cost_of(2, 3, 5)),
            ValueError,
            "y: got shape (2, 3, 5), expected (2, M, 4)",
        ),
        (lambda: soft_dtw(cost_of(2, 0, 4), cost_of(2, 3, 4)), ValueError, "x: sample 0 has length 0"),
        (
            lambda: soft_dtw(cost_of(1, 2, 2), cost_of(1, 2, 2), cost="l2"),
            ValueError,
            "cost: got 'l2', expected one of",
        ),
        (
            lambda: soft_dtw(cost_of(1, 2, 2), cost_of(1, 2, 2), temperature=0.5),
            ValueError,
            "temperature: got 0.5 with cost='sqeuclidean'",
        ),
        (
            lambda: soft_dtw(cost_of(1, 2, 2), cost_of(1, 2, 2), cost="contrastive", temperature=0.0),
            ValueError,
            "temperature: got 0.0",
        ),
        (
            lambda: soft_dtw(cost_of(1, 2, 2), cost_of(1, 2, 2), cost="contrastive", temperature=math.nan),
            ValueError,
            "temperature: got nan",
        ),
        (
            lambda: soft_dtw(cost_of(1, 2, 2), cost_of(1, 2, 2), cost="contrastive", temperature=torch.ones(())),
            TypeError,
            "temperature: got Tensor, expected a float",
        ),
        (lambda: soft_dtw_from_cost(cost_of(1, 2, 2), gamma=-1.0), ValueError, "gamma: got -1.0, expected 0 <= gamma"),
        (lambda: soft_dtw_from_cost(cost_of(1, 2, 2), gamma=math.nan), ValueError, "gamma: got nan"),
        (lambda: soft_dtw_from_cost(cost_of(1, 2, 2), gamma="1"), TypeError, "gamma: got str"),
        (lambda: soft_dtw_from_cost(cost_of(1, 2, 2), gamma=1e-320), ValueError, "gamma: got 1e-320, expected 0 or"),
        (lambda: soft_dtw_from_cost(cost_of(1, 2, 2), gamma=10**400), ValueError, "gamma: got 1000"),
        (
            lambda: soft_dtw_from_cost(cost_of(1, 2, 2), gamma=torch.tensor(math.inf)),
            ValueError,
            "gamma: got a tensor with",
        ),
        (lambda: soft_dtw_from_cost(cost_of(2, 2, 2), gamma=torch.ones(3)), ValueError, "gamma: got shape (3,)"),
        (lambda: soft_dtw_from_cost(cost_of(1, 2, 2), gamma=torch.zeros(1)), ValueError, "gamma: got a tensor with"),
        (lambda: soft_dtw_from_cost(cost_of(1, 2, 2), band=-1), ValueError, "band: got -1, expected >= 0"),
        (lambda: soft_dtw_from_cost(cost_of(1, 2, 2), band=0.5), TypeError, "band: got float"),
        (lambda: soft_dtw_from_cost(cost_of(1, 2, 2), band=2**63), ValueError, "band: got 9223372036854775808"),
        (lambda: soft_dtw_from_cost(cost_of(1, 2, 2), band=(1,)), ValueError, "band: got 1 entries"),
        (
            lambda: soft_dtw_from_cost(cost_of(1, 2, 2), band=(torch.zeros(2, dtype=torch.int64),) * 2),
            ValueError,
            "band[0]: got shape (2,), expected (1, 2)",
        ),
        (lambda: soft_dtw_from_cost(cost_of(1, 2, 2), drop_cost=math.nan), ValueError, "drop_cost: got nan"),
        (lambda: soft_dtw_from_cost(cost_of(1, 2, 2), drop_cost="1"), TypeError, "drop_cost: got str"),
        (
            lambda: soft_dtw_from_cost(cost_of(1, 2, 2), drop_cost=cost_of(1, 3)),
            ValueError,
            "drop_cost: got shape (1, 3)",
        ),
        (
            lambda: soft_dtw_from_cost(cost_of(1, 2, 2), backend="gpu"),
            ValueError,
            "backend: got 'gpu', expected one of",
        ),
        (lambda: soft_dtw_from_cost(cost_of(1, 2, 2), backend="triton"), ValueError, "backend: 'triton' cannot serve"),
        (lambda: soft_dtw_from_cost(cost_of(1, 2, 2), backend="cuda"), ValueError, "the tensors are on cpu"),
    ],
)
def test_error_messages(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        call()
    assert message in str(raised.value)
