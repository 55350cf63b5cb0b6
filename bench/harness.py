"""Checks, times and weighs implementations of one thing side by side; knows nothing of any op.

A file ``bench/<op>.py`` offers ``workloads(device, quick)``; nothing else has to be told of a new op.
"""

from __future__ import annotations

import ctypes
import gc
import random
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lyra_ops.testing import assert_within_reference_error

FORWARD, BOTH = "forward", "forward+backward"


@dataclass
class Cost:
    """What no run can do without: bytes of inputs read once and outputs written once, floating-point operations."""

    bytes: int
    flops: int


@dataclass
class Workload:
    """The same inputs for several implementations, each a function of the inputs that returns one tensor.

    Names of our own implementations begin with "lyra"; the others are peers. Floating-point inputs get gradients, for
    an upstream gradient of ones. ``plain`` is the formula in plain torch, in the dtype of the inputs.
    """

    name: str
    inputs: Callable[[], tuple[Tensor, ...]]  # fresh random ones on each call
    implementations: dict[str, Callable[..., Tensor]]
    plain: Callable[..., Tensor]
    costs: dict[str, Cost]  # per direction: FORWARD, BOTH
    items: tuple[str, int]  # what to count per second, for example ("cells", 614400)
    budget: tuple[int, float] = (7, 1.0)  # on a CPU: runs and seconds at least, but see time_cpu
    # (ours, plain, exact, name): raises AssertionError where ours, an output or a gradient, is not good enough.
    judge: Callable[[Tensor, Tensor, Tensor, str], None] = lambda ours, plain, exact, name: (
        assert_within_reference_error(ours, plain, exact, name=name)
    )


@dataclass
class Result:
    workload: str
    direction: str
    implementation: str
    seconds: dict[str, float]  # median, p20, p80
    repeats: int
    # "wall"; "cpu" (of one thread: what other processes take in between is not counted), "graph" (device time of a
    # captured graph), "events" (device time with launch gaps)
    timing: str
    peak_bytes: int | None  # above the inputs
    bytes: int
    flops: int
    items: tuple[str, int]
    share_of_ceiling: float
    ceiling: str  # which one: "bandwidth" or "arithmetic"
    error: float  # relative L2 distance from float64: of the gradients, or of the output where there are none


class WrongResult(AssertionError):
    """An implementation of ours failed its gate, so nothing is timed."""


def measure(workloads: Iterable[Workload], device: str, ceilings: dict[str, float], quick: bool) -> Iterator[Result]:
    peak = peak_gpu if device == "cuda" else peak_cpu
    for workload in workloads:
        errors = gate(workload)
        for direction, cost in workload.costs.items():
            floors = {
                "bandwidth": cost.bytes / ceilings["bytes_per_s"],
                "arithmetic": cost.flops / ceilings["flop_per_s"],
            }
            ceiling = max(floors, key=floors.get)
            functions = {name: workload.implementations[name] for name in errors}
            if device == "cuda":
                timed = {name: time_gpu(workload, function, direction, quick) for name, function in functions.items()}
            else:
                inputs = workload.inputs()
                runs = {name: call(function, inputs, direction) for name, function in functions.items()}
                clock = "cpu" if torch.get_num_threads() == 1 else "wall"
                timed = {name: (t, clock) for name, t in time_cpu(runs, workload.budget, quick, CLOCKS[clock]).items()}
            for name, (samples, timing) in timed.items():
                median = statistics.median(samples)
                yield Result(
                    workload=workload.name,
                    direction=direction,
                    implementation=name,
                    seconds={"median": median, "p20": percentile(samples, 20), "p80": percentile(samples, 80)},
                    repeats=len(samples),
                    timing=timing,
                    peak_bytes=peak(call(functions[name], workload.inputs(), direction)),
                    bytes=cost.bytes,
                    flops=cost.flops,
                    items=workload.items,
                    share_of_ceiling=floors[ceiling] / median,
                    ceiling=ceiling,
                    error=errors[name],
                )


def call(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], direction: str) -> Callable[[], list[Tensor]]:
    """A function without arguments that returns the output and, for BOTH, the gradients."""
    leaves = [t for t in inputs if t.is_floating_point()]

    def run() -> list[Tensor]:
        if direction == FORWARD:
            with torch.no_grad():
                return [function(*inputs)]
        output = function(*inputs)
        return [output.detach(), *torch.autograd.grad(output, leaves, torch.ones_like(output))]

    for leaf in leaves:
        leaf.requires_grad_(direction == BOTH)
    return run


def gate(workload: Workload) -> dict[str, float]:
    """Raises WrongResult if one of ours is wrong; returns the errors of all that give a result, and names the rest."""
    direction = BOTH if BOTH in workload.costs else FORWARD
    inputs = workload.inputs()
    plain = call(workload.plain, inputs, direction)()
    exact = call(
        workload.plain, tuple(t.detach().double() if t.is_floating_point() else t for t in inputs), direction
    )()
    errors = {}
    for name, function in workload.implementations.items():
        ours_to_judge = name.startswith("lyra")
        try:
            got = call(function, inputs, direction)()
        except Exception as error:
            if ours_to_judge:
                raise
            print(f"{name} cannot do {workload.name}: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        if ours_to_judge:
            for k, (ours, theirs, truth) in enumerate(zip(got, plain, exact)):
                try:
                    workload.judge(ours, theirs, truth, f"gradient {k}" if k else "output")
                except AssertionError as error:
                    raise WrongResult(f"{name} on {workload.name}: {error}") from None
        pairs = list(zip(got, exact))[1 if direction == BOTH else 0 :]
        distance = sum((ours.double() - truth).square().sum().item() for ours, truth in pairs)
        errors[name] = (distance / sum(truth.square().sum().item() for _, truth in pairs)) ** 0.5
    return errors


# --- time --------------------------------------------------------------------------------------------------------


def percentile(samples: list[float], percent: int) -> float:
    ordered = sorted(samples)
    return ordered[min(len(ordered) * percent // 100, len(ordered) - 1)]


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def time_cpu(
    runs: dict[str, Callable[[], object]],
    budget: tuple[int, float],
    quick: bool,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each, by turns: what else goes on in the machine then meets all of them alike. Each round in an order
    of its own, since what ran before decides what the caches hold: worth a tenth at a few megabytes."""
    draw = random.Random(0)
    for run in runs.values():
        run()
    least, seconds = (3, 0.1) if quick else budget
    samples: dict[str, list[float]] = {name: [] for name in runs}

    def wanted(taken: list[float]) -> bool:
        # Some peers take many seconds a call: three of those have to do.
        more = len(taken) < least or sum(taken) < seconds
        return len(taken) < 3 or (more and sum(taken) < 10 and len(taken) < 1000)

    while left := [name for name, taken in samples.items() if wanted(taken)]:
        for name in draw.sample(left, len(left)):
            start = clock()
            runs[name]()
            samples[name].append(clock() - start)
    return samples


def time_gpu(workload: Workload, function, direction: str, quick: bool) -> tuple[list[float], str]:
    """Device time with a cold L2: before each sample a buffer of twice its size is overwritten.

    Ours is captured in a graph, which leaves the kernels alone; peers often cannot be, and are timed as called.
    """
    device = torch.cuda.current_device()
    flush = torch.empty(2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.uint8, device=device)
    ours = any(function is f for name, f in workload.implementations.items() if name.startswith("lyra"))
    if ours:
        static = workload.inputs()
        captured = call(function, static, direction)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                captured()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = captured()
        replay, timing = graph.replay, "graph"
    else:
        replay, timing = call(function, workload.inputs(), direction), "events"
    for _ in range(3):
        replay()
    samples = []
    for _ in range(20 if quick else 200):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        start.record()
        replay()
        end.record()
        samples.append((start, end))
    torch.cuda.synchronize()
    if ours:
        # A graph that left a kernel out would still be fast: fresh inputs have to give what an eager call gives.
        fresh = workload.inputs()
        with torch.no_grad():
            for to, value in zip(static, fresh):
                to.copy_(value)
            for output in outputs:
                output.fill_(torch.nan if output.is_floating_point() else -1)
        graph.replay()
        for replayed, eager in zip(outputs, call(function, fresh, direction)()):
            if not torch.equal(replayed, eager):
                raise WrongResult(f"{workload.name}: the timed graph does not compute what an eager call does")
    return [start.elapsed_time(end) / 1e3 for start, end in samples], timing


# --- memory ------------------------------------------------------------------------------------------------------


def peak_gpu(run: Callable[[], object]) -> int:
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_cpu(run: Callable[[], object]) -> int | None:
    """By how much the process's resident set grew at most; None where Linux does not let it be reset."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else memory freed before and used again would not count
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        run()
        return max(resident("VmHWM") - before, 0)
    except (OSError, AttributeError):
        return None


def resident(field: str) -> int:
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1))


# --- ceilings ----------------------------------------------------------------------------------------------------


def measured_ceilings(device: str) -> dict[str, float]:
    """What this machine does at best: a large copy, counting bytes read and written, and a large float32 product."""
    size, n = (1 << 28, 8192) if device == "cuda" else (1 << 26, 2048)
    a, b = (torch.rand(size, device=device) for _ in range(2))
    x, y = (torch.rand(n, n, device=device) for _ in range(2))
    return {
        "bytes_per_s": 8 * size / fastest(lambda: a.copy_(b), device),
        "flop_per_s": 2 * n**3 / fastest(lambda: x @ y, device),
    }


def fastest(run: Callable[[], object], device: str) -> float:
    samples = []
    for _ in range(10):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        samples.append(time.perf_counter() - start)
    return min(samples)
