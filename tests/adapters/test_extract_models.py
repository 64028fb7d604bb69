"""``fl.extract``: two checkpoints, tile by tile, against the dense change of every weight in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from builders import gaussian
from safetensors.torch import save_file
from tolerances import SUMS32
from torch import Tensor

import fastlora as fl
from fastlora.engine import low_rank
from tests.cli.command import done, refused

SHAPES = {
    "model.embed_tokens.weight": (40, 96), "model.layers.0.q_proj.weight": (160, 96),
    "model.layers.0.o_proj.weight": (96, 160), "model.layers.0.same.weight": (96, 96),
}  # fmt: skip


def models(dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A model and its fine-tune: changes of rank 6 and noise; one weight is equal, a norm changes."""
    base, tuned = {}, {}
    for i, (name, (n, m)) in enumerate(SHAPES.items()):
        base[name] = (0.1 * gaussian(n, m, seed=i)).to(dtype)
        change = gaussian(n, 6, seed=20 + i) @ gaussian(6, m, seed=40 + i) / 8 + 0.03 * gaussian(n, m, seed=60 + i)
        tuned[name] = base[name] if "same" in name else (base[name].float() + change).to(dtype)
    base["model.norm.weight"] = torch.ones(96, dtype=dtype)
    tuned["model.norm.weight"] = torch.full((96,), 1.5, dtype=dtype)
    return base, tuned


def save(folder: Path, state: dict[str, Tensor]) -> Path:
    """In two shards."""
    folder.mkdir()
    names = list(state)
    save_file({n: state[n] for n in names[:2]}, folder / "model-00001-of-00002.safetensors")
    save_file({n: state[n] for n in names[2:]}, folder / "model-00002-of-00002.safetensors")
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("exact", [False, True])
def test_shards_against_the_dense_change(
    dtype: torch.dtype, exact: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(low_rank, "EXACT_SIDE", 0)
    base, tuned = models(dtype)
    folders = save(tmp_path / "base", base), save(tmp_path / "tuned", tuned)
    found = fl.extract(*folders, rank=6, exact=exact)
    assert set(found.modules) == {"model.layers.0.q_proj", "model.layers.0.o_proj"}
    assert set(found.extras) == {"model.embed_tokens.weight", "model.norm.weight"}
    assert all(torch.equal(found.extras[n].tensor, tuned[n]) for n in found.extras)
    lost = total = 0.0
    for module in found.modules:
        name = f"{module}.weight"
        delta = tuned[name].double() - base[name].double()
        least = float(torch.linalg.svdvals(delta)[6:].norm())
        error = float((found.delta(module).double() - delta).norm())
        assert error <= (1 + SUMS32 if exact else 1.01) * least
        lost, total = lost + error**2, total + float(delta.square().sum())
    assert found.provenance["retained_energy"] == pytest.approx(1 - lost / total, abs=SUMS32)
    bounded = fl.extract(*folders, rank=6, exact=exact, memory="1MiB")
    assert all(torch.equal(bounded.delta(m), found.delta(m)) for m in found.modules)


def test_embeddings_and_norms(tmp_path: Path) -> None:
    base, tuned = models(torch.bfloat16)
    factored = fl.extract(base, tuned, energy=0.9, embeddings="factor", norms="skip")
    assert factored.updates["model.embed_tokens"].layout.kind == "embedding" and not factored.extras
    assert any("model.norm.weight changed and are left out" in note for note in factored.notes)
    skipped = fl.extract(base, tuned, rank=2, embeddings="skip", norms="skip")
    assert "model.embed_tokens" not in skipped.updates and not skipped.extras
    some = fl.extract(base, tuned, rank=2, include=["q_proj"])
    assert some.modules == ["model.layers.0.q_proj"] and not some.extras
    wrong: dict[str, Any]
    for wrong, message in (({"embeddings": "some"}, "embeddings='some' is unknown; there are keep, factor, skip"),
                           ({"norms": "factor"}, "norms='factor' is unknown; there are keep, skip")):  # fmt: skip
        with pytest.raises(fl.InputError, match=message):
            fl.extract(base, tuned, rank=2, **wrong)


def test_another_vocabulary_has_the_common_rows() -> None:
    base, tuned = models(torch.float32)
    name = "model.embed_tokens.weight"
    grown = {**tuned, name: torch.cat([tuned[name], torch.ones(3, 96)])}
    found = fl.extract(base, grown, rank=64)
    expected = tuned[name] - base[name]
    assert float((found.delta("model.embed_tokens").mT - expected).norm()) <= SUMS32 * float(expected.norm())
    assert any(f"{name}: 40 rows in the base model and 43 in the fine-tune" in note for note in found.notes)


def test_what_is_not_finite_is_told() -> None:
    base, tuned = models(torch.bfloat16)
    tuned["model.layers.0.q_proj.weight"][3, 3] = torch.nan
    with pytest.raises(fl.InputError, match=r"model\.layers\.0\.q_proj\.weight holds NaN or Inf"):
        fl.extract(base, tuned, rank=2)


def test_the_command_has_the_same_choices(tmp_path: Path) -> None:
    base, tuned = models(torch.bfloat16)
    save(tmp_path / "base", base), save(tmp_path / "tuned", tuned)
    pair = ("extract", "base", "tuned", "--rank", "6")
    kept = ("--embeddings", "keep", "--norms", "keep", "--memory", "64MiB")
    done(*pair, *kept, "-o", "kept", "-q", cwd=tmp_path)
    found, expected = fl.load(tmp_path / "kept"), fl.extract(base, tuned, rank=6)
    assert isinstance(found, fl.Adapter) and set(found.extras) == set(expected.extras)
    assert all(torch.equal(found.delta(m), expected.delta(m)) for m in expected.modules)
    assert "there are keep, factor, skip" in refused(*pair, "--embeddings", "x", "-o", "out", cwd=tmp_path)
