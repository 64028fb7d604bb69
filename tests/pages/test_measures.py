"""Norms, ranks and spectra of a page, against dense singular values."""

from __future__ import annotations

import numpy as np
import pools
import pytest
import torch
from builders import gaussian

import fastlora as fl
from fastlora.pages.measures import MOST_DIRECTIONS, chosen_directions, effective_rank, measure
from fastlora.pages.places import places

MODULES = ["layers.0.q", "layers.0.v", "layers.1.q", "head"]


def ragged() -> fl.Pool:
    """Different ranks; the second adapter lacks a module, and changes nothing in another."""
    adapters = []
    for i, ranks in enumerate([(3, 1, 5, 2), (4, 4, 2, None)]):
        parts = {}
        for m, (module, rank) in enumerate(zip(MODULES, ranks, strict=True)):
            if rank is not None:
                left = gaussian(9 + m, rank, seed=10 * i + m, dtype=torch.float32) * (0 if (i, m) == (1, 1) else 1)
                parts[module] = (left, gaussian(rank, 7, seed=50 + 10 * i + m, dtype=torch.float32), 0.5)
        adapters.append(pools.make_adapter(f"a{i}", parts))
    return fl.Pool(adapters)


def test_measures_are_those_of_dense_updates() -> None:
    pool = ragged()
    where = places(pool.modules)
    found = measure(pool, where)
    for i, adapter in enumerate(pool.adapters):
        shares: dict[int, list[np.ndarray]] = {}
        for m, module in enumerate(pool.modules):
            if module not in adapter:
                assert np.isnan(found.norms[i, m]) and found.ranks[i, m] == found.numerical[i, m] == -1
                continue
            update = adapter.updates[module]
            sigma = torch.linalg.svdvals(pools.exact(update)).numpy()[: update.rank]
            assert found.norms[i, m] == pytest.approx(np.linalg.norm(sigma), rel=1e-6, abs=1e-12)
            assert found.ranks[i, m] == update.rank
            assert found.numerical[i, m] == (update.rank if sigma[0] > 0 else 0)
            if sigma[0] > 0:
                p = sigma / sigma.sum()
                assert found.effective[i, m] == pytest.approx(float(np.exp(-(p * np.log(p)).sum())), rel=1e-5)
                padded = np.zeros(len(found.directions))
                padded[: len(sigma)] = np.square(sigma) / np.square(sigma).sum()
                shares.setdefault(where.kind[m], []).append(padded)
            else:
                assert found.effective[i, m] == 0
        for kind in range(len(where.kinds)):
            expected = np.mean(shares[kind], 0) if kind in shares else np.full(len(found.directions), np.nan)
            np.testing.assert_allclose(found.spectra[i, kind], expected, atol=1e-6)
        assert found.parameters[i] == sum(u.rank * sum(u.shape) for u in adapter.updates.values())
        assert found.totals[i] == pytest.approx(np.sqrt(np.nansum(found.norms[i] ** 2)))


def test_effective_ranks_at_their_ends() -> None:
    assert effective_rank(np.full(6, 0.3)) == pytest.approx(6)
    assert effective_rank(np.array([2.0, 0.0, 0.0])) == 1
    assert effective_rank(np.zeros(3)) == effective_rank(np.zeros(0)) == 0


@pytest.mark.parametrize("most", [0, 1, 8, 32, 33, 40, 256, 4096])
def test_the_directions_that_are_shown(most: int) -> None:
    chosen = chosen_directions(most)
    assert len(chosen) <= MOST_DIRECTIONS and chosen == sorted(set(chosen))
    if most:
        assert chosen[0] == 0 and chosen[-1] == most - 1
    if most <= MOST_DIRECTIONS:
        assert chosen == list(range(most))
