"""``fastlora merge`` without a method: what it does, and what it says of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders import make_adapter
from command import done, refused
from tolerances import SUMS32

import fastlora as fl


def folders(root: Path, *sizes: float) -> list[fl.Adapter]:
    """Adapters ``a``, ``b``, … of rank 4 whose scalings differ by these factors."""
    return [
        fl.load(make_adapter(root / name, alpha=8 * size, seed=i))
        for i, (name, size) in enumerate(zip("abc", sizes, strict=False))
    ]


def distance(merged: fl.Adapter, terms: list[tuple[float, fl.Adapter]]) -> float:
    error, size = 0.0, 0.0
    for module in merged.modules:
        expected = sum((w * a.delta(module) for w, a in terms), torch.zeros(()))
        error += float((merged.delta(module) - expected).square().sum())
        size += float(expected.square().sum())
    return (error / size) ** 0.5


def test_without_weights_it_is_the_sum_at_the_mean_norm(tmp_path: Path) -> None:
    adapters = folders(tmp_path, 1.0, 1.5, 1.0)
    found = done("merge", "a", "b", "c", "-o", "out", "--save-recipe", "did.yaml", cwd=tmp_path)
    data = done("merge", "a", "b", "c", "-o", "again", "--json", cwd=tmp_path).json()
    scale = data["default"]["scales"]["matched_norm"]
    merged = fl.load(tmp_path / "out")
    assert distance(merged, [(scale, a) for a in adapters]) <= SUMS32
    assert {u.rank for u in merged.updates.values()} == {12} and data["retained_energy"] is None
    assert data["default"]["scales"]["mean"] == pytest.approx(1 / 3) and 1 / 3 < scale < 1
    assert data["default"]["method"] == "cat" and data["retained_energy_by_adapter"] is None
    text = " ".join(found.out.split())
    assert f"every adapter × {scale:.3g}, at which the sum has their mean norm" in text
    assert "between the mean (× 0.333) and the sum (× 1)" in text and "cosines of ΔW" in text
    done("merge", "did.yaml", "-o", "replayed", cwd=tmp_path)
    assert distance(fl.load(tmp_path / "replayed"), [(scale, a) for a in adapters]) <= SUMS32


def test_weights_that_are_given_stay(tmp_path: Path) -> None:
    a, b, _ = folders(tmp_path, 1.0, 5.0, 1.0)
    found = done("merge", "a:0.7", "b", "-o", "out", cwd=tmp_path)
    merged = fl.load(tmp_path / "out")
    assert distance(merged, [(0.7, a), (1.0, b)]) <= SUMS32 and {u.rank for u in merged.updates.values()} == {8}
    assert "No weights were given" not in found.out and not found.err
    found = done("merge", "a:0.7", "b", "--rank", "3", "-o", "cut", cwd=tmp_path)
    assert "kept of each: a " in found.out and {u.rank for u in fl.load(tmp_path / "cut").updates.values()} == {3}


def test_what_a_cut_keeps_of_every_adapter(tmp_path: Path) -> None:
    folders(tmp_path, 1.0, 1.5, 4.0)
    found = done("merge", "a", "b", "--rank", "4", "-o", "two", "--json", cwd=tmp_path).json()
    assert found["default"]["method"] == "svd" and set(found["retained_energy_by_adapter"]) == {"a", "b"}
    assert all(0 < share < 1 for share in found["retained_energy_by_adapter"].values())
    found = done("merge", "a", "b", "c", "--rank", "4", "-o", "three", cwd=tmp_path)
    assert "the cut keeps the directions that hold most of all adapters alike" in " ".join(found.out.split())
    assert "kept" in found.out and " times as long as the shortest" in found.err and "equal_energy" in found.err
    data = done("merge", "a", "b", "c", "--rank", "4", "-o", "again", "--json", cwd=tmp_path).json()
    assert data["default"]["method"] == "ctm"
    assert done("merge", "a", "b", "c", "--rank", "4", "-o", "quiet", "--quiet", cwd=tmp_path).out == ""


@pytest.mark.parametrize("options", [
    ("--method", "svd", "--rank", "3"), ("--method", "iso_c"), ("--method", "ctm", "--rank", "3"),
    ("--method", "ties", "--rank", "3", "--min-energy", "0.1"), ("--method", "slerp", "--energy", "0.5"),
], ids=lambda x: x[1])  # fmt: skip
def test_a_method_that_cuts_says_what_it_keeps_of_each(tmp_path: Path, options: tuple[str, ...]) -> None:
    """The command, the recipe that it saved, and both as JSON."""
    folders(tmp_path, 1.0, 1.5)
    found = done("merge", "a:0.7", "b:1.5", *options, "-o", "one", "--save-recipe", "did.yaml", cwd=tmp_path)
    again = done("merge", "did.yaml", "-o", "two", cwd=tmp_path)
    line = next(line for line in found.out.splitlines() if line.startswith("kept of each: a "))
    assert line in again.out.splitlines()
    data = done("merge", "a:0.7", "b:1.5", *options, "-o", "three", "--json", cwd=tmp_path).json()
    told = done("merge", "did.yaml", "-o", "four", "--json", cwd=tmp_path).json()
    shares = data["retained_energy_by_adapter"]
    assert set(shares) == {"a", "b"} and all(0 < share < 1 for share in shares.values())
    assert told["retained_energy_by_adapter"] == shares and "default" not in data
    for name, share in shares.items():
        assert f"{name} {int(1e4 * share) / 100:.2f} %" in line


def test_of_many_adapters_the_least_are_told(tmp_path: Path) -> None:
    names = [f"m{i}" for i in range(10)]
    for i, name in enumerate(names):
        make_adapter(tmp_path / name, alpha=1 + i, seed=i)
    found = done("merge", *names, "--method", "svd", "--rank", "4", "-o", "out", cwd=tmp_path)
    line = " ".join(found.out.split()).partition("kept of each of 10, the least: ")[2]
    assert "m0 " in line and "m9" not in line and line.count("%") == 8
    found = done("merge", *names, "--method", "cat", "-o", "whole", "--json", cwd=tmp_path)
    assert found.json()["retained_energy_by_adapter"] is None


def test_what_needs_a_method(tmp_path: Path) -> None:
    folders(tmp_path, 1.0, 1.0)
    message = refused("merge", "a", "b", "--set", "density=0.3", "-o", "out", cwd=tmp_path)
    assert "--set density=…: is a parameter of a method; give --method too" in message
    make_adapter(tmp_path / "c", alpha=-8, seed=0)
    assert "cancel each other" in refused("merge", "a", "c", "-o", "out", cwd=tmp_path)
    assert not (tmp_path / "out").exists()
    done("merge", "a:1", "c:1", "-o", "out", cwd=tmp_path)
