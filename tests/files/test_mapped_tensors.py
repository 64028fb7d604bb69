"""Views of mapped files: those that lie at equal distances in one step are those that are made one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders import gaussian
from safetensors.torch import save_file

from fastlora.files.mapped_tensors import Runs
from fastlora.files.tensor_files import map_safetensors, read_safetensors


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
