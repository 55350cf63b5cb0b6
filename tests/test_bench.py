"""The benchmark harness refuses to time a wrong result, and says what it timed."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lyra_ops
from bench import token_select
from bench.__main__ import main
from bench.harness import BOTH, FORWARD, Cost, Workload, WrongResult, measure, time_cpu
from bench.peers import soft_dtw as soft_dtw_peers
from bench.peers import token_select as peers
from bench.report import write
from lyra_ops.testing import assert_within_reference_error

ROOT = Path(__file__).parents[1]
CEILINGS = {"bytes_per_s": 1e9, "flop_per_s": 1e9}


def square(x: Tensor) -> Tensor:
    return x * x


def workload(**implementations) -> Workload:
    return Workload(
        name="squares",
        inputs=lambda: (torch.randn(1000),),
        implementations={name.replace("_", " "): f for name, f in implementations.items()},
        plain=square,
        costs={FORWARD: Cost(8000, 1000), BOTH: Cost(12000, 3000)},
        items=("squares", 1000),
    )


def test_times_every_implementation_both_ways():
    results = list(measure([workload(lyra=square, peer=square)], "cpu", CEILINGS, quick=True))
    assert [(r.implementation, r.direction) for r in results] == [
        (name, direction) for direction in (FORWARD, BOTH) for name in ("lyra", "peer")
    ]
    for r in results:
        assert r.timing == ("cpu" if torch.get_num_threads() == 1 else "wall")
        assert r.seconds["p20"] <= r.seconds["median"] <= r.seconds["p80"]
        assert r.ceiling == "bandwidth"
        assert r.share_of_ceiling == pytest.approx(r.bytes / 1e9 / r.seconds["median"])


def test_no_implementation_always_follows_the_same_one():
    """What ran before decides what the caches hold."""
    order: list[str] = []
    time_cpu({name: partial(order.append, name) for name in "abc"}, (30, 0.0), quick=False)
    assert {(x, y) for x, y in itertools.pairwise(order) if x != y} == set(itertools.permutations("abc", 2))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x * x * (1 + 1e-5),
        lambda x: x.detach() * x,  # right, but for its gradient
        lambda x: torch.where(torch.arange(1000) == 7, torch.nan, x * x),
    ],
)
def test_a_wrong_result_of_ours_is_not_timed(wrong):
    with pytest.raises(WrongResult, match="squares"):
        next(measure([workload(peer=square, lyra=wrong)], "cpu", CEILINGS, quick=True))


def test_a_peer_is_shown_with_its_error_or_left_out_with_its_reason(capsys):
    def broken(x: Tensor) -> Tensor:
        raise NotImplementedError("only on Tuesdays")

    rough = workload(lyra=square, rough_peer=lambda x: x * x * 1.01, broken_peer=broken)
    errors = {r.implementation: r.error for r in measure([rough], "cpu", CEILINGS, quick=True)}
    assert errors["rough peer"] == pytest.approx(0.01, rel=1e-3)
    assert "broken peer" not in errors
    assert "only on Tuesdays" in capsys.readouterr().err


def test_the_peers_of_token_select_are_given_the_same_task():
    query, key = torch.randn(2, 6, 5, 64), torch.randn(2, 2, 150, 64)
    lse = (query @ key.repeat_interleave(3, dim=1).mT / 8).logsumexp(-1)
    plain, exact = (token_select.formula(*tensors) for tensors in ((query, key), (query.double(), key.double())))
    for scores in (peers.published_scores, peers.grouped_scores, peers.scores_by_attention):
        assert_within_reference_error(scores(query, key), plain, exact, name=scores.__name__)
    assert_within_reference_error(peers.grouped_shares(query, key, lse), plain, exact)
    places = exact.topk(7).indices.sort().values
    assert torch.equal(peers.topk_and_sort(exact, 7), places) and torch.equal(peers.stable_sort(exact, 7), places)


@pytest.mark.slow
@pytest.mark.parametrize("band", [None, 4])
def test_the_peers_of_soft_dtw_are_given_the_same_task(band: int | None):
    cost, lengths = torch.rand(1, 30, 30, dtype=torch.float64), (torch.tensor([30]), torch.tensor([30]))

    def results(function, *options: float) -> list[Tensor]:
        leaf = cost.clone().requires_grad_()
        value = function(leaf, *lengths, *options)
        return [value.detach(), torch.autograd.grad(value.sum(), leaf)[0]]

    want = results(lambda *given: lyra_ops.soft_dtw_from_cost(*given, gamma=0.5, band=band))
    for name, peer in soft_dtw_peers.implementations("cpu", ragged=False, band=band).items():
        for got, right in zip(results(peer, 0.5), want, strict=True):
            assert (got.double() - right).norm() <= 1e-3 * right.norm(), name  # of float32 inside of some


@pytest.mark.slow
@pytest.mark.parametrize(
    ("op", "implementations"),
    [
        ("soft_dtw", {"lyra (cpu)", "plain torch (anti-diagonals)"}),
        ("token_select", {"lyra (cpu)", "published formula", "torch.topk, sort", "torch.gather each"}),
    ],
)
def test_the_command_writes_what_it_ran_on(op: str, implementations: set[str], tmp_path: Path):
    file = tmp_path / f"{op}.json"
    options = ["--quick", "--device", "cpu", "--threads", "1", "--json", str(file)]
    subprocess.run([sys.executable, "-m", "bench", op, *options], cwd=ROOT, check=True)
    told = json.loads(file.read_text())
    assert told["op"] == op
    assert told["threads"] == 1
    assert all(told[key] for key in ("device", "torch", "commit", "command", "date", "ceilings"))
    assert {r["implementation"] for r in told["results"]} >= implementations


def test_the_command_times_some_workloads_only(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv("NUMBA_NUM_THREADS", "1")  # which the command sets, for good
    file, options = tmp_path / "some.json", ["soft_dtw", "--quick", "--device", "cpu"]
    assert main([*options, "--only", "features of 64", "--json", str(file)]) == 0
    assert {"features of 64" in r["workload"] for r in json.loads(file.read_text())["results"]} == {True}
    assert main([*options, "--only", "features of 65"]) == 2
    assert "no workload of soft_dtw" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*options, "--only", "features", "--json"])
    assert "--json: got no FILE" in capsys.readouterr().err


def test_the_report_shows_what_was_kept_and_nothing_else(tmp_path: Path):
    results = [asdict(r) for r in measure([workload(lyra=square, peer_a=square)], "cpu", CEILINGS, quick=True)]
    results[0]["peak_bytes"], results[1]["peak_bytes"] = 0, None  # nothing more than the inputs; not known
    told = {"op": "squares", "device": "a <CPU>", "threads": 1, "torch": "2", "driver": None, "commit": "abc123"}
    told |= {"command": "python -m bench squares", "date": "today", "load": 0.5}
    told |= {"ceilings": CEILINGS, "results": results}
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "squares.json").write_text(json.dumps(told))
    (tmp_path / "cpu" / "other.json").write_text(json.dumps({"rows": []}))  # a record of another kind
    write(tmp_path, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "a &lt;CPU&gt;" in page and "abc123" in page and page.count("<svg") == 3
    for r in results:
        assert f"{r['seconds']['median'] * 1e3:.3f} ms" in page
    assert "peer a" in page


def test_the_report_says_where_there_is_nothing_to_show(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no results"):
        write(tmp_path, tmp_path / "report.html")
