"""dense."""

from common import benchmarks

test_dense = benchmarks("dense")
