"""``fl.report``: a page about a pool of adapters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastlora.adapters.pool import Pool
from fastlora.analysis.chance import wachter_edge
from fastlora.analysis.overlap import overlap
from fastlora.analysis.similar import Overlap
from fastlora.decomposition.decompose import decompose
from fastlora.decomposition.report import WEAK, Report
from fastlora.errors import InputError
from fastlora.files.disk_errors import writing
from fastlora.files.earlier import Overwrite
from fastlora.files.output import replacing
from fastlora.ops.chain import check_cuts
from fastlora.pages.page import Content, page_data
from fastlora.pages.rendering import rendered, require_jinja
from fastlora.pages.resemblance import closest_pairs
from fastlora.runtime.progress import track

EVERY_PAIR = 8
"""Adapters of which all pairs are decomposed."""

USUAL = 0.85


def report(
    pool: Pool,
    path: str | Path,
    *,
    threshold: float | None = None,
    title: str | None = None,
    overwrite: Overwrite = False,
) -> Path:
    """Writes a page about a pool: one HTML file that loads nothing from a network.

    It shows how similar the adapters are, in the order of their tree; families, duplicates and outliers; of every
    adapter norms, ranks and spectra; and what pairs share beside what chance would give: all pairs of up to eight
    adapters, of more every adapter with the one whose column spaces are most like its own.

    Args:
        pool: two adapters or more.
        path: the file to write.
        threshold: ``τ`` of the decompositions. Default: 0.3, or twice the largest eigenvalue that chance would give.
        title: by default the number of adapters.
        overwrite: replace an earlier page of fastlora; ``"force"`` replaces any file.

    Returns:
        ``path``.

    Raises:
        InputError: a pool of one adapter, a threshold outside ``[0, 1)``, jinja2 or scipy not installed
            (``pip install fastlora[report]``).
        OutputError: a file that exists or cannot be written.
        NonFiniteError: a factor that holds NaN or Inf.

    Cost: four reads of all factors, that of :func:`fastlora.overlap` and ``O(r³)`` operations for every module and
    adapter. Memory ``k²``; the file has ``10·k²`` bytes and 16 for every module of every adapter.
    """
    require_jinja()
    if threshold is not None:
        check_cuts(threshold, "product", 0.0, 0, 1.0)
    if len(pool) < 2:
        raise InputError("report: a pool of one adapter has nothing to compare; give two adapters or more")
    similarities = overlap(pool)
    reports = closest_reports(pool, similarities, threshold)
    content = Content(title or f"{len(pool)} adapters", pool, similarities, reports)
    return write_page(content, path, overwrite)


def write_page(content: Content, path: str | Path, overwrite: Overwrite = False) -> Path:
    """Makes the page and writes it, whole or not at all."""
    text = rendered(*page_data(content))
    path = Path(path)
    with replacing(path, overwrite=overwrite) as staging, writing(path):
        staging.write_text(text, encoding="utf-8")
    return path


def closest_reports(pool: Pool, similarities: Overlap, threshold: float | None = None) -> list[Report]:
    """What the closest pairs share."""
    pairs = closest_pairs(similarities, EVERY_PAIR)
    if threshold is None:
        threshold = weak_threshold(pool, pairs)
    reports = []
    for pair in track(pairs, "decomposing pairs"):
        reports += decompose(pool.subset(list(pair)), threshold).reports
    return reports


def weak_threshold(pool: Pool, pairs: Sequence[tuple[str, str]]) -> float:
    """The lowest ``τ`` that has a meaning for all pairs, docs/math.md section 3: ``max(0.3, twice the edge)``, of ranks
    as they are stored; that of the paper where chance alone would be above it."""
    shapes = set()
    for a, b in pairs:
        ours, theirs = pool[a].updates, pool[b].updates
        shapes |= {(u.shape[0], u.rank, theirs[m].rank) for m, u in ours.items() if m in theirs}
    edge = max((wachter_edge(*shape) for shape in shapes), default=0.0)
    return max(WEAK, 2 * edge) if 2 * edge < USUAL else USUAL
