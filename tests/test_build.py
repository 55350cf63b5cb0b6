"""The library as a product: its ABI, builds without CUDA or torch, and a wheel where there is no compiler."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from lyra_ops import _loader

ROOT = Path(__file__).parents[1]
SITE_PACKAGES = Path(sysconfig.get_path("purelib"))


def run(*command: object, **kwargs: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, **kwargs)


def output(*command: object, **kwargs: object) -> str:
    done = run(*command, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def path_without(folder: Path, *programs: str) -> str:
    """A PATH on which everything is found but these programs (and what a build finds by itself: the CUDA folders)."""
    folder.mkdir()
    for place in reversed(os.environ["PATH"].split(os.pathsep)):
        for program in Path(place).iterdir() if Path(place).is_dir() else ():
            if program.name not in programs:
                (folder / program.name).unlink(missing_ok=True)
                (folder / program.name).symlink_to(program)
    return str(folder)


@pytest.fixture
def source_tree(tmp_path: Path) -> Path:
    """A copy of the sources, so that a build under test does not touch the library that other tests use."""
    tree = tmp_path / "source"
    ignore = shutil.ignore_patterns(
        ".*", "build", "__pycache__", "*.so", "build_info.json", "*.egg-info", "weights", "bench"
    )
    shutil.copytree(ROOT, tree, ignore=ignore)
    return tree


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """An empty virtual environment; returns its python."""
    venv.create(tmp_path / "venv", symlinks=True)
    return tmp_path / "venv" / "bin" / "python"


def lend(python: Path, *packages: str) -> None:
    """Gives an environment some of our packages, one link each: a whole folder would bring an editable lyra along."""
    site = Path(output(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    for package in packages:
        for found in [*SITE_PACKAGES.glob(package), *SITE_PACKAGES.glob(f"{package}.py")]:
            (site / found.name).symlink_to(found)


def test_library_loads() -> None:
    assert _loader.failure() is None


def test_library_uses_only_the_stable_abi_of_torch_2_10() -> None:
    pytest.importorskip("torch_abi_audit", reason="torch-abi-audit is not installed")
    report = json.loads(output(sys.executable, "-m", "torch_abi_audit.cli", _loader.LIBRARY, "--json"))
    (library,) = report["bundled_libs"]
    assert library["torch"]["stable"], library["torch"]["unstable_symbols"]
    assert not library["torch"]["unknown_shim_symbols"]
    assert tuple(map(int, library["torch"]["min_torch_version"].split("."))) <= (2, 10, 0)


def test_library_knows_no_python_and_no_libtorch_cuda() -> None:
    symbols = [line.split() for line in output("nm", "-D", "--undefined-only", _loader.LIBRARY).splitlines()]
    assert not [name for *_, name in symbols if name.startswith(("Py", "_Py"))]
    kinds = {name: kind for kind, name in (line[-2:] for line in symbols)}
    # A strong reference would keep the library from loading on a torch without CUDA.
    assert kinds.get("aoti_torch_get_current_cuda_stream", "w") == "w"
    dynamic = output("readelf", "-d", _loader.LIBRARY)
    needed = [line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "NEEDED" in line]
    # Through libtorch.so alone does that weak symbol find libtorch_cuda where there is one.
    assert "libtorch.so" in needed
    assert not [name for name in needed if "cuda" in name or "python" in name]
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic


def test_cuda_kernels_are_in_the_library_wherever_nvcc_is() -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH: the library under test holds CPU ops only")
    assert _loader.build_info()["cuda_missing"] == ""
    assert ".nv_fatbin" in output("readelf", "-S", "-W", _loader.LIBRARY)


@pytest.mark.slow
def test_build_without_nvcc_has_all_cpu_ops_and_says_why_cuda_is_missing(source_tree: Path, tmp_path: Path) -> None:
    environ = {**os.environ, "PATH": path_without(tmp_path / "bin", "nvcc")}
    for variable in ("CUDACXX", "CUDA_PATH", "CUDA_HOME"):
        environ.pop(variable, None)
    built = output(sys.executable, "setup.py", "-q", "build_ext", "--inplace", cwd=source_tree, env=environ)
    assert "CPU ops only: nvcc was not found" in built
    told = output(sys.executable, "-m", "lyra_ops.env", cwd=source_tree, env=environ)
    assert "CUDA kernels: NONE: nvcc was not found" in told
    assert "nvcc      not found" in told
    assert "install the CUDA toolkit" in told
    listed = "import torch, lyra_ops; print([op for op in torch._C._dispatch_get_all_op_names() if 'lyra::' in op])"
    here, there = (output(sys.executable, "-c", listed, cwd=tree, env=environ) for tree in (ROOT, source_tree))
    assert "lyra::" in here
    assert here == there


def test_build_without_torch_stops_with_what_to_do(source_tree: Path, environment: Path) -> None:
    lend(environment, "setuptools", "_distutils_hack", "wheel")
    done = run(environment, "setup.py", "-q", "build_ext", "--inplace", cwd=source_tree)
    assert done.returncode != 0
    assert "torch >= 2.10 was not found" in done.stderr
    assert "Install torch first" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_wheel_works_in_a_clean_environment_without_a_compiler(
    source_tree: Path, environment: Path, tmp_path: Path
) -> None:
    """Built from the sdist, so that what the sdist lacks is noticed too."""
    output(sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path, cwd=source_tree)
    (sdist,) = tmp_path.glob("*.tar.gz")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    output(*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, sdist, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-linux_x86_64.whl")

    lend(environment, "torch", "torchgen", "functorch", "typing_extensions", "sympy", "mpmath", "filelock", "networkx")
    lend(environment, "jinja2", "markupsafe", "fsspec")
    output(*pip, "--python", environment, "install", "-q", "--no-deps", "--no-index", wheel)
    program = (
        "import torch, lyra_ops; x = torch.rand(2, 5, 4, requires_grad=True); "
        "lyra_ops.soft_dtw_from_cost(x, backend='cpu').sum().backward(); "
        "assert x.grad.isfinite().all() and lyra_ops.__file__.startswith({home!r}), lyra_ops.__file__"
    )
    home = environment.parents[1]
    bare = {"PATH": "/nonexistent", "HOME": str(tmp_path)}
    output(environment, "-c", program.format(home=str(home)), cwd=tmp_path, env=bare)
    told = output(home / "bin" / "lyra", "env", cwd=tmp_path, env=bare)
    assert "nvcc      not found" in told
    assert " loaded" in told
