"""Measurements as lines of JSON, which a process that dies leaves as far as they are whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read(path: Path, start: int = 0) -> list[dict[str, Any]]:
    """The objects in a file from byte ``start`` on, none where there is no file; what is no whole object is left out,
    such as a last line that was cut."""
    if not path.exists():
        return []
    found = []
    for line in path.read_bytes()[start:].splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            found.append(row)
    return found
