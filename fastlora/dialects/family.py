"""What is known of a family of models: the names of its modules, fused projections, halves in another order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property, lru_cache

from fastlora.dialects.naming import Named, Shape
from fastlora.dialects.patterns import Found, Table, filled

RowsOf = Callable[[int, int], tuple[int, ...] | None]
"""From rows and columns of a fused weight to the rows of its parts; ``None`` where it cannot have such parts."""


@dataclass(frozen=True, slots=True)
class Fused:
    """A projection that stands for several. ``parts``: their patterns, in the order of their rows."""

    parts: tuple[str, ...]
    rows: RowsOf


@dataclass(frozen=True, slots=True)
class Writing:
    """The dialect in which the readers of a family agree. ``style``: as in :attr:`FileForm.style`; ``original``:
    whether under the names of the original code; ``held``: canonical prefixes that its readers take, all if empty."""

    style: str
    original: bool
    held: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Family:
    """A family of models whose files have the same names.

    ``names``: ``{canonical pattern: original pattern}`` of all modules that have weights, fused ones too, ``""`` where
    the original code has none. ``also_read``: further spellings, ``{pattern: canonical pattern}``. ``fused``: what a
    canonical fused pattern is made of. ``swapped``: patterns whose halves the original code has in the other order,
    ``True`` always, ``False`` only where the rows are twice the columns (in the last block). ``text_encoders``: a
    component of a file (``"te1"``, ``"clip_l"``, …) → the components that it may be, with the names of each, the first
    that has a name wins. ``blocks``: how many numbered modules the largest published model has, by the pattern before
    the number. ``columns``: by pattern, the columns that published models have. ``ratios``: by pattern, rows over
    columns. ``hints``: how metadata call the family, without punctuation. ``writing``: what to write, the best first.
    """

    name: str
    title: str
    names: Mapping[str, str]
    writing: tuple[Writing, ...]
    also_read: Mapping[str, str] = field(default_factory=dict)
    fused: Mapping[str, Fused] = field(default_factory=dict)
    swapped: Mapping[str, bool] = field(default_factory=dict)
    text_encoders: Mapping[str, tuple[tuple[str, Table], ...]] = field(default_factory=dict)
    blocks: Mapping[str, int] = field(default_factory=dict)
    columns: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    ratios: Mapping[str, int | Fraction] = field(default_factory=dict)
    hints: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()

    @cached_property
    def table(self) -> Table:
        return Table(self.names, self.also_read)

    @cached_property
    def _roots(self) -> frozenset[str]:
        """The first parts of all paths: enough to tell most families apart without their tables."""
        spellings = (*self.names, *self.names.values(), *self.also_read)
        return frozenset(spelling.partition(".")[0] for spelling in spellings if spelling)

    def has_root(self, text: str, flat: bool) -> bool:
        """Whether a name begins like one of this family."""
        if flat:
            return any(text.startswith(root) for root in self._roots)
        return text.partition(".")[0] in self._roots

    @cached_property
    def _whole_of(self) -> dict[str, list[str]]:
        wholes: dict[str, list[str]] = {}
        for whole, fused in self.fused.items():
            for part in fused.parts:
                wholes.setdefault(part, []).append(whole)
        return wholes

    def canonical(self, text: str, shape: Shape | None = None) -> Named | None:
        """The module of the denoiser that a dotted path means, in the spelling of diffusers or the original one;
        ``None`` where there is none. ``shape``: of its weight, where halves are swapped in one block only."""
        return self._named(found(self, text, False), shape)

    def from_flat(self, text: str, shape: Shape | None = None) -> Named | None:
        """As :meth:`canonical`, of a name with underscores for dots."""
        return self._named(found(self, text, True), shape)

    def original(self, path: str, shape: Shape | None = None) -> tuple[str, bool] | None:
        """The dotted original path of a canonical path, and whether the halves of its rows are swapped there; ``None``
        where the original code has no such module (as for the parts of what it has fused)."""
        known = found(self, path, False)
        if known is None or known.original or (text := self.table.original(known)) is None:
            return None
        return text, self.is_swapped(known.pattern, shape)

    def is_swapped(self, pattern: str, shape: Shape | None) -> bool:
        """Whether the original code has the two halves of this module's rows in the other order."""
        rule = self.swapped.get(pattern)
        return rule is True or (rule is False and shape is not None and shape[0] == 2 * shape[1])

    def parts(self, path: str) -> tuple[str, ...] | None:
        """The canonical paths of the parts of a fused projection, in the order of their rows; ``None`` if it is none"""
        known = found(self, path, False)
        if known is None or known.pattern not in self.fused:
            return None
        return tuple(filled(p, known.numbers) for p in self.fused[known.pattern].parts)

    def wholes(self, path: str) -> tuple[str, ...]:
        """The canonical fused projections that have this canonical path as a part."""
        known = found(self, path, False)
        if known is None:
            return ()
        return tuple(filled(p, known.numbers) for p in self._whole_of.get(known.pattern, ()))

    def whole(self, path: str) -> str | None:
        """The fused projection that the original code has in place of this part; ``None`` if it has none."""
        wholes = self.wholes(path)
        return next((w for w in wholes if self.original(w) is not None), wholes[0] if wholes else None)

    def rows(self, path: str, out: int, columns: int) -> tuple[int, ...] | None:
        """How many rows each part of a fused projection has; ``None`` where its shape does not allow it."""
        known = found(self, path, False)
        fused = None if known is None else self.fused.get(known.pattern)
        rows = None if fused is None else fused.rows(out, columns)
        return rows if rows is not None and sum(rows) == out and min(rows) > 0 else None

    def rows_over_columns(self, path: str) -> int | Fraction | None:
        """What published models have as rows over columns of a module; ``None`` where that is not known."""
        known = found(self, path, False)
        return None if known is None else self.ratios.get(known.pattern)

    def _named(self, known: Found | None, shape: Shape | None) -> Named | None:
        if known is None:
            return None
        swapped = known.original and self.is_swapped(known.pattern, shape)
        return Named("", known.path, known.original, swapped)


@lru_cache(1 << 16)
def found(family: Family, text: str, flat: bool) -> Found | None:
    """A name in the table of a family's denoiser. Kept: the files of one trainer have the same names."""
    if not family.has_root(text, flat):
        return None
    return family.table.flat(text) if flat else family.table.dotted(text)
