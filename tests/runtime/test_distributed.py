"""Which GPU a rank has, and how much travels: without GPUs, by what torch is told."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from thread_ranks import ThreadRank, on_ranks
from torch import Tensor

from fastlora.runtime import devices, ranks
from fastlora.runtime.distributed import own_gpu


class Machine:
    """GPUs that torch believes in."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, gpus: int, *, nccl: bool = True) -> None:
        self.current = 0
        monkeypatch.setattr(devices, "unavailable", lambda index=None: None if gpus else "no GPU")
        monkeypatch.setattr(dist, "is_nccl_available", lambda: nccl)
        for name, value in (
            ("device_count", lambda: gpus), ("current_device", lambda: self.current), ("set_device", self.set),
        ):  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)

    def set(self, device: torch.device | int) -> None:
        self.current = device if isinstance(device, int) else device.index


def launched(monkeypatch: pytest.MonkeyPatch, local: int, here: int) -> None:
    for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("LOCAL_RANK", str(local)), ("LOCAL_WORLD_SIZE", str(here))):
        monkeypatch.setenv(name, value)


def test_each_rank_of_a_machine_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, 4)
    launched(monkeypatch, local=2, here=4)
    with own_gpu("cuda") as gpu:
        assert gpu == torch.device("cuda", 2)
        assert devices.parse("cuda") == gpu and devices.parse("cuda:1") == torch.device("cuda", 1)
    assert machine.current == 0


@pytest.mark.parametrize("case", ["shared", "no nccl", "one named", "host", "no gpu", "no torchrun"])
def test_what_travels_goes_by_gloo(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, {"shared": 2, "no gpu": 0}.get(case, 4), nccl=case != "no nccl")
    if case != "no torchrun":
        launched(monkeypatch, local=3, here=4)
    with own_gpu({"one named": "cuda:1", "host": "auto"}.get(case, "cuda")) as gpu:
        assert gpu is None
        assert machine.current == {"shared": 1, "no nccl": 3}.get(case, 0)


def test_large_payloads_take_the_group_for_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """By threads: which group and which bytes; NCCL itself needs GPUs."""
    taken: list[tuple[object, int]] = []
    monkeypatch.setattr(ranks, "BULK", 1000)

    def all_gather(tensors: list[Tensor], tensor: Tensor, group: object) -> None:
        taken.append((group, tensor.nbytes))
        for out in tensors:
            out.copy_(tensor)

    monkeypatch.setattr(dist, "all_gather", all_gather)
    alone = ranks.Ranks(0, 1, "small", much=("large", torch.device("cpu")))
    for size in (10, 5000):
        assert alone.exchange("x", b"a" * size) == [b"a" * size]
    head = 3 * 8
    assert taken == [("small", head), ("small", 10), ("small", head), ("large", 5000)]


def test_threads_that_are_ranks_exchange_what_they_say() -> None:
    def work() -> list[int]:
        members = ranks.current()
        assert isinstance(members, ThreadRank)
        return ranks.gathered("numbers", lambda: 10 * members.rank)

    assert on_ranks(3, work) == [[0, 10, 20]] * 3
