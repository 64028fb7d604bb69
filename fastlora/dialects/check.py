"""``fl.check``: what programs would make of a single file, before one finds out by its pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fastlora.dialects.families import family_named
from fastlora.dialects.file_facts import FileFacts, facts_of
from fastlora.dialects.readers import all_readers
from fastlora.dialects.spelling import STYLES
from fastlora.dialects.verdicts import Reading
from fastlora.errors import InputError
from fastlora.files.locate import find


@dataclass(frozen=True, slots=True)
class FileCheck:
    """What readers make of a file.

    ``path``: of the file. ``facts``: what is known of it. ``readings``: by the name of the reader. ``asked``: whether
    these readers were asked for by name. ``advice``: a command that mends the file, or why none does; ``None`` for a
    file that is right.
    """

    path: Path
    facts: FileFacts
    readings: Mapping[str, Reading]
    asked: bool
    advice: str | None

    def __repr__(self) -> str:
        told = ", ".join(f"{name}: {_summary(reading)}" for name, reading in self.readings.items())
        return f"FileCheck({self.path.name!r}, {told})"

    @property
    def is_clean(self) -> bool:
        """Whether every reader that was asked for reads every module as meant. Where none was named, one that has no
        model of this family does not count."""
        return all(self.is_right(name) for name in self.readings)

    def is_right(self, name: str) -> bool:
        """The same of one reader."""
        reading = self.readings[name]
        return (reading.has_no_model and not self.asked) or (reading.refused is None and not reading.findings)


def check(path: str | Path, readers: Iterable[str] | str | None = None, *, family: str | None = None) -> FileCheck:
    """What programs make of a single file: which modules each would lose or scale wrongly, or why it refuses the file.

    ``ΔW = alpha / rank · B·A`` is what a file means (alpha is the rank where it has none); the rules of each reader
    were tried on the reader itself or read in its code, and hold for the versions that they name.

    path: the file, a folder that stands for one, or ``org/name/file.safetensors`` of the Hub.
    readers: of ``diffusers``, ``comfy``, ``sd-scripts`` and ``a1111``; all but ``sd-scripts`` by default.
    family: of the model, where the names in the file leave that open (``"flux"``, ``"qwen_image"``).

    Returns an object with ``is_clean``, ``readings`` by reader (``refused``, ``findings`` by module with ``fault``,
    ``factor`` and ``why``) and ``advice``. Raises :class:`InputError` for files that cannot be read, unknown readers,
    and a family that is not known or is in doubt. Cost: reads the header, and no factors.
    """
    chosen = _chosen(readers)
    file, facts = facts_of(find(path).path, family)
    readings = {name: all_readers()[name].read(facts) for name in chosen}
    found = FileCheck(file, facts, readings, readers is not None, None)
    if found.is_clean:
        return found
    return FileCheck(file, facts, readings, found.asked, _advice(found))


def _summary(reading: Reading) -> str:
    if reading.refused is not None:
        return "refuses it"
    return f"{len(reading.findings)} findings" if reading.findings else "as meant"


def _chosen(readers: Iterable[str] | str | None) -> list[str]:
    known = list(all_readers())
    if readers is None:
        return [name for name, reader in all_readers().items() if reader.BY_DEFAULT]
    chosen = [readers] if isinstance(readers, str) else list(readers)
    unknown = next((name for name in chosen if name not in known), None)
    if unknown is not None:
        raise InputError(f"there are no rules for a reader {unknown!r}; known are {', '.join(known)}")
    if not chosen:
        raise InputError(f"no reader is named; known are {', '.join(known)}")
    return list(dict.fromkeys(chosen))


def _advice(found: FileCheck) -> str:
    facts = found.facts
    wrong = [name for name in found.readings if not found.is_right(name)]
    faults = {f.fault for name in wrong for f in found.readings[name].findings.values()}
    refused = any(found.readings[name].refused is not None for name in wrong)
    if all(found.readings[name].has_no_model for name in wrong):
        return "use it with another program"
    if faults == {"unsure"} and not refused:
        return "try it there, and compare with a program that reads it as meant"
    target = best_format(facts)
    if target is None:
        return "no way of writing is known here that its readers agree on"
    command = f"`fastlora convert {found.path} --to {target} --out FILE.safetensors`"
    if any({"dora_scale", "magnitude"} & m.keys.keys() for m in facts.modules.values()):
        return f"{command} mends names and scales; a DoRA needs its base model, and few programs apply it right"
    return f"{command} writes it as readers agree on it"


def best_format(facts: FileFacts) -> str | None:
    """The format in which the readers of a family agree on a file; ``None`` where none is known."""
    family = family_named(facts.family) if facts.family is not None else None
    if family is None:
        return None
    paths = [m.named.path for m in facts.of("")]
    for writing in family.writing:
        if not writing.held or all(path.startswith(writing.held) for path in paths):
            return STYLES[writing.style].format
    return STYLES[family.writing[0].style].format if family.writing else None
