"""combine."""

from common import benchmarks

test_combine = benchmarks("combine")
