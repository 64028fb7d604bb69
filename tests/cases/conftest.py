"""The right values of reported faults; what runs the command line is in ``tests/cli``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "cli"))
