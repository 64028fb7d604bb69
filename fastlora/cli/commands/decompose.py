"""``fastlora decompose``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastlora.cli.arguments import parse_all
from fastlora.cli.inputs import load_pool, refuse_weights
from fastlora.cli.options import ALL, Adapters, Csv, Energy, Html, OutDirectory, Rank, command
from fastlora.cli.outputs import check_table, output_directory, write_table
from fastlora.cli.pages import check_page, write_page_of
from fastlora.cli.run import Run, print_json
from fastlora.errors import InputError

if TYPE_CHECKING:
    from fastlora.decomposition.input_parts import InputDecomposition
    from fastlora.decomposition.result import Decomposition


@command(*ALL)
def decompose(
    run: Run,
    adapters: Adapters,
    out: OutDirectory,
    threshold: Annotated[
        str, typer.Option(help="τ: eigenvalues above it count as shared; soft: by how far they are above chance.")
    ] = "0.85",
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
    weighting: Annotated[
        str | None, typer.Option(help="energy: directions count by σ²/(σ² + ρσ₁²).", show_default=False)
    ] = None,
    rho: Annotated[float | None, typer.Option(help="ρ of --weighting; default: 0.01.", show_default=False)] = None,
    inputs: Annotated[
        Path | None,
        typer.Option(help="Statistics of inputs (fl.statistics): parts by inputs, not by column spaces."),
    ] = None,
    mu: Annotated[
        float | None, typer.Option(help="With --inputs: how much the others' inputs weigh; default: 1.")
    ] = None,
    ridge: Annotated[
        float | None, typer.Option(help="With --inputs: ε, of the mean of the diagonal; default: 1e-4.")
    ] = None,
    plots: Annotated[
        bool, typer.Option("--plots", help="Also write spectrum.png, energy.png and overlap.png.")
    ] = False,
    csv: Csv = None,
    html: Html = None,
    every: Annotated[bool, typer.Option("--all", help="Print every module, not the most shared.")] = False,
) -> None:
    """Split a pool into shared and unique adapters (DeVec, arXiv 2512.22511)."""
    specs = parse_all(adapters)
    refuse_weights(specs)
    directory = output_directory(run, out, [s.path for s in specs])
    check_table(run, csv)
    check_page(run, html)
    if inputs is not None and (plots or html is not None):
        raise InputError(
            f"{'--plots' if plots else '--html'} shows spectra, which parts by inputs do not have; leave it out"
        )
    if plots:
        from fastlora.files.pictures import require_matplotlib

        require_matplotlib()
    run.start(lean=True)
    from fastlora.core.dtypes import parse_dtype
    from fastlora.decomposition.decompose import decompose as decompose_pool
    from fastlora.decomposition.result import Decomposition
    from fastlora.views.results import decomposition_data, decomposition_rows, show_decomposition

    pool, _ = load_pool(run, specs)  # on the CPU: it may have to be streamed through the device
    if run.dtype is not None:
        parse_dtype(run.dtype, pool.adapters[0].dtype)
    chosen: dict[str, Any] = {
        "threshold": _threshold(threshold),
        "chain": chain,
        "mode": mode,
        "side": side,
        "rank": rank,
        "energy": energy,
    }
    chosen |= {"weighting": weighting, "rho": rho, "rtol": rtol, "target": target}
    chosen |= {"inputs": inputs, "mu": mu, "ridge": ridge}
    parts: Decomposition | InputDecomposition = decompose_pool(
        pool,
        **chosen,
        order=None if order is None else [name.strip() for name in order.split(",")],
        memory=run.memory,
        device=run.device,
    )
    with directory as staging:
        how = {"keep_reports": True} if isinstance(parts, Decomposition) else {}
        lost = parts.write(staging, run.dtype, run.uniform_rank, run.format, **how)
        if plots and isinstance(parts, Decomposition):
            _write_plots(parts, staging)
    data = decomposition_data(parts, out)
    if csv is not None:
        write_table(run, csv, decomposition_rows(data))
    if html is not None and isinstance(parts, Decomposition):
        write_page_of(run, html, f"{len(pool)} adapters, decomposed", pool, None, parts.reports)
    if run.as_json:
        print_json(data)
    elif not run.quiet:
        show_decomposition(data, every)
    told = parts.reports[0].notices if len(parts.reports) == 1 else []
    run.tell_notes([*pool.told, *told, *lost, *directory.notices])


def _threshold(text: str) -> float | str:
    """A number, or a word that :func:`fastlora.decompose` knows or refuses."""
    try:
        return float(text)
    except ValueError:
        return text


def _write_plots(parts: Decomposition, staging: Path) -> None:
    from fastlora.analysis.overlap import overlap
    from fastlora.analysis.plots import plot_overlap
    from fastlora.decomposition.plots import plot_energy, plot_spectrum

    for i, report in enumerate(parts.reports):
        if report.rows:
            suffix = "" if len(parts.reports) == 1 else f"-{i + 1}"
            plot_spectrum(report, staging / f"spectrum{suffix}.png")
            plot_energy(report, staging / f"energy{suffix}.png")
    plot_overlap(overlap(parts.pool), staging / "overlap.png")
