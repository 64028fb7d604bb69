"""Single files of image and video models: from tensors to a record, whatever dialect they are in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fastlora.core.data import BaseInfo, DoraData, Extra, LoraData, Magnitude
from fastlora.core.dtypes import widest
from fastlora.core.factors import Factor
from fastlora.core.file_form import FileForm
from fastlora.core.inert import note_on_zeros
from fastlora.core.updates import Layout, Update
from fastlora.dialects.doubles import require_same, without_parts
from fastlora.dialects.looks import Looks, file_in, look, looks_of, open_file
from fastlora.dialects.lycoris import Converted, TooLarge, converted, kind_of
from fastlora.dialects.named_modules import Modules, named_modules
from fastlora.dialects.naming import Named
from fastlora.dialects.parameters import BESIDE, extras_of, magnitude_of, require_owner, swapped_halves
from fastlora.dialects.read_scales import Scales, read_scales
from fastlora.dialects.styles_read import style_of
from fastlora.dialects.suffixes import Stored, group
from fastlora.dialects.weights import DTYPES, Place, plain_update, require_pairs, widened
from fastlora.errors import InputError, UnsupportedAdapter
from fastlora.files.earlier import MARK

CONVOLUTIONS = (".conv1", ".conv2", "conv_in", "conv_out", "samplers.0.conv")
"""Modules of a UNet whose kernel is 3×3, by the end of their names."""
UNETS = ("sd15", "sdxl", "sdxl_refiner")


def read_file(path: Path, name: str, *, family: str | None = None, rank: int | None = None) -> LoraData | DoraData:
    """The adapter in a single file, or in the folder that stands for it; plain factors are views of the mapped file.

    ``family``: which models it is for, where its names leave that open. ``rank``: what is no plain factor is cut to
    this rank. Raises :class:`InputError` for what is damaged or contradicts itself, and :class:`UnsupportedAdapter`
    for what has no low-rank form or is of an unknown model; both name the file and the tensor.
    """
    if rank is not None and rank < 1:
        raise InputError(f"rank={rank}: needed is a whole number of at least 1")
    file = (file_in(path) or path) if path.is_dir() else path
    tensors, metadata = open_file(file)
    return read_tensors(tensors, metadata, file, name, looks=looks_of(file), family=family, rank=rank)


def read_tensors(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    file: Path,
    name: str,
    *,
    looks: Looks | None = None,
    family: str | None = None,
    rank: int | None = None,
) -> LoraData | DoraData:
    """The same for tensors in memory under the names of a file. ``file``: what messages call it."""
    looks = looks or look({key: tuple(t.shape) for key, t in tensors.items()})
    if looks is None:
        raise UnsupportedAdapter(f"{file} holds no adapter that is known here")
    grouped = group(widened(tensors), file)
    modules = grouped.modules
    require_pairs(modules, [("up", "down")], file)
    known = named_modules(modules, metadata, family, file)
    scales = read_scales(modules, known.named, known.family, metadata, file)
    contents = _Contents(file, modules, known, scales, rank)
    contents.read()
    record = _record(contents, name.removesuffix(file.suffix), looks, grouped.spelling, metadata)
    zeros = note_on_zeros(record.name, record.updates.values(), with_extras=bool(record.extras))
    told = [f"{file.name}: {note}" for note in (*grouped.notes, *scales.notes, *contents.notes)]
    return replace(record, notes=(*known.notes, *told, *zeros))


def _record(
    contents: _Contents, name: str, looks: Looks, spelling: str, metadata: Mapping[str, str]
) -> LoraData | DoraData:
    stored = contents.modules.values()
    alphas = Counter(s.parts["alpha"].dtype for s in stored if "alpha" in s.parts)
    family = contents.known.family
    form = FileForm(
        looks.format,
        None if family is None else family.name,
        style_of(looks, spelling, contents.known, bool(alphas)),
        contents.stems,
        {key: value for key, value in metadata.items() if key != MARK},
        alpha_dtype=str(alphas.most_common(1)[0][0])[6:] if alphas else "float32",
    )
    dtypes = {t.dtype for s in stored for part, t in s.parts.items() if part != "alpha" and t.dtype in DTYPES}
    base, dtype = BaseInfo(form=form), widest(dtypes)
    if contents.magnitudes:
        return DoraData(name, contents.updates, contents.magnitudes, extras=contents.extras, base=base, dtype=dtype)
    return LoraData(name, contents.updates, extras=contents.extras, base=base, dtype=dtype)


class _Contents:
    """What the modules of a file become. ``stems``: ``{module: stem}``."""

    def __init__(
        self, file: Path, modules: Mapping[str, Stored], known: Modules, scales: Scales, rank: int | None
    ) -> None:
        self.file, self.modules, self.known, self.scales, self.rank = file, modules, known, scales, rank
        self.updates: dict[str, Update] = {}
        self.extras: dict[str, Extra] = {}
        self.magnitudes: dict[str, Magnitude] = {}
        self.stems: dict[str, str] = {}
        self.notes: list[str] = []
        self._converted: dict[str, Converted] = {}
        self._too_large: dict[str, TooLarge] = {}
        self._twice = 0

    def read(self) -> None:
        """Reads every module, or refuses the file."""
        for stem, stored in self.modules.items():
            self._add(stem, stored, self.known.named[stem])
        if self._too_large:
            raise self._refusal()
        self.updates, dropped = without_parts(self.updates, self.known.named, self.stems, self.known.family, self.file)
        for module in dropped:
            del self.stems[module]
            self.magnitudes.pop(module, None)
        if self._twice or dropped:
            self.notes.append(f"{self._twice + len(dropped)} modules are there twice, and equal: each counts once")
        self.notes += _on_converted(self._converted)

    def _add(self, stem: str, stored: Stored, named: Named) -> None:
        module = named.module
        update = self._update(stem, stored, named)
        if update is not None:
            earlier = self.updates.get(module)
            if earlier is not None:
                require_same(earlier, update, (self.stems[module], stem), self.file)
                self._twice += 1
            else:
                self.updates[module] = update
        if not stored.parts.keys().isdisjoint(BESIDE) or "diff" in stored.parts or update is None:
            self._add_beside(stem, stored, named, update)
        self.stems.setdefault(module, stem)

    def _add_beside(self, stem: str, stored: Stored, named: Named, update: Update | None) -> None:
        rows = None if update is None else update.shape[0]
        require_owner(stored, update is not None or stem in self._too_large, self.file)
        for parameter, extra in extras_of(stored, named, self.scales.of[stem], rows, self.file):
            earlier = self.extras.get(parameter)
            if earlier is not None and not torch.equal(earlier.tensor, extra.tensor):
                raise Place(self.file, stem).fail(f"changes {parameter}, which another module of the file changes too")
            self.extras[parameter] = extra
        if update is not None:
            kernel = 1
            for size in update.layout.kernel:
                kernel *= size
            magnitude = magnitude_of(stored, named, update.shape, kernel, self.file)
            if magnitude is not None:
                self.magnitudes[named.module] = magnitude

    def _update(self, stem: str, stored: Stored, named: Named) -> Update | None:
        parts, scale = stored.parts, self.scales.of[stem]
        kind = "LoRA" if "up" in parts and len(parts) <= 3 and "mid" not in parts else kind_of(parts)
        if kind is None or (kind == "diff" and parts["diff"].dim() == 1):
            return None
        if kind == "LoRA":
            update = plain_update(stored, scale, self.file)
        else:
            try:
                found = converted(stored, scale, self.rank, self.file)
            except TooLarge as reason:
                self._too_large[stem] = reason
                return None
            self._converted[stem] = found
            update = self._with_kernel(found.update, named)
        if named.swapped:
            B = update.B.terms[0].source
            update = replace(update, B=Factor.of("B", swapped_halves(B, Place(self.file, stem))))
        return update

    def _with_kernel(self, update: Update, named: Named) -> Update:
        """LyCORIS flattens the kernel of some convolutions, which of a UNet is known."""
        family = self.known.family
        is_conv = family is not None and family.name in UNETS and not named.component
        if is_conv and update.layout.kind == "linear" and named.path.endswith(CONVOLUTIONS) and not update.shape[1] % 9:
            return replace(update, layout=Layout("conv", kernel=(3, 3)))
        return update

    def _refusal(self) -> InputError:
        stem, reason = next(iter(self._too_large.items()))
        others = f" and {len(self._too_large) - 1} other modules" if len(self._too_large) > 1 else ""
        what = "a whole matrix" if reason.kind == "diff" else f"a {reason.kind}"
        return InputError(
            f"{self.file}: module {stem!r}{others} is {what}, an update of rank {reason.rank}, which is not low. "
            "Give the rank to read it at, `fl.load(path, rank=64)` or `--read-rank 64`: the nearest update of "
            "that rank is taken, and what it lacks is told"
        )


def _on_converted(found: Mapping[str, Converted]) -> Sequence[str]:
    """What became of modules that are no plain factors."""
    notes = []
    for kind in dict.fromkeys(c.kind for c in found.values()):
        exact = [c.update.rank for c in found.values() if c.kind == kind and c.kept is None]
        if exact:
            ranks = f"rank {min(exact)}" if min(exact) == max(exact) else f"ranks {min(exact)} to {max(exact)}"
            notes.append(f"{len(exact)} modules are {_plural(kind)}: they are read exactly, as updates of {ranks}")
    cut = {stem: c for stem, c in found.items() if c.kept is not None}
    if cut:
        total = sum(c.energy for c in cut.values())
        kept = sum(c.energy * (c.kept or 0.0) for c in cut.values()) / total if total > 0 else 1.0
        least = min(cut, key=lambda stem: cut[stem].kept or 0.0)
        share = cut[least].kept or 0.0
        notes.append(
            f"{len(cut)} modules ({', '.join(dict.fromkeys(_plural(c.kind) for c in cut.values()))}) are cut to rank "
            f"{max(c.update.rank for c in cut.values())}, the nearest updates of that rank: {kept:.2%} of their Σσ² is "
            f"kept, a relative error of {(max(1.0 - kept, 0.0)) ** 0.5:.2g}; least in {least}, {share:.2%}"
        )
    return notes


def _plural(kind: str) -> str:
    return {"diff": "whole matrices", "LoCon with a core": "convolutions with a core"}.get(kind, kind)
