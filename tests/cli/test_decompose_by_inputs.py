"""``fastlora decompose --inputs``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders import make_adapter
from command import done, refused

import fastlora as fl
from fastlora.merging.input_rows import InputRows


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """Two adapters and statistics of their inputs."""
    pool = fl.Pool.load([make_adapter(tmp_path / name, seed=i) for i, name in enumerate("ab")])
    generator = torch.Generator().manual_seed(1)
    groups = {}
    for name in "ab":
        rows = {m: torch.randn(20, pool["a"].updates[m].shape[1], generator=generator) for m in pool.modules}
        groups[name] = InputRows(rows, {m: m for m in rows}, dict.fromkeys(rows, 20))
    fl.Statistics(groups).save(tmp_path / "inputs.safetensors")
    return tmp_path


def test_parts_by_inputs(here: Path) -> None:
    told = done(
        "decompose", "a", "b", "--inputs", "inputs.safetensors", "--mu", "2", "-o", "out", "--csv", "t.csv", cwd=here
    )
    assert "a + b: by inputs, μ = 2, ridge = 0.0001" in told.out and "written: out (4 adapters" in told.out
    pool = fl.Pool.load([here / "a", here / "b"])
    parts = fl.decompose(pool, inputs=here / "inputs.safetensors", mu=2.0)
    for place, part in parts.adapters().items():
        read = fl.load(here / "out" / place)
        for module in part.modules:
            torch.testing.assert_close(read.delta(module), part.delta(module), rtol=1e-4, atol=1e-5)
    assert (here / "t.csv").read_text().startswith("report,module,adapter,norm_kept,own_kept,others_left\n")
    data = done("decompose", "a", "b", "--inputs", "inputs.safetensors", "-o", "other", "--json", cwd=here).json()
    assert data["mode"] == "inputs" and data["reports"][0]["settings"]["mu"] == 1.0
    assert {row["adapter"] for row in data["reports"][0]["total"]} == {"a", "b"}


def test_what_has_no_meaning_is_refused(here: Path) -> None:
    by_inputs = ("decompose", "a", "b", "--inputs", "inputs.safetensors", "-o", "out")
    assert "chain has no effect on a decomposition by inputs" in refused(*by_inputs, "--chain", "mean", cwd=here)
    assert "--plots shows spectra" in refused(*by_inputs, "--plots", cwd=here)
    assert "mu belongs to a decomposition by inputs" in refused(
        "decompose", "a", "b", "--mu", "1", "-o", "out", cwd=here
    )
    assert "holds no statistics" in refused(*by_inputs[:4], "a/adapter_model.safetensors", "-o", "out", cwd=here)
    assert not (here / "out").exists()


def test_a_soft_threshold_with_weights(here: Path) -> None:
    soft = ("decompose", "a", "b", "--threshold", "soft", "-o")
    given = (*soft, "soft", "--chain", "mean", "--weighting", "energy", "--html", "p.html", "--plots")
    told = done(*given, cwd=here).out
    assert "mean chain, left side, soft threshold, weighted by energy (ρ = 0.01)" in " ".join(told.split())
    assert (here / "p.html").exists() and (here / "soft" / "spectrum.png").exists()
    assert "needs a symmetric chain" in refused(*soft, "out", cwd=here)
    assert "threshold='hard'" in refused("decompose", "a", "b", "--threshold", "hard", "-o", "out", cwd=here)
