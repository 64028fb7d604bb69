"""Single files, written piece by piece: kernels put each factor straight to its place in the file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from fastlora.core.data import LoraData
from fastlora.core.factors import Factor, Side
from fastlora.core.file_form import FileForm
from fastlora.core.inert import loadable
from fastlora.core.updates import Update, chosen_rank
from fastlora.dialects.cutting import is_even, widened
from fastlora.dialects.detect import identify
from fastlora.dialects.expected import expected_zeros
from fastlora.dialects.extras import components_with_bias, extra_tensors
from fastlora.dialects.families import family_named
from fastlora.dialects.family import Family
from fastlora.dialects.header import DESCRIPTION, HASHES, description, facts, hashes
from fastlora.dialects.laying import Laid, Place, laid, with_ranks
from fastlora.dialects.scales import as_stored, stored_scales
from fastlora.dialects.shapes import with_kernels
from fastlora.dialects.spelling import STYLES, UNETS, Style, component_of, denoiser, style_name, style_named
from fastlora.dialects.told import told_of_readers
from fastlora.errors import InputError, OutputError
from fastlora.files.tensor_writing import InOneFile, TensorFile, cast_tensor

DOWN_FAMILIES = frozenset({"flux"})
"""Families of which diffusers reads ``diffusion_model.`` with ``lora_down`` only."""


@dataclass(frozen=True, eq=False)
class FileAdapter(LoraData):
    """An adapter as a single file will have it. ``places``: of its updates, by module. ``ranks``, ``alphas``: by stem;
    no alphas where scales are inside ``B``. ``zeros``: shapes of modules that readers expect, by stem. ``others``: what
    else the file holds, by the tensors' names."""

    _: KW_ONLY
    style: Style
    places: Mapping[str, Place]
    ranks: Mapping[str, int]
    alphas: Mapping[str, float] = field(default_factory=dict)
    zeros: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    others: Mapping[str, Tensor] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)


def laid_out(adapter: LoraData, uniform_rank: int | bool | None) -> LoraData:
    """The adapter as the file of its form will have it: in the names of that form where it has some, else in the
    dialect of the format in which the readers of its family agree.

    Raises :class:`InputError` for modules that the dialect cannot hold, and for an unknown family.
    """
    if isinstance(adapter, FileAdapter):
        return adapter
    form = adapter.base.form
    assert form is not None
    adapter = loadable(adapter)
    adapter, own, style, family = _in_dialect(adapter, form)
    ranks = with_ranks(own, chosen_rank(adapter.updates.values(), uniform_rank))
    zeros = {} if form.style else expected_zeros(own, style, family)  # a file in its own names is as it was
    alphas, updates = dict[str, float](), own.updates
    if style.alpha:
        is_unet = family is not None and family.name in UNETS and style.format == "kohya"
        is_plain = bool(form.style) and all(_is_stored(u) for u in own.updates.values())
        alphas, updates = stored_scales(own, ranks, alike=is_unet and not is_plain)
    metadata = facts(adapter, form, list(ranks.values()), list(alphas.values()), is_kohya=style.format == "kohya")
    others = extra_tensors(adapter, own, style, family, form)
    if family is not None and _is_described(style, family):
        described = _described_ranks(own, ranks, family, {module for module, _ in zeros.values()})
        biased = {component or denoiser(family) for component in components_with_bias(others, own)}
        metadata[DESCRIPTION] = description(described, biased)
    if style.alpha:
        alphas |= dict.fromkeys(zeros, 1.0)
    if style.format == "kohya" and not HASHES.keys().isdisjoint(form.metadata):
        metadata |= {name: "0" * digits for name, digits in HASHES.items()}  # room for those of the result
    made = FileAdapter(
        adapter.name,
        updates,
        extras=adapter.extras,
        base=adapter.base,
        dtype=adapter.dtype,
        provenance=adapter.provenance,
        notes=adapter.notes,
        details=adapter.details,
        style=style,
        places=own.places,
        ranks=ranks,
        alphas=alphas,
        zeros={stem: shape for stem, (_, shape) in zeros.items()},
        others=others,
        metadata=metadata,
    )
    return _told(made, family, form)


def best_style(format: str, family: Family | None) -> Style:
    """The dialect of a format in which the readers of a family agree."""
    if family is None:
        raise InputError(
            f"the names of format={format!r} depend on the model; say which family it is of (family=, --family)"
        )
    for writing in family.writing:
        name = writing.style
        if name == "diffusion_model" and not writing.original:
            name = "diffusion_model-diffusers"
        if name in STYLES and STYLES[name].format == format:
            return style_named(name)
    if format == "comfy" and family.name in DOWN_FAMILIES:
        return style_named(style_name("diffusion_model-down", alpha=True))
    if format == "comfy":  # has no names of its own that others read too
        return style_named(family.writing[0].style)
    return style_named({"kohya": "kohya-original", "diffusers": "component"}.get(format, format))


def _in_dialect(adapter: LoraData, form: FileForm) -> tuple[LoraData, Laid, Style, Family | None]:
    """The adapter as a file of its form lays it, the dialect and the family.

    Of several families that the names fit, all must lay it alike.
    """
    found: list[tuple[LoraData, Laid, Style, Family | None]] = []
    families: list[Family | None] = [*families_of(adapter, form)]
    for family in families or [None]:
        style = style_named(form.style) if form.style else best_style(form.format, family)
        shaped = with_kernels(adapter, family)
        found.append((shaped, laid(shaped, style, family, form if form.style else None), style, family))
        if form.style and all(m in form.stems for m, u in adapter.updates.items() if u.rank):
            break
    first = found[0]
    other = next((f for f in found if f[1].places != first[1].places or f[2] != first[2]), None)
    if other is not None:
        names = [f[3].name for f in found if f[3] is not None]
        raise InputError(
            f"adapter {adapter.name!r}: its modules may be of {' or '.join(names)}, whose files have different names; "
            f"say which it is (family={names[0]!r}, --family {names[0]})"
        )
    return first


def families_of(adapter: LoraData, form: FileForm) -> list[Family]:
    """The family of the model: that of the file, else those that call its modules as the adapter does."""
    if form.family is not None:
        known = family_named(form.family)
        return [] if known is None else [known]
    stems = {form.stems.get(m, m): m for m in adapter.updates}
    shapes = {stem: adapter.updates[m].shape for stem, m in stems.items()}
    found = identify(shapes, form.metadata)
    result = []
    for name in found.candidates:
        family = family_named(name)
        named = identify(shapes, form.metadata, name).modules
        if family is not None and all(s in named and named[s].module == m for s, m in stems.items()):
            result.append(family)
    return result


def _is_stored(update: Update) -> bool:
    return update.B.stored is not None and update.A.stored is not None


def _is_described(style: Style, family: Family) -> bool:
    """Whether diffusers applies its own metadata to such a file: of kohya's for Stable Diffusion, it refuses them."""
    if family.name in DOWN_FAMILIES and style.name.startswith(("kohya-original", "diffusion_model-down")):
        return True
    return style.described and not style.alpha


def _described_ranks(
    own: Laid, ranks: Mapping[str, int], family: Family, zeros: Iterable[str]
) -> dict[str, dict[str, int]]:
    """The ranks of the modules of diffusers, as its converters leave them: ``{component: {module: rank}}``."""
    result: dict[str, dict[str, int]] = {}
    for module in zeros:
        result.setdefault(denoiser(family), {}).update(dict.fromkeys(family.parts(module) or (module,), 1))
    for stem, module in own.modules.items():
        component, path = component_of(module)
        of_component = result.setdefault(component or denoiser(family), {})
        counts = own.counts.get(module)
        if counts is None:
            of_component[path] = ranks[stem]
            continue
        parts, rank = family.parts(path), ranks[stem]
        assert parts is not None
        if family.name in DOWN_FAMILIES and _cut_evenly(own, module, stem, rank, counts):
            rank //= len(counts)
        of_component.update(dict.fromkeys(parts, rank))
    return result


def _cut_evenly(own: Laid, module: str, stem: str, rank: int, counts: tuple[int, ...]) -> bool:
    """Whether diffusers will find ``B`` block-diagonal, and cut the rank as well."""
    if rank % len(counts):
        return False
    if module in own.updates:
        update = own.updates[module]
        return update.rank == rank and is_even(update, counts)
    share = rank // len(counts)
    starts = [sum(counts[:i]) for i in range(len(counts))]
    return all(
        (at := starts.index(place.row) * share) <= place.column and place.column + own.updates[m].rank <= at + share
        for m, place in own.places.items()
        if place.stem == stem
    )


def _told(laid_out: FileAdapter, family: Family | None, form: FileForm) -> FileAdapter:
    """With notes on what readers of the dialect do not take; a file in its own names is read as it was before."""
    if family is None or form.style or laid_out.style.format not in ("kohya", "comfy"):
        return laid_out
    tensors = {**_outlines(laid_out, torch.float32), **_stored_alphas(laid_out)}
    notes = told_of_readers(laid_out.name, tensors, laid_out.metadata, family, Path(laid_out.name))
    return replace(laid_out, notes=(*laid_out.notes, *notes))


def _stored_alphas(adapter: FileAdapter) -> dict[str, Tensor]:
    dtype_name = "float32" if adapter.base.form is None else adapter.base.form.alpha_dtype
    return {f"{stem}.alpha": as_stored(alpha, dtype_name) for stem, alpha in adapter.alphas.items()}


def _outlines(adapter: FileAdapter, dtype: torch.dtype) -> dict[str, Tensor]:
    """The factors of the file, as shapes."""
    style, outlines = adapter.style, dict[str, Tensor]()
    for module, place in adapter.places.items():
        update, rank = adapter.updates[module], adapter.ranks[place.stem]
        kernel = update.layout.kernel
        channels = update.shape[1] // math.prod(kernel)
        outlines[place.stem + style.up] = _meta((place.rows, rank, *(1 for _ in kernel)), dtype)
        outlines[place.stem + style.down] = _meta((rank, channels, *kernel), dtype)
    for stem, (n, m) in adapter.zeros.items():
        outlines |= {stem + style.up: _meta((n, 1), dtype), stem + style.down: _meta((1, m), dtype)}
    return outlines


class SingleFile(InOneFile):
    """A single file that is written piece by piece, each factor at its place; nothing of a tensor is kept here.

    Parts of one tensor are written into its rows and columns. What nobody writes is zero.
    """

    def __init__(self, path: Path, adapter: LoraData, dtype: torch.dtype) -> None:
        assert isinstance(adapter, FileAdapter)
        self.path, self.adapter, self.dtype = path, adapter, dtype
        self._others = dict(adapter.others)
        self._alphas = _stored_alphas(adapter)
        outlines = _outlines(adapter, dtype)
        self._others = {
            name: cast_tensor(t, dtype, name) if t.is_floating_point() else t for name, t in self._others.items()
        }
        clash = outlines.keys() & self._others.keys() or self._alphas.keys() & self._others.keys()
        if clash:
            raise OutputError(f"{path}: two tensors would be called {min(clash)}")
        self._file = TensorFile(path, {**outlines, **self._alphas, **self._others}, adapter.metadata)

    def is_packed(self, module: str) -> bool:
        """No module is: each factor has rows of its own in the file."""
        return False

    def place(self, module: str, side: Side) -> tuple[str, int]:
        """The name of a factor's tensor, and where in the file the factor starts."""
        place, style = self.adapter.places[module], self.adapter.style
        update = self.adapter.updates[module]
        if side == "B":
            name, entries = place.stem + style.up, place.row * self.adapter.ranks[place.stem]
        else:
            name, entries = place.stem + style.down, place.column * update.shape[1]
        return name, self._file.offset(name) + entries * self.dtype.itemsize

    def lay(self, module: str, side: Side, factor: Factor) -> Factor:
        """The factor as it lies there: ``B`` is as wide as its tensor."""
        place = self.adapter.places[module]
        return widened(factor, self.adapter.ranks[place.stem], place.column) if side == "B" else factor

    def put(self, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Nothing comes this way: no module is packed, and an adapter that is zero has a module of rank 1."""
        assert not factors

    def finish(self) -> None:
        """Writes what belongs to no factor: scales, biases, norms."""
        self._file.written(
            s + end for s in self.adapter.zeros for end in (self.adapter.style.up, self.adapter.style.down)
        )
        self._file.write(self._alphas)
        self._file.write(self._others, check=True)

    def close(self) -> None:
        """Checks that everything was written, and puts the hashes of the tensors into the header."""
        self._file.close()
        metadata = self.adapter.metadata
        if metadata.keys() >= HASHES.keys():
            found = hashes(self.path, self._file.start, self._file.tensors.entries, metadata)
            self._file.restate({**metadata, **found})


def _meta(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
