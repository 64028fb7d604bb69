"""Pools: adapters of one base model, whose modules are aligned by name."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from fastlora.adapters.dora import DoRA, refused
from fastlora.adapters.folders import holds_adapters, load_folder
from fastlora.adapters.loading import load
from fastlora.adapters.lora import Adapter
from fastlora.adapters.one_form import in_one_form
from fastlora.adapters.renaming import Renaming, named_alike
from fastlora.core.deferred import outline_of
from fastlora.core.names import check_name, check_names_differ
from fastlora.core.updates import Layout
from fastlora.core.vector_space import VectorSpace
from fastlora.errors import FastloraError, InputError, UnsupportedAdapter
from fastlora.files.locate import LocatedPath, exists, find
from fastlora.runtime import devices
from fastlora.runtime.cpython import paused_collector


def on_device(pool: Pool, device: str | torch.device | None) -> Pool:
    """The pool where it is computed on: on ``device``, or where all of it is."""
    return pool.to(devices.parse(device) or pool.device)


AdapterSource = str | os.PathLike[str]


class Pool:
    """LoRA adapters of one base model, in a fixed order and by name.

    For every module a pool holds the updates ``ΔW_i = s_i B_i A_i`` of the adapters that have it: ``B_i [n, r_i]`` and
    ``A_i [r_i, m]``. Ranks, dtypes and the adapted modules may differ; ``n`` and ``m`` of a module may not. A pool is
    a container of adapters by name: ``len``, ``in``, iteration over names and ``pool[name]`` work.

    ``notices`` is a list of what was noticed while the adapters were put together: different base models, names that
    were aligned, adapters that share no module.

    Args:
        adapters: one LoRA adapter at the least, each with a name of its own.
        align: adapters of one model may call its modules differently, because the model was wrapped differently or its
            code was reorganised. Modules that are certainly the same get one name, and ``notices`` say so; names that
            end alike and may be the same are told (docs/formats.md). ``False`` takes the names as they are. Experts and
            projections that are fused in one adapter and in parts in another get one form in either case.
        rename: ``{old: new}``, names or beginnings of names (whole segments) that are exchanged in all adapters before
            that: it settles what ``align`` cannot know.

    Raises:
        InputError: no adapters, a name that repeats or cannot be a folder, a module whose shape or layout differs, an
            adapter that has no module in common with the others and lies in other layers, a ``rename`` that nothing has
            a use for or that makes two modules one.
        UnsupportedAdapter: an (IA)³ adapter or a task vector, which have no factors.

    Cost: names and shapes are compared; no factor is read.
    """

    def __init__(
        self,
        adapters: Iterable[VectorSpace],
        *,
        align: bool = True,
        rename: Mapping[str, str] | None = None,
    ) -> None:
        given = [require_updates(adapter) for adapter in adapters]
        if not given:
            raise InputError("a pool needs adapters, none was given")
        for adapter in given:
            check_name(adapter.name)
        check_names_differ((a.name, a) for a in given)
        self.notices: list[str]
        self._adapters: dict[str, Adapter] = {}
        self._owners: dict[str, list[int]] = {}
        given, self.notices = _named(given, align, Renaming(rename))
        self._add(given)
        self._compare_bases()

    @classmethod
    @paused_collector()
    def load(
        cls,
        sources: AdapterSource | Iterable[AdapterSource | VectorSpace] | Mapping[str, AdapterSource],
        *,
        rename: Mapping[str, str] | None = None,
        family: str | None = None,
        rank: int | None = None,
    ) -> Pool:
        """Loads adapters with :func:`fastlora.load` and puts them into a pool.

        Args:
            sources: PEFT directories, single files, Hub ids or adapters that are loaded already, in the order of the
                pool; they are called after their folders or files. Or ``{name: path}``. A folder that holds adapters,
                in the list or in its place, stands for all LoRA adapters directly in it, with numbers in their names
                in order; :attr:`notices` say which entries were left out and why.
            rename: ``{old: new}``, as :class:`Pool` takes it: ``{"visual": "model.visual"}`` where one adapter has
                ``visual.blocks.0.attn.qkv`` and another ``model.visual.blocks.0.attn.qkv``.
            family: the models that single files are for, where their names fit several, as :func:`fastlora.load`.
            rank: the rank at which modules are read that are no plain LoRA, as :func:`fastlora.load`.

        Raises:
            InputError: what :func:`fastlora.load` and :class:`Pool` refuse; one adapter instead of a list; a folder
                without an adapter that can be used.
            UnsupportedAdapter: a kind whose numbers would come out wrong, an (IA)³ adapter, a task vector.

        Cost: that of :func:`fastlora.load` for each; tensors stay in their files.
        """
        if isinstance(sources, str | os.PathLike):
            if not (exists(os.fspath(sources)) and holds_adapters(Path(sources).expanduser())):
                raise InputError(
                    f"a pool is loaded from a list of paths or {{name: path}}, not from the one path {sources}"
                )
            sources = [sources]
        if isinstance(sources, Mapping):
            named = [load(os.fspath(p), name, family=family, rank=rank) for name, p in sources.items()]
            return cls(named, rename=rename)
        found = (s if isinstance(s, VectorSpace) else find(s if isinstance(s, Path) else os.fspath(s)) for s in sources)
        elements, notices = _loaded(found, family, rank)
        pool = cls(elements, rename=rename)
        pool.notices[:0] = notices
        return pool

    @property
    def adapters(self) -> list[Adapter]:
        """The adapters, in the order of the pool."""
        return list(self._adapters.values())

    @property
    def names(self) -> list[str]:
        """The names of the adapters, in the order of the pool."""
        return list(self._adapters)

    @property
    def modules(self) -> list[str]:
        """Every module that some adapter has, in order of first appearance."""
        return list(self._owners)

    @property
    def told(self) -> list[str]:
        """What a user should know: the :attr:`notices`, and the notes of the adapters."""
        return list(dict.fromkeys([*self.notices, *(note for a in self._adapters.values() for note in a.notes)]))

    def present(self, module: str) -> list[int]:
        """Positions in the pool of the adapters that have ``module``, ascending; empty for an unknown module."""
        return list(self._owners.get(module, ()))

    def __getitem__(self, name: str) -> Adapter:
        """The adapter of that name. Raises :class:`InputError` when there is none."""
        try:
            return self._adapters[name]
        except KeyError:
            raise InputError(f"the pool has no adapter {name!r}; it has {', '.join(self._adapters)}") from None

    @property
    def device(self) -> torch.device:
        """Where the adapters are. Raises :class:`InputError` when they are on different devices."""
        name_by_device = {a.place: a.name for a in reversed(self._adapters.values()) if a.place is not None}
        if len(name_by_device) > 1:
            where = ", ".join(f"{name!r} on {device}" for device, name in reversed(name_by_device.items()))
            raise InputError(f"the adapters of the pool are on different devices ({where}); use `pool.to(…)`")
        return next(iter(name_by_device), torch.device("cpu"))

    def to(self, device: torch.device | str) -> Pool:
        """The pool with all factors on a device; a pool that is there already is returned as it is.

        Args:
            device: ``"cpu"``, ``"cuda"``, ``"cuda:1"`` or a :class:`torch.device`.

        Raises:
            InputError: a device that cannot be used, with the reason.
            DeviceMemoryError: an adapter that does not fit there.

        Cost: one buffer and one copy an adapter. Factors that came from the host are not copied back.
        """
        target = devices.parse(device)
        if target is None or all([a.place in (None, target) for a in self._adapters.values()]):
            return self
        return self._with(a.to(target) for a in self.adapters)

    def without_extras(self) -> Pool:
        """The pool of the low-rank updates alone, without biases and replaced modules. Nothing is read or copied."""
        return self._with(a.without_extras() for a in self.adapters)

    def subset(self, names: Iterable[str]) -> Pool:
        """A pool of the adapters with these ``names``, in the order given, under the module names that they have here.

        Raises :class:`InputError` for a name that the pool does not have, and for no names. Nothing is copied.
        """
        names = list(names)
        chosen = {name: self[name] for name in names}
        if not chosen or len(chosen) < len(names):
            return Pool([self[name] for name in names], align=False)  # which says what is wrong
        # What adapters must have in common these have: a pool of many has thousands of pairs.
        pool = copy.copy(self)
        pool._adapters, pool._owners, pool.notices = chosen, {}, []
        for i, adapter in enumerate(chosen.values()):
            for module in adapter.updates:
                pool._owners.setdefault(module, []).append(i)
        pool._compare_bases()
        return pool

    def __contains__(self, name: object) -> bool:
        return name in self._adapters

    def __iter__(self) -> Iterator[str]:
        return iter(self._adapters)

    def __len__(self) -> int:
        return len(self._adapters)

    def __repr__(self) -> str:
        return f"Pool({', '.join(self._adapters)}: {len(self._owners)} modules)"

    def _with(self, adapters: Iterable[Adapter]) -> Pool:
        """This pool and what was noticed about it, with other adapters in place of its own, one for one."""
        pool = Pool(adapters, align=False)
        pool.notices = list(self.notices)
        return pool

    def _add(self, given: Sequence[Adapter]) -> None:
        checked: dict[int, Adapter] = {}  # by the identity of outlines
        outlines = [outline_of(adapter) for adapter in given]
        for place, (adapter, outline) in enumerate(zip(given, outlines, strict=True)):
            first = adapter if outline is None else checked.setdefault(id(outline), adapter)
            for module in first.updates:
                owners = self._owners.setdefault(module, [])
                if owners and first is adapter:
                    self._check_module(module, given[owners[0]], adapter)
                owners.append(place)
            self._adapters[adapter.name] = adapter

    def _check_module(self, module: str, first: Adapter, second: Adapter) -> None:
        one, two = first.updates[module], second.updates[module]
        if one.shape != two.shape:
            raise InputError(
                f"module {module!r} is {_shape(one.shape)} in adapter {first.name!r} and "
                f"{_shape(two.shape)} in adapter {second.name!r}; they belong to different base models (or "
                "to different vocabularies)"
            )
        if one.layout is not two.layout and one.layout != two.layout:
            raise InputError(
                f"module {module!r} is {_layout(one.layout)} in adapter {first.name!r} and "
                f"{_layout(two.layout)} in adapter {second.name!r}; they belong to different base models"
            )

    def _compare_bases(self) -> None:
        first, *others = self.adapters
        for other in others:
            if other.base.layer_replication != first.base.layer_replication:
                raise InputError(
                    f"adapters {first.name!r} and {other.name!r} repeat layers of the base model differently "
                    f"(layer_replication {first.base.layer_replication} and "
                    f"{other.base.layer_replication}), so their layer numbers mean different layers; "
                    "combine only adapters that agree"
                )
        for what, values in (
            ("base models", {a.name: a.base.model for a in self.adapters}),
            ("revisions of the base model", {a.name: a.base.revision for a in self.adapters}),
        ):
            told = {name: value for name, value in values.items() if value is not None}
            if len(set(told.values())) > 1:
                listed = ", ".join(f"{name}: {value}" for name, value in told.items())
                self.notices.append(f"the adapters name different {what} ({listed})")


def _named(adapters: list[Adapter], align: bool, renaming: Renaming) -> tuple[list[Adapter], list[str]]:
    """The adapters under the names that they have in a pool, and notices."""
    adapters = [renaming(adapter) for adapter in adapters]
    renaming.require_used()
    some = _different(adapters)
    if len(some) < len(adapters) and named_alike(some):
        with contextlib.suppress(FastloraError):  # told of all
            if in_one_form(some, align=align, strict=True) == (some, []):  # each is itself, and nothing is to tell
                return adapters, []
    return in_one_form(adapters, align=align, strict=True)


def _different(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Of adapters that differ in numbers alone the first, and the first two of all: what these have in common with the
    others, the rest has. Nobody need look at the updates of the rest."""
    outlines = [outline_of(adapter) for adapter in adapters]
    seen = set[int]()
    some = []
    for i, (adapter, outline) in enumerate(zip(adapters, outlines, strict=True)):
        if i < 2 or outline is None or id(outline) not in seen:
            some.append(adapter)
        seen.add(id(outline))
    return some


def _loaded(
    sources: Iterable[LocatedPath | VectorSpace], family: str | None, rank: int | None
) -> tuple[list[VectorSpace], list[str]]:
    """The adapters of a list, those of its folders in their place, and notes on what the folders hold beside them."""
    given = list(sources)
    paths = [s for s in given if isinstance(s, LocatedPath)]
    folders = {s.path for s in paths if holds_adapters(s.path)}
    check_names_differ((s.name, s.path) for s in paths if s.path not in folders)  # before anything is loaded
    loaded: list[tuple[VectorSpace, object]] = []
    notices: list[str] = []
    for source in given:
        if isinstance(source, VectorSpace):
            loaded.append((source, source))
        elif source.path in folders:
            elements, notes = load_folder(source.path, family=family, rank=rank)
            loaded += [(e, source.path / e.name) for e in elements]
            notices += notes
        else:
            loaded.append((load(source.path, source.name, family=family, rank=rank), source.path))
    check_names_differ((element.name, where) for element, where in loaded)
    return [element for element, _ in loaded], notices


def require_updates(element: VectorSpace, what: str = "a pool") -> Adapter:
    """The element if it is a LoRA adapter. Raises :class:`UnsupportedAdapter` for ``what`` needs ``ΔW = s·B·A``."""
    if isinstance(element, Adapter):
        return element
    if isinstance(element, DoRA):
        raise refused(element)
    if element.kind == "a task vector":
        out = "make a LoRA adapter of it first: `.extract(rank=…)` or `.extract(energy=…)`"
    else:
        out = "combine (IA)³ adapters with +, − and *, `fl.add`, `fl.negate`, `fl.analogy`, `fl.compose` or "
        out += (
            "`fastlora compose`; or make LoRAs of them on their base model, with `fastlora apply BASE A --out TUNED` "
        )
        out += "and `fastlora extract BASE TUNED --rank N --out B`"
    raise UnsupportedAdapter(
        f"{element.name!r} is {element.kind} and has no low-rank updates s·B·A, which {what} needs (to merge, "
        f"decompose, compress, compare); {out}"
    )


def _shape(shape: tuple[int, int]) -> str:
    return f"[{shape[0]}, {shape[1]}]"


def _layout(layout: Layout) -> str:
    if layout.kind == "conv":
        return f"a convolution with kernel {list(layout.kernel)}"
    if layout.kind == "expert":
        laid_out = {"out-in": "", "older": ", laid out by peft before 0.19", "unsaid": ", laid out by an unknown peft"}
        return f"expert {layout.expert} of {layout.experts}{laid_out[layout.order]}"
    return {"linear": "a linear module", "embedding": "an embedding"}[layout.kind]
