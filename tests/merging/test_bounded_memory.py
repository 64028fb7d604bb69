"""``memory=`` changes no bit of any merge method, however little is worked on at once."""

from __future__ import annotations

from pathlib import Path

import merge_calls
import pools
import pytest
from builders import gaussian

import fastlora as fl
from fastlora.runtime import memory

SHAPES = {f"layers.{i}.{kind}": shape for i in range(4) for kind, shape in (("q", (40, 24)), ("v", (9, 24)))}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters in files: ``a0``, ``a1`` and ``a2`` of ragged ranks, one of which lacks modules, ``b0`` … alike."""
    root = tmp_path_factory.mktemp("adapters")
    for i in range(3):
        for name, rank in ((f"a{i}", (3, 2, 4)[i]), (f"b{i}", 3)):
            parts = {
                m: (gaussian(n, rank, seed=9 * i + j), gaussian(rank, k, seed=90 + 9 * i + j), 1.0)
                for j, (m, (n, k)) in enumerate(SHAPES.items())
                if name != "a1" or j % 3
            }
            pools.make_adapter(name, parts).save(root / name)
    return root


@pytest.mark.parametrize("method", fl.methods())
def test_little_memory_gives_the_same_bits(
    method: str, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Module by module: the least that is worked on at once is one byte here."""
    names = [f"{'b' if method in merge_calls.OF_EQUALS else 'a'}{i}" for i in range(3)]

    def saved(place: str, bound: str | None) -> dict[str, bytes]:
        pool = fl.Pool([fl.load(folders / name) for name in names])
        merge_calls.called(method, pool, memory=bound).save(tmp_path / place)
        return {p.name: p.read_bytes() for p in (tmp_path / place).iterdir()}

    whole = saved("whole", None)
    monkeypatch.setattr(memory, "LEAST", 1)
    assert "adapter_model.safetensors" in whole and saved("bounded", "1KiB") == whole
