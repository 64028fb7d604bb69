"""One module against the paper's dense algorithm."""

from common import benchmarks

test_dense = benchmarks("dense")
