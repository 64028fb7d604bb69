"""Writing a model card beside a result."""

from __future__ import annotations

from pathlib import Path

from fastlora.core.names import CARD_NAME
from fastlora.files.disk_errors import writing


def write_card(directory: Path, text: str) -> None:
    """Writes ``README.md`` into a directory that is being staged."""
    with writing(directory / CARD_NAME):
        (directory / CARD_NAME).write_text(text, encoding="utf-8")
