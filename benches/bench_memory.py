"""Whole decompositions, files to files, within a bound on memory."""

from common import benchmarks

test_memory = benchmarks("memory")
