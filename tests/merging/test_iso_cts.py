"""``iso_cts`` against the definition on dense matrices, restricted to the directions that are kept."""

from __future__ import annotations

import math

import mixed
import pools
import pytest
import torch
from tolerances import FLOAT32, SUBSPACE64
from torch import Tensor

import fastlora as fl


def definition(common: float, rank: int) -> mixed.Definition:
    def merged(deltas: Tensor, weights: Tensor, noise: float) -> Tensor:
        present = [delta for delta in deltas if float(delta.norm())]
        ((U, sigma, Vt),) = mixed.forms(deltas.sum(0)[None], noise)
        q = min(rank, len(sigma))
        # Of updates that cancel, rounding is left.
        sizes = sum(float(torch.linalg.matrix_norm(d, 2)) for d in present)
        if not present or float(sigma[0]) <= 1e-12 * sizes:
            return torch.zeros_like(deltas[0])
        k = len(present)
        t = min(round((q - math.floor(q * common)) / k), q // k)
        left, sizes_of, right = [U[:, : q - k * t]], [sigma[: q - k * t]], [Vt[: q - k * t]]
        for delta in present:
            own_U, own, own_Vt = torch.linalg.svd(delta - left[0] @ (left[0].mT @ delta), full_matrices=False)
            count = min(t, int((own > noise * torch.linalg.matrix_norm(delta, 2)).sum()))
            left.append(own_U[:, :count])
            sizes_of.append(own[:count])
            right.append(own_Vt[:count])
        bases = mixed.procrustes(torch.cat(left, 1), noise) @ mixed.procrustes(torch.cat(right).mT, noise).mT
        return torch.cat(sizes_of).mean() * bases

    return merged


@pytest.mark.parametrize(("common", "rank"), [(0.8, 6), (0.4, 9), (1.0, 3), (0.0, 4)])
def test_it_is_the_definition(common: float, rank: int) -> None:
    mixed.require_parity("iso_cts", definition(common, rank), FLOAT32, common=common, rank=rank)


def test_one_adapter_is_iso_c() -> None:
    pool = pools.make_pool(pools.planted(1))
    for rank in (2, 6):
        expected = pools.exact(fl.merge(pool, method="iso_c", rank=rank).updates[pools.MODULE])
        assert mixed.distance(fl.merge(pool, method="iso_cts", rank=rank), pools.MODULE, expected) <= SUBSPACE64


def test_what_is_refused() -> None:
    for common in (-0.1, 1.5):
        with pytest.raises(fl.InputError, match=f"iso_cts: common={common:g} must be between 0 and 1"):
            fl.merge(pools.make_pool(pools.planted(2)), method="iso_cts", common=common)
