"""The `lyra` command: picks the subcommand, imports only what that one needs, and turns errors into one clear line.

A subcommand is a module with `add_arguments(parser)` and `run(args) -> int | None`.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# name: (module, the pip extra it needs, help)
COMMANDS = {
    "demo": ("lyra_model.demo", "model", "ask Nano Lyra a few spoken questions and see, hear and time its answers"),
    "ask": ("lyra_model.ask", "model", "answer one question given as audio, text or both"),
    "train": ("lyra_model.train", "train", "train the speech projector and adapters, with checkpoints and resume"),
    "eval": ("lyra_model.evaluate", "train", "word error rate and spoken-against-typed answers on held-out speech"),
    "bench": (None, "bench", "benchmark the ops against their peers (the same as `python -m bench`)"),
    "env": ("lyra_ops.env", None, "what is installed, which backends work, and what to do about those that do not"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `lyra <command>`; returns its exit code, 2 for wrong input or a missing package."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command = argv[0] if argv and argv[0] in COMMANDS else None
    try:
        if command == "bench":
            return _bench(argv[1:])
        args = _parser(command).parse_args(argv)
        return importlib.import_module(COMMANDS[args.command][0]).run(args) or 0
    except ModuleNotFoundError as error:
        return _fail(command, _missing_package(command, error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `lyra env | head`: nobody reads on
        return 0
    except (ValueError, OSError) as error:
        return _fail(command, str(error))
    except KeyboardInterrupt:
        return 130


def _parser(command: str | None) -> argparse.ArgumentParser:
    """The parser; only the arguments of the command at hand are filled in, so that no other module is imported."""
    parser = argparse.ArgumentParser(prog="lyra", description="Lyra: omni-modal ops and the small model built on them.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (module, _, text) in COMMANDS.items():
        sub = subparsers.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name == command:
            importlib.import_module(module).add_arguments(sub)
    return parser


def _bench(argv: list[str]) -> int:
    """Benchmarks are run from the source tree, where their results are kept too; they are not installed."""
    root = Path(__file__).resolve().parents[1]
    if not (root / "bench" / "__main__.py").exists():
        raise FileNotFoundError("the benchmarks live in the source tree: clone it and run `lyra bench` there")
    return subprocess.run([sys.executable, "-m", "bench", *argv], cwd=root, check=False).returncode


def _missing_package(command: str | None, error: ModuleNotFoundError) -> str:
    extra = COMMANDS[command][1] if command else None
    name = error.name or str(error)
    if extra is None or name.split(".")[0] in ("lyra_ops", "lyra_model"):
        return str(error)
    return f"the package {name!r} is missing: pip install 'lyra-omni[{extra}]'"


def _fail(command: str | None, message: str) -> int:
    print(f"lyra{' ' + command if command else ''}: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
