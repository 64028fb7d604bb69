"""Merging two adapters of rank 16 into one of rank 16."""

from common import benchmarks

test_merge = benchmarks("merge")
