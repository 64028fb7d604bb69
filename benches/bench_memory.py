"""memory."""

from common import benchmarks

test_memory = benchmarks("memory")
