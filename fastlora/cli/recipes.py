"""Recipes on the command line: ``fastlora merge RECIPE.yaml``, and ``--save-recipe`` of what a merge did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fastlora.cli.arguments import AdapterSpec
from fastlora.cli.inputs import load_pool
from fastlora.cli.outputs import output_target, require_place, write_adapter
from fastlora.cli.pages import write_result_page
from fastlora.cli.run import Run
from fastlora.errors import InputError

if TYPE_CHECKING:
    from fastlora.adapters.lora import Adapter
    from fastlora.adapters.pool import Pool

SUFFIXES = (".yaml", ".yml")


def given_recipe(adapters: Sequence[str], options: Mapping[str, object]) -> Path | None:
    """The recipe among the arguments; it stands alone, without the ``options`` that it has itself."""
    files = [a for a in adapters if a.lower().endswith(SUFFIXES)]
    if not files:
        return None
    if len(adapters) > 1:
        raise InputError(f"{files[0]} is a recipe, which names its adapters; leave out the other arguments")
    used = next((name for name, value in options.items() if value), None)
    if used is not None:
        raise InputError(f"{files[0]} is a recipe, which has this itself; leave out {used}, or change the recipe")
    return Path(files[0])


def merge_recipe(run: Run, file: Path, out: Path, html: Path | None, *, drop_extras: bool, **options: object) -> None:
    """Merges what a recipe names and writes it; ``options`` are those of the merge that it does not have.
    ``html``: a page to write, if one is asked for."""
    from fastlora.merging.recipe import Recipe

    recipe = Recipe.load(file)
    specs = [AdapterSpec(name, Path(path), is_named=True) for name, path in recipe.named.items()]
    target = output_target(run, out, [s.path for s in specs])
    run.start()
    from fastlora.adapters.placing import place
    from fastlora.merging.kept import with_kept
    from fastlora.runtime import devices
    from fastlora.views.merging import kept_data, show_kept

    pool, _ = load_pool(run, specs, drop_extras=drop_extras)
    require_place(run, out, pool.adapters[0])
    placed = place(pool.adapters, devices.parse(run.device) or pool.device, run.memory)
    pool = pool.to(placed.device)
    merged = recipe.merge(pool, memory=run.memory, device=run.device, **options)
    with placed.in_use():
        merged, shares = with_kept(pool, merged)
    kept = kept_data(shares)
    run = run if run.dtype is not None else replace(run, dtype=recipe.dtype)
    write_adapter(run, merged, target, out, [*pool.notices, *merged.notes], kept)
    if html is not None:
        write_result_page(run, html, pool, merged, kept["retained_energy_by_adapter"])
    if not run.as_json and not run.quiet:
        show_kept(kept)


def check_recipe(run: Run, file: Path | None) -> None:
    """Refuses, before any work, a file for a recipe that could not be written."""
    if file is None:
        return
    from fastlora.files.earlier import check_file

    if file.suffix.lower() not in SUFFIXES:
        raise InputError(f"--save-recipe {file}: a recipe is a file *.yaml")
    check_file(file, overwrite=run.replace)


def save_recipe(
    run: Run,
    file: Path,
    specs: Sequence[AdapterSpec],
    pool: Pool,
    weights: Mapping[str, float],
    method: str,
    merged: Adapter,
) -> None:
    """Writes the recipe that does the same merge again."""
    from fastlora.files.disk_errors import writing
    from fastlora.files.output import replacing
    from fastlora.merging.recipe import recipe_text

    if len(specs) != len(pool):
        raise InputError("--save-recipe: a recipe names every adapter; give them one by one, not as a folder")
    used = merged.provenance["parameters"]  # all of them, so that other defaults would change nothing
    assert isinstance(used, dict)
    text = recipe_text([str(s.path) for s in specs], [weights[s.name] for s in specs], method, used, run.dtype)
    with replacing(file, overwrite=run.replace) as staging, writing(file):
        staging.write_text(text, encoding="utf-8")
