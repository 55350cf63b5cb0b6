"""Builds lyra_ops/_C.so with CMake; everything that is static stands in pyproject.toml.

The library holds no Python symbols and speaks torch's stable ABI, so one wheel serves every Python 3 and torch >= 2.10.
torch is found by its folder and never imported: under pip's build isolation it is not importable, but the environment
that the package goes to has it, and its headers are all that is needed.
"""

import fcntl
import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
NO_TORCH = """
lyra: torch >= 2.10 was not found, and its headers are needed to build the ops. Looked in:
  {looked}
Install torch first (for example: pip install torch), then lyra. With uv, or another tool whose isolated build cannot
see the environment it installs to, add --no-build-isolation.
"""


def torch_dir() -> Path:
    """The torch package of the environment that is being installed to."""
    looked = []
    spec = importlib.util.find_spec("torch")
    if spec and spec.origin:
        looked.append(Path(spec.origin).parent)
    for prefix in (sys.prefix, sys.base_prefix):
        paths = sysconfig.get_paths(vars={"base": prefix, "platbase": prefix})
        looked += [Path(paths[key]) / "torch" for key in ("purelib", "platlib")]
    for folder in looked:
        if (folder / "include/torch/csrc/stable/library.h").exists():
            return folder
    raise SystemExit(NO_TORCH.format(looked="\n  ".join(dict.fromkeys(map(str, looked)))))


def commit() -> str:
    """The commit of the source tree, marked when files that go into the library differ from it."""

    def git(*args: str) -> str:
        return subprocess.run(["git", "-C", ROOT, *args], capture_output=True, text=True, check=True).stdout.strip()

    try:
        dirty = git("status", "--porcelain", "csrc", "CMakeLists.txt")
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


class CMakeBuild(build_ext):
    """build_ext whose one extension is the CMake target."""

    def run(self) -> None:
        into = ROOT if self.inplace or self.editable_mode else Path(self.build_lib)
        work = ROOT / "build" / "cmake"
        work.mkdir(parents=True, exist_ok=True)
        with open(work / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # ninja does not guard a folder against a second ninja
            self.cmake(work)
            for name in ("_C.so", "build_info.json"):
                target = into / "lyra_ops" / name
                target.parent.mkdir(parents=True, exist_ok=True)
                # Replaced, not overwritten: a running process may have the old library mapped.
                shutil.copy2(work / name, target.with_suffix(".new"))
                os.replace(target.with_suffix(".new"), target)

    def cmake(self, work: Path) -> None:
        digest = runpy.run_path(str(ROOT / "lyra_ops" / "_sources.py"))["digest"]()
        known = {"LYRA_TORCH_DIR": torch_dir(), "LYRA_COMMIT": commit(), "LYRA_SOURCES": digest}
        configure = ["cmake", "-S", ROOT, "-B", work, *(f"-D{name}={value}" for name, value in known.items())]
        ninja = shutil.which("ninja")
        if ninja:
            # Named each time: the ninja of an isolated build is gone by the next one.
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        try:
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", work, "--parallel", str(os.cpu_count())], check=True)
        except FileNotFoundError:
            raise SystemExit("lyra: cmake was not found; pip install cmake ninja") from None
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"lyra: the build of lyra_ops/_C.so failed (exit {error.returncode}), see above") from None

    def get_outputs(self) -> list[str]:
        return [str(Path(self.build_lib) / "lyra_ops" / name) for name in ("_C.so", "build_info.json")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class AnyPython(bdist_wheel):
    """A wheel for one platform and every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("lyra_ops._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": AnyPython},
)
