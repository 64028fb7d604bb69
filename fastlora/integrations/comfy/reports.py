"""What nodes say about adapters and results, as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fastlora.adapters.lora import Adapter
from fastlora.adapters.pool import Pool
from fastlora.analysis.overlap import overlap
from fastlora.decomposition.report import Report
from fastlora.views.adapters import adapter_data
from fastlora.views.results import overlap_data, overlap_rows
from fastlora.views.tables import Table
from fastlora.views.text import escaped, share_text

WIDTH = 100


def result_report(adapter: Adapter, notes: Iterable[str] = (), kept: object = None) -> str:
    """What a result holds: ``kept``, the share of Σσ² that it has of what it was made from."""
    share = "" if kept is None else f", {share_text(float(str(kept)))} of Σσ² kept"
    return "\n".join([f"{_size(adapter)}{share}", *_notes([*adapter.notes, *notes])])


def comparison(adapters: Sequence[Adapter]) -> str:
    """Size, norm and family of every adapter; of several, the cosines of ``ΔW`` and the overlaps of their spaces."""
    table = Table("name:LoRA", "number:modules", "text:rank", "number:norm", "text:dtype", "text:family")
    for adapter in adapters:
        form = adapter.base.form
        norm = f"{adapter_data(adapter)['norm']:.4g}"
        family = (form.family if form is not None else None) or "–"
        table.add(adapter.name, len(adapter.updates), _ranks(adapter), norm, str(adapter.dtype)[6:], family)
    lines = table.lines(WIDTH)
    notes = [note for adapter in adapters for note in adapter.notes]
    if len(adapters) > 1:
        pool = Pool(adapters)
        rows = overlap_rows(overlap_data(overlap(pool)))[1:]
        similarity = Table("name:", "name:", *(f"named:{name}" for name in pool.names), keys=2)
        for row in rows:
            similarity.add(*row[:2], *(x if isinstance(x, str) else f"{x:.3f}" for x in row[2:]))
        lines += ["", *similarity.lines(WIDTH)]
        notes += pool.notices
    return "\n".join([*lines, *_notes(notes)])


def decomposition_report(report: Report, notes: Iterable[str] = ()) -> str:
    """How much two adapters share, beside what chance would give."""
    data = report.as_dict()
    totals = data["totals"]
    shared = sum(1 for row in data["rows"] if row["shared"])
    counted = f"{totals['shared_directions']} directions shared in {shared} of {len(data['rows'])} modules"
    line = f"{counted}; {totals['expected_by_chance']:.2g} expected by chance"
    return "\n".join([line, *(f"warning: {escaped(w)}" for w in data["warnings"]), *_notes(notes)])


def _size(adapter: Adapter) -> str:
    return f"{escaped(adapter.name)}: {len(adapter.updates)} modules, rank {_ranks(adapter)}"


def _ranks(adapter: Adapter) -> str:
    ranks = {u.rank for u in adapter.updates.values()}
    return "–" if not ranks else f"{min(ranks)}" if len(ranks) == 1 else f"{min(ranks)}–{max(ranks)}"


def _notes(notes: Iterable[str]) -> list[str]:
    return [f"note: {escaped(note)}" for note in dict.fromkeys(notes)]
