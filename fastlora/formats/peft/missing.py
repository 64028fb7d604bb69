"""What a configuration names and the file does not hold: it was lost when the adapter was saved, or never applied."""

from __future__ import annotations

from fastlora.core.data import ModulesData
from fastlora.core.patterns import Patterns
from fastlora.formats.peft.names import saved_module

LISTED = 4


def note_on_modules(record: ModulesData) -> list[str]:
    """A sentence on trained modules none of which is in the file. PEFT names several for some tasks, of which a model
    has one."""
    names = record.base.modules_to_save
    if not names or any(saved_module(path, names) is not None for path in record.extras):
        return []
    listed = ", ".join(names[:LISTED])
    why = "what was trained there was lost when it was saved"
    return [f"adapter {record.name!r}: 'modules_to_save' names {listed}, and its file holds no tensor of it: {why}"]


def note_on_scalings(name: str, patterns: Patterns) -> list[str]:
    """A sentence on patterns for ``lora_alpha`` that were asked for every module and meant none."""
    unused = patterns.unused
    if not unused:
        return []
    more = f" and {len(unused) - LISTED} more" if len(unused) > LISTED else ""
    listed = ", ".join(map(repr, unused[:LISTED])) + more
    why = "if a module was renamed, its scaling is another one"
    return [f"adapter {name!r}: 'alpha_pattern' has {listed}, which is for no module of the file: {why}"]
