"""``chain`` on the CUDA kernels: the tests of the op, and what is particular to the kernel."""

from __future__ import annotations

import pools
import pytest
import test_chain as op

from fastlora.ops.chain import CHAINS

pytestmark = pytest.mark.usefixtures("on_emulator")


@pytest.mark.parametrize("pool", pools.POOLS)
@pytest.mark.parametrize("kind", CHAINS)
def test_dense(kind: str, pool: str) -> None:
    op.test_dense("cuda", kind, pool)
