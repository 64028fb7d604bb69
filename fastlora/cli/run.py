"""What commands have in common: options checked, adapters loaded, results written and told."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from fastlora.cli.exits import outputs
from fastlora.errors import InputError

if TYPE_CHECKING:
    from fastlora.adapters.loading import Element
    from fastlora.adapters.lora import Adapter
    from fastlora.adapters.pool import Pool
    from fastlora.cli.arguments import AdapterSpec


@contextmanager
def running(device: str, backend: str | None, quiet: bool, on_cpu: str = "") -> Iterator[None]:
    """Backend and progress of one command; ``on_cpu``: the name of one that computes on the CPU alone."""
    if device not in ("auto", "cpu"):
        if on_cpu:
            raise InputError(f"--device {device}: {on_cpu} computes on the CPU; use auto or cpu")
        from fastlora.runtime.devices import parse

        parse(device)
    from fastlora.ops.dispatch import current_backend, use_backend
    from fastlora.runtime.progress import show_progress

    with use_backend(backend or current_backend()), show_progress(not quiet):
        yield


def require_backend() -> None:
    """Says before any work what the first op would stumble over."""
    from fastlora.ops.dispatch import current_backend, kernels

    name = current_backend()
    reason = None if name == "auto" else kernels(name)
    if isinstance(reason, str):
        raise InputError(f"backend {name!r} cannot be used: {reason}")
    if name in ("auto", "cpu"):
        from fastlora.backends import cpu

        try:
            if cpu.unavailable() is None:
                cpu.isa()
        except RuntimeError as error:  # FASTLORA_ISA names what does not exist or does not run here
            raise InputError(str(error)) from None


def load_pool(texts: list[str], weighted: bool, device: str) -> tuple[Pool, list[AdapterSpec]]:
    from fastlora.cli.arguments import parse_all
    from fastlora.runtime.progress import track

    specs = parse_all(texts)  # before the imports that take a second: a wrong path is told at once
    if not weighted:
        refuse_weights(specs)
    from fastlora.adapters.loading import load
    from fastlora.adapters.pool import Pool

    require_backend()
    pool = Pool([load(s.path, s.name) for s in track(specs, "loading")])
    return (pool if device in ("auto", "cpu") else pool.to(device)), specs


def refuse_weights(specs: list[AdapterSpec]) -> None:
    heavy = [s for s in specs if s.weight is not None]
    if heavy:
        raise InputError(f"{heavy[0].name}: weights have no meaning for this command; leave out `:{heavy[0].weight:g}`")


def output_directory(out: Path, overwrite: bool, inputs: list[Path]) -> Any:
    from fastlora.files.output import OutputDirectory

    target = OutputDirectory(out, overwrite=overwrite, files=("*.png",))
    target.refuse_inputs(inputs)
    outputs.append(target)
    return target


def paths_of(texts: list[str]) -> list[Path]:
    from fastlora.cli.arguments import parse_all

    return [s.path for s in parse_all(texts)]


def print_json(data: object) -> None:
    typer.echo(json.dumps(_plain(data), indent=1, allow_nan=False))


def _plain(value: Any) -> Any:
    """What JSON has: no tensors, no keys but strings, and ``null`` for the numbers that it lacks."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)


def print_notices(lines: list[str], quiet: bool) -> None:
    if not quiet:
        for line in dict.fromkeys(lines):
            typer.echo(f"note: {line}", err=True)


def write_one(
    adapter: Adapter, target: Any, out: Path, dtype: str | None, as_json: bool, quiet: bool, notices: Sequence[str]
) -> None:
    from fastlora.formats import write_adapter

    with target as staging:
        write_adapter(adapter, staging, dtype)
    ranks = [u.rank for u in adapter.updates.values()]
    retained = adapter.provenance.get("retained_energy")
    notices = [*notices, *target.notices]
    if as_json:
        found = {"out": str(out), "modules": len(ranks), "rank": max(ranks, default=0), "retained_energy": retained}
        print_json({**found, "retained_energy_by_module": adapter.details.get("retained_energy"), "notices": notices})
    elif not quiet:
        share = "" if retained is None else f", {100 * float(str(retained)):.2f} % of the energy kept"
        typer.echo(f"{out}: {len(ranks)} modules, rank {min(ranks, default=0)}–{max(ranks, default=0)}{share}")
    print_notices(notices, quiet)


def output_target(out: Path, overwrite: bool, inputs: list[Path]) -> Any:
    """The output directory; ``None`` for the file of a task vector."""
    if out.suffix != ".safetensors":
        return output_directory(out, overwrite, inputs)
    from fastlora.files.output import check_file

    if out.resolve() in [p.resolve() for p in inputs]:
        raise InputError(f"the output {out} is an input; write to another file")
    check_file(out, overwrite=overwrite)
    return None


def write_element(
    result: Element, target: Any, out: Path, dtype: str | None, as_json: bool, quiet: bool, overwrite: bool
) -> None:
    from fastlora.adapters.lora import Adapter
    from fastlora.adapters.task_vector import TaskVector

    if isinstance(result, TaskVector) != (target is None):
        needed = "a file, NAME.safetensors" if target is not None else "a directory"
        raise InputError(f"the result is {result.kind}, which is written as {needed}; change --out {out}")
    if isinstance(result, Adapter):
        write_one(result, target, out, dtype, as_json, quiet, result.notes)
        return
    if isinstance(result, TaskVector):
        result.save(out, dtype=dtype, overwrite=overwrite)
        found = {"kind": "task vector", "parameters": len(result.deltas)}
        said = f"task vector of {len(result.deltas)} parameters"
    else:
        from fastlora.formats.peft.ia3 import write

        with target as staging:
            write(staging, result, dtype)
        found = {"kind": "IA3", "modules": len(result.vectors)}
        said = f"(IA)³, {len(result.vectors)} modules"
    notices = [*result.notes, *(target.notices if target is not None else [])]
    if as_json:
        print_json({"out": str(out), **found, "notices": notices})
    elif not quiet:
        typer.echo(f"{out}: {said}")
    print_notices(notices, quiet)
