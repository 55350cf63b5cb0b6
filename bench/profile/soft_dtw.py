"""python -m bench.profile.soft_dtw: what part of soft_dtw from features is anything but its matrix products.

By torch's profiler, on a CPU: the time of the whole call, and of torch's products in it. Median of several calls.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bench import records
from bench.harness import BOTH, FORWARD, call
from bench.soft_dtw import from_features

PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::baddbmm_")
SHAPES = (((150, 300), (20, 64)), ((300, 300), (64, 64)), ((1500, 1500), (200, 200)))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.profile.soft_dtw", description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default %(default)s")
    parser.add_argument("--seconds", type=float, default=5, help="for each, or three calls; default %(default)s")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for shape in SHAPES:
        for dim in (576, 3584):
            workload = from_features("cpu", 32, *shape, dim)
            inputs = workload.inputs()
            for direction in (FORWARD, BOTH):
                run = call(workload.implementations["lyra (cpu)"], inputs, direction)
                seconds, share = outside_products(run, options.seconds)
                rows.append({"workload": workload.name, "direction": direction, "seconds": seconds, "outside": share})
                print(
                    f"{workload.name}, {direction}: {seconds * 1e3:.1f} ms, {share:.0%} outside the products",
                    flush=True,
                )
    record = records.origin("cpu", "bench.profile.soft_dtw", sys.argv[1:]) | {"rows": rows}
    records.write(records.folder("cpu") / "soft_dtw_profile.json", record)


def outside_products(run: Callable[[], object], seconds: float) -> tuple[float, float]:
    """Seconds of a call, and the share of them that its matrix products do not take."""
    run()
    found = []
    while len(found) < 3 or sum(whole for whole, _ in found) < seconds:
        with profile(activities=[ProfilerActivity.CPU]) as told, record_function("call"):
            run()
        events = told.key_averages()
        whole = next(e.cpu_time_total for e in events if e.key == "call")
        products = sum(e.self_cpu_time_total for e in events if e.key in PRODUCTS)
        found.append((whole / 1e6, 1 - products / whole))
    return tuple(statistics.median(values) for values in zip(*found))


if __name__ == "__main__":
    main()
