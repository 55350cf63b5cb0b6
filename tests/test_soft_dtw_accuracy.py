"""The compiled soft-DTW in float32 on the inputs of the accuracy table, against bounds that hold for any length."""

from __future__ import annotations

import pytest
from soft_dtw_oracles import COMPILED, device_of, looped, random
from torch import from_numpy

pytest.importorskip("numba")
from bench.accuracy import soft_dtw as table


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("large", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_value_to_1e_6_and_alignment_to_1e_4_or_with_8_bits_1e_2(large: bool, backend: str) -> None:
    for name, cost, gamma, band in table.inputs(large):
        if large == (band is not None):
            judged = table.judged(device_of(backend), band)
            truth = table.loop(cost.double().numpy(), gamma, -1 if band is None else band)
            for ours, bound in (("lyra", 1e-4), ("lyra, bits=8", 1e-2)):
                found = table.errors(judged[ours], cost.to(device_of(backend)), gamma, *truth)
                assert "failed" not in found, (name, ours)
                assert found["value"] <= 1e-6 and found["gradient"] <= bound, (name, ours, found)


@pytest.mark.parametrize("gamma", [1.0, 0.05])
def test_the_truth_of_the_table_is_that_of_a_wider_float(gamma: float) -> None:
    cost = random(30, 17).square()
    value, expected = table.loop(cost.numpy(), gamma, -1)
    want, alignment = looped(cost, gamma)
    assert value == pytest.approx(want.item(), rel=1e-12)
    assert (from_numpy(expected) - alignment).abs().max() < 1e-12
