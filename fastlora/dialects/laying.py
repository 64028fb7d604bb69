"""An adapter as a dialect's file has it: which updates lie in which tensors, and where.

Projections that the dialect has fused are put together, those that it has in parts are cut, halves are in its order.
Parts that are put together stay updates of their own: each is written into its rows and columns of the tensors that
they share, so that nothing is copied in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from fastlora.core.data import LoraData
from fastlora.core.file_form import FileForm
from fastlora.core.updates import Update
from fastlora.dialects.cutting import joined_by_input, split, swapped_halves
from fastlora.dialects.family import Family
from fastlora.dialects.spelling import Style, component_of, is_swapped, stem_of
from fastlora.errors import InputError

LISTED = 6


@dataclass(frozen=True, slots=True)
class Place:
    """Where an update lies: in the tensors of ``stem``, whose ``B`` has ``rows``, from ``row`` and ``column`` on."""

    stem: str
    rows: int
    row: int = 0
    column: int = 0


@dataclass(slots=True)
class Laid:
    """``updates``, as they lie in a file, and their ``places``, by module. ``modules``: the module that the tensors of
    a stem are of. ``counts``: the rows of the parts of such a module that the file has fused, where it has parts."""

    updates: dict[str, Update] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)
    modules: dict[str, str] = field(default_factory=dict)
    counts: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def add(self, module: str, update: Update, place: Place, whole: str) -> None:
        """One update of the file, in the tensors of the module ``whole``."""
        other = self.modules.setdefault(place.stem, whole)
        if module in self.updates or other != whole:
            raise InputError(
                f"{other} and {module} would both be {place.stem} in the file: one weight in two forms. Leave out one "
                "of them"
            )
        self.updates[module] = update
        self.places[module] = place

    def ranks(self) -> dict[str, int]:
        """The rank of the tensors of each stem."""
        ranks: dict[str, int] = {}
        for module, place in self.places.items():
            ranks[place.stem] = max(ranks.get(place.stem, 0), place.column + self.updates[module].rank)
        return ranks


def laid(adapter: LoraData, style: Style, family: Family | None, form: FileForm | None) -> Laid:
    """The updates of an adapter as a file of a dialect has them; those of rank 0 are left out.

    ``form``: of a file of that dialect whose names are kept. Raises :class:`InputError` where the dialect has no place
    for some modules, all of which are named.
    """
    result, groups, lost = Laid(), dict[str, dict[str, Update]](), list[str]()
    own = {} if form is None else form.stems
    for module, update in adapter.updates.items():
        if not update.rank:
            continue
        stem = own.get(module)
        if stem is not None:
            _add_whole(result, module, update, stem, family)
        elif family is None or not _add(result, groups, module, update, style, family):
            lost.append(module)
    if lost:
        raise _cannot_hold(adapter.name, lost, style, family)
    for whole, parts in groups.items():
        assert family is not None
        _add_parts(result, whole, parts, style, family)
    return result


def _add(
    result: Laid, groups: dict[str, dict[str, Update]], module: str, update: Update, style: Style, family: Family
) -> bool:
    """Adds a module, cut into parts or set aside for the module that it is a part of; whether it has a place."""
    stem = stem_of(module, style, family, update.shape)
    if stem is not None:
        _add_whole(result, module, update, stem, family)
        return True
    component, path = component_of(module)
    if component:
        return False
    for whole in family.wholes(path):
        if stem_of(whole, style, family, None) is not None:
            groups.setdefault(whole, {})[module] = update
            return True
    parts = family.parts(path)
    counts = None if parts is None else family.rows(path, *update.shape)
    if parts is None or counts is None:
        return False
    return all(
        _add(result, groups, part, piece, style, family)
        for part, piece in zip(parts, split(update, counts), strict=True)
        if piece.rank
    )


def _add_whole(result: Laid, module: str, update: Update, stem: str, family: Family | None) -> None:
    if family is not None:
        if is_swapped(module, stem, family, update.shape):
            update = swapped_halves(update)
        component, path = component_of(module)
        if not component and family.parts(path) is not None:
            counts = family.rows(path, *update.shape)
            if counts is not None:
                result.counts[module] = counts
    result.add(module, update, Place(stem, update.shape[0]), module)


def _add_parts(result: Laid, whole: str, parts: Mapping[str, Update], style: Style, family: Family) -> None:
    """The parts of a projection that the dialect has fused. One that is missing has zeros for rows."""
    names = family.parts(whole)
    assert names is not None
    counts = _counts(whole, names, {m: u.shape for m, u in parts.items()}, family)
    rows = sum(counts)
    stem = stem_of(whole, style, family, (rows, next(iter(parts.values())).shape[1]))
    assert stem is not None
    present = [(m, parts[m]) for m in names if m in parts]
    if len(present) == len(names):
        joined = joined_by_input([u for _, u in present])
        if joined is not None:
            _add_whole(result, whole, joined, stem, family)
            return
    result.counts[whole] = tuple(counts)
    column = 0
    for module, update in present:
        row = sum(counts[: names.index(module)])
        result.add(module, update, Place(stem, rows, row, column), whole)
        column += update.rank


def _counts(whole: str, names: Sequence[str], shapes: Mapping[str, tuple[int, int]], family: Family) -> tuple[int, ...]:
    """The rows of all parts of a fused projection, also of those that an adapter lacks."""
    columns = {shape[1] for shape in shapes.values()}
    found = set[tuple[int, ...]]()
    if len(columns) == 1:
        (width,) = columns
        published = family.rows_over_columns(whole)
        likely = [] if published is None or len(shapes) == len(names) else [int(published * width)]
        for totals in (likely, _totals(names, shapes, width)):
            for total in totals:
                counts = family.rows(whole, total, width)
                if counts is not None and all(counts[names.index(m)] == shape[0] for m, shape in shapes.items()):
                    found.add(counts)
            if found:
                break
    if len(found) != 1:
        has = ", ".join(f"{m} {list(shape)}" for m, shape in shapes.items())
        raise InputError(
            f"{has}: the dialect has them in one weight, {whole}, and these shapes do not tell how many rows the "
            "other parts have; write format='diffusers' (--format diffusers), which has each on its own"
        )
    return found.pop()


def _totals(names: Sequence[str], shapes: Mapping[str, tuple[int, int]], width: int) -> Iterator[int]:
    """How many rows the whole may have: what the parts add up to, or parts alike, or as wide as the input."""
    present = sum(shape[0] for shape in shapes.values())
    absent = len(names) - len(shapes)
    if not absent:
        yield present
        return
    for rows in dict.fromkeys([*(shape[0] for shape in shapes.values()), width, 4 * width]):
        yield present + absent * rows
    if absent > 1:
        yield present + (absent - 1) * width + 4 * width


def with_ranks(laid: Laid, rank: int | None) -> dict[str, int]:
    """The rank of each stem's tensors: its own, or ``rank`` for all, which is the largest at least."""
    own = laid.ranks()
    return own if rank is None else dict.fromkeys(own, max([rank, *own.values()]))


def scaled_alike(laid: Laid) -> dict[str, float | None]:
    """By stem, the scaling of its updates where they have one that a file can store beside the factors."""
    scalings: dict[str, set[float]] = {}
    for module, place in laid.places.items():
        scalings.setdefault(place.stem, set()).add(laid.updates[module].scaling)
    return {stem: s if len(found) == 1 and (s := next(iter(found))) > 0 else None for stem, found in scalings.items()}


def _cannot_hold(name: str, lost: Sequence[str], style: Style, family: Family | None) -> InputError:
    more = f" and {len(lost) - LISTED} more" if len(lost) > LISTED else ""
    of_family = "a model of no known family" if family is None else family.title
    way_out = (
        "say which family it is of (family=, --family)"
        if family is None
        else "write format='diffusers' (--format diffusers), which holds every module"
    )
    return InputError(
        f"adapter {name!r} ({of_family}): files of the dialect {style.name!r} have no place for "
        f"{', '.join(lost[:LISTED])}{more}; {way_out}"
    )
