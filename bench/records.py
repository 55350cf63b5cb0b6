"""The JSON that is kept of a measurement: where, and what says how its figures came about."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def folder(device: str) -> Path:
    return RESULTS / re.sub(r"\W+", "-", device_name(device)).strip("-").lower()


def origin(device: str, module: str | None = None, arguments: Sequence[str] = ()) -> dict:
    """module, arguments: of the command that measured; left out where its paths say nothing to others."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if device == "cuda"
        else None,
        "commit": commit(),
        **({"command": shlex.join(["python", "-m", module, *arguments])} if module else {}),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "load": os.getloadavg()[0],  # of the machine when this was made: well above `threads` means it was not alone
    }


def write(path: Path, record: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\nwritten to {path}")


def commit() -> str | None:
    """The commit, marked when files that the numbers depend on differ from it."""
    git = ("git", "-C", str(RESULTS.parent.parent))
    head = said(*git, "rev-parse", "--short=12", "HEAD")
    changed = said(*git, "status", "--porcelain", "--untracked-files=no", "--", "csrc", "lyra_ops", "bench/*.py")
    return f"{head}-dirty" if head and changed else head


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return found.group(1).strip() if found else "cpu"


def said(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None
