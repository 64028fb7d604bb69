"""Views of mapped files: those that lie at equal distances in one step are those that are made one by one."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import gaussian
from safetensors.torch import save_file

from fastlora.files import tensor_files
from fastlora.files.mapped_tensors import Runs
from fastlora.files.tensor_files import map_safetensors, read_header, read_safetensors


@pytest.mark.parametrize("seed", range(4))
def test_runs_are_single_views(seed: int, tmp_path: Path) -> None:
    shapes = [(4, 3), (3, 4), (4, 3), (5,), (4, 3), (4, 3), (3, 4), (4, 3), (1, 1), (3, 4)]
    dtypes = [torch.float32, torch.bfloat16, torch.float64]
    tensors = {
        f"{(7 * i + seed) % 11}.{i}": gaussian(*shape, seed=i, dtype=dtypes[(i // 3 + seed) % 3])
        for i, shape in enumerate(shapes)
    }
    file = tmp_path / "x.safetensors"
    save_file(tensors, file, {"a": "b" * seed})  # tensors begin at other remainders
    mapped = map_safetensors(file)
    order = [*reversed(tensors), *list(tensors)[:2]]
    for wanted in (order[: len(tensors)], list(tensors)[::2], [order[-1]], []):
        found = Runs([mapped.places[name] for name in wanted]).tensors(mapped.mapping, mapped.start)
        for name, tensor, single in zip(wanted, found, map(read_safetensors(file).get, wanted), strict=True):
            assert single is not None and tensor.dtype == single.dtype and tensor.stride() == single.stride()
            assert torch.equal(tensor, single) and torch.equal(tensor, tensors[name])


def test_threads_that_read_other_files_take_no_header_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one thread remembers a header, others come with more than are remembered."""
    files = [tmp_path / f"{i}.safetensors" for i in range(tensor_files.MOST_KNOWN + 2)]
    for i, file in enumerate(files):
        save_file({f"x{i}": torch.zeros(2)}, file)
    others = threading.Thread(target=lambda: [read_header(file) for file in files[1:]], daemon=True)

    class Interrupted(OrderedDict[Any, Any]):
        def __setitem__(self, key: Any, value: Any) -> None:
            super().__setitem__(key, value)
            if threading.current_thread() is not others:
                others.start()
                others.join(0.2)  # no longer: they wait for this one

    monkeypatch.setattr(tensor_files, "_known", Interrupted())
    assert list(read_header(files[0]).shapes) == ["x0"]
    others.join()
    assert len(tensor_files._known) == tensor_files.MOST_KNOWN
