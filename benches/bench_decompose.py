"""decompose."""

from common import benchmarks

test_decompose = benchmarks("decompose")
