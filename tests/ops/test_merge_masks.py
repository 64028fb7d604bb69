"""Masks of rules on elements: drawn at random, and by ranks in a row."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import gaussian
from compiled import needs_same_bits
from test_merge_tiles import KERNELS, SAME_BITS, Pair, dense, elements, whole

from fastlora.ops import merge_tiles as op
from fastlora.ops.dispatch import use_backend
from fastlora.ops.merge_tiles import TileRule, TileTask
from fastlora.reference import merge_tiles as formula
from fastlora.reference.philox import philox


def test_words_are_those_of_philox() -> None:
    """The known answers of Random123."""
    ones = 0xFFFFFFFF
    counters = np.array([[0, 0, 0, 0], [ones] * 4], dtype=np.uint32)
    assert philox(counters[0], (0, 0)).tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox(counters[1], (ones, ones)).tolist() == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("backend", KERNELS)
def test_random_masks_have_their_density_and_are_independent(backend: str) -> None:
    shape = 200, 333
    task = TileTask([(torch.ones(200, 1), torch.ones(1, 333))] * 2, [1.0, 2.0], shape, torch.float32)
    keys = [op.key_of(0, "a"), op.key_of(0, "b")]
    rule = TileRule("random", keep=[op.bound_of(0.3)] * 2, keys=keys, module_key=op.key_of("q"), gains=[1.0, 1.0])
    with use_backend(backend):
        found = dense(task, rule)
        other = dense(task, replace(rule, module_key=op.key_of("k")))
    masks = [(found == 1) | (found == 3), found >= 2, (other == 1) | (other == 3)]
    deviation = 1 / shape[0] / shape[1] * 0.3 * 0.7
    for mask in masks:
        assert float(mask.double().mean()) == pytest.approx(0.3, abs=5 * deviation**0.5)
    for other_mask in masks[1:]:
        together = float((masks[0] & other_mask).double().mean())
        assert together == pytest.approx(0.09, abs=5 * deviation**0.5)


SPANS = [(0.15, 0.3), (0.0, 1.0), (0.5, 0.0), (0.3, 1e-9), (0.9, 0.1), (0.4, 1e-5)]


@needs_same_bits
@pytest.mark.parametrize("backend", SAME_BITS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(3, 1), (5, 64), (9, 1031), (2, 5000)], ids=str)
def test_row_masks_follow_exact_ranks(shape: tuple[int, int], dtype: torch.dtype, backend: str) -> None:
    """Of the elements that the backend forms: all different, many equal, of all sizes, none."""
    n, m = shape
    spread = gaussian(4, m, seed=2, dtype=torch.float64) * 10.0 ** torch.linspace(-12, 3, m, dtype=torch.float64)
    kinds = [gaussian(4, m, seed=1, dtype=dtype), spread.to(dtype), whole(4, m, seed=3, dtype=dtype), torch.zeros(4, m)]
    pairs: list[Pair] = [(gaussian(n, 4, seed=5, dtype=dtype), kind.to(dtype)) for kind in kinds]
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    task = TileTask(pairs, [1.0, 0.3, 1.0, 1.0], shape, kind)
    keys, module = [op.key_of(3, f"a{i}") for i in range(4)], op.key_of("q")
    for least, span in SPANS:
        with use_backend(backend):
            bits, x = op.row_masks(task, [(least, span)] * 4, keys, module), elements(task)
        for i in range(4):
            found = (bits[i][:, torch.arange(m) // 64] >> (torch.arange(m) % 64)) & 1
            assert torch.equal(found.bool(), formula.row_mask(x[i], least, span, keys[i], module))
