"""Hundreds of small adapters from and to files, against loops of safetensors' own calls."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastlora as fl
from fastlora.bench.contest import OURS, Contest, Task, require
from fastlora.bench.files import clear
from fastlora.bench.timing import Action, Contender, thread_counts

COUNT = 500
LAYERS, SIDE, RANK = 6, 64, 4
"""Of each adapter: two modules a layer, 24 tensors and 24 KB of float32."""

MEMORY = Path("/dev/shm")
"""A file system in memory: on others, making a file may take longer than all that is compared here."""

LOAD, SAVE = "safetensors.torch.load_file", "safetensors.torch.save_file"


def small() -> list[Contest]:
    """Loading, into adapters and into a pool, and saving. The opponents have less to do: they neither look at a
    configuration nor write one, no card, and no folder that is whole or not there."""
    each = f"{COUNT} small adapters"
    return [
        Contest(f"load {each}", (LOAD,), partial(_prepare_loading, _each)),
        Contest(f"load {each} as a pool", (LOAD,), partial(_prepare_loading, _as_pool)),
        Contest(f"save {each}", (SAVE,), _prepare_saving),
    ]


def _each(paths: Sequence[Path]) -> list[object]:
    return [fl.load(path) for path in paths]


def _as_pool(paths: Sequence[Path]) -> Sequence[object]:
    return fl.Pool.load(paths).adapters


def made(index: int) -> fl.Adapter:
    """An adapter of the workload, in memory."""
    generator = torch.Generator().manual_seed(index)
    modules = [f"model.layers.{i}.self_attn.{name}" for i in range(LAYERS) for name in ("q_proj", "v_proj")]
    draw = partial(torch.randn, generator=generator)
    return fl.Adapter.from_tensors({m: (draw(SIDE, RANK), draw(RANK, SIDE)) for m in modules}, name=f"a{index}")


def named(adapter: fl.Adapter) -> dict[str, Tensor]:
    """Its tensors as PEFT names them."""
    sides = {m: {"A": A, "B": B} for m, (B, A) in adapter.tensors().items()}
    return {f"base_model.model.{m}.lora_{s}.weight": t for m, both in sides.items() for s, t in both.items()}


def _folder() -> tempfile.TemporaryDirectory[str]:
    in_memory = MEMORY.is_dir() and os.access(MEMORY, os.W_OK)
    return tempfile.TemporaryDirectory(dir=MEMORY if in_memory else None)


def _prepare_loading(load: Callable[[Sequence[Path]], Sequence[object]]) -> Task:
    folder = _folder()
    paths = [made(i).save(Path(folder.name, f"a{i}")) for i in range(COUNT)]
    files = [path / "adapter_model.safetensors" for path in paths]

    def theirs() -> list[dict[str, Tensor]]:
        return [load_file(file) for file in files]

    for adapter, expected in zip(load(paths), theirs(), strict=True):
        assert isinstance(adapter, fl.Adapter)
        _require_equal("what was loaded", named(adapter), expected)
    contenders = {
        OURS: Contender(lambda: load(paths), thread_counts()),
        LOAD: Contender(theirs, thread_counts()),
    }
    return Task(contenders, note=_note(folder.name), close=folder.cleanup)


def _prepare_saving() -> Task:
    folder = _folder()
    root = Path(folder.name)
    adapters = [made(i) for i in range(COUNT)]
    tensors = [named(adapter) for adapter in adapters]

    def ours() -> None:
        for adapter in adapters:
            adapter.save(root / "ours" / adapter.name)

    def theirs() -> None:
        for i, own in enumerate(tensors):
            save_file(own, root / "theirs" / f"{i}.safetensors")

    def empty(name: str) -> None:
        clear(root / name)
        (root / name).mkdir()

    actions: dict[str, Action] = {"ours": ours, "theirs": theirs}
    for name, action in actions.items():
        empty(name)
        action()
    for i, adapter in enumerate(adapters):
        written = load_file(root / "ours" / adapter.name / "adapter_model.safetensors")
        _require_equal("what was saved", written, load_file(root / "theirs" / f"{i}.safetensors"))
    contenders = {
        OURS: Contender(ours, thread_counts(), reset=partial(empty, "ours")),
        SAVE: Contender(theirs, thread_counts(), reset=partial(empty, "theirs")),
    }
    return Task(contenders, note=_note(folder.name), close=folder.cleanup)


def _require_equal(what: str, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    if found.keys() != expected.keys():
        raise AssertionError(f"{what} has other tensors")
    for name, tensor in expected.items():
        require(f"{what}, {name}", found[name], tensor, 0.0)


def _note(folder: str) -> str:
    return f"{COUNT} small adapters: {4 * LAYERS} tensors of float32 each; files in {Path(folder).parent}"
