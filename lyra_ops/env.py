"""`lyra env`: on one screen, what is installed, which backends work, why the others do not, and what to do about it."""

from __future__ import annotations

import argparse
import importlib.util
import json
import pkgutil
import platform
import re
import shutil
import subprocess
import sys
import textwrap
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import lyra_ops
from lyra_ops import _loader, _sources
from lyra_ops._backend import BACKENDS

RESULTS = Path(__file__).resolve().parents[1] / "bench" / "results"
PACKAGES = {
    "model": ("transformers", "peft", "safetensors", "soundfile", "soxr", "gguf", "piper-tts"),
    "train": ("accelerate", "jiwer"),
    "bench": ("numba", "tslearn", "pytest-benchmark"),
    "gpu": ("triton", "cupy"),
    "flash": ("flash-attn",),
}
OLDEST_GPU = (8, 0)
HOW_NVCC = "install the CUDA toolkit (12.0 or newer), put nvcc on PATH and build again"


def collect() -> dict[str, Any]:
    """Everything that the report says, as plain data."""
    ops = [m.name for m in pkgutil.iter_modules(lyra_ops.__path__) if m.ispkg and _has(m.name, "reference")]
    info = {
        "lyra": _version("lyra-omni") or "source tree, not installed",
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}",
        "torch": torch.__version__,
        "library": {"path": str(_loader.LIBRARY), "failure": _loader.failure(), **_loader.build_info()},
        "nvcc": _nvcc(),
        "gpu": _gpu(),
        "packages": {extra: {name: _version(name) for name in names} for extra, names in PACKAGES.items()},
        "ops": {name: _op(name) for name in sorted(ops)},
    }
    info["to_do"] = _to_do(info)
    return info


def render(info: dict[str, Any]) -> str:
    """The report as text."""
    library, gpu = info["library"], info["gpu"]
    lines = [
        f"lyra      {info['lyra']}; python {info['python']}; {info['system']}",
        f"torch     {info['torch']}",
        f"library   {library['path']}",
        f"          {'NOT LOADED: ' + library['failure'] if library['failure'] else 'loaded'}",
    ]
    if "commit" in library:
        cuda = library["cuda_missing"] or f"nvcc {library['nvcc']} for {library['cuda_architectures']}"
        lines.append(f"          built from {library['commit']} with torch {library['torch']}, {library['cxx']}")
        lines.append(f"          CUDA kernels: {'NONE: ' if library['cuda_missing'] else ''}{cuda}")
    lines.append(f"nvcc      {info['nvcc'] or 'not found'}")
    lines.append(f"GPU       {'; '.join(gpu['devices']) or 'none that torch can use'}")
    if gpu["driver"]:
        lines.append(f"          driver {gpu['driver']}")
    lines.append("")
    for name, op in info["ops"].items():
        for device, chosen in op["chosen"].items():
            unusable = op["unusable"][device]
            usable = ", ".join(b for b in BACKENDS if b not in unusable)
            lines.append(f"{name + ' on ' + device:<22} {chosen:<10} usable: {usable}")
            best = "cuda" if device == "cuda" else "cpu"
            if best in unusable:
                reason = "see library" if library["failure"] else unusable[best]
                lines[-1] += f"; not {best}: {reason}"
        for path, proof in op["proven"].items():
            lines.append(f"{'':<22} {path}: {proof}")
    lines.append("")
    for extra, packages in info["packages"].items():
        have = [f"{name} {version}" for name, version in packages.items() if version]
        lack = [name for name, version in packages.items() if not version]
        lines.append(f"[{extra}]".ljust(10) + ", ".join(have) + (f"  missing: {', '.join(lack)}" if lack else ""))
    lines += ["", "To do:" if info["to_do"] else "Nothing is missing."]
    lines += [f"  - {step}" for step in info["to_do"]]
    return "\n".join(textwrap.fill(line, 118, subsequent_indent=" " * 10) for line in lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="the report as JSON, every reason included")


def run(args: argparse.Namespace) -> int:
    info = collect()
    print(json.dumps(info, indent=2) if args.json else render(info))
    return 0


def _op(name: str) -> dict[str, Any]:
    """Per device: the backend of a plain call, and why each other one cannot serve; per GPU path: where it was proven.

    A single call may ask for what only the reference can do: `lyra_ops.backend_of` tells for that call.
    """
    triton = _triton(name)
    unusable = {
        "cpu": {"cuda": "works on GPU tensors", "triton": "works on GPU tensors", "cpu": _compiled(name, "cpu")},
        "cuda": {"cuda": _compiled(name, "cuda"), "triton": triton, "cpu": "works on CPU tensors"},
    }
    paths = {backend for backend in ("cuda", "triton") if unusable["cuda"][backend] is None}
    proofs = _proofs(name)
    return {
        "unusable": {device: {b: why for b, why in reasons.items() if why} for device, reasons in unusable.items()},
        "chosen": {
            device: next(b for b in BACKENDS if b == "reference" or reasons[b] is None)
            for device, reasons in unusable.items()
        },
        "proven": {path: proofs.get(path, "never run on a GPU") for path in sorted(paths | set(proofs))},
    }


def _has(op: str, part: str) -> bool:
    return importlib.util.find_spec(f"lyra_ops.{op}.{part}") is not None


def _compiled(op: str, device: str) -> str | None:
    """None if the op has kernels for the device, or makes do with torch's own, else why not."""
    if device == "cpu" and _has(op, "cpu"):
        return None
    if (reason := _loader.failure()) is not None:
        return reason
    raw = [
        name.removeprefix("lyra::") for name in torch._C._dispatch_get_all_op_names() if name.startswith(f"lyra::{op}")
    ]
    if not raw:
        return "not written yet"
    reasons = [_loader.missing(name, device) for name in raw]
    return None if None in reasons else reasons[0]


def _triton(op: str) -> str | None:
    if not _has(op, "triton"):
        return "not written yet"
    return None if importlib.util.find_spec("triton") else "triton is not installed: pip install triton"


def _proofs(op: str) -> dict[str, str]:
    """Per kernel path the GPU and commit on which its tests last ran, from what `make gpu-check` wrote."""
    runs = [json.loads(file.read_text()) for file in RESULTS.glob("*/gpu-check.json")]
    proofs = {}
    for run in sorted(runs, key=lambda run: run["date"]):
        for path, count in run["tests"].items():
            if path.startswith(f"{op}/"):
                told = ", ".join(f"{count[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped"))
                where = f"on {run['device']} at {run['commit']} ({run['date'][:10]})"
                proofs[path.removeprefix(f"{op}/")] = f"{told} {where}"
    return proofs


def _nvcc() -> str | None:
    path = shutil.which("nvcc")
    if path is None:
        return None
    version = re.search(r"V([\d.]+)", _output(path, "--version"))
    return f"{version.group(1) if version else 'unknown version'} ({path})"


def _gpu() -> dict[str, Any]:
    """GPUs that torch can use, and what the driver says, which may know of GPUs that this torch cannot use."""
    devices = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            devices.append(f"{gpu.name} (sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB)")
    seen = _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    return {"devices": devices, "driver": seen.split(",")[-1].strip() if "," in seen else None}


def _to_do(info: dict[str, Any]) -> list[str]:
    """In words, what to do for each thing that is missing; most important first."""
    library, gpu = info["library"], info["gpu"]
    steps = []
    if library["failure"]:
        steps.append(f"compiled ops: {_loader.HOW_TO_BUILD} (until then the plain-torch reference serves, slower)")
    elif (digest := _sources.digest()) and digest != library.get("sources"):
        steps.append("compiled ops: older than the sources beside them; `make build`")
    has_gpu = bool(gpu["devices"] or gpu["driver"])
    if not has_gpu:
        steps.append("GPU: none found; the CPU ops are complete, CUDA ops need an NVIDIA GPU of sm_80 or newer")
    elif not gpu["devices"]:
        steps.append(
            f"GPU: the driver sees one, but torch {info['torch']} cannot use it; install a CUDA build of torch"
        )
    elif any(torch.cuda.get_device_capability(i) < OLDEST_GPU for i in range(torch.cuda.device_count())):
        steps.append("GPU: older than sm_80; the CUDA kernels do not run there, ask for backend='reference'")
    if library.get("cuda_missing"):
        fix = HOW_NVCC if info["nvcc"] is None else f"nvcc is here now: {_loader.HOW_TO_BUILD}"
        steps.append(f"CUDA kernels: {library['cuda_missing']}; {fix}")
    elif info["nvcc"] is None and library["failure"]:
        steps.append(f"nvcc: not found, so a build makes CPU ops only; {HOW_NVCC}")
    for extra, packages in info["packages"].items():
        if extra in ("gpu", "flash") and not has_gpu:
            continue
        if not all(packages.values()):
            steps.append(f"extra {extra!r}, if you want it: pip install 'lyra-omni[{extra}]'")
    return steps


def _version(package: str) -> str | None:
    """The installed version, without importing the package; CuPy's name carries its CUDA version."""
    names = [package] if package != "cupy" else ["cupy-cuda13x", "cupy-cuda12x", "cupy"]
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _output(*command: str) -> str:
    """What a program prints, "" if it is absent or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="lyra env", description=__doc__)
    add_arguments(parser)
    sys.exit(run(parser.parse_args()))
