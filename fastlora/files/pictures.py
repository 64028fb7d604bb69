"""Pictures as files: what can be written, and writing it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fastlora.errors import InputError, OutputError
from fastlora.files.earlier import MARK, Overwrite, check_file
from fastlora.runtime.ranks import from_first


def require_matplotlib() -> None:
    """Refuses, before any work, plots that could not be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError("plots need matplotlib: `pip install fastlora[plot]`") from None


def check_picture(path: Path, overwrite: Overwrite = False) -> None:
    """Refuses, before any work, a picture that could not be written."""
    require_matplotlib()
    from matplotlib.backend_bases import FigureCanvasBase

    if _format(path) not in FigureCanvasBase.get_supported_filetypes():
        raise InputError(f"{path} is no name for a picture: end it in .png, .pdf, .svg or .jpg")
    check_file(path, overwrite=overwrite)
    if not path.absolute().parent.is_dir():
        raise OutputError(f"{path} cannot be written: there is no directory {path.absolute().parent}")


def _format(path: Path) -> str:
    return path.suffix[1:].lower()


def _marked(format: str) -> dict[str, Any]:
    """What makes a picture say who wrote it, where its format can."""
    if format in ("jpg", "jpeg"):
        return {"pil_kwargs": {"comment": MARK.encode()}}
    field = {"png": "Software", "pdf": "Creator", "svg": "Creator", "eps": "Creator", "ps": "Creator"}.get(format)
    return {} if field is None else {"metadata": {field: MARK}}


def load_pyplot() -> Any:
    """Matplotlib's ``pyplot``, drawing into files; :class:`InputError` where it is not installed."""
    require_matplotlib()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_picture(figure: Any, path: Path) -> Path:
    """Writes a picture that exists whole or not at all; of several ranks the first does."""
    unfinished = path.with_name(f".{path.name}.partial-{os.getpid()}")

    def write() -> None:
        figure.savefig(unfinished, format=_format(path), dpi=150, bbox_inches="tight", **_marked(_format(path)))
        os.replace(unfinished, path)

    try:
        from_first("drawing", write)
    finally:
        unfinished.unlink(missing_ok=True)
        load_pyplot().close(figure)
    return path
