"""A plugin of pytest that writes the name of a test down when it fails: a run that is stopped tells no failure."""

from __future__ import annotations

import os
from typing import Any


def pytest_runtest_logreport(report: Any) -> None:
    """Appends to the file FASTLORA_FAILING, from the process that gathers the results."""
    path = os.environ.get("FASTLORA_FAILING")
    if path and report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        with open(path, "a", encoding="utf-8") as file:
            file.write(report.nodeid + "\n")
