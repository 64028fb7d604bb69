"""Whole decompositions in memory."""

from common import benchmarks

test_decompose = benchmarks("decompose")
