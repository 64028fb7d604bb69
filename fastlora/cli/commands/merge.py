"""``fastlora merge``."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastlora.cli.arguments import AdapterSpec, parse_all
from fastlora.cli.doras import is_recombined, recombine_doras
from fastlora.cli.inputs import load_pool, refuse_weights
from fastlora.cli.options import ALL, Adapters, DropExtras, Energy, Html, Out, Rank, command
from fastlora.cli.outputs import output_target, require_place, write_adapter
from fastlora.cli.pages import check_page, write_result_page
from fastlora.cli.recipes import check_recipe, given_recipe, merge_recipe
from fastlora.cli.recipes import save_recipe as write_recipe
from fastlora.cli.run import Run
from fastlora.cli.scoring import Scoring
from fastlora.errors import InputError
from fastlora.merging.listing import method_files

if TYPE_CHECKING:
    from fastlora.adapters.pool import Pool
    from fastlora.coefficients.comparison import Comparison
    from fastlora.files.output import OutputDirectory
    from fastlora.merging.input_rows import Statistics
    from fastlora.views.tables import Data

OPTIONS = ("rank", "energy", "min_energy", "data", "memory", "device", "method")
"""Parameters of a merge that are options of the command."""


@command(*ALL)
def merge(
    run: Run,
    adapters: Adapters,
    out: Out,
    method: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(method_files())}: `fastlora methods` says what each does and takes. By default the exact "
            "sum with the weights, or without any at the mean norm of the adapters. With --score several, A,B,C.",
            show_default=False,
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="A parameter of the method, such as density=0.3.", metavar="NAME=VALUE", show_default=False
        ),
    ] = None,
    weights_by: Annotated[
        str | None,
        typer.Option(help="equal_energy, matched_norm or least_interference, in place of :WEIGHT.", show_default=False),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="A file of `fl.statistics(…)`, for methods that use inputs; may be given again.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    score: Annotated[
        str | None,
        typer.Option(
            help="Try sums of several lengths, then rules, and write the best: `CMD CANDIDATE` prints how good one is, "
            "a number or one an example and a line; {} in CMD stands for the candidate.",
            metavar="CMD",
            show_default=False,
        ),
    ] = None,
    budget: Annotated[int | None, typer.Option(help="How often --score may run CMD.", show_default=False)] = None,
    scores: Annotated[
        Path | None,
        typer.Option(
            help="Keep what --score found in this JSON file, and go on with it.", metavar="FILE", show_default=False
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw what --score found.", metavar="FILE", show_default=False)
    ] = None,
    save_recipe: Annotated[
        Path | None,
        typer.Option(help="Write what this command does as a recipe, *.yaml.", metavar="FILE", show_default=False),
    ] = None,
    html: Html = None,
    rank: Rank = None,
    energy: Energy = None,
    min_energy: Annotated[
        float | None,
        typer.Option(
            help="Least share of Σσ² that a method on elements (ties) may keep; 0.9 by default.", show_default=False
        ),
    ] = None,
    drop_extras: DropExtras = False,
    dora: Annotated[
        str | None,
        typer.Option(
            help="What DoRAs become on --base: nearest (LoRAs, the default) or recombine (one DoRA).",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Merge adapters into one: Σ wᵢΔWᵢ; or what a recipe says, `fastlora merge RECIPE.yaml`."""
    own = {"--method": method, "--set": set_, "--weights-by": weights_by, "--save-recipe": save_recipe}
    recipe = given_recipe(adapters, {**own, "--dora": dora, "--score": score})
    others = {**own, "--data": data, "--min-energy": min_energy, "--html": html, "--uniform-rank": run.uniform_rank}
    recombined = is_recombined(run, dora, {**others, "--score": score})
    check_page(run, html)
    scoring = Scoring(score, budget, scores, plot)
    scoring.check(run, method, set_)
    if recipe is not None:
        statistics = read_statistics(data or ())
        options = {"rank": rank, "energy": energy, "min_energy": min_energy, "data": statistics}
        merge_recipe(run, recipe, out, html, drop_extras=drop_extras, **options)
        return
    specs = parse_all(adapters)
    if weights_by is not None:
        refuse_weights(specs)
    settings = parse_settings(set_ or ())
    if settings and method is None:
        raise InputError(f"--set {next(iter(settings))}=…: is a parameter of a method; give --method too")
    check_recipe(run, save_recipe)
    target = output_target(run, out, [s.path for s in specs])
    run.start()
    if recombined:
        recombine_doras(run, specs, out, rank=rank, energy=energy, drop_extras=drop_extras)
        return
    from fastlora.adapters.placing import place
    from fastlora.coefficients.weights import weights as find_weights
    from fastlora.merging.default import choose
    from fastlora.merging.kept import with_kept
    from fastlora.merging.merge import merge as merge_pool
    from fastlora.runtime import devices
    from fastlora.views.merging import choice_data, kept_data, show_choice, show_kept

    pool, given = load_pool(run, specs, drop_extras=drop_extras)
    require_place(run, out, pool.adapters[0])
    placed = place(pool.adapters, devices.parse(run.device) or pool.device, run.memory)
    pool = pool.to(placed.device)
    notes = list(pool.notices)
    weights = {name: 1.0 if weight is None else weight for name, weight in given.items()}
    if weights_by is not None:
        with placed.in_use():
            weights = find_weights(pool, weights_by)
        notes += [f"weight of {name}: {weight:.6g}" for name, weight in weights.items()]
    statistics = read_statistics(data or ())
    if score is not None:
        if min_energy is not None:
            raise InputError("--min-energy: has no place beside --score, whose rules have their defaults; leave it out")
        cut = {"rank": rank, "energy": energy, "data": statistics}
        with placed.in_use():
            found = scoring.choose(run, pool, specs, weights, out, method, **cut)
        write_chosen(run, found, pool, specs, target, out, notes, html, save_recipe)
        return
    parameters: dict[str, object] = {**settings, "min_energy": min_energy}
    choice = None
    if method is None and statistics is not None:
        method = "regmean"
    elif method is None:
        weighed = weights_by is not None or any(weight is not None for weight in given.values())
        with placed.in_use():
            choice = choose(pool, weights if weighed else None, rank=rank, energy=energy)
        method, weights, parameters = choice.method, choice.weights, {**parameters, **choice.parameters}
        notes += choice.notes
    merged = merge_pool(
        pool,
        weights,
        method=method,
        rank=rank,
        energy=energy,
        data=statistics,
        memory=run.memory,
        device=run.device,
        **parameters,
    )
    with placed.in_use():
        merged, shares = with_kept(pool, merged)
    kept = kept_data(shares)
    chosen: Data = {} if choice is None else choice_data(choice)
    report = {**kept, **({"default": chosen} if chosen else {})}
    write_adapter(run, merged, target, out, [*notes, *merged.notes], report)
    if not run.as_json and not run.quiet:
        show_choice(chosen, kept) if chosen else show_kept(kept)
    if html is not None:
        write_result_page(run, html, pool, merged, report["retained_energy_by_adapter"])
    if save_recipe is not None:
        write_recipe(run, save_recipe, specs, pool, weights, method, merged)


def write_chosen(
    run: Run,
    found: Comparison,
    pool: Pool,
    specs: Sequence[AdapterSpec],
    target: OutputDirectory | None,
    out: Path,
    notes: Sequence[str],
    html: Path | None,
    recipe: Path | None,
) -> None:
    """Writes the winner of ``--score``, and says how it was found."""
    from fastlora.merging.kept import with_kept
    from fastlora.views.merging import kept_data, show_chosen, show_kept

    merged, shares = with_kept(pool, found.adapter)
    kept = kept_data(shares)
    write_adapter(run, merged, target, out, [*notes, *merged.notes], {**kept, "chosen": found.as_dict()})
    if not run.as_json and not run.quiet:
        show_chosen(*found.rows(), found.conclusion)
        show_kept(kept)
    if html is not None:
        write_result_page(run, html, pool, merged, kept["retained_energy_by_adapter"])
    if recipe is not None:
        write_recipe(run, recipe, specs, pool, found.settings["weights"], found.settings["method"], merged)


def read_statistics(files: Sequence[Path]) -> Statistics | None:
    """The inputs in some files, together; ``None`` without any."""
    if not files:
        return None
    from fastlora.merging.input_rows import Statistics

    return functools.reduce(operator.or_, map(Statistics.load, files))


def parse_settings(texts: Sequence[str]) -> dict[str, str]:
    """``{name: value}`` of ``NAME=VALUE`` arguments; what a value means, the method knows."""
    settings: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name.isidentifier() or not value.strip():
            raise InputError(f"--set {text!r}: write NAME=VALUE, such as density=0.3")
        if name in OPTIONS:
            raise InputError(f"--set {text!r}: use the option --{name.replace('_', '-')}")
        if name in ("pool", "weights"):
            raise InputError(f"--set {text!r}: adapters and weights are arguments, PATH:WEIGHT")
        if name in settings:
            raise InputError(f"--set {text!r}: {name} is given twice")
        settings[name] = value.strip()
    return settings
