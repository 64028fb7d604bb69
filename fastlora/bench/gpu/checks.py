"""Whether a plan holds what its launches should have made, in the dtypes in which it is timed."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora.core.updates import factor, sides
from fastlora.decomposition.plan import DecompositionPlan
from fastlora.decomposition.planned import PlannedPart
from fastlora.ops.gram import blocks_of
from fastlora.ops.passes import CombineJob, CombineOutput

HALVES = (torch.float16, torch.bfloat16)
BLOCKS = 2.0**-29  # of ‖x‖‖y‖: a Gram block, of half-precision factors on tensor cores
SUMS = 2.0**-18  # of the sizes of all terms: a sum in float32 on tensor cores, which truncate; else far less


def require_plan(plan: DecompositionPlan) -> None:
    """Refuses a plan whose last run left NaN or Inf, or a wrong number in the first or the last module of a part.

    Gram blocks are held against float64. Every element of every result is held against the float64 sum of its terms
    by the plan's own small matrices, rounded once. Raises ``AssertionError``. Those modules come to the host.
    """
    for job in plan.jobs:
        if not all(bool(output.out.isfinite().all()) for output in job.outputs if output.out is not None):
            raise AssertionError("a result of the plan holds NaN or Inf")
    for p, part in enumerate(plan.parts):
        first = 2 * sum(len(before.modules) for before in plan.parts[:p])
        for g in sorted({0, len(part.modules) - 1}):
            _require_blocks(part, g)
            for job in plan.jobs[first + 2 * g : first + 2 * g + 2]:
                for number, output in enumerate(job.outputs):
                    require_rounded_once(f"{part.modules[g]}, result {number}", job, output)


def _require_blocks(part: PlannedPart, g: int) -> None:
    row = part.blocks.updates[g]
    k = len(row)
    projected, other = sides(part.settings.side)
    for side, found, kind in (
        (projected, part.blocks.projected[g], part.settings.blocks_kind),
        (other, part.blocks.other[g], "diagonal"),
    ):
        columns = []
        for update in row:
            stored = factor(update, side).stored
            assert stored is not None
            x = stored.cpu().double()
            columns.append(x.mT if side == "A" else x)
        for i, j in blocks_of(kind, k):
            wanted = columns[i].mT @ columns[j]
            block = (found[i] if kind == "diagonal" else found[i, j])[: wanted.shape[0], : wanted.shape[1]].cpu()
            size = columns[i].norm(dim=0)[:, None] * columns[j].norm(dim=0)
            _require(f"{part.modules[g]}, block {side} {i} {j}", block - wanted, BLOCKS * size)


def require_rounded_once(what: str, job: CombineJob, output: CombineOutput) -> None:
    """Refuses a result of a combine pass that is not the float64 sum of its terms, rounded to its dtype."""
    assert output.out is not None
    wanted, size = (torch.zeros(output.shape, dtype=torch.float64) for _ in range(2))
    for f, c, at, scale in output.terms:
        x = job.factors[f].cpu().double()
        coefficient = None if c is None else c.cpu()
        for total, part in (
            (wanted, _product(x, coefficient, job.rows)),
            (size, _product(x.abs(), None if coefficient is None else coefficient.abs(), job.rows)),
        ):
            width = part.shape[0 if job.rows else 1]
            covered = total[at : at + width] if job.rows else total[:, at : at + width]
            covered += part * (scale if total is wanted else abs(scale))
    dtype = output.dtype
    half = dtype in HALVES and all(job.factors[f].dtype in HALVES for f, *_ in output.terms)
    info = torch.finfo(dtype)
    rounding = torch.maximum(wanted.abs(), torch.tensor(info.smallest_normal)) * (info.eps / 2)
    _require(what, output.out.cpu().double() - wanted, rounding + (SUMS if half else 2.0**-48) * size)


def _product(x: Tensor, coefficient: Tensor | None, rows: bool) -> Tensor:
    if coefficient is None:
        return x
    return coefficient @ x if rows else x @ coefficient


def _require(what: str, error: Tensor, allowed: Tensor) -> None:
    """NaN is refused too."""
    wrong = ~(error.abs() <= allowed)
    if bool(wrong.any()):
        worst = float((error.abs() / allowed.clamp(min=1e-300)).nan_to_num(torch.inf).max())
        raise AssertionError(f"{what}: {int(wrong.sum())} numbers are off, by up to {worst:.3g} of what is allowed")
