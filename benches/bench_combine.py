"""The pass that writes the results of a whole pool."""

from common import benchmarks

test_combine = benchmarks("combine")
