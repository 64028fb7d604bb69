"""Limits of shared memory at launches: 48 KB less a kernel's static arrays without asking, and one limit for all."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import emulation
import pytest
import torch
from test_resources import LIMITS
from tolerances import FLOAT32, FLOAT64

import fastlora as fl

FIRST = Path(__file__).with_name("first_launch.py")
# With the static arrays they take more than 48 KB, and less without.
SHAPES = [
    *((p, q, torch.float32) for p, q in ((1520, 8), (1004, 12), (588, 20), (203, 48), (123, 64))),
    *((p, q, torch.float64) for p, q in ((1524, 4), (752, 8), (108, 40))),
]


@pytest.mark.parametrize(("p", "q", "dtype"), SHAPES, ids=lambda x: str(x).removeprefix("torch."))
def test_the_first_launch_of_a_process(emulator: Any, p: int, q: int, dtype: torch.dtype, tmp_path: Path) -> None:
    a = torch.randn(p, q, dtype=dtype, generator=torch.Generator().manual_seed(0))
    source = tmp_path / "a"
    source.write_bytes(a.numpy().tobytes())
    command = [sys.executable, "-I", "-S", FIRST, emulator.__file__, source, str(p), str(q), str(dtype)[6:]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = torch.frombuffer(bytearray((tmp_path / "a.out").read_bytes()), dtype=dtype)
    ut, s, vt = found.split([q * p, q, q * q])
    tolerance = (FLOAT32 if dtype == torch.float32 else FLOAT64) * float(s[0])
    torch.testing.assert_close((ut.view(q, p).mT * s) @ vt.view(q, q), a, rtol=0, atol=tolerance)
    assert (s[:-1] >= s[1:]).all() and float(s[-1]) > 0


def test_no_launch_takes_back_what_another_may_have(emulator: Any) -> None:
    """Sizes below and above 48 KB, on a device that no other test uses: each kernel asks once, for all there is."""
    largest, before = 200 * 1024, len(emulator.shared_settings())
    with emulation.emulated(emulator, 0, largest):
        for n in (40, 120, 96, 120, 150):
            fl.ops.eigh_ex(torch.full((1, n, n), torch.nan))
            fl.ops.svd_ex(torch.full((1, n, n), torch.nan))
    asked = emulator.shared_settings()[before:]
    assert 2 <= len(asked) <= 4 and set(asked) == {largest - 1024}


def test_threads_launch_one_kernel_in_different_sizes(emulator: Any) -> None:
    """On a device that no other test uses. What a thread is given must last until its launch."""
    problems: list[BaseException] = []

    def work(n: int) -> None:
        a = torch.full((n, n), torch.nan)
        ut, s, vt, info = torch.empty(n, n), torch.empty(n), torch.empty(n, n), torch.empty(1, dtype=torch.int32)
        addresses = [x.data_ptr() for x in (a, ut, s, vt, info)]
        for _ in range(20):
            error = emulator.cuda_svd(*addresses, batch=1, p=n, q=n, is_double=False, stream=0)
            if error:
                problems.append(RuntimeError(f"n = {n}: {emulator.cuda_error_message(error)}"))
                return

    emulator.set_schedule(0)
    emulator.set_shared_limit(199 * 1024)
    threads = [threading.Thread(target=work, args=(n,)) for n in (84, 90, 98, 106)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        emulator.set_shared_limit(emulation.SHARED_LIMIT)
    assert not problems


def test_static_arrays_beside_dynamic_memory_have_their_room() -> None:
    text = (emulation.ROOT / "csrc" / "cuda" / "launch.h").read_text()
    (room,) = re.findall(r"kStaticShared = (\d+);", text)
    for kernels in LIMITS["sm_90"].values():
        for name, taken in kernels.items():
            assert taken["shared"] <= int(room) or name.startswith("svd_warp_kernel"), name  # takes no dynamic memory
