"""The ops: torch operators on batched tensors (``torch.ops.fastlora.*``), each a contract for several backends."""

from fastlora.ops.chain import Chain, chain
from fastlora.ops.combine import combine
from fastlora.ops.eigh import eigh, eigh_ex
from fastlora.ops.gram import gram
from fastlora.ops.svd import svd, svd_ex

__all__ = ["Chain", "chain", "combine", "eigh", "eigh_ex", "gram", "svd", "svd_ex"]
