"""Names of devices that are neither the processor nor CUDA's: what torch computes on here, and nothing else."""

from __future__ import annotations

import pytest
import torch

from fastlora.errors import InputError
from fastlora.runtime import devices


def with_two(monkeypatch: pytest.MonkeyPatch, *, available: bool = True) -> None:
    """As on a machine with two devices of Intel, the second one in use."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: available)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 1)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)


@pytest.mark.parametrize(("name", "number"), [("xpu", 1), ("xpu:0", 0), ("xpu:1", 1)])
def test_a_device_of_this_machine_has_its_number(name: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with_two(monkeypatch)
    assert devices.parse(name) == torch.device("xpu", number)


@pytest.mark.parametrize("name", ["xpu:2", "mps", "meta", "gpu"])
def test_others_do_not_exist(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with_two(monkeypatch)
    with pytest.raises(InputError, match=f"device '{name}' does not exist"):
        devices.parse(name)


def test_without_an_accelerator_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with_two(monkeypatch, available=False)
    with pytest.raises(InputError, match="device 'xpu' does not exist"):
        devices.parse("xpu")
