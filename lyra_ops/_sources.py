"""A digest of what the compiled library is made of, so that a library from elsewhere is known to fit the source tree.

Only the standard library is needed here: setup.py runs this file before anything is installed.
"""

from __future__ import annotations

import hashlib
from pathlib import Path


def digest() -> str | None:
    """Of csrc/ and CMakeLists.txt; None where the package is installed without its source tree."""
    root = Path(__file__).resolve().parents[1]
    files = sorted(path for path in (root / "csrc").rglob("*") if path.is_file())
    if not files:
        return None
    total = hashlib.sha256()
    for path in [root / "CMakeLists.txt", *files]:
        total.update(f"{path.relative_to(root)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()[:16]
