"""Times beside those of opponents, from the plain data of ``fastlora bench``."""

from __future__ import annotations

from fastlora.views.tables import Data, Table
from fastlora.views.text import print_paragraph

HEADER = (
    "what",
    "opponent",
    "its time",
    "ours, 1 thread",
    "ours, 2 threads",
    "ratio, 1 / 2",
    "1 thread ÷ 2",
    "floor, 1 / 2",
    "ours ÷ floor, 1 / 2",
)


def milliseconds(seconds: float | None) -> str:
    """A time in ms or s with three digits; a dash for none."""
    return "–" if seconds is None else f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def cells(row: Data) -> tuple[str, ...]:
    """One row below :data:`HEADER`."""
    ours, theirs, floor = row["ours"], row["theirs"], row["floor"]
    ratios = " / ".join(_ratio(theirs / ours[count]) for count in ours)
    floors = "–" if floor is None else " / ".join(map(milliseconds, floor.values()))
    above = "–" if floor is None else " / ".join(_ratio(ours[count] / own) for count, own in floor.items())
    second = f"{ours[1] / ours[2]:.2f}" if ours.keys() >= {1, 2} else "–"
    times = [milliseconds(ours.get(count)) for count in (1, 2)]
    return (row["what"], row["opponent"], milliseconds(theirs), *times, ratios, second, floors, above)


def _ratio(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 100 else f"{ratio:,.0f}"


def notes(data: Data) -> list[str]:
    """What a reader of the times must know."""
    return list(dict.fromkeys(row["note"] for row in data["rows"] if row["note"]))


def machine_line(data: Data) -> str:
    """The machine, and what it could do at best."""
    copy, single, double = (data[f"{key}_per_second"] for key in ("copy_bytes", "fp32_operations", "fp64_operations"))
    counts = ", ".join(
        f"{c} thread{'s' * (c > 1)}: copy {copy[c] / 1e9:.1f} GB/s (read + written), "
        f"fp32 {single[c] / 1e9:.0f} and fp64 {double[c] / 1e9:.0f} Gop/s"
        for c in copy
    )
    return f"{data['machine']}. Measured limits: {counts}."


def show_bench(data: Data) -> None:
    """Prints the machine, one row a contest and opponent, and the notes below."""
    kinds = ("text", "text", *("number",) * (len(HEADER) - 2))
    table = Table(*(f"{kind}:{heading}" for kind, heading in zip(kinds, HEADER, strict=True)), keys=2)
    for row in data["rows"]:
        table.add(*cells(row))
    print_paragraph(machine_line(data))
    table.print()
    for note in notes(data):
        print_paragraph(note)


def show_comparison(data: Data) -> None:
    """Prints this checkout beside another revision, one row a task and number of threads."""
    table = Table("text:what", "number:threads", "number:base", "number:here", "number:base ÷ here", "number:of runs")
    for row in data["rows"]:
        spread = f"{row['least']:.2f} to {row['largest']:.2f}"
        times = milliseconds(row["base"]), milliseconds(row["here"])
        table.add(row["what"], str(row["threads"]), *times, f"{row['ratio']:.2f}", spread)
    print_paragraph(
        f"{data['machine']}. Base: {data['base']}; here: {data['here']}; {data['rounds']} runs of each. The base was "
        f"built {data['options']}. Tests passed on both: {', '.join(data['tests'])}. A ratio whose range holds 1 shows "
        "nothing."
    )
    table.print()


def comparison_rows(data: Data) -> list[list[object]]:
    """The rows in seconds, with a heading."""
    keys = ("what", "threads", "base", "here", "ratio", "least", "largest")
    return [list(keys), *([row[key] for key in keys] for row in data["rows"])]


def bench_rows(data: Data) -> list[list[object]]:
    """The rows in seconds, with a heading."""
    counts = list(dict.fromkeys(count for row in data["rows"] for count in row["ours"]))
    heads = [f"{kind}_{c}" for kind in ("ours", "floor") for c in counts]
    rows: list[list[object]] = [["what", "opponent", "theirs", *heads, "note"]]
    for row in data["rows"]:
        ours = [row["ours"].get(count, "") for count in counts]
        floors = [(row["floor"] or {}).get(count, "") for count in counts]
        rows.append([row["what"], row["opponent"], row["theirs"], *ours, *floors, row["note"]])
    return rows


def show_bench_names(data: Data) -> None:
    """Prints what can be timed, and the workloads."""
    table = Table("name:case", "text:what is timed", "text:on", "text:when")
    for name, case in data["cases"].items():
        table.add(name, case["summary"], ", ".join(case["workloads"]), "only when named" if case["slow"] else "")
    table.print()
    print_paragraph(f"workloads: {', '.join(data['workloads'])}")
