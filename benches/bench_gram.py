"""gram."""

from common import benchmarks

test_gram = benchmarks("gram")
