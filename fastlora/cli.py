"""The command line. Imports nothing heavy until a command runs."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastlora.errors import InputError
from fastlora.exits import guarded, listen, outputs

if TYPE_CHECKING:
    from fastlora.adapter import Adapter
    from fastlora.locate import AdapterSpec
    from fastlora.pool import Pool

app = typer.Typer(
    name="fastlora",
    help="Merge, decompose and edit pools of LoRA adapters, exactly and without dense matrices.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: rich would double the time that --help takes
    context_settings={"help_option_names": ["-h", "--help"]},
)

ADAPTER_HELP = "PATH, PATH:WEIGHT or NAME=PATH[:WEIGHT]; a PEFT directory or a Hub id."
Adapters = Annotated[list[str], typer.Argument(help=ADAPTER_HELP, metavar="A…", show_default=False)]
Memory = Annotated[
    str | None, typer.Option(help="Bound on resident memory, or on the GPU's: 1GiB.", show_default=False)
]
One = Annotated[str, typer.Argument(help="An adapter: a PEFT directory or a Hub id.", metavar="A", show_default=False)]
Out = Annotated[
    Path, typer.Option("--out", "-o", help="Directory to write; must not exist, or --overwrite.", show_default=False)
]
Rank = Annotated[int | None, typer.Option(help="Keep at most this many directions.", show_default=False)]
Energy = Annotated[
    float | None, typer.Option(help="Keep this share of Σσ² (0–1), instead of a rank.", show_default=False)
]
DType = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16; default: widest of the inputs.", show_default=False)
]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda or cuda:N; auto is the CPU.")]
Backend = Annotated[str | None, typer.Option(help="Force a backend: cpu, cuda, triton, reference.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable result on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no report, errors only.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output.")]
DropExtras = Annotated[
    bool, typer.Option("--drop-extras", help="Leave out biases and replaced modules (modules_to_save).")
]


@contextmanager
def _running(device: str, backend: str | None, quiet: bool, on_cpu: str = "") -> Iterator[None]:
    """Backend and progress of one command; ``on_cpu``: the name of one that computes on the CPU alone."""
    if device not in ("auto", "cpu"):
        if on_cpu:
            raise InputError(f"--device {device}: {on_cpu} computes on the CPU; use auto or cpu")
        from fastlora.device import parse

        parse(device)
    from fastlora.backends import current_backend, use_backend
    from fastlora.progress import show_progress

    with use_backend(backend or current_backend()), show_progress(not quiet):
        yield


def _require_backend() -> None:
    """Says before any work what the first op would stumble over."""
    from fastlora.backends import current_backend, kernels

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


def _load_pool(texts: list[str], weighted: bool, device: str) -> tuple[Pool, list[AdapterSpec]]:
    from fastlora.locate import parse_all
    from fastlora.progress import track

    specs = parse_all(texts)  # before the imports that take a second: a wrong path is told at once
    if not weighted:
        _refuse_weights(specs)
    from fastlora.formats import load
    from fastlora.pool import Pool

    _require_backend()
    pool = Pool([load(s.path, s.name) for s in track(specs, "loading")])
    return (pool if device in ("auto", "cpu") else pool.to(device)), specs


def _refuse_weights(specs: list[AdapterSpec]) -> None:
    heavy = [s for s in specs if s.weight is not None]
    if heavy:
        raise InputError(f"{heavy[0].name}: weights have no meaning for this command; leave out `:{heavy[0].weight:g}`")


def _output(out: Path, overwrite: bool, inputs: list[Path]) -> Any:
    from fastlora.output import OutputDirectory

    target = OutputDirectory(out, overwrite=overwrite, files=("*.png",))
    target.refuse_inputs(inputs)
    outputs.append(target)
    return target


def _paths(texts: list[str]) -> list[Path]:
    from fastlora.locate import parse_all

    return [s.path for s in parse_all(texts)]


def _print_json(data: object) -> None:
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


def _notices(lines: list[str], quiet: bool) -> None:
    if not quiet:
        for line in dict.fromkeys(lines):
            typer.echo(f"note: {line}", err=True)


@app.command()
def decompose(
    adapters: Adapters,
    out: Out,
    threshold: Annotated[float, typer.Option(help="τ: eigenvalues above it count as shared.")] = 0.85,
    chain: Annotated[str, typer.Option(help="product (the paper), palindrome or mean.")] = "product",
    mode: Annotated[
        str, typer.Option(help="pool: all at once; pairs: every pair; iterative: clean --target.")
    ] = "pool",
    target: Annotated[str | None, typer.Option(help="The adapter to clean (iterative).", show_default=False)] = None,
    order: Annotated[
        str | None, typer.Option(help="Names of the others, comma-separated (iterative).", show_default=False)
    ] = None,
    side: Annotated[str, typer.Option(help="left: column spaces (the paper); right: row spaces.")] = "left",
    rank: Rank = None,
    energy: Energy = None,
    rtol: Annotated[
        float | None,
        typer.Option(help="Noise floor relative to σ_max; default: the stored dtype's.", show_default=False),
    ] = None,
    memory: Memory = None,
    plots: Annotated[
        bool, typer.Option("--plots", help="Also write spectrum.png, energy.png and overlap.png.")
    ] = False,
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
        target_directory = _output(out, overwrite, _paths(adapters))
        if plots:
            from fastlora.plots import require_matplotlib

            require_matplotlib()
        from fastlora.api import decompose as run
        from fastlora.engine import parse_dtype

        pool, _ = _load_pool(adapters, weighted=False, device="cpu")  # it may have to be streamed
        if dtype is not None:
            parse_dtype(dtype, pool.adapters[0].dtype)
        names = None if order is None else [n.strip() for n in order.split(",")]
        parts = run(
            pool,
            threshold,
            chain=chain,
            mode=mode,
            side=side,
            rank=rank,
            energy=energy,
            rtol=rtol,
            target=target,
            order=names,
            memory=memory,
            device=device,
        )
        with target_directory as staging:
            parts.write(staging, dtype)
            if plots:
                _write_plots(parts, parts.pool, staging)
        if as_json:
            _print_json({"out": str(out), "mode": mode, "reports": [r.as_dict() for r in parts.reports]})
        elif not quiet:
            from fastlora.show import show_decomposition

            show_decomposition(parts, out, every)
        seen = [n for r in parts.reports for n in r.notices] if len(parts.reports) == 1 else []
        _notices([*pool.notices, *seen, *target_directory.notices], quiet)


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
    method: Annotated[
        str,
        typer.Option(help="svd: best rank-r approximation of the sum; cat: the exact sum; pem: sum of the factors."),
    ] = "svd",
    weights_by: Annotated[
        str | None,
        typer.Option(help="equal_energy, matched_norm or least_interference, in place of :WEIGHT.", show_default=False),
    ] = None,
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
        target = _output(out, overwrite, _paths(adapters))
        from fastlora.api import merge as run
        from fastlora.pool import Pool

        pool, specs = _load_pool(adapters, weighted=weights_by is None, device=device)
        if drop_extras:
            notices, pool = pool.notices, Pool(a.without_extras() for a in pool.adapters)
            pool.notices = notices
        weights = {s.name: 1.0 if s.weight is None else s.weight for s in specs}
        told = []
        if weights_by is not None:
            from fastlora.methods.weights import weights as find_weights

            weights = find_weights(pool, weights_by)
            told = [f"weight of {name}: {weight:.6g}" for name, weight in weights.items()]
        merged = run(pool, weights, method=method, rank=rank, energy=energy)
        _write_one(merged, target, out, dtype, as_json, quiet, [*pool.notices, *told, *merged.notes])


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
        target = _output(out, overwrite, _paths([adapter]))
        from fastlora.api import compress as run

        pool, _ = _load_pool([adapter], weighted=False, device=device)
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
    notices = [*notices, *target.notices]
    if as_json:
        found = {"out": str(out), "modules": len(ranks), "rank": max(ranks, default=0), "retained_energy": retained}
        _print_json({**found, "retained_energy_by_module": adapter.details.get("retained_energy"), "notices": notices})
    elif not quiet:
        share = "" if retained is None else f", {100 * float(str(retained)):.2f} % of the energy kept"
        typer.echo(f"{out}: {len(ranks)} modules, rank {min(ranks, default=0)}–{max(ranks, default=0)}{share}")
    _notices(notices, quiet)


@app.command()
def inspect(
    adapter: One,
    every: Annotated[bool, typer.Option("--all", help="Print every module, not the first ones.")] = False,
    device: Device = "auto",
    backend: Backend = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """What an adapter holds: modules, ranks, scaling, norms, spectrum; the vectors of (IA)³."""
    with _running(device, backend, quiet):
        from fastlora.locate import parse

        spec = parse(adapter)
        _refuse_weights([spec])
        _require_backend()
        from fastlora.adapter import Adapter
        from fastlora.formats import load
        from fastlora.show import describe

        element = load(spec.path, spec.name)
        if device not in ("auto", "cpu") and isinstance(element, Adapter):
            element = element.to(device)
        data, show = describe(element)
        if as_json:
            _print_json(data)
        elif not quiet:
            show(data, every)


@app.command()
def overlap(
    adapters: Adapters,
    plot: Annotated[Path | None, typer.Option(help="Write the two matrices as a picture.", show_default=False)] = None,
    device: Device = "auto",
    backend: Backend = None,
    as_json: Json = False,
    quiet: Quiet = False,
    overwrite: Overwrite = False,
) -> None:
    """How similar adapters are: cosine of ΔW and overlap of their column spaces, for every pair."""
    with _running(device, backend, quiet):
        if plot is not None:
            from fastlora.plots import check_picture

            check_picture(plot, overwrite)
        pool, _ = _load_pool(adapters, weighted=False, device=device)
        from fastlora.api import overlap as run

        if len(pool) < 2:
            raise InputError("overlap: a pool of one adapter has nothing to compare; give two adapters or more")
        found = run(pool)
        if plot is not None:
            from fastlora.output import writing
            from fastlora.plots import plot_overlap

            with writing(plot):
                plot_overlap(found, plot)
        if as_json:
            modules = {m: {"cosine": c, "subspace": s} for m, (c, s) in found.modules.items()}
            _print_json({"names": found.names, "cosine": found.cosine, "subspace": found.subspace, "modules": modules})
        elif not quiet:
            from fastlora.show import show_overlap

            show_overlap(found)
        _notices(pool.notices, quiet)


@app.command()
def bench(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Cases and workloads (--list); default: every case that takes no hours.", metavar="NAME…"),
    ] = None,
    listing: Annotated[bool, typer.Option("--list", help="Name the cases and workloads.")] = False,
    markdown: Annotated[
        Path | None, typer.Option(help="Also write the table to this file.", show_default=False)
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """The project's own numbers on this machine, beside plain torch. Takes minutes; close other programs."""
    # Spinning threads would make two of them slower than one on small machines; read before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    with _running("auto", None, quiet):
        from fastlora.bench.cases import select
        from fastlora.bench.contest import Unavailable, rows
        from fastlora.bench.table import as_dict, as_markdown
        from fastlora.bench.timing import measure_machine, waiting
        from fastlora.progress import track
        from fastlora.show import show_bench, show_bench_names

        if listing:
            show_bench_names()
            return
        contests = select(names or ())
        _notices([w] if (w := waiting()) else [], quiet)
        machine = measure_machine()
        found, skipped = [], []
        for contest in track(contests, "timing"):
            try:
                found += rows(contest, machine)
            except Unavailable as reason:
                skipped.append(f"{contest.what} was left out: {reason}")
        if not found:
            raise InputError("; ".join(skipped))
        if markdown is not None:
            markdown.write_text(as_markdown(machine, found), encoding="utf-8")
        if as_json:
            _print_json(as_dict(machine, found))
        elif not quiet:
            show_bench(machine, found)
        _notices(skipped, quiet)


@app.command()
def info(as_json: Json = False) -> None:
    """Versions, backends, and why each is or is not usable."""
    from fastlora.show import environment, show_environment

    data = environment()
    if as_json:
        _print_json(data)
    else:
        show_environment(data)


# Puts its command into `app`.
from fastlora import cli_modulate as cli_modulate  # noqa: E402


@app.callback(invoke_without_command=True)
def _start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        import fastlora

        typer.echo(f"fastlora {fastlora.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(2)


def main() -> None:
    """Entry point: 0 done, 2 wrong use or bad input (one message), 1 internal error, 128 + n stopped by signal n."""
    listen()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # σ and ‖ where the encoding has none
    sys.exit(guarded(lambda: app(standalone_mode=False)))


# Commands with a file of their own, which uses what is above.
from fastlora import cli_compose as cli_compose  # noqa: E402
from fastlora import cli_extract as cli_extract  # noqa: E402
