"""What a command writes: directories, single files, tables; and what it says about them."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from fastlora.cli.exits import outputs
from fastlora.cli.run import Run, print_json
from fastlora.core.file_form import DIRECTORIES, check_format
from fastlora.errors import InputError, OutputError
from fastlora.views.text import escaped, share_text

if TYPE_CHECKING:
    import numpy.typing as npt

    from fastlora.adapters.dora import DoRA
    from fastlora.adapters.loading import Element
    from fastlora.adapters.lora import Adapter
    from fastlora.files.output import OutputDirectory


def output_directory(run: Run, out: Path, inputs: Iterable[Path]) -> OutputDirectory:
    """The output directory, which a signal removes while it is unfinished."""
    from fastlora.files.output import OutputDirectory

    target = OutputDirectory(out, overwrite=run.replace)
    target.refuse_inputs(inputs)
    outputs.append(target)
    return target


def output_target(run: Run, out: Path, inputs: Iterable[Path]) -> OutputDirectory | None:
    """The output directory; ``None`` for one file, of a task vector or of an adapter."""
    is_file = out.suffix == ".safetensors"
    if run.format is not None:
        check_format(run.format)
    if run.format is not None and is_file == (run.format in DIRECTORIES):
        needed = "a directory" if is_file else "a file, NAME.safetensors"
        raise InputError(f"--format {run.format} is written as {needed}; change --out {out}")
    if out.suffix != ".safetensors":
        return output_directory(run, out, inputs)
    from fastlora.files.earlier import check_file

    if out.resolve() in [p.resolve() for p in inputs]:
        raise InputError(f"the output {out} is an input; write to another file")
    check_file(out, overwrite=run.replace)
    return None


def require_place(run: Run, out: Path, adapter: Adapter) -> None:
    """Refuses, before any work, an output whose name does not fit the format of the result: that of its first input."""
    from fastlora import formats

    formats.require_place(adapter, out, run.format)


def check_table(run: Run, path: Path | None) -> None:
    """Refuses, before any work, a file for a table that could not be written."""
    if path is None:
        return
    from fastlora.files.earlier import check_file

    check_file(path, overwrite=run.replace)
    if not path.absolute().parent.is_dir():
        raise OutputError(f"{path} cannot be written: there is no directory {path.absolute().parent}")


def write_table(run: Run, path: Path, rows: Sequence[Sequence[object]]) -> None:
    """Writes a table with a heading as CSV, whole or not at all."""
    from fastlora.files.disk_errors import writing
    from fastlora.files.output import replacing

    with replacing(path, overwrite=run.replace) as staging, writing(path):
        with staging.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([escaped(c) if isinstance(c, str) else c for c in row] for row in rows)


def write_arrays(run: Run, path: Path, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Writes named arrays as a NumPy file, whole or not at all. It holds no pickled objects."""
    import numpy as np

    from fastlora.files.disk_errors import writing
    from fastlora.files.output import replacing

    with replacing(path, overwrite=run.replace) as staging, writing(path), staging.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def write_adapter(
    run: Run,
    adapter: Adapter,
    target: OutputDirectory | None,
    out: Path,
    notes: Iterable[str],
    more_data: Mapping[str, object] | None = None,
) -> None:
    """Writes a LoRA adapter and says what it is; ``target`` is ``None`` for one file.

    ``more_data``: what else ``--json`` prints.
    """
    from fastlora import formats
    from fastlora.files.output import replacing

    formats.require_place(adapter, out, run.format)
    ranks, more = formats.ranks_written(adapter, run.uniform_rank, run.format)
    with replacing(out, overwrite=run.replace) if target is None else target as staging:
        lost = formats.write_adapter(adapter, staging, run.dtype, run.uniform_rank, run.format)
    retained = adapter.provenance.get("retained_energy") if any(ranks) else None  # of nothing there is no share
    notes = list(dict.fromkeys([*notes, *more, *lost, *([] if target is None else target.notices)]))
    if run.as_json:
        data = {"out": str(out), "modules": len(ranks), "rank": max(ranks, default=0), "retained_energy": retained}
        data |= {"retained_energy_by_module": adapter.details.get("retained_energy"), "notices": notes}
        print_json({**data, **(more_data or {})})
    elif not run.quiet:
        share = "" if retained is None else f", {share_text(float(str(retained)))} of the energy kept"
        typer.echo(f"{out}: {len(ranks)} modules, rank {min(ranks, default=0)}–{max(ranks, default=0)}{share}")
    run.tell_notes(notes)


def write_dora(run: Run, adapter: DoRA, out: Path) -> None:
    """Writes a DoRA adapter and says what it is."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        adapter.save(out, dtype=run.dtype, overwrite=run.replace, format=run.format)
    notes = [*adapter.notes, *(str(warning.message) for warning in told)]
    if run.as_json:
        data = {"kind": "DoRA", "modules": len(adapter.updates), "magnitudes": len(adapter.magnitudes)}
        print_json({"out": str(out), **data, "notices": notes})
    elif not run.quiet:
        typer.echo(f"{out}: DoRA, {len(adapter.updates)} modules, {len(adapter.magnitudes)} with magnitudes")
    run.tell_notes(notes)


def write_element(run: Run, result: Element, target: OutputDirectory | None, out: Path) -> None:
    """Writes an adapter of any kind and says what it is; ``target`` is ``None`` for one file."""
    from fastlora import formats
    from fastlora.adapters.lora import Adapter
    from fastlora.adapters.task_vector import TaskVector

    if isinstance(result, Adapter):
        write_adapter(run, result, target, out, result.notes)
        return
    if isinstance(result, TaskVector) != (target is None):
        needed = "a file, NAME.safetensors" if target is not None else "a directory"
        raise InputError(f"the result is {result.kind}, which is written as {needed}; change --out {out}")
    notes = list(result.notes)
    if isinstance(result, TaskVector):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", UserWarning)
            result.save(out, dtype=run.dtype, overwrite=run.replace)
        notes += [str(warning.message) for warning in told]
        data = {"kind": "task vector", "parameters": len(result.deltas)}
        said = f"task vector of {len(result.deltas)} parameters"
    else:
        assert target is not None
        with target as staging:
            formats.write_adapter(result, staging, run.dtype)
        data = {"kind": "IA3", "modules": len(result.modules)}
        said = f"(IA)³, {len(result.modules)} modules"
        notes += target.notices
    if run.as_json:
        print_json({"out": str(out), **data, "notices": notes})
    elif not run.quiet:
        typer.echo(f"{out}: {said}")
    run.tell_notes(notes)
