"""merge."""

from common import benchmarks

test_merge = benchmarks("merge")
