"""What an adapter calls the parts of its model, and the same adapter under other names."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from fastlora.core.data import AdapterData, DeltaData, DoraData, Extra, Ia3Data, LoraData, ModulesData
from fastlora.core.updates import Update
from fastlora.errors import InputError

X = TypeVar("X", bound=AdapterData)
V = TypeVar("V")

LISTED = 3  # names in a message


def signatures(record: AdapterData) -> dict[str, Hashable]:
    """``{name: what must be equal for two names to be one}`` of an adapter: modules, and parameters beside them.

    A parameter of an adapted module goes by its module's name, another one by its own module's.
    """
    if isinstance(record, DeltaData):
        return {p: tuple(d.shape) for p, d in record.deltas.items()}
    found: dict[str, Hashable] = {}
    if isinstance(record, LoraData | DoraData):
        found = {m: (u.shape, u.layout.kind, u.layout.kernel, u.layout.experts) for m, u in record.updates.items()}
    elif isinstance(record, Ia3Data):
        found = {m: (s.shape, s.feedforward) for m, s in record.vectors.items()}
    if isinstance(record, ModulesData) and record.extras:
        beside: dict[str, list[Hashable]] = {}
        for path, extra in record.extras.items():
            module, _, parameter = path.rpartition(".")
            if module and module not in found:
                beside.setdefault(module, []).append((parameter, tuple(extra.tensor.shape)))
        found |= {module: tuple(parameters) for module, parameters in beside.items()}
    return found


def parts_of(record: AdapterData) -> Mapping[str, object]:
    """What an adapter changes, by name, without what lies beside it."""
    parts = record.deltas if isinstance(record, DeltaData) else getattr(record, "updates", None)
    return parts if parts is not None else record.vectors  # type: ignore[attr-defined]


def named_alike(records: Sequence[AdapterData]) -> bool:
    """Whether all adapters have the same names, so that there is nothing to find out."""
    parts = [parts_of(record).keys() for record in records]
    beside = [record.extras.keys() if isinstance(record, ModulesData) else set() for record in records]
    return all(p == parts[0] for p in parts) and all(b == beside[0] for b in beside)


def settled_names(records: Iterable[AdapterData]) -> frozenset[str]:
    """The names that were given by hand."""
    return frozenset().union(*(r.base.settled for r in records if isinstance(r, ModulesData)))


def renamed(record: X, names: Mapping[str, str]) -> X:
    """The adapter with other names in place of some of its own; parameters go with their modules. Nothing is copied.

    Raises :class:`InputError` where two parts would get one name.
    """
    if not names:
        return record

    def name(old: str) -> str:
        return names.get(old, old)

    if isinstance(record, DeltaData):
        values = _moved(record.values, name, record)
        return replace(
            record, deltas=_moved(record.deltas, name, record), values=values, facts=record.facts.renamed(name)
        )
    if isinstance(record, LoraData):
        updates = {m: _contained(m, u, name(m)) for m, u in record.updates.items()}
        record = replace(record, updates=_moved(updates, name, record))
    elif isinstance(record, DoraData):
        magnitudes = _moved(record.magnitudes, name, record)
        record = replace(record, updates=_moved(record.updates, name, record), magnitudes=magnitudes)
    elif isinstance(record, Ia3Data):
        record = replace(record, vectors=_moved(record.vectors, name, record))
    assert isinstance(record, ModulesData)
    # A pattern that chose modules by their old names need not choose them by the new ones.
    base = replace(record.base, selection=replace(record.base.selection, verbatim=""))
    return replace(record, extras=_moved_extras(record.extras, names, record), base=base)


def _moved(parts: Mapping[str, V], name: Callable[[str], str], record: AdapterData) -> dict[str, V]:
    moved: dict[str, V] = {}
    for old, part in parts.items():
        if name(old) in moved:
            first = next(other for other in parts if name(other) == name(old))
            raise InputError(
                f"adapter {record.name!r}: {first!r} and {old!r} would both be called {name(old)!r}; they are two "
                "parts of its model: give each a name of its own"
            )
        moved[name(old)] = part
    return moved


def _moved_extras(extras: Mapping[str, Extra], names: Mapping[str, str], record: AdapterData) -> dict[str, Extra]:
    def name(path: str) -> str:
        module, _, parameter = path.rpartition(".")
        return f"{names[module]}.{parameter}" if module in names else names.get(path, path)

    return _moved(extras, name, record)


def _contained(module: str, update: Update, new: str) -> Update:
    """The update of a part of a ``container``, ``container[e]``, whose name changes with the part's."""
    container = update.layout.container
    if not container or module == new or not module.startswith(container):
        return update
    part = module[len(container) :]
    return replace(update, layout=replace(update.layout, container=new.removesuffix(part)))


class Renaming:
    """``{old: new}`` by hand: a whole name, or the first segments of names, which are exchanged for others.

    ``{"visual": "model.visual"}`` makes ``model.visual.blocks.0`` of ``visual.blocks.0``. An empty old name stands
    before all names, and an empty new one takes the old away. Of several that fit the longest is taken, once. Names
    that lie under the new name already, where that begins with the old one, stay: ``{"model": "model.language_model"}``
    may be said of adapters under both. ``{"a": "a"}`` settles that these names are right as they are.
    """

    def __init__(self, changes: Mapping[str, str] | None) -> None:
        self.changes: dict[str, str] = {}
        if not isinstance(changes, Mapping | None):
            raise InputError(f"rename must be {{old: new}}, not of type {type(changes).__name__}")
        for old, new in (changes or {}).items():
            if not all(isinstance(name, str) and name.isprintable() and ".." not in name for name in (old, new)):
                raise InputError(f"rename: {old!r} and {new!r} must be names of modules, or what names begin with")
            key = old.strip().strip(".")
            if key in self.changes:
                raise InputError(f"rename: {key!r} is given twice")
            self.changes[key] = new.strip().strip(".")
        self._unused = dict.fromkeys(self.changes)
        self._met: list[str] = []
        self.settled: set[str] = set()
        """Names that were given by hand, as they are now."""

    def names(self, record: AdapterData) -> dict[str, str]:
        """``{name: new name}`` for what changes in an adapter."""
        if not self.changes:
            return {}
        found = {}
        for name in signatures(record):
            if len(self._met) < LISTED:
                self._met.append(name)
            new = self._new(name)
            if new is None:
                continue
            self.settled.add(new)
            if new != name:
                found[name] = new
        return found

    def __call__(self, record: X) -> X:
        """The adapter under its new names."""
        if not self.changes:
            return record
        result = renamed(record, self.names(record))
        own = self.settled.intersection(signatures(result)) if isinstance(result, ModulesData) else None
        if not own or not isinstance(result, ModulesData):
            return result
        return replace(result, base=replace(result.base, settled=result.base.settled | own))

    def require_used(self) -> None:
        """Refuses a change that no adapter had a use for."""
        if self._unused:
            old = next(iter(self._unused))
            raise InputError(
                f"rename: no name that could change begins with {old!r} (to become {self.changes[old]!r}); names are "
                f"such as {', '.join(self._met) or 'none'}: give whole segments of their beginning, OLD=NEW"
            )

    def _new(self, name: str) -> str | None:
        """The new name, which may be the old one; ``None`` where no change speaks of it."""
        for old in sorted(self.changes, key=len, reverse=True):
            if not _begins(name, old):
                continue
            new = self.changes[old]
            if new != old and _begins(new, old) and _begins(name, new):
                return name
            self._unused.pop(old, None)
            rest = name[len(old) :] if old else f".{name}"
            if not new and not rest.strip("."):
                raise InputError(f"rename: {name!r} would have no name left; give it one, OLD=NEW")
            return new + rest if new else rest.lstrip(".")
        return None


def _begins(name: str, start: str) -> bool:
    return not start or name == start or name.startswith(f"{start}.") or name.startswith(f"{start}[")
