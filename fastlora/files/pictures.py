"""Pictures as files: what can be written, and writing it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fastlora.errors import InputError, OutputError


def require_matplotlib() -> None:
    """Refuses, before any work, plots that could not be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError("plots need matplotlib: `pip install fastlora[plot]`") from None


def check_picture(path: Path, overwrite: bool = False) -> None:
    """Refuses, before any work, a picture that could not be written."""
    require_matplotlib()
    from matplotlib.backend_bases import FigureCanvasBase

    if _format(path) not in FigureCanvasBase.get_supported_filetypes():
        raise InputError(f"{path} is no name for a picture: end it in .png, .pdf, .svg or .jpg")
    if path.is_dir() or (os.path.lexists(path) and not overwrite):
        raise OutputError(f"{path} exists; choose another name" + ("" if path.is_dir() else ", or use --overwrite"))
    if not path.absolute().parent.is_dir():
        raise OutputError(f"{path} cannot be written: there is no directory {path.absolute().parent}")


def _format(path: Path) -> str:
    return path.suffix[1:].lower()


def load_pyplot() -> Any:
    """Matplotlib's ``pyplot``, drawing into files; :class:`InputError` where it is not installed."""
    require_matplotlib()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_picture(figure: Any, path: Path) -> Path:
    """Writes a picture that exists whole or not at all."""
    unfinished = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        figure.savefig(unfinished, format=_format(path), dpi=150, bbox_inches="tight")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
        load_pyplot().close(figure)
    return path
