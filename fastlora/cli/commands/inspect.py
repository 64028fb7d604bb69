"""``fastlora inspect``."""

from __future__ import annotations

from typing import Annotated

import typer

from fastlora.cli.inputs import parse_one
from fastlora.cli.options import Csv, Every, command
from fastlora.cli.outputs import check_table, write_table
from fastlora.cli.run import Run, print_json

Described = Annotated[
    str,
    typer.Argument(
        help="An adapter: a PEFT directory or a Hub id; or a folder of adapters.", metavar="A", show_default=False
    ),
]


@command("rename", "family", "read_rank", "device", "backend", "as_json", "quiet", "overwrite", "force")
def inspect(run: Run, adapter: Described, every: Every = False, csv: Csv = None) -> None:
    """What an adapter holds: modules, ranks, scaling, norms, spectrum; the vectors of (IA)³."""
    spec = parse_one(adapter)
    check_table(run, csv)
    run.start(lean=True)
    run.require_backend()
    from fastlora.adapters.dora import DoRA
    from fastlora.adapters.folders import ANY, holds_adapters, load_folder
    from fastlora.adapters.loading import Element, load
    from fastlora.adapters.lora import Adapter
    from fastlora.adapters.renaming import Renaming
    from fastlora.views.adapters import csv_rows, describe, folder_data, show

    renaming = Renaming(run.changes)

    def moved(element: Element) -> Element:
        element = renaming(element)
        return element.to(run.device) if isinstance(element, Adapter) and not run.on_host else element

    notes: list[str] = []
    folder = holds_adapters(spec.path)
    if folder:
        elements, notes = load_folder(spec.path, ANY, family=run.family, rank=run.read_rank)
        elements = [moved(element) for element in elements]
        data = folder_data(str(spec.path), elements, notes)
    else:
        elements = [moved(load(spec.path, spec.name, family=run.family, rank=run.read_rank))]
        data = describe(elements[0])
        form = elements[0].base.form if isinstance(elements[0], Adapter | DoRA) else None
        if form is not None and form.format != "mlx":
            from fastlora.dialects.file_facts import facts_of
            from fastlora.views.single_files import file_data

            data["file"] = file_data(facts_of(spec.path, form.family, certain=False)[1], form)
    renaming.require_used()
    if csv is not None:
        write_table(run, csv, csv_rows(data))
    if run.as_json:
        print_json(data)
    elif not run.quiet:
        show(data, every)
    if folder or run.as_json:  # the report of one adapter has its notes
        notes += [note for element in elements for note in element.notes]
    run.tell_notes(notes)
