"""The ops: torch operators on batched tensors (``torch.ops.fastlora.*``), each a contract for several backends."""

from __future__ import annotations

from fastlora.ops.chain import Chain

__all__ = ["Chain", "chain", "combine", "eigh", "eigh_ex", "gram", "svd", "svd_ex"]
