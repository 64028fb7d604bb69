"""The page as text: a template, styles and scripts in one file that loads nothing.

Charts are drawn by scripts of our own, of some 25 kB: a heat map of a thousand adapters is a million cells, which a
canvas shows from two bytes each; a library for charts alone would take more room than the largest page with it.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import math
from importlib import resources
from typing import TYPE_CHECKING, Any

from fastlora.errors import InputError
from fastlora.views.text import escaped

if TYPE_CHECKING:
    from jinja2 import Environment

SCRIPTS = ("base.js", "tables.js", "charts.js", "heat.js", "cards.js", "decompositions.js", "start.js")
UNSAFE = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}
"""What could end a script block, or a line of one."""


def require_jinja() -> None:
    """Refuses, before any work, a page that could not be made."""
    try:
        import jinja2  # noqa: F401
    except ImportError:
        raise InputError("a page needs jinja2: `pip install fastlora[report]`") from None
    try:
        import scipy  # noqa: F401
    except ImportError:
        raise InputError("a page needs scipy, for the order of its heat map: `pip install fastlora[report]`") from None


def rendered(printed: dict[str, Any], drawn: dict[str, Any]) -> str:
    """The whole page. Every text is escaped twice: what cannot be printed, and what HTML would read as markup."""
    style, script = _asset("page.css"), _script()
    environment = _environment()
    page: str = environment.get_template("page.html").render(
        **_shown(printed),
        style=style,
        script=script,
        style_hash=_digest(style),
        script_hash=_digest(script),
        data=script_data(_shown(drawn)),
    )
    return page


def script_data(data: Any) -> str:
    """JSON that a script block can hold."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).translate(UNSAFE)


def _shown(value: Any) -> Any:
    """Plain data whose texts can be printed; ``None`` for numbers that JSON lacks."""
    if isinstance(value, str):
        return value if value.isprintable() else "\n".join(map(escaped, value.split("\n")))
    if isinstance(value, dict):
        return {key: _shown(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_shown(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def _digest(text: str) -> str:
    """What a policy allows a script or a style by."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}"


def _script() -> str:
    """All scripts in a scope of their own."""
    return "(() => {\n'use strict';\n" + "".join(map(_asset, SCRIPTS)) + "})();\n"


def _asset(name: str) -> str:
    return (resources.files("fastlora.pages") / "assets" / name).read_text(encoding="utf-8")


@functools.cache
def _environment() -> Environment:
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    environment = Environment(
        loader=FunctionLoader(_asset),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "share": share, "short": short, "whole": whole}
    return environment


def number(value: float | None) -> str:
    """Three digits or four; a dash for what is not known."""
    return "–" if value is None or math.isnan(value) else f"{value:.4g}" if abs(value) >= 1 else f"{value:.3g}"


def share(value: float | None) -> str:
    """A cosine or a share, to three decimals."""
    return "–" if value is None or math.isnan(value) else f"{value:.3f}"


def short(value: int) -> str:
    """A large count in thousands, millions or billions."""
    for size, name in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if name == 'k' else size):.3g} {name}"
    return str(value)


def whole(value: int) -> str:
    """A count with its thousands apart."""
    return f"{value:,}".replace(",", "\u202f")
