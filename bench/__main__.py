"""python -m bench <op|all>: checks each implementation against float64, then times it beside its peers.

Exit code 1, and no time at all, for an op of ours that gives a wrong result. ``--report`` writes one HTML page from all
results that were kept.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from bench import records
from bench.harness import Result, WrongResult, measure, measured_ceilings

HERE = Path(__file__).parent
OPS = sorted(path.stem for path in HERE.glob("*.py") if (HERE.parent / "lyra_ops" / path.stem).is_dir())


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    parser.add_argument("op", choices=[*OPS, "all"], nargs="?")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU; default %(default)s")
    parser.add_argument("--only", metavar="REGEX", help="the workloads alone in whose names it is found")
    parser.add_argument("--quick", action="store_true", help="small inputs and few repeats: does it run?")
    parser.add_argument(
        "--json",
        nargs="?",
        const=True,
        metavar="FILE",
        help="write the results; without FILE to bench/results/<device>/<op>.json",
    )
    parser.add_argument(
        "--report",
        nargs="?",
        const=Path("bench/results/report.html"),
        type=Path,
        metavar="FILE",
        help="write a page with plots from all kept results; default %(const)s",
    )
    args = parser.parse_args(arguments)
    if args.op is None:
        if not args.report:
            parser.error("op: got none, expected " + ", ".join([*OPS, "all"]) + "; or --report alone")
        return report(args.report)
    if args.op == "all" and isinstance(args.json, str):
        parser.error("--json: a FILE holds one op, but 'all' were asked for")
    if args.only and args.json is True:
        parser.error("--json: got no FILE, expected one, since bench/results/<device>/<op>.json holds all workloads")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA GPU here")
    os.environ["NUMBA_NUM_THREADS"] = str(args.threads)  # before any peer imports numba
    torch.set_num_threads(args.threads)

    ceilings = measured_ceilings(args.device)
    for op in OPS if args.op == "all" else [args.op]:
        print(f"{op} on {records.device_name(args.device)}, {args.threads} CPU threads; measured ceilings "
              f"{ceilings['bytes_per_s'] / 1e9:.1f} GB/s, {ceilings['flop_per_s'] / 1e9:.0f} GFLOP/s")  # fmt: skip
        results = []
        try:
            workloads = importlib.import_module(f"bench.{op}").workloads(args.device, args.quick)
            workloads = (w for w in workloads if re.search(args.only or "", w.name))
            for result in measure(workloads, args.device, ceilings, args.quick):
                if not results or (results[-1].workload, results[-1].direction) != (result.workload, result.direction):
                    print(f"\n{result.workload}, {result.direction}\n{HEADER}")
                print(row(result), flush=True)
                results.append(result)
        except WrongResult as error:
            print(f"bench: {error}; nothing more is timed", file=sys.stderr)
            return 1
        if not results:
            print(f"bench: --only: no workload of {op} has {args.only!r} in its name", file=sys.stderr)
            return 2
        if args.json:
            path = records.folder(args.device) / f"{op}.json" if args.json is True else Path(args.json)
            record = {"op": op, **records.origin(args.device, "bench", arguments), "ceilings": ceilings}
            records.write(path, record | {"results": [asdict(r) for r in results]})
    return report(args.report) if args.report else 0


def report(page: Path) -> int:
    from bench.report import write  # matplotlib, which timing does without

    try:
        write(records.RESULTS, page)
    except FileNotFoundError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    print(f"written to {page}")
    return 0


HEADER = (
    f"{'':34}{'median':>10}{'p20':>10}{'p80':>10}{'rate':>18}{'of ceiling':>12}{'peak memory':>13}{'error':>9}  timing"
)


def row(r: Result) -> str:
    what, count = r.items
    rate = f"{count / r.seconds['median'] / 1e9:.4f} G{what}/s"
    peak = "?" if r.peak_bytes is None else f"{r.peak_bytes / 2**20:.1f} MiB"
    times = "".join(f"{milliseconds(r.seconds[key]):>10}" for key in ("median", "p20", "p80"))
    return f"{r.implementation:34}{times}{rate:>18}{r.share_of_ceiling:>11.1%} {peak:>13}{r.error:>9.0e}  {r.timing}"


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms" if seconds < 0.1 else f"{seconds * 1e3:.0f} ms"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
