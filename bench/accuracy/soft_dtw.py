"""python -m bench.accuracy.soft_dtw: how far ours and other people's soft-DTW are from float64, on hard inputs.

The truth is a plain double loop in float64 over the log-domain recursion and over normalised step probabilities,
written for numba. Reported per input: relative error of the value, relative L2 error of the gradient.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from functools import partial

import numba
import numpy as np
import torch

import lyra_ops
from bench import records
from bench.peers.soft_dtw import implementations


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy.soft_dtw", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--large", action="store_true", help="also pairs of 4096 and 8192 tokens with a band")
    options = parser.parse_args()
    rows = []
    for name, cost, gamma, band in inputs(options.large):
        value, expected = loop(cost.double().numpy(), gamma, -1 if band is None else band)
        print(f"\n{name}\n{'':34}{'value':>10}{'gradient':>10}")
        for who, function in judged(options.device, band).items():
            row = {
                "input": name,
                "implementation": who,
                **errors(function, cost.to(options.device), gamma, value, expected),
            }
            rows.append(row)
            print(
                f"{who:34}{row['value']:>10.1e}{row['gradient']:>10.1e}"
                if "value" in row
                else f"{who:34}{row['failed']}"
            )
    record = records.origin(options.device, "bench.accuracy.soft_dtw", sys.argv[1:]) | {"rows": rows}
    records.write(records.folder(options.device) / "soft_dtw_accuracy.json", record)


def inputs(large: bool) -> Iterator[tuple[str, torch.Tensor, float, int | None]]:
    """(name, cost (N, M) float32, gamma, band)."""
    for n, m in ((300, 64), (1500, 200)):
        for gamma in (10.0, 1.0, 0.1, 0.01):
            yield f"squared distances, {n} x {m}, gamma {gamma}", distances(n, m), gamma, None
        yield f"contrastive, {n} x {m}, gamma 0.1", contrastive(n, m), 0.1, None
    yield "ties, 300 x 64, gamma 1.0", torch.zeros(300, 64), 1.0, None
    infinite = distances(300, 64)
    infinite[:200, 30] = math.inf
    yield "a column of +inf in 200 rows, 300 x 64, gamma 1.0", infinite, 1.0, None
    yield "costs to 1e4, 300 x 64, gamma 1e-4", distances(300, 64) * 60, 1e-4, None
    for size, band in ((4096, 256), (8192, 512)) if large else ():
        for gamma in (10.0, 1.0, 0.1, 0.01):
            name = f"squared distances, {size} x {size}, band {band}, gamma {gamma}"
            yield name, distances(size, size), gamma, band
        yield f"contrastive, {size} x {size}, band {band}, gamma 0.1", contrastive(size, size), 0.1, band
        yield f"ties, {size} x {size}, band {band}, gamma 1.0", torch.zeros(size, size), 1.0, band


def distances(n: int, m: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.cdist(torch.randn(n, 64, generator=g), torch.randn(m, 64, generator=g)).square()


def contrastive(n: int, m: int) -> torch.Tensor:
    logits = torch.randn(n, m, generator=torch.Generator().manual_seed(1)) / 0.07
    return -logits.log_softmax(-1)


def judged(device: str, band: int | None) -> dict:
    def ours(cost: torch.Tensor, n: torch.Tensor, m: torch.Tensor, gamma: float, bits: int) -> torch.Tensor:
        return lyra_ops.soft_dtw_from_cost(cost, n, m, gamma=gamma, band=band, bits=bits, backend=device)

    named = {"lyra": partial(ours, bits=16), "lyra, bits=8": partial(ours, bits=8)}
    return named | implementations(device, ragged=False, band=band)


def errors(function, cost: torch.Tensor, gamma: float, value: float, expected: np.ndarray) -> dict:
    lengths = (torch.tensor([size], device=cost.device) for size in cost.shape)
    leaf = cost[None].clone().requires_grad_()
    try:
        got = function(leaf, *lengths, gamma)
        (gradient,) = torch.autograd.grad(got.sum(), leaf)
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"[:200]}
    if not (got.isfinite().all() and gradient.isfinite().all()):
        return {"failed": "NaN or inf"}
    distance = gradient[0].detach().double().cpu().numpy() - expected
    return {
        "value": abs(got.item() - value) / abs(value),
        "gradient": float(np.linalg.norm(distance) / np.linalg.norm(expected)),
    }


@numba.njit(cache=False)
def loop(cost: np.ndarray, gamma: float, band: int) -> tuple[float, np.ndarray]:
    n, m = cost.shape
    above = np.full(m + 1, np.inf)
    above[0] = 0.0
    share = np.zeros((n + 1, m + 1, 3))
    for i in range(n):
        here = np.full(m + 1, np.inf)
        for j in range(m):
            if band >= 0 and 2 * abs(j * (n - 1) - i * (m - 1)) > max(2 * band * (n - 1), n + m - 2):
                continue
            least = min(above[j], above[j + 1], here[j])
            if least == np.inf:
                continue
            weights = (
                math.exp((least - above[j]) / gamma),
                math.exp((least - above[j + 1]) / gamma),
                math.exp((least - here[j]) / gamma),
            )
            total = weights[0] + weights[1] + weights[2]
            for k in range(3):
                share[i, j, k] = weights[k] / total
            here[j + 1] = cost[i, j] + least - gamma * math.log(total)
        above = here
    expected = np.zeros((n + 1, m + 1))
    expected[n - 1, m - 1] = 1.0
    for i in range(n - 1, -1, -1):
        for j in range(m - 1, -1, -1):
            if i < n - 1 or j < m - 1:
                expected[i, j] = (
                    expected[i + 1, j + 1] * share[i + 1, j + 1, 0]
                    + expected[i + 1, j] * share[i + 1, j, 1]
                    + expected[i, j + 1] * share[i, j + 1, 2]
                )
    return above[m], expected[:n, :m]


if __name__ == "__main__":
    main()
