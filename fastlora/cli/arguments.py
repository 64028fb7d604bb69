"""``NAME=PATH:WEIGHT``: an adapter, or a folder of adapters, as an argument."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fastlora.core.names import CONFIG_NAME, check_name, check_names_differ
from fastlora.errors import InputError
from fastlora.files.locate import exists, find


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """One adapter as the command line names it: ``PATH``, ``PATH:WEIGHT`` or ``NAME=PATH[:WEIGHT]``.

    ``weight`` is ``None`` where none was given. The path may be a folder that holds adapters: such a folder has no
    name of its own.
    """

    name: str
    path: Path
    weight: float | None = None
    is_named: bool = False

    @property
    def may_be_folder(self) -> bool:
        """Whether the path may hold adapters rather than be one; only a look at all formats, with torch, tells."""
        return self.path.is_dir() and not (self.path / CONFIG_NAME).exists() and any(self.path.iterdir())


def parse(text: str) -> AdapterSpec:
    """Reads one adapter argument; an existing path wins over a reading with ``:`` or ``=``.

    Raises :class:`InputError` for what exists in no reading, a weight that is no finite number, or an
    unusable name.
    """
    readings = list(_readings(text))
    existing = next((r for r in readings if exists(r[1])), None)
    # Where nothing exists, the reading with the most parts is what was meant: it gives the clearest message,
    # and a Hub id is not there yet.
    name, path, weight = existing or readings[-1]
    located = find(path)
    number = None if weight is None else _weight(weight, text)
    spec = AdapterSpec(located.name if name is None else name, located.path, number, name is not None)
    if spec.is_named or not spec.may_be_folder:
        check_name(spec.name)
    return spec


def parse_all(texts: Iterable[str]) -> list[AdapterSpec]:
    """Reads the adapter arguments of one command, whose names must differ; those in folders are compared when they are
    loaded."""
    specs = [parse(text) for text in texts]
    check_names_differ((s.name, str(s.path)) for s in specs if not s.may_be_folder)
    return specs


def parse_renaming(texts: Iterable[str]) -> dict[str, str]:
    """``{old: new}`` of ``--map OLD=NEW``. Raises :class:`InputError` for another form, or what stands there twice."""
    changes: dict[str, str] = {}
    for text in texts:
        old, equals, new = text.partition("=")
        if not equals or text.strip() == "=":
            raise InputError(
                f"--map {text!r}: write OLD=NEW, a module's name or what names begin with, such as visual=model.visual"
            )
        if old.strip().strip(".") in changes:
            raise InputError(f"--map {text!r}: {old.strip()!r} is given twice")
        changes[old.strip().strip(".")] = new
    return changes


def _readings(text: str) -> Iterable[tuple[str | None, str, str | None]]:
    """``(name, path, weight)`` as ``text`` can be split, from no split to every split."""
    yield None, text, None
    head, colon, weight = text.rpartition(":")
    if colon and head:
        yield None, head, weight
    # A separator before "=" means that "=" belongs to the path.
    name, equals, value = text.partition("=")
    if equals and "/" not in name:
        yield name, value, None
        head, colon, weight = value.rpartition(":")
        if colon and head:
            yield name, head, weight


def _weight(text: str, argument: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise InputError(
            f"in {argument!r} the weight {text!r} is no finite number; write PATH:WEIGHT, such as legal:0.7"
        )
    return weight
