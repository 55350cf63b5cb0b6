"""`lyra` as a user types it, in processes of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMANDS = ("demo", "ask", "train", "eval", "bench", "env")


def lyra(*args: str, prelude: str = "") -> subprocess.CompletedProcess[str]:
    program = f"import sys\n{prelude}\nfrom lyra_model.cli import main\nsys.exit(main({list(args)!r}))"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)


def test_help_names_every_command_and_imports_none_of_them() -> None:
    check = "import atexit; atexit.register(lambda: print(sorted({'torch', 'transformers'} & set(sys.modules))))"
    done = lyra("--help", prelude=check)
    assert done.returncode == 0
    for command in COMMANDS:
        assert f"\n    {command} " in done.stdout
    assert done.stdout.endswith("[]\n")


def test_unknown_command_is_one_line_and_exit_code_2() -> None:
    done = lyra("sing")
    assert done.returncode == 2
    assert "invalid choice: 'sing'" in done.stderr
    assert "Traceback" not in done.stderr


def test_missing_extra_is_named_in_one_line() -> None:
    hide = "class Hide:\n  def find_spec(self, name, *_):\n    if name.split('.')[0] == 'transformers':\n      "
    hide += "raise ModuleNotFoundError(f'No module named {name!r}', name=name)\nsys.meta_path.insert(0, Hide())"
    done = lyra("ask", "--text", "Hello", prelude=hide)
    assert done.returncode == 2
    assert done.stderr == "lyra ask: error: the package 'transformers' is missing: pip install 'lyra-omni[model]'\n"


def test_wrong_input_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    done = lyra("ask", "--audio", str(tmp_path / "nothing.wav"))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("lyra ask: error: ")
    assert "nothing.wav" in line


def test_env_as_a_command_and_as_a_module() -> None:
    as_command = lyra("env")
    as_module = subprocess.run([sys.executable, "-m", "lyra_ops.env"], capture_output=True, text=True, cwd=ROOT)
    assert as_command.returncode == as_module.returncode == 0
    assert as_command.stdout == as_module.stdout
