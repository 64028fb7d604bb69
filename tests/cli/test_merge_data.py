"""``fastlora merge --data``: inputs of modules from files."""

from __future__ import annotations

from pathlib import Path

import pools
import tolerances
import torch
from builders import gaussian
from command import done, refused

import fastlora as fl
from fastlora.adapters.pool import Pool
from fastlora.merging.input_rows import InputRows, Statistics


def test_statistics_of_every_adapter_come_from_files(tmp_path: Path) -> None:
    pool = Pool([
        pools.make_adapter(name, {"m": (gaussian(6, 2, seed=seed), gaussian(2, 9, seed=seed + 1), 1.0)})
        for name, seed in (("a", 0), ("b", 2))
    ])  # fmt: skip
    groups = {n: InputRows({"m": gaussian(20, 9, seed=7 + i)}, {"m": "m"}, {"m": 20}) for i, n in enumerate("ab")}
    for adapter in pool.adapters:
        adapter.save(tmp_path / adapter.name)
        Statistics({adapter.name: groups[adapter.name]}).save(tmp_path / f"{adapter.name}.safetensors")
    files = ["--data", "a.safetensors", "--data", "b.safetensors"]
    done("merge", "a", "b", "--method", "regmean", *files, "--out", "out", cwd=tmp_path)
    expected = pools.exact(fl.merge(pool, method="regmean", data=Statistics(groups)).updates["m"])
    found = pools.exact(fl.load(tmp_path / "out").updates["m"])
    assert float((found - expected).norm() / expected.norm()) <= tolerances.FLOAT32
    assert "needs the inputs" in refused("merge", "a", "b", "--method", "ssr", "--out", "x", cwd=tmp_path)
    message = refused("merge", "a", "b", "--method", "ssr", *files[:2], *files[:2], "--out", "x", cwd=tmp_path)
    assert "'a' are given twice" in message
    assert torch.equal(fl.Statistics.load(tmp_path / "a.safetensors").of["a"].of("m"), groups["a"].rows["m"])
