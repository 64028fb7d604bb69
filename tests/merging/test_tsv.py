"""``tsv`` against the definition on dense singular vectors."""

from __future__ import annotations

import mixed
import pools
import pytest
import torch
from pools import MODULE
from tolerances import FLOAT32
from torch import Tensor

import fastlora as fl


def definition(spectrum: str) -> mixed.Definition:
    def merged(deltas: Tensor, weights: Tensor, noise: float) -> Tensor:
        found = [form for form in mixed.forms(deltas, noise) if len(form[1])]
        if not found:
            return torch.zeros_like(deltas[0])
        scaled = {
            "own": lambda s: s,
            "flat": lambda s: torch.full_like(s, float(s.mean())),
            "rms": lambda s: torch.full_like(s, float(s.square().mean().sqrt())),
        }[spectrum]
        U = mixed.procrustes(torch.cat([U for U, _, _ in found], 1), noise)
        V = mixed.procrustes(torch.cat([Vt for _, _, Vt in found]).mT, noise)
        return (U * torch.cat([scaled(s) for _, s, _ in found])) @ V.mT

    return merged


@pytest.mark.parametrize("spectrum", ["own", "flat", "rms"])
def test_it_is_the_definition(spectrum: str) -> None:
    mixed.require_parity("tsv", definition(spectrum), FLOAT32, spectrum=spectrum)


def test_bases_of_separate_updates_stay() -> None:
    """Orthogonal updates: the sum. Copies of one: that one, where a sum would be three times as long."""
    row_frame = pools.orthonormal(pools.M, 12, 9)
    parts = [(b, (row_frame[:, 4 * i : 4 * i + 4] @ torch.randn(4, 4).double()).mT, s)
             for i, (b, _, s) in enumerate(pools.orthogonal(3))]  # fmt: skip
    total = sum(pools.dense(p) for p in parts)
    assert mixed.distance(fl.merge(pools.make_pool(parts), method="tsv"), MODULE, total) <= FLOAT32  # type: ignore[arg-type]
    same = pools.identical(3)
    found = fl.merge(pools.make_pool(same), method="tsv")
    assert mixed.distance(found, MODULE, pools.dense(same[0])) <= FLOAT32
    assert found.updates[MODULE].rank == same[0][0].shape[1]


def test_nothing_is_cut_unless_it_is_said() -> None:
    pool = pools.make_pool(pools.planted(3))
    whole, cut = fl.merge(pool, method="tsv"), fl.merge(pool, method="tsv", rank=4)
    assert whole.updates[MODULE].rank == 18 and "retained_energy" not in whole.provenance
    assert cut.updates[MODULE].rank == 4 and 0 < cut.provenance["retained_energy"] < 1  # type: ignore[operator]
    matrix = pools.exact(whole.updates[MODULE])
    best = float(torch.linalg.svdvals(matrix)[4:].norm())  # no matrix of rank 4 is nearer
    assert float((pools.exact(cut.updates[MODULE]) - matrix).norm()) == pytest.approx(best, rel=FLOAT32)
