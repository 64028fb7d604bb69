"""What a model name asks for: an expression over the adapters of a folder, and the key of its result."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastlora._version import __version__
from fastlora.core.names import CONFIG_NAME
from fastlora.errors import InputError
from fastlora.expressions.check import Checker
from fastlora.expressions.grammar import Node, names, parse
from fastlora.expressions.sums import shape, term_weights
from fastlora.files.json_files import parse_object, require_file

LONGEST = 400
"""Characters of a name: servers print them, and remember them."""
MOST_ADAPTERS = 16
NAME = re.compile(r"[^\W_][\w.-]*")
"""What an adapter may be called: no path, and nothing hidden."""
LARGEST_CONFIG = 2**24
LAYOUT = 1
"""Raised when the same expression would be written in another way."""

Stamp = list[tuple[str, int, int, int, int]]


@dataclass(frozen=True, slots=True)
class Request:
    """An expression, where its adapters lie, and the key under which its result is kept. ``weights``: those of
    what it adds up (:func:`fastlora.expressions.sums.term_weights`)."""

    text: str
    adapters: Mapping[str, Path]
    key: str
    weights: Mapping[object, float] | None


def is_expression(name: object) -> bool:
    """Whether a model name can be one of ours. A plain name is that of an adapter, which other resolvers serve."""
    return isinstance(name, str) and 0 < len(name) <= LONGEST and not NAME.fullmatch(name)


def read_request(text: str, folder: Path, base: str | None, what_else: object) -> Request:
    """What is to be composed for a model name.

    ``base``: what the adapters must name as their base model; ``None`` lets them name any. ``what_else``: plain data
    that the result depends on.

    The key is of all that the numbers depend on: the expression without its blanks, the files of the adapters (name,
    size, times, number), the version.

    Raises :class:`InputError` for what is no expression, for names of no adapter and for adapters of other models.
    """
    tree = parse(text)
    used = names(tree)
    if len(used) > MOST_ADAPTERS:
        raise InputError(f"the expression names {len(used)} adapters, more than {MOST_ADAPTERS}; merge some beforehand")
    known = [name for name in used if _is_adapter(folder, name)]
    if not Checker(text, known).check(tree):
        raise InputError("this is a number; an expression over adapters is needed")
    adapters = {name: folder / name for name in used}
    if base is not None:
        for name, path in adapters.items():
            _require_base(name, path, base)
    return Request(text, adapters, _key(tree, adapters, what_else), term_weights(tree, text))


def stamps(adapters: Mapping[str, Path]) -> dict[str, Stamp]:
    """What tells whether the files of some adapters are still the same."""
    return {name: _stamp(path) for name, path in adapters.items()}


def _is_adapter(folder: Path, name: str) -> bool:
    return NAME.fullmatch(name) is not None and (folder / name / CONFIG_NAME).is_file()


def _require_base(name: str, path: Path, base: str) -> None:
    file = path / CONFIG_NAME
    require_file(file, LARGEST_CONFIG)
    told = parse_object(file.read_bytes(), str(file)).get("base_model_name_or_path")
    if told != base:
        raise InputError(
            f"adapter {name!r} names the base model {told!r}, and {base!r} is served; serve that one, or if both are "
            "the same, correct the field or allow any (ANY_BASE=1)"
        )


def _stamp(directory: Path) -> Stamp:
    found = []
    for file in sorted(directory.iterdir()):
        status = file.stat()
        found.append((file.name, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino))
    return found


def _key(tree: Node, adapters: Mapping[str, Path], what_else: object) -> str:
    content = [LAYOUT, __version__, what_else, shape(tree), stamps(adapters)]
    return hashlib.sha256(json.dumps(content).encode("utf-8", "surrogatepass")).hexdigest()[:32]
