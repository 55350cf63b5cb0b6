"""`make gpu-check`: everything that only a GPU can show, in one command of at most nine minutes.

Runs with the machine's own python3 (torch with CUDA and pytest; no network, no venv): takes lyra_ops/_C.so if it fits
the sources and loads, else builds it; then the GPU tests, compute-sanitizer on the small ones, and the benchmarks.
Results go as JSON to $OUT, or else to bench/results/<device>/. The exit code is 0 only if GPU tests ran and all passed.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

try:
    import pytest  # noqa: F401 - named here so that its absence is told like torch's
    import torch
except ModuleNotFoundError as error:
    sys.exit(f"gpu-check: {sys.executable} has no {error.name}: nothing was tested (PYTHON=... chooses another python)")

ROOT = Path(__file__).resolve().parents[1]
STOP_AT = time.monotonic() + 9 * 60 - 15
# Seconds for the steps that must not eat the rest's time; what the tests leave goes to the benchmarks.
BUILD, TESTS, SANITIZER = 240, 240, 75


def main() -> int:
    if not torch.cuda.is_available():
        print(f"gpu-check: torch {torch.__version__} at {sys.executable} sees no CUDA GPU: nothing was tested")
        return 2
    device = torch.cuda.get_device_name()
    built_from = commit()
    print(f"gpu-check: {device}, torch {torch.__version__}, sources of {built_from}", flush=True)
    out = Path(os.environ.get("OUT") or ROOT / "bench" / "results" / re.sub(r"\W+", "-", device).strip("-").lower())
    out.mkdir(parents=True, exist_ok=True)

    if (problem := library_problem()) is not None:
        print(f"gpu-check: building the library: {problem}", flush=True)
        if step("build", [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], BUILD) != 0:
            return 2
        if (problem := library_problem()) is not None:
            print(f"gpu-check: no library to test: {problem}")
            return 2

    outcomes = out / "gpu-tests.json"
    outcomes.unlink(missing_ok=True)
    tests = step("tests", [*pytest_command("gpu"), f"--gpu-report={outcomes}"], TESTS)
    counts = json.loads(outcomes.read_text()) if outcomes.exists() else {}
    outcomes.unlink(missing_ok=True)
    report = {
        "device": device,
        "driver": driver(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": built_from,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": "make gpu-check",
        "tests": counts,
        "sanitizer": {tool: sanitize(tool) for tool in ("memcheck", "racecheck")},
        "bench": {op: bench(op, out) for op in ops_with_benchmark()},
    }
    (out / "gpu-check.json").write_text(json.dumps(report, indent=2) + "\n")

    total = {key: sum(count[key] for count in counts.values()) for key in ("passed", "failed", "skipped")}
    print(f"gpu-check: sanitizer {report['sanitizer']}, benchmarks {report['bench']}; results in {out}")
    print(f"GPU TESTS: {total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped on {device}")
    bad = tests != 0 or not total["passed"] or any("FAILED" in told for told in report["sanitizer"].values())
    return 1 if bad or any(told != "ok" for told in report["bench"].values()) else 0


def library_problem() -> str | None:
    """Why the library beside the sources cannot be tested here; asked of a fresh process, since loading is for good."""
    code = (
        "from lyra_ops import _loader as l, _sources as s; i = l.build_info(); "
        "print(l.failure() or i.get('cuda_missing') or ('' if i.get('sources') == s.digest() else 'sources changed'))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        return (done.stderr.strip().splitlines() or [f"python ended with {done.returncode}"])[-1]
    return done.stdout.strip() or None


def sanitize(tool: str) -> str:
    """The tests marked `sanitize` under compute-sanitizer; the caching allocator is off because it hides bounds."""
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if program is None:
        return "not run: compute-sanitizer is not installed"
    command = [program, "--tool", tool, "--error-exitcode", "86", *pytest_command("gpu and sanitize"), "-x"]
    code = step(tool, command, SANITIZER, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    return {0: "clean", 5: "not run: no test is marked `sanitize`", 124: "not run to its end: out of time"}.get(
        code, f"FAILED (exit {code})"
    )


def bench(op: str, out: Path) -> str:
    left = STOP_AT - time.monotonic()
    if left < 20:
        return "not run: out of time"
    command = [sys.executable, "-m", "bench", op, "--device", "cuda", "--json", str(out / f"{op}.json")]
    code = step(f"bench {op}", command, left)
    return {0: "ok", 124: "not run to its end: out of time"}.get(code, f"FAILED (exit {code})")


def ops_with_benchmark() -> list[str]:
    ops = {source.parent.name for source in ROOT.glob("csrc/*/*.cu")}
    return sorted(op for op in ops if (ROOT / "bench" / f"{op}.py").exists())


def step(name: str, command: list[str], seconds: float, **environment: str) -> int:
    """Runs one step within its time and what is left of the whole; returns its exit code, 124 when time ran out."""
    seconds = max(1.0, min(seconds, STOP_AT - time.monotonic()))
    print(f"--- {name} (at most {seconds:.0f} s): {' '.join(command)}", flush=True)
    started = time.monotonic()
    try:
        code = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        code = 124
    print(f"--- {name}: exit {code} after {time.monotonic() - started:.0f} s", flush=True)
    return code


def pytest_command(marks: str) -> list[str]:
    # The model's tests need packages that a bare machine lacks, the shim's a compiler; neither has tests for a GPU.
    left_out = ["--ignore-glob=*/test_lyra_*.py", "--ignore-glob=*/host_shim/*"]
    return [sys.executable, "-m", "pytest", "-q", "-m", marks, "-p", "no:cacheprovider", *left_out]


def commit() -> str:
    """The commit of the sources; a tree without git has it from the library that came along."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
        return head.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        pass
    info = ROOT / "lyra_ops" / "build_info.json"
    known = json.loads(info.read_text()) if info.exists() else {}
    digest = runpy.run_path(str(ROOT / "lyra_ops" / "_sources.py"))["digest"]()
    return known.get("commit", "unknown") if known.get("sources") == digest else "unknown"


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


if __name__ == "__main__":
    sys.exit(main())
