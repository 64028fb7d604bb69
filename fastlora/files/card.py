"""Writing a model card beside a result."""

from __future__ import annotations

from pathlib import Path

from fastlora.core.names import CARD_NAME
from fastlora.files.small_files import write_text


def write_card(directory: Path, text: str) -> None:
    """Writes ``README.md`` into a directory that is being staged."""
    write_text(directory, CARD_NAME, text)
