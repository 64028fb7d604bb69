"""The modules of a single file under the names of the model; what no family knows is refused as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fastlora.dialects.detect import Identified, identify
from fastlora.dialects.families import family_named
from fastlora.dialects.family import Family
from fastlora.dialects.naming import Named
from fastlora.dialects.suffixes import Stored
from fastlora.dialects.weights import weight_shape
from fastlora.errors import UnsupportedAdapter

LISTED = 4


@dataclass(frozen=True, slots=True)
class Modules:
    """``{stem: what it is}`` of all stems, the family (``None`` where it is in doubt), what is worth telling, and the
    names of all families that it may be."""

    named: Mapping[str, Named]
    family: Family | None
    notes: tuple[str, ...] = field(default_factory=tuple)
    candidates: tuple[str, ...] = ()


def named_modules(
    modules: Mapping[str, Stored], metadata: Mapping[str, str], family: str | None, file: Path
) -> Modules:
    """What the stems of a file mean.

    Raises :class:`UnsupportedAdapter` for names that no family, or not the one that is asked for, has.
    """
    shapes = {
        stored.plain: weight_shape({part: tuple(t.shape) for part, t in stored.parts.items()})
        for stored in modules.values()
    }
    found = identify(shapes, metadata, family)
    _require_matched(found, modules, file, family)
    notes = tuple(f"{file.name}: {note}" for note in found.notes)
    return Modules(
        {stem: found.modules[stored.plain] for stem, stored in modules.items()},
        None if found.family is None else family_named(found.family),
        notes,
        found.candidates,
    )


def _require_matched(found: Identified, modules: Mapping[str, Stored], file: Path, family: str | None) -> None:
    if not found.unmatched:
        return
    lost = set(found.unmatched)
    keys = [next(iter(stored.keys.values())) for stored in modules.values() if stored.plain in lost]
    more = f" and {len(keys) - LISTED} more" if len(keys) > LISTED else ""
    listed = ", ".join(map(repr, keys[:LISTED])) + more
    if family is not None:
        raise UnsupportedAdapter(
            f"{file}: the family {family!r} has no modules for {listed}; leave the family out, or give the one that "
            "the file was trained for"
        )
    nearest = f" (the nearest family is {found.candidates[0]})" if found.candidates else ""
    raise UnsupportedAdapter(
        f"{file} is for a model that is not known here{nearest}: no family has modules for {listed}. Nothing of it is "
        "read. If these tensors belong to another model, put them into a file of their own; "
        '`fl.load(path, family="other")` (`--family other`) reads all of it under the names that it has'
    )
