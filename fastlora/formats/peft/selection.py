"""Which modules a configuration selects.

What an input says is kept where it selects exactly what the result has: PEFT translates older names of tensors when it
loads them, but not the paths in a configuration, so ``q_proj`` still selects what a full path would not.
"""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from fastlora.core.data import Selection
from fastlora.core.names import EMBEDDINGS
from fastlora.core.patterns import path_tails
from fastlora.files.json_files import is_plain
from fastlora.formats.peft.names import HEADS, block_tail, exact_pattern

OTHER_FIELDS = ("exclude_modules", "layers_to_transform", "layers_pattern")
"""Fields that select modules together with ``target_modules``."""

UNIQUE = EMBEDDINGS.union(*HEADS.values())
"""Names of modules that a model has once."""


def read_selection(values: Mapping[str, Any]) -> Selection:
    """What the fields of a configuration select by. Fields of other types than PEFT writes select nothing here."""
    targets = values.get("target_modules")
    others = {key: values[key] for key in OTHER_FIELDS if values.get(key) not in (None, [], "")}
    parameters = values.get("target_parameters")
    named = tuple(dict.fromkeys(parameters)) if isinstance(parameters, list) and _is_sound(parameters) else ()
    if not all(map(_is_sound, (targets, *others.values()))):
        return Selection(parameters=named)
    if others or isinstance(targets, str):
        return Selection(parameters=named, verbatim=json.dumps({"target_modules": targets, **others}, sort_keys=True))
    return Selection(tuple(dict.fromkeys(targets or ())) if isinstance(targets, list) else (), named)


def _is_sound(value: object) -> bool:
    """Whether a value may be written again: a text, a whole number, or a list of those; or nothing."""
    items = value if isinstance(value, list) else [value]
    return all(x is None or type(x) is int or (isinstance(x, str) and is_plain(x)) for x in items)


def module_fields(selection: Selection, known: Iterable[str], modules: Iterable[str]) -> dict[str, Any]:
    """The fields that select ``modules`` of the ``known`` ones, which the adapters have that a result is made of."""
    return dict(_module_fields(selection, tuple(known), tuple(modules)))


@functools.lru_cache(16)  # the parts of a decomposition have the same modules
def _module_fields(selection: Selection, known: tuple[str, ...], modules: tuple[str, ...]) -> dict[str, Any]:
    everything, wanted = dict.fromkeys([*known, *modules]), dict.fromkeys(modules)
    if selection.verbatim and len(everything) == len(wanted):
        fields: dict[str, Any] = json.loads(selection.verbatim)
        # Full paths need no exclusion, which earlier versions of fastlora wrote beside them.
        if not isinstance(fields["target_modules"], list) or set(fields["target_modules"]) != wanted.keys():
            return fields
    ends = () if selection.verbatim else selection.modules
    kept, paths = _chosen(ends, everything, wanted)
    excluded = _also_taken(paths, everything, wanted, is_complete=bool(ends))
    fields = {"target_modules": [*kept, *paths]}
    if excluded:
        fields["exclude_modules"] = exclude_pattern(excluded, modules)
    return fields


def selected_parameters(selection: Selection, known: Iterable[str], parameters: list[str]) -> list[str]:
    """``target_parameters`` that select ``parameters`` of the ``known`` ones."""
    kept, paths = _chosen(selection.parameters, dict.fromkeys([*known, *parameters]), dict.fromkeys(parameters))
    return [*kept, *paths]


def _chosen(
    ends: Iterable[str], everything: Mapping[str, None], wanted: Mapping[str, None]
) -> tuple[list[str], list[str]]:
    """The ``ends`` that select wanted modules and no other known one, and paths of the rest: from their numbered block
    on where no other module ends so, and where some ends are known to select the model's modules."""
    matched: dict[str, list[str]] = {end: [] for end in ends}
    shared_ends = bool(matched)
    for module in everything:
        for tail in path_tails(module):
            if tail in matched:
                matched[tail].append(module)
    kept = [end for end, modules in matched.items() if modules and all(m in wanted for m in modules)]
    covered = {m for end in kept for m in matched[end]}
    rest = [m for m in wanted if m not in covered]
    if not shared_ends or not rest:
        return kept, rest
    count = Counter(tail for module in everything for tail in path_tails(module))
    return kept, [t if count[t := block_tail(m)] == 1 else m for m in rest]


def _also_taken(
    paths: list[str], everything: Mapping[str, None], wanted: Mapping[str, None], *, is_complete: bool
) -> list[str]:
    """The listed paths that select another module, whose path ends with them.

    ``is_complete``: every module of the model that an end selects is known. Else the short paths count too, since
    nothing is known of the model: ``x.query`` would take ``y.x.query`` along.
    """
    tails = {tail for m in everything if m not in wanted for tail in path_tails(m)}
    return [p for p in paths if p in tails or not (is_complete or _is_unique(p))]


def _is_unique(path: str) -> bool:
    """Whether it goes without saying that no other module's path ends with this one."""
    return path.count(".") > 1 or path.rpartition(".")[2] in UNIQUE


def exclude_pattern(paths: Iterable[str], modules: Collection[str]) -> str:
    """A full-match pattern for ``exclude_modules``: what ends with one of ``paths`` after a dot, except ``modules``."""
    listed = list(paths)
    longer = rf".+\.(?:{'|'.join(map(re.escape, listed))})"
    wanted = [m for m in modules if re.fullmatch(longer, m)]
    pattern = rf"(?!(?:{'|'.join(map(re.escape, wanted))})$){longer}" if wanted else longer
    # PEFT warns about a pattern that excludes nothing. The containers at the top are in every model and are no targets,
    # so they are excluded too.
    tops = sorted({m.partition(".")[0] for m in modules} - set(modules))
    return "|".join([*map(re.escape, tops), pattern])


def rank_patterns(modules: Iterable[str], everything: Iterable[str]) -> list[str]:
    """A pattern for each of ``modules`` that PEFT matches with it and no other of ``everything``: from its numbered
    block on where that is enough, so that it holds under the names of newer model code too."""
    listed = list(modules)
    if not listed:
        return []
    count = Counter(tail for module in everything for tail in path_tails(module))
    return [re.escape(t) if count[t := block_tail(m)] == 1 else exact_pattern(m) for m in listed]
