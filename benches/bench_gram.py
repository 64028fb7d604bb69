"""The pass that reads the factors of a whole pool."""

from common import benchmarks

test_gram = benchmarks("gram")
