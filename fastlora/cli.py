"""The command line. Imports nothing heavy until a command runs."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from fastlora.errors import FastloraError, InputError

if TYPE_CHECKING:
    from fastlora.adapter import Adapter
    from fastlora.locate import AdapterSpec
    from fastlora.pool import Pool

app = typer.Typer(
    name="fastlora",
    help="Merge, decompose and edit pools of LoRA adapters, exactly and without dense matrices.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ADAPTER_HELP = "PATH, PATH:WEIGHT or NAME=PATH[:WEIGHT]; a PEFT directory or a Hub id."
Adapters = Annotated[list[str], typer.Argument(help=ADAPTER_HELP, metavar="A…", show_default=False)]
One = Annotated[str, typer.Argument(help="An adapter: a PEFT directory or a Hub id.", metavar="A", show_default=False)]
Out = Annotated[Path, typer.Option("--out", "-o", help="Directory to write; must not exist, or --overwrite.", show_default=False)]
Rank = Annotated[int | None, typer.Option(help="Keep at most this many directions.", show_default=False)]
Energy = Annotated[float | None, typer.Option(help="Keep this share of Σσ² (0–1), instead of a rank.", show_default=False)]
DType = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: widest of the inputs.", show_default=False)]
Device = Annotated[str, typer.Option(help="Where to compute: auto or cpu.")]
Backend = Annotated[str | None, typer.Option(help="Force a backend: cpu or reference.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable result on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no report, errors only.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output.")]
DropExtras = Annotated[bool, typer.Option("--drop-extras", help="Leave out biases and replaced modules (modules_to_save).")]


@contextmanager
def _running(device: str, backend: str | None, quiet: bool) -> Iterator[None]:
    """Backend and progress of one command."""
    if device not in ("auto", "cpu"):
        raise InputError(f"--device {device}: this version computes on the CPU; use auto or cpu")
    from fastlora.backends import use_backend
    from fastlora.progress import show_progress

    with use_backend(backend or "auto"), show_progress(not quiet):
        yield


def _load_pool(texts: list[str], weighted: bool) -> tuple[Pool, list[AdapterSpec]]:
    from fastlora.formats import load
    from fastlora.locate import parse_all
    from fastlora.pool import Pool
    from fastlora.progress import track

    specs = parse_all(texts)
    heavy = [s for s in specs if s.weight is not None]
    if heavy and not weighted:
        raise InputError(f"{heavy[0].name}: weights have no meaning for this command; leave out `:{heavy[0].weight:g}`")
    return Pool([load(s.path, s.name) for s in track(specs, "loading")]), specs


def _output(out: Path, overwrite: bool, inputs: list[Path]) -> Any:
    from fastlora.output import OutputDirectory

    target = OutputDirectory(out, overwrite=overwrite, files=("*.png",))
    target.refuse_inputs(inputs)
    return target


def _paths(texts: list[str]) -> list[Path]:
    from fastlora.locate import parse_all

    return [s.path for s in parse_all(texts)]


def _print_json(data: object) -> None:
    typer.echo(json.dumps(data, indent=1, default=_plain))


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    return str(value)


def _notices(lines: list[str], quiet: bool) -> None:
    if not quiet:
        for line in lines:
            typer.echo(f"note: {line}", err=True)


@app.command()
def decompose(
    adapters: Adapters,
    out: Out,
    threshold: Annotated[float, typer.Option(help="τ: eigenvalues above it count as shared.")] = 0.85,
    chain: Annotated[str, typer.Option(help="product (the paper), palindrome or mean.")] = "product",
    mode: Annotated[str, typer.Option(help="pool: all at once; pairs: every pair; iterative: clean --target.")] = "pool",
    target: Annotated[str | None, typer.Option(help="The adapter to clean (iterative).", show_default=False)] = None,
    order: Annotated[str | None, typer.Option(help="Names of the others, comma-separated (iterative).", show_default=False)] = None,
    side: Annotated[str, typer.Option(help="left: column spaces (the paper); right: row spaces.")] = "left",
    rank: Rank = None,
    energy: Energy = None,
    rtol: Annotated[float | None, typer.Option(help="Noise floor relative to σ_max; default: the stored dtype's.", show_default=False)] = None,
    plots: Annotated[bool, typer.Option("--plots", help="Also write spectrum.png, energy.png and overlap.png.")] = False,
    every: Annotated[bool, typer.Option("--all", help="Print every module, not the most shared.")] = False,
    dtype: DType = None,
    device: Device = "auto",
    backend: Backend = None,
    as_json: Json = False,
    quiet: Quiet = False,
    overwrite: Overwrite = False,
) -> None:
    """Split a pool into shared and unique adapters (DeVec, arXiv 2512.22511)."""
    with _running(device, backend, quiet):
        from fastlora.api import decompose as run
        from fastlora.engine import parse_dtype

        target_directory = _output(out, overwrite, _paths(adapters))
        pool, _ = _load_pool(adapters, weighted=False)
        if dtype is not None:
            parse_dtype(dtype, pool.adapters[0].dtype)
        names = None if order is None else [n.strip() for n in order.split(",")]
        parts = run(
            pool, threshold, chain=chain, mode=mode, side=side, rank=rank, energy=energy, rtol=rtol, target=target, order=names
        )
        with target_directory as staging:
            parts.write(staging, dtype)
            if plots:
                _write_plots(parts, pool, staging)
        if as_json:
            _print_json({"out": str(out), "mode": mode, "reports": [r.as_dict() for r in parts.reports]})
        elif not quiet:
            from fastlora.show import show_decomposition

            show_decomposition(parts, out, every)
        _notices([*pool.notices, *target_directory.notices], quiet or as_json)


def _write_plots(parts: Any, pool: Pool, staging: Path) -> None:
    from fastlora.api import overlap as compare
    from fastlora.plots import plot_energy, plot_overlap, plot_spectrum

    for i, report in enumerate(parts.reports):
        if report.rows:
            suffix = "" if len(parts.reports) == 1 else f"-{i + 1}"
            plot_spectrum(report, staging / f"spectrum{suffix}.png")
            plot_energy(report, staging / f"energy{suffix}.png")
    plot_overlap(compare(pool), staging / "overlap.png")


@app.command()
def merge(
    adapters: Adapters,
    out: Out,
    method: Annotated[str, typer.Option(help="svd: best rank-r approximation of the sum; cat: the exact sum.")] = "svd",
    rank: Rank = None,
    energy: Energy = None,
    drop_extras: DropExtras = False,
    dtype: DType = None,
    device: Device = "auto",
    backend: Backend = None,
    as_json: Json = False,
    quiet: Quiet = False,
    overwrite: Overwrite = False,
) -> None:
    """Merge adapters into one: Σ wᵢΔWᵢ."""
    with _running(device, backend, quiet):
        from fastlora.api import merge as run
        from fastlora.pool import Pool

        target = _output(out, overwrite, _paths(adapters))
        pool, specs = _load_pool(adapters, weighted=True)
        if drop_extras:
            notices, pool = pool.notices, Pool(a.without_extras() for a in pool.adapters)
            pool.notices = notices
        weights = {s.name: 1.0 if s.weight is None else s.weight for s in specs}
        merged = run(pool, weights, method=method, rank=rank, energy=energy)
        _write_one(merged, target, out, dtype, as_json, quiet, [*pool.notices, *merged.notes])


@app.command()
def compress(
    adapter: One,
    out: Out,
    rank: Rank = None,
    energy: Energy = None,
    dtype: DType = None,
    device: Device = "auto",
    backend: Backend = None,
    as_json: Json = False,
    quiet: Quiet = False,
    overwrite: Overwrite = False,
) -> None:
    """Resize an adapter to a lower rank, keeping as much of it as that rank can."""
    with _running(device, backend, quiet):
        from fastlora.api import compress as run

        target = _output(out, overwrite, _paths([adapter]))
        pool, _ = _load_pool([adapter], weighted=False)
        smaller = run(pool.adapters[0], rank, energy=energy)
        _write_one(smaller, target, out, dtype, as_json, quiet, smaller.notes)


def _write_one(
    adapter: Adapter, target: Any, out: Path, dtype: str | None, as_json: bool, quiet: bool, notices: list[str]
) -> None:
    from fastlora.engine import write_adapter

    with target as staging:
        write_adapter(adapter, staging, dtype)
    ranks = [u.rank for u in adapter.updates.values()]
    retained = adapter.provenance.get("retained_energy")
    if as_json:
        found = {"out": str(out), "modules": len(ranks), "rank": max(ranks, default=0), "retained_energy": retained}
        _print_json({**found, "retained_energy_by_module": adapter.details.get("retained_energy"), "notices": notices})
        return
    if not quiet:
        share = "" if retained is None else f", {100 * float(str(retained)):.2f} % of the energy kept"
        typer.echo(f"{out}: {len(ranks)} modules, rank {min(ranks, default=0)}–{max(ranks, default=0)}{share}")
    _notices([*notices, *target.notices], quiet)


@app.command()
def inspect(
    adapter: One,
    every: Annotated[bool, typer.Option("--all", help="Print every module, not the first ones.")] = False,
    device: Device = "auto",
    backend: Backend = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """What an adapter holds: modules, ranks, scaling, norms, spectrum."""
    with _running(device, backend, quiet):
        from fastlora.methods.spectrum import singular_forms
        from fastlora.show import adapter_data, show_adapter

        pool, _ = _load_pool([adapter], weighted=False)
        forms = singular_forms(pool.names[0], pool.adapters[0].updates)
        data = adapter_data(pool.adapters[0], forms)
        if as_json:
            _print_json(data)
        else:
            show_adapter(data, every)


@app.command()
def overlap(
    adapters: Adapters,
    plot: Annotated[Path | None, typer.Option(help="Write the two matrices as a picture.", show_default=False)] = None,
    device: Device = "auto",
    backend: Backend = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """How similar adapters are: cosine of ΔW and overlap of their column spaces, for every pair."""
    with _running(device, backend, quiet):
        from fastlora.api import overlap as run
        from fastlora.output import writing

        pool, _ = _load_pool(adapters, weighted=False)
        found = run(pool)
        if plot is not None:
            from fastlora.plots import plot_overlap

            with writing(plot):
                plot_overlap(found, plot)
        if as_json:
            modules = {m: {"cosine": c, "subspace": s} for m, (c, s) in found.modules.items()}
            _print_json({"names": found.names, "cosine": found.cosine, "subspace": found.subspace, "modules": modules})
        elif not quiet:
            from fastlora.show import show_overlap

            show_overlap(found)
        _notices(pool.notices, quiet or as_json)


@app.command()
def info(as_json: Json = False) -> None:
    """Versions, backends, and why each is or is not usable."""
    from fastlora.show import environment, show_environment

    data = environment()
    if as_json:
        _print_json(data)
    else:
        show_environment(data)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        import fastlora

        typer.echo(f"fastlora {fastlora.__version__}")
        raise typer.Exit


def _terminate(signum: int, _: object) -> NoReturn:
    raise SystemExit(128 + signum)


def main() -> None:
    """Entry point: 0 done, 2 wrong use or bad input (one message), 1 internal error."""
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(_guarded(lambda: app(standalone_mode=True)))


def _guarded(run: Callable[[], object]) -> int:
    try:
        run()
    except FastloraError as error:
        typer.echo(f"error: {error}", err=True)
        return 2
    except KeyboardInterrupt:
        typer.echo("interrupted: nothing was written; run the same command again", err=True)
        return 130
    except MemoryError:
        typer.echo("error: out of memory; close other programs or use fewer adapters at once", err=True)
        return 2
    except BrokenPipeError:
        sys.stderr.close()  # the reader went away: not an error of ours, and nothing more to say
        return 0
    return 0
