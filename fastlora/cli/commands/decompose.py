"""``fastlora decompose``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastlora.cli.options import Adapters, Backend, Device, DType, Energy, Json, Memory, Out, Overwrite, Quiet, Rank
from fastlora.cli.run import load_pool, output_directory, paths_of, print_json, print_notices, running

if TYPE_CHECKING:
    from fastlora.adapters.pool import Pool


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
    with running(device, backend, quiet):
        target_directory = output_directory(out, overwrite, paths_of(adapters))
        if plots:
            from fastlora.files.pictures import require_matplotlib

            require_matplotlib()
        from fastlora.core.dtypes import parse_dtype
        from fastlora.decomposition.decompose import decompose as run

        pool, _ = load_pool(adapters, weighted=False, device="cpu")  # it may have to be streamed
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
            print_json({"out": str(out), "mode": mode, "reports": [r.as_dict() for r in parts.reports]})
        elif not quiet:
            from fastlora.views.results import show_decomposition

            show_decomposition(parts, out, every)
        seen = [n for r in parts.reports for n in r.notices] if len(parts.reports) == 1 else []
        print_notices([*pool.notices, *seen, *target_directory.notices], quiet)


def _write_plots(parts: Any, pool: Pool, staging: Path) -> None:
    from fastlora.analysis.overlap import overlap as compare
    from fastlora.analysis.plots import plot_overlap
    from fastlora.decomposition.plots import plot_energy, plot_spectrum

    for i, report in enumerate(parts.reports):
        if report.rows:
            suffix = "" if len(parts.reports) == 1 else f"-{i + 1}"
            plot_spectrum(report, staging / f"spectrum{suffix}.png")
            plot_energy(report, staging / f"energy{suffix}.png")
    plot_overlap(compare(pool), staging / "overlap.png")
