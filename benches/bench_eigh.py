"""Batched eigendecomposition, torch.linalg beside it."""

from common import benchmarks

test_eigh = benchmarks("eigh")
