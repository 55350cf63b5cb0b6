"""One HTML page of all results under bench/results: tables, speed and memory against size, roofline.

It holds no number of its own: what it shows was measured by the command and at the commit that it names.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from html import escape
from itertools import groupby
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: .5em 0 1.5em } th, td { padding: .15em .7em; text-align: right }
td { white-space: nowrap }
th { border-bottom: 1px solid #999 } th:first-child, td:first-child { text-align: left }
tr.ours { background: #eef4ea; font-weight: 600 } .from { color: #666 } svg { max-width: 100%; height: auto }
"""
COLUMNS = ("", "median", "p20 to p80", "times ours", "rate", "of ceiling", "peak memory", "error")
MARKERS = "os^vDPX*<>hp"


def write(results: Path, page: Path) -> None:
    """Writes the page from every record of `python -m bench <op> --json` below ``results``."""
    files = [(file, json.loads(file.read_text())) for file in sorted(results.glob("*/*.json"))]
    records = [(file, told) for file, told in files if "ceilings" in told and told["results"]]
    if not records:
        raise FileNotFoundError(f"{results}: no results; `python -m bench all --json` makes them")
    parts = [part for file, told in records for part in section(file.relative_to(results), told)]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(
        f"<!doctype html><meta charset='utf-8'><title>Lyra: benchmarks</title><style>{STYLE}</style>"
        f"<h1>Lyra: benchmarks</h1>{''.join(parts)}\n"
    )


def section(file: Path, told: dict) -> Iterable[str]:
    yield f"<h2>{escape(told['op'])} on {escape(told['device'])}</h2>"
    ceilings = told["ceilings"]
    software = f"torch {told['torch']}" + (f", driver {told['driver']}" if told["driver"] else "")
    yield (
        f"<p class='from'>{escape(str(file))}: <code>{escape(told['command'])}</code> at commit "
        f"{escape(str(told['commit']))}, {told['date']}, {escape(software)}, {told['threads']} CPU threads, "
        f"load {told['load']:.1f}. Ceilings measured in the same run: "
        f"{ceilings['bytes_per_s'] / 1e9:.1f} GB/s, {ceilings['flop_per_s'] / 1e9:.0f} GFLOP/s (float32).</p>"
    )
    yield from (size_plot(told["results"], *what) for what in SIZE_PLOTS)
    yield roofline(told)
    for (workload, direction), rows in groupby(told["results"], lambda r: (r["workload"], r["direction"])):
        yield f"<h3>{escape(workload)}, {direction}</h3>{table(list(rows))}"


def table(rows: list[dict]) -> str:
    ours = min((r["seconds"]["median"] for r in rows if is_ours(r)), default=None)
    head = "".join(f"<th>{column}</th>" for column in COLUMNS)
    body = "".join(
        f"<tr{' class=ours' if is_ours(r) else ''}>{''.join(f'<td>{cell}</td>' for cell in cells(r, ours))}</tr>"
        for r in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def cells(r: dict, ours: float | None) -> Iterable[str]:
    time, (what, count) = r["seconds"], r["items"]
    yield escape(r["implementation"])
    yield f"{time['median'] * 1e3:.3f} ms"
    yield f"{time['p20'] * 1e3:.3f} to {time['p80'] * 1e3:.3f}"
    yield f"{time['median'] / ours:.2f}" if ours else ""
    yield f"{count / time['median'] / 1e9:.4f} G{escape(what)}/s"
    yield f"{r['share_of_ceiling']:.1%} ({r['ceiling']})"
    yield "?" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 2**20:.1f} MiB"
    yield f"{r['error']:.0e}"


def is_ours(r: dict) -> bool:
    return r["implementation"].startswith("lyra")


# What is plotted against the size of a workload: title, unit, value of a result, scale. Memory can be 0, or unknown.
SIZE_PLOTS = (
    ("speed", "items per second", lambda r: r["items"][1] / r["seconds"]["median"], {"value": "log"}),
    ("peak memory", "bytes above the inputs", lambda r: r["peak_bytes"], {"value": "symlog", "linthresh": 2**20}),
)


def size_plot(results: list[dict], title: str, unit: str, value, scale: dict) -> str:
    directions = list(dict.fromkeys(r["direction"] for r in results))
    figure, axes = plt.subplots(1, len(directions), figsize=(6 * len(directions), 4), sharey=True, squeeze=False)
    for axis, direction in zip(axes[0], directions):
        for marker, (name, rows) in zip(MARKERS * 9, by_implementation(results, direction)):
            points = sorted((r["items"][1], value(r)) for r in rows if value(r) is not None)
            ours = name.startswith("lyra")
            axis.plot(*zip(*points), marker=marker, lw=2 if ours else 1, alpha=1 if ours else 0.7, label=name)
        items = results[0]["items"][0]
        axis.set_yscale(**scale)
        axis.set(xscale="log", xlabel=f"{items} in a workload", title=f"{title}, {direction}")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel(unit)
    axes[0][-1].legend(fontsize=7, bbox_to_anchor=(1.02, 1), loc="upper left")
    return svg(figure)


def by_implementation(results: list[dict], direction: str) -> Iterable[tuple[str, list[dict]]]:
    names = dict.fromkeys(r["implementation"] for r in results if r["direction"] == direction)
    for name in names:
        yield name, [r for r in results if r["direction"] == direction and r["implementation"] == name]


def roofline(told: dict) -> str:
    bandwidth, arithmetic = told["ceilings"]["bytes_per_s"], told["ceilings"]["flop_per_s"]
    figure, axis = plt.subplots(figsize=(7, 4))
    reach = [r["flops"] / r["bytes"] for r in told["results"] if r["flops"]] + [arithmetic / bandwidth]
    low, high = min(reach) / 2, max(reach) * 2
    corner = arithmetic / bandwidth
    axis.plot([low, corner, high], [low * bandwidth, arithmetic, arithmetic], color="black", lw=1)
    for marker, direction in zip(MARKERS, dict.fromkeys(r["direction"] for r in told["results"])):
        for ours, colour in ((True, "tab:green"), (False, "tab:gray")):
            rows = [r for r in told["results"] if r["direction"] == direction and is_ours(r) == ours and r["flops"]]
            points = [(r["flops"] / r["bytes"], r["flops"] / r["seconds"]["median"]) for r in rows]
            if points:
                axis.scatter(
                    *zip(*points),
                    s=24,
                    marker=marker,
                    color=colour,
                    label=f"{'lyra' if ours else 'peers'}, {direction}",
                )
    axis.set(xscale="log", yscale="log", xlabel="flop per byte that no run can do without", ylabel="flop/s")
    axis.set_title("roofline: the line is what was measured here at best")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    return svg(figure)


def svg(figure: plt.Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", bbox_inches="tight")
    plt.close(figure)
    return text.getvalue().partition("<svg")[2].join(("<svg", ""))
