"""Whole decompositions, files to files."""

from common import benchmarks

test_files = benchmarks("files")
