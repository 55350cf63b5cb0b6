"""Builds CUDA kernel sources with g++ and the shim of lyra/host_cuda.h, and loads them as Python modules."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import pybind11
import pytest
import torch

ROOT = Path(__file__).parents[2]
FLAGS = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC"]

Build = Callable[..., ModuleType]
Switch = tuple[Path, int, int, str]


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """build(source, first=None): the module made of tests/host_shim/<source>; headers in `first` win over csrc's."""

    def build(source: str, first: Path | None = None) -> ModuleType:
        folder = tmp_path_factory.mktemp("host_shim")
        name = f"{Path(source).stem}_{folder.name}".replace("-", "_")
        library = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
        folders = [*([first] if first else []), ROOT / "csrc", ROOT / "csrc" / "include"]
        system = [sysconfig.get_path("include"), pybind11.get_include()]
        include = [f"-I{path}" for path in folders] + [f"-isystem{path}" for path in system]
        command = ["g++", *FLAGS, "-DLYRA_HOST_CUDA", f"-DLYRA_MODULE={name}", *include]
        subprocess.run([*command, str(ROOT / "tests" / "host_shim" / source), "-o", str(library)], check=True)
        spec = importlib.util.spec_from_file_location(name, library)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return build


SWITCHES = """#pragma once
#include <cstdlib>
namespace lyra {
inline bool without(int n) {
  const char* given = std::getenv("LYRA_WITHOUT");
  return given && std::atoi(given) == n;
}
inline int own_value(int value) { return value; }
}
"""


@pytest.fixture(scope="session")
def build_switched(build: Build, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """build_switched(source, switches): one build for all mutants of an op's headers.

    A switch (header, start, end, text) puts text in place of header's text[start:end]; in it WITHOUT is true while the
    environment's LYRA_WITHOUT is the number of the switch.
    """

    def build_switched(source: str, switches: Sequence[Switch]) -> ModuleType:
        op = switches[0][0].parent
        folder = tmp_path_factory.mktemp("switches")
        shutil.copytree(op, folder / op.name)
        (folder / op.name / "switches.h").write_text(SWITCHES)
        for header in {header for header, *_ in switches}:
            text = header.read_text()
            numbered = [(*span, n) for n, (where, *span) in enumerate(switches) if where == header]
            for start, end, instead, n in sorted(numbered, reverse=True):
                text = text[:start] + instead.replace("WITHOUT", f"without({n})") + text[end:]
            (folder / op.name / header.name).write_text('#include "switches.h"\n' + text)
        return build(source, first=folder)

    return build_switched


@pytest.fixture(scope="session")
def load_ops(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], None]:
    """load_ops(source): torch then has the ops that tests/host_shim/<source> registers, for CPU tensors."""

    def load_ops(source: str) -> None:
        library = tmp_path_factory.mktemp("host_shim") / f"{Path(source).stem}.so"
        home = Path(torch.__file__).parent
        folders = [ROOT / "tests" / "host_shim" / "without_gpu", ROOT / "csrc", ROOT / "csrc" / "include"]
        include = [f"-I{path}" for path in folders] + [f"-isystem{home / 'include'}"]
        command = ["g++", *FLAGS, "-DLYRA_HOST_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000", *include]
        linked = [f"-L{home / 'lib'}", "-ltorch_cpu", "-ltorch"]
        source = str(ROOT / "tests" / "host_shim" / source)
        subprocess.run([*command, source, "-o", str(library), *linked], check=True)
        torch.ops.load_library(library)

    return load_ops
