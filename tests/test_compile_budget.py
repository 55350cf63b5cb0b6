"""Kernels stay within the registers that their header promises, and never spill: nvcc knows it without a GPU.

A header says it in lines of the form `budget sm_80: forward_kernel<float> 128, forward_kernel<double> 128`; what one
step of an inner loop takes at most, in lines of the form `loop sm_80: forward_kernel<float> 87 instructions`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "csrc"
STEPS = 16  # csrc/soft_dtw/pairs.h: kSteps, what a loop of a sweep is unrolled by


def nvdisasm() -> str | None:
    """Triton brings one along."""
    triton = find_spec("triton")
    brought = triton and Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    return shutil.which("nvdisasm") or (str(brought) if brought and brought.exists() else None)


def budgets() -> dict[tuple[str, str], dict[str, int]]:
    """{(header, architecture): {kernel: registers}} as the headers csrc/<op>/*.cuh say."""
    found = {}
    for header in sorted(CSRC.glob("*/*.cuh")):
        for arch, kernels in re.findall(r"budget (sm_\w+): (.+)", header.read_text()):
            said = {kernel: int(registers) for kernel, registers in re.findall(r"([\w:]+<[^>]+>|\w+) (\d+)", kernels)}
            found.setdefault((str(header.relative_to(CSRC)), arch), {}).update(said)
    return found


def loops() -> list[tuple[str, str, str, int]]:
    """(header, architecture, kernel, instructions) as the headers say."""
    return [
        (str(header.relative_to(CSRC)), arch, kernel, int(count))
        for header in sorted(CSRC.glob("*/*.cuh"))
        for arch, kernel, count in re.findall(r"loop (sm_\w+): (\S+<[^>]+>) (\d+) instructions", header.read_text())
    ]


def nvcc(header: str, arch: str, kernels: list[str], folder: Path, output: str) -> str:
    """Compiles the kernels to ``folder / output``; returns what ptxas says of them."""
    op = Path(header).parent.name
    taken = ", ".join(f"(void*)lyra::{op}::{kernel}" for kernel in kernels)
    source = folder / "kernels.cu"
    source.write_text(f'#include "{header}"\nvoid* kernels[] = {{{taken}}};\n')
    number = arch.removeprefix("sm_")
    target = f"-gencode=arch=compute_{number},code={arch}"
    flags = [
        "-std=c++20",
        "-O3",
        "--expt-relaxed-constexpr",
        "-Xptxas",
        "-v",
        target,
        f"-I{CSRC}",
        f"-I{CSRC / 'include'}",
    ]
    what = "-cubin" if output.endswith(".cubin") else "-c"
    command = ["nvcc", *flags, what, str(source), "-o", str(folder / output)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def compiled(header: str, arch: str, kernels: list[str], folder: Path) -> dict[str, tuple[int, int]]:
    """{kernel: (registers, bytes spilled or kept in local memory)}"""
    op = Path(header).parent.name
    told = nvcc(header, arch, kernels, folder, "kernels.o")
    told = subprocess.run(["c++filt"], input=told, capture_output=True, text=True, check=True).stdout
    result = {}
    for part in told.split("Compiling entry function")[1:]:
        kernel = re.search(rf"lyra::{op}::([\w:]+(?:<[^>]*>)?)\(", part).group(1)
        local = [int(x) for x in re.search(r"(\d+) bytes stack frame, (\d+) .*?, (\d+) ", part).groups()]
        result[kernel] = (int(re.search(r"Used (\d+) registers", part).group(1)), sum(local))
    return result


def test_every_kernel_header_has_a_budget_for_both_architectures():
    headers = {str(header.relative_to(CSRC)) for header in CSRC.glob("*/*.cuh")}
    assert set(budgets()) == {(header, arch) for header in headers for arch in ("sm_80", "sm_90a")}


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize(("header", "arch"), budgets())
def test_registers_and_spills(header: str, arch: str, tmp_path: Path):
    allowed = budgets()[header, arch]
    used = compiled(header, arch, list(allowed), tmp_path)
    # A header may include another of its op, whose kernels are then compiled, too.
    included = {k for (other, a), kernels in budgets().items() if other != header and a == arch for k in kernels}
    used = {kernel: figures for kernel, figures in used.items() if kernel in allowed or kernel not in included}
    assert set(used) == set(allowed)
    assert {kernel: spilled for kernel, (_, spilled) in used.items() if spilled} == {}
    too_many = {k: f"{registers} > {allowed[k]}" for k, (registers, _) in used.items() if registers > allowed[k]}
    assert too_many == {}


def shortest_shuffling_loop(code: str) -> int:
    """Instructions from a label to the first jump back to it that has two shuffles per step between."""
    instructions, labels = [], {}
    for line in code.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.+?);", line):
            instructions.append(instruction[1])
            jump = re.search(r"BRA.*`\((\.L_x_\d+)\)", instruction[1])
            body = instructions[labels.get(jump[1], len(instructions)) :] if jump else []
            if sum("SHFL" in one for one in body) >= 2 * STEPS:
                return len(body)
    raise AssertionError("no loop that shuffles")


@pytest.mark.skipif(shutil.which("nvcc") is None or nvdisasm() is None, reason="needs nvcc and nvdisasm")
@pytest.mark.parametrize(("header", "arch", "kernel", "most"), loops())
def test_instructions_per_step(header: str, arch: str, kernel: str, most: int, tmp_path: Path):
    nvcc(header, arch, [kernel], tmp_path, "kernel.cubin")
    command = [nvdisasm(), "-c", str(tmp_path / "kernel.cubin")]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert shortest_shuffling_loop(code) <= most * STEPS


def test_the_loops_of_the_sweeps_have_a_budget_for_both_architectures():
    assert {(arch, kernel.split("<")[0]) for _, arch, kernel, _ in loops()} == {
        (arch, f"{way}_kernel") for arch in ("sm_80", "sm_90a") for way in ("forward", "backward")
    }
