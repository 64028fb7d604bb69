"""The threads that kernels share: any number of them, several callers at once, child processes, and rest."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from builders import gaussian
from compiled import needs_kernels

from fastlora import ops

pytestmark = needs_kernels

X = gaussian(300, 24, seed=1, dtype=torch.float64).reshape(25, 12, 24)
GRAM = X @ X.mT


@pytest.fixture(autouse=True)
def own_number_of_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def values() -> torch.Tensor:
    return ops.eigh(GRAM)[0]


def test_any_number_of_threads_gives_the_same_bits() -> None:
    torch.set_num_threads(1)
    alone = values()
    for threads in (2, 3, 7, 40, 2, 1, 5):
        torch.set_num_threads(threads)
        for _ in range(20):
            assert torch.equal(values(), alone)


def test_several_callers_at_once() -> None:
    torch.set_num_threads(3)
    expected, found, together = values(), [], threading.Barrier(4)

    def call() -> None:
        torch.set_num_threads(3)
        together.wait()
        for _ in range(250):
            found.append(torch.equal(values(), expected))

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(600)
    assert len(found) == 1000 and all(found)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_process_has_threads_of_its_own() -> None:
    torch.set_num_threads(2)
    expected = values()
    child = os.fork()
    if not child:
        torch.set_num_threads(2)
        os._exit(0 if all(torch.equal(values(), expected) for _ in range(5)) else 3)
    ends = time.monotonic() + 600
    done, status = 0, 0
    while not done and time.monotonic() < ends:
        done, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.01)
    if not done:
        os.kill(child, 9)
    assert done and os.waitstatus_to_exitcode(status) == 0


def test_threads_without_work_sleep() -> None:
    torch.set_num_threads(4)
    values()
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.1


def test_threads_are_there_after_they_were_needed() -> None:
    program = """
import os, torch
from fastlora import ops
x = torch.eye(12, dtype=torch.float64).expand(100, 12, 12).contiguous()
def count(threads):
    torch.set_num_threads(threads)
    before = len(os.listdir("/proc/self/task"))
    ops.eigh(x)
    return len(os.listdir("/proc/self/task")) - before
print(count(1), count(3), count(2), count(4))
"""
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["0", "2", "0", "1"]
