"""Batched small singular value decomposition, torch.linalg beside it."""

from common import benchmarks

test_svd = benchmarks("svd")
