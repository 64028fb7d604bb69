"""The tests of the ops with the Triton kernels, which Triton's interpreter runs on the CPU.

The interpreter takes milliseconds for a program, so the quick half of these tests runs here; all of them, in an
hour and more, by `make triton`.
"""

from __future__ import annotations

import re

import pytest
from processes import execute

OPS = "tests/ops/test_gram.py", "tests/ops/test_combine.py", "tests/ops/test_passes.py"
CHOSEN = (
    "tests/ops/test_gram.py::test_blocks_and_ragged_ranks[triton-chain-B]",
    "tests/ops/test_gram.py::test_special_values[triton-torch.bfloat16]",
    "tests/ops/test_gram.py::test_layout_in_memory[torch.float32-A]",
    "tests/ops/test_gram.py::test_empty_and_other_batch_dimensions",
    "tests/ops/test_gram.py::test_long_halves_beyond_float32[B]",
    "tests/ops/test_combine.py::test_ragged_ranks[triton-B]",
    "tests/ops/test_combine.py::test_cancellation_is_exact[torch.bfloat16]",
    "tests/ops/test_combine.py::test_the_engine_writes_ragged_terms_rounded_once",
    "tests/ops/test_empty_terms.py",
    "tests/ops/test_passes.py::test_every_half_survives",
    "tests/ops/test_merge_tiles.py::test_rules_are_their_formulas[(1, 300)-ties-torch.float32-triton]",
    "tests/ops/test_merge_tiles.py::test_rules_are_their_formulas[(1, 300)-breadcrumbs-torch.float64-triton]",
    "tests/ops/test_merge_tiles.py::test_rules_are_their_formulas[(65, 1)-dare-torch.float32-triton]",
    "tests/ops/test_merge_tiles.py::test_rules_are_their_formulas[(65, 1)-della-torch.float32-triton]",
    "tests/ops/test_merge_tiles.py::test_rules_are_their_formulas[(65, 1)-sce-torch.float64-triton]",
    "tests/ops/test_merge_tiles.py::test_products_with_thin_matrices[triton]",
    "tests/ops/test_similarity.py::test_definition[ragged-triton]",
    "tests/ops/test_similarity.py::test_split[triton]",
)


@pytest.mark.parametrize(
    "tests",
    [CHOSEN[:5], CHOSEN[5:10], CHOSEN[10:], ("tests/triton/interpreted.py",)],
    ids=["gram", "combine", "merge", "passes"],
)
def test_in_the_interpreter(tests: tuple[str, ...]) -> None:
    printed = execute(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", *tests,
        TRITON_INTERPRET="1", FASTLORA_BACKEND="triton",
    )  # fmt: skip
    counts = re.search(r"(\d+) passed", printed)
    assert counts is not None and int(counts[1]) >= 5, printed
