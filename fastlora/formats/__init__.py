"""Adapter files: from a path to a record, from a record to files. One module a format, found by listing this folder.

A format has ``detects(path)``, ``read(path, name) -> AdapterData`` and ``WRITES``, the kinds of record that it writes
(none for a format that is only read). It writes low-rank adapters through ``sink(…)``, which the engine fills, after
``ready(…)`` gave them the ranks that its readers can take, and other kinds through ``write(…)``; with ``SUFFIX`` they
are single files, else directories.
"""

from __future__ import annotations

import functools
import importlib
import os
import pkgutil
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import torch
from torch import Tensor

from fastlora.core.data import AdapterData, DeltaData, DoraData, Ia3Data, LoraData
from fastlora.core.dtypes import parse_dtype
from fastlora.core.file_form import PEFT, FileForm, check_format
from fastlora.core.names import CONFIG_NAME, check_name
from fastlora.engine import write as engine
from fastlora.engine.checks import require_finite_extras
from fastlora.engine.contracts import Sink
from fastlora.errors import InputError, UnsupportedAdapter
from fastlora.files.digits import digits_lost
from fastlora.files.disk_errors import partial_of
from fastlora.files.earlier import Overwrite
from fastlora.files.locate import find
from fastlora.files.output import OutputDirectory, replacing
from fastlora.files.tensor_files import SAFETENSORS
from fastlora.files.whole_output import placed

LISTED = 8
"""Folders that a message names."""

Lora = TypeVar("Lora", bound=LoraData)


class Format(Protocol):
    """A module of this folder."""

    WRITES: tuple[type[AdapterData], ...]

    def detects(self, path: Path) -> bool:
        """Whether a path looks like one of this format; it opens no tensors."""

    def read(self, path: Path, name: str) -> AdapterData:
        """What the path holds, under a ``name``; :class:`InputError` says what is wrong with it."""

    def ready(self, adapter: LoraData, uniform_rank: int | bool | None) -> LoraData:
        """The low-rank adapter as it will be written: at the ranks that readers of this format can take, with notes on
        what that changed. ``uniform_rank``: see :func:`write_adapters`."""

    def sink(
        self, directory: Path, adapter: LoraData, outlines: Mapping[str, tuple[Tensor, Tensor]], dtype: torch.dtype
    ) -> Sink:
        """A directory that factors are written into one by one; ``outlines``: ``(B, A)`` by module, for the shapes."""

    def write(self, path: Path, record: AdapterData, dtype: torch.dtype | str | None) -> None:
        """Writes a whole record at once; ``None``: in its own dtype."""


@runtime_checkable
class SingleFiles(Protocol):
    """A format of single files, whose ``read`` also takes the family of models and the rank of what is no LoRA."""

    SINGLE_FILES: bool

    def read(self, path: Path, name: str, *, family: str | None, rank: int | None) -> AdapterData:
        """What the file holds, under a ``name``."""


@functools.cache
def all_formats() -> dict[str, Format]:
    """Every format by its name, that of its module."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return {name: cast(Format, importlib.import_module(f"{__name__}.{name}")) for name in names}


def is_certain(path: Path) -> bool:
    """Whether a path is a PEFT directory whatever other formats would say, which need not be imported to find out."""
    return bool(_peft().is_certain(path))


@functools.cache
def _peft() -> Any:
    return importlib.import_module(f"{__name__}.{PEFT}")


def find_format(path: Path) -> Format | None:
    """The format of what lies at a path; ``None`` where no format takes it for an adapter."""
    if is_certain(path):
        return cast(Format, _peft())
    return next((format for format in all_formats().values() if format.detects(path)), None)


def read(
    path: str | Path, name: str | None = None, *, family: str | None = None, rank: int | None = None
) -> AdapterData:
    """The adapter at a path, as a record, without copying its tensors.

    path: a PEFT directory, a single file of an adapter, the Hub id of one of these, or the file of a task vector.
    name: what the adapter is called from here on; the name of the folder or file by default.
    family, rank: how a single file is read; other formats have no use for them.

    Raises :class:`InputError` where nothing can be read and :class:`UnsupportedAdapter` for adapters whose
    numbers would come out wrong.
    """
    if (known := read_alike(path, name)) is not None:
        return known
    location = find(path)
    name = location.name if name is None else name
    check_name(name)
    unfinished = None if location.path.is_file() else partial_of(location.path)
    if unfinished is not None:
        raise InputError(
            f"{location.path} lies in {unfinished.name}, an output that was never finished; run that command again"
        )
    format = find_format(location.path)
    if getattr(format, "SINGLE_FILES", False):
        return cast(SingleFiles, format).read(location.path, name, family=family, rank=rank)
    if format is not None:
        return format.read(location.path, name)
    if location.path.is_file():
        _refuse_file(location.path)
    _refuse_directory(location.path)
    raise AssertionError("unreachable")


def read_alike(path: str | Path, name: str | None) -> AdapterData | None:
    """As :func:`read`, of an adapter like one that was read before, as hundreds mostly are; ``None`` for others."""
    text = os.fspath(path)
    if not text or text[0] == "~" or partial_of(text) is not None:
        return None
    own = os.path.basename(os.path.abspath(text)) if name is None else name
    return cast(AdapterData | None, _peft().read_alike(text, own))


def save(
    record: AdapterData,
    path: Path,
    *,
    dtype: torch.dtype | str | None = None,
    uniform_rank: int | bool | None = None,
    overwrite: Overwrite = False,
    format: str | None = None,
) -> Path:
    """Writes one adapter, atomically: a directory, or the one file of a format that has a suffix.

    ``dtype=None`` keeps the widest dtype of the inputs (task vectors: float32). ``uniform_rank``, ``format``: see
    :func:`write_adapters`.
    """
    if isinstance(record, DoraData):
        from fastlora.dialects.dora_file import laid_dora

        if format is not None:
            check_format(format)
        form = record.base.form if format is None else FileForm(format) if format != PEFT else None
        if form is not None and path.suffix == SAFETENSORS:
            if format is not None and record.base.form is not None:
                form = replace(record.base.form, format=format, style="")
            record, format = laid_dora(replace(record, base=replace(record.base, form=form))), None
    if isinstance(record, LoraData) and format is None and not uniform_rank and path.suffix != SAFETENSORS:
        files = _peft().whole_files(record, dtype)
        if files is not None and placed(os.fspath(path), files):
            return path
    suffix = require_place(record, path, format)
    output = replacing(path, overwrite=overwrite) if suffix else OutputDirectory(path, overwrite=overwrite)
    with output as staging:
        notes = write_adapter(record, staging, dtype, uniform_rank, format)
    for note in notes:
        warnings.warn(note, stacklevel=3)
    return path


def writer_of(record: AdapterData) -> Format:
    """The format that a record is written in: a low-rank adapter in that of the file that it is from, if such files
    are written."""
    if isinstance(record, LoraData) and record.base.form is not None:
        own = all_formats().get(record.base.form.format)
        if own is not None and hasattr(own, "sink"):
            return own
    return next(f for f in all_formats().values() if isinstance(record, f.WRITES))


def in_format(adapter: Lora, format: str | None, family: str | None = None) -> dict[str, Lora]:
    """The low-rank adapter as one that is written in a format, in the dialect in which its readers agree; ``None``
    leaves it in the form of its file. ``family``: of its model, where its names leave that open.

    Returns ``{folder: adapter}``; the folder is ``""`` for the output itself. PEFT adapts one model: an adapter of
    several becomes one for each, in folders that have the names of diffusers (``unet``, ``text_encoder``, …).

    Raises :class:`InputError` for a format that is not written, and for modules of no known model.
    """
    if format is None:
        return {"": adapter}
    check_format(format)
    if format == PEFT:
        from fastlora.dialects.components import by_component

        return by_component(adapter, family)
    form = adapter.base.form or FileForm(format)
    form = replace(form, format=format, family=family or form.family, style="")
    return {"": replace(adapter, base=replace(adapter.base, form=form))}


def suffix_of(record: AdapterData, format: str | None = None) -> str:
    """What the name of the file ends with that a record is written as; nothing for a directory."""
    writer = writer_of(record) if format is None or not isinstance(record, LoraData) else all_formats().get(format)
    return str(getattr(writer, "SUFFIX", ""))


def require_place(record: AdapterData, path: Path, format: str | None = None) -> str:
    """Refuses a directory for what is written as a file, and a file for what is written as a directory; returns
    :func:`suffix_of`."""
    if format is not None:
        check_format(format)
    suffix = suffix_of(record, format)
    if isinstance(record, LoraData) and format is None and record.base.form is not None:
        format = record.base.form.format
    if suffix and path.suffix != suffix:
        what = f"a file of the format {format}" if format else "a task vector"
        way_out = f", or write a PEFT directory with format='{PEFT}' (--format {PEFT})" if format else ""
        raise InputError(
            f"the output {path} is no name for {what}: that is one file, NAME{suffix}; change it to "
            f"{path.name}{suffix}{way_out}"
        )
    if not suffix and path.suffix == SAFETENSORS:
        raise InputError(
            f"the output {path} has the name of a file, and {'a PEFT' if isinstance(record, LoraData) else 'an'} "
            f"adapter is a directory; change it to {path.stem}"
            + (
                ", or write one file with format='kohya', 'diffusers' or 'comfy' (--format)"
                * isinstance(record, LoraData)
            )
        )
    return suffix


def write_adapter(
    record: AdapterData,
    directory: Path,
    dtype: torch.dtype | str | None = None,
    uniform_rank: int | bool | None = None,
    format: str | None = None,
) -> list[str]:
    """Writes one adapter into a directory, or the file of one, that is being staged; returns what is worth telling, in
    sentences."""
    if isinstance(record, LoraData):
        return write_adapters({directory: record}, dtype, uniform_rank=uniform_rank, format=format)
    require_finite_extras([record] if isinstance(record, Ia3Data) else [])
    writer_of(record).write(directory, record, dtype)
    if isinstance(record, DeltaData):
        return digits_lost(record.name, record.deltas, parse_dtype(dtype, torch.float32))
    return []


def write_adapters(
    adapters: Mapping[Path, LoraData],
    dtype: torch.dtype | str | None = None,
    meanwhile: Callable[[], object] = lambda: None,
    uniform_rank: int | bool | None = None,
    format: str | None = None,
) -> list[str]:
    """Writes low-rank adapters that share stored matrices into directories, reading each of those matrices once.

    ``meanwhile`` is called while the last of them are written; see :func:`fastlora.engine.write.write_adapters`, also
    for what is returned.
    ``uniform_rank``: ``True`` writes all modules of an adapter with its largest rank, a number with that one; zeros
    fill the smaller ones. By default ranks differ where readers can take that. Raises :class:`InputError` for a number
    below an adapter's own rank.
    ``format``: that of all; by default each has the format and the names of the file that it is from.
    """
    require_finite_extras(adapters.values())
    known = {note for adapter in adapters.values() for note in adapter.notes}
    if format is not None:
        adapters = {d / folder: part for d, a in adapters.items() for folder, part in in_format(a, format).items()}
    targets = {d: parse_dtype(dtype, a.dtype) for d, a in adapters.items()}
    whole = {d: ready(a, uniform_rank) for d, a in adapters.items()}
    notes = engine.write_adapters(whole, targets, _Sinks(), meanwhile)
    # Ranks that PEFT needs are told by who asks for them beforehand.
    changed = [(whole[d], a) for d, a in adapters.items() if whole[d] is not a or a.notes]
    told = [n for after, before in changed for n in (after if suffix_of(before) else before).notes if n not in known]
    notes += dict.fromkeys(told)
    for directory, adapter in whole.items():
        if not adapter.extras:
            continue
        shifts = {path: extra.tensor for path, extra in adapter.extras.items() if extra.kind == "delta"}
        notes += digits_lost(adapter.name, shifts, targets[directory])
    return notes


def ready(adapter: Lora, uniform_rank: int | bool | None = None) -> Lora:
    """The low-rank adapter as it will be written; its notes say what that changed."""
    return cast(Lora, writer_of(adapter).ready(adapter, uniform_rank))


def ranks_written(
    adapter: LoraData, uniform_rank: int | bool | None = None, format: str | None = None
) -> tuple[list[int], list[str]]:
    """The ranks of all modules as they will be written, and notes on what that changed."""
    ranks, notes = list[int](), list[str]()
    for part in in_format(adapter, format).values():
        whole = ready(part, uniform_rank)
        ranks += [u.rank for u in whole.updates.values()]
        notes += [note for note in whole.notes if note not in adapter.notes]
    return ranks, notes


def open_sink(
    directory: Path, adapter: LoraData, outlines: Mapping[str, tuple[Tensor, Tensor]], dtype: torch.dtype
) -> Sink:
    """The files of a low-rank adapter in its own format, to be filled by the engine."""
    return writer_of(adapter).sink(directory, adapter, outlines, dtype)


@runtime_checkable
class Repeated(Protocol):
    """A sink that can be opened again, for another adapter of the same modules, ranks and base model."""

    def again(self, directory: Path, adapter: LoraData) -> Sink:
        """The files of the other adapter, with nothing in them."""


class _Sinks:
    """Opens sinks, those of adapters that are alike from one another: the parts of many pairs mostly are."""

    def __init__(self) -> None:
        self._opened: dict[object, Repeated] = {}

    def __call__(
        self, directory: Path, adapter: LoraData, outlines: Mapping[str, tuple[Tensor, Tensor]], dtype: torch.dtype
    ) -> Sink:
        # Outlines, layouts and forms are the same objects where they are equal; what was opened keeps them alive.
        shapes = tuple([(m, id(b), id(a)) for m, (b, a) in outlines.items()])
        modules = tuple([(m, id(u.layout)) for m, u in adapter.updates.items()])
        key = writer_of(adapter), adapter.base, id(adapter.base.form), dtype, shapes, modules
        alike = None if adapter.extras else self._opened.get(key)
        if alike is not None:
            return alike.again(directory, adapter)
        sink = open_sink(directory, adapter, outlines, dtype)
        if isinstance(sink, Repeated) and not adapter.extras:
            self._opened[key] = sink
        return sink


def _refuse_file(path: Path) -> None:
    from fastlora.dialects.looks import SUFFIXES, open_file

    if (path.parent / CONFIG_NAME).exists():
        raise InputError(f"{path} is one file of an adapter; pass its directory {path.parent}")
    if path.suffix in SUFFIXES:
        open_file(path)  # a damaged file is told as that
        raise UnsupportedAdapter(
            f"{path} is a single file without {CONFIG_NAME}, and its tensors are none of an adapter that is known "
            "here; pass the directory that `model.save_pretrained(...)` of a PEFT model wrote. A whole model takes "
            "part through `fl.task_vector(base, finetuned)`"
        )
    raise InputError(
        f"{path} is a file, needed is a PEFT adapter directory (with {CONFIG_NAME}) or a file of tensors "
        f"({', '.join(SUFFIXES)})"
    )


def _refuse_directory(directory: Path) -> None:
    inside = _adapters_below(directory)
    if inside:
        more = f" and {len(inside) - LISTED} more" if len(inside) > LISTED else ""
        raise InputError(
            f"{directory} holds {len(inside)} adapters ({', '.join(inside[:LISTED])}{more}) and is none itself; pass "
            f"one of them, for example {directory / inside[-1]}"
        )
    if (directory / "config.json").exists():
        raise InputError(
            f"{directory} looks like a whole model (config.json, no {CONFIG_NAME}); needed is a PEFT adapter directory "
            "(a fine-tuned model takes part through `fl.task_vector(base, finetuned)`)"
        )
    found = ", ".join(sorted(p.name for p in directory.iterdir())[:8]) or "nothing"
    raise InputError(
        f"{directory} has no {CONFIG_NAME} (found: {found}); pass the directory that "
        "`model.save_pretrained(...)` of a PEFT model wrote"
    )


def _adapters_below(directory: Path) -> list[str]:
    """Folders in a folder, or in those, that are adapters of PEFT, ``checkpoint-9`` before ``checkpoint-10``."""
    depths = (f"*/{CONFIG_NAME}", f"*/*/{CONFIG_NAME}", f"*/*/*/{CONFIG_NAME}")
    for depth in depths:
        folders = [str(p.parent.relative_to(directory)) for p in directory.glob(depth)]
        if folders:
            return sorted(folders, key=lambda name: [int(t) if t.isdigit() else t for t in re.split(r"(\d+)", name)])
    return []
