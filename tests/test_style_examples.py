"""The example of drawing styles: its mixes are painted as diffusers paints them, and its distances are right."""

from __future__ import annotations

import copy
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import FLOAT32, SUMS32

import fastlora as fl

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def painter() -> Any:
    """Barely trained."""
    for package in ("diffusers", "peft"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        return importlib.import_module("styles").Painter(0, shorter=60)


@pytest.mark.parametrize("format", ["diffusers", None])
def test_a_mix_of_styles_paints_as_in_diffusers(load: Any, painter: Any, tmp_path: Path, format: str | None) -> None:
    """Training, saving and loading are theirs, all between is ours. By default the file is as the styles' files are."""
    styles, mixing = load("styles"), load("style_mixing")
    measured, _ = mixing.own_pictures(painter, 0, 1)
    mix = 1.5 * mixing.total(mixing.uniques(fl.Pool(painter.adapters.values()), ("etching", "neon"), 0.1)["unique"])
    mix.save(tmp_path / "mix.safetensors", format=format)
    found = measured.paint(styles.deltas_of(mix))
    assert not torch.allclose(found, measured.paint({}), atol=1e-3)
    user = copy.copy(painter)
    user.model = copy.deepcopy(painter.model)
    user.model.load_lora_adapter(tmp_path / "mix.safetensors", prefix="transformer" if format else None)
    expected = user.paint({}, measured.content, measured.noise)
    torch.testing.assert_close(found, expected, atol=SUMS32, rtol=0)


def test_styles_in_a_pipeline_paint_as_diffusers_adds_them(load: Any, painter: Any, tmp_path: Path) -> None:
    user = copy.copy(painter)
    user.model = copy.deepcopy(painter.model)
    found = load("styles_in_a_pipeline").paintings(user, tmp_path)
    for names in ("etching + sanguine + sepia", "etching + neon"):
        expected = found[f"{names}: set_adapters"]
        torch.testing.assert_close(found[f"{names}: merge_loaded"], expected, atol=SUMS32, rtol=0)
        assert not torch.allclose(found[f"{names}: mix_unique"], expected, atol=1e-4)
    assert len(found) == 10 and (tmp_path / "etching_neon.safetensors").exists()


def test_distance_from_a_drawing(load: Any) -> None:
    styles = load("styles")
    content = torch.arange(styles.CONTENTS)
    generator = torch.Generator().manual_seed(0)
    for style in styles.STYLES.values():
        pictures = styles.draw(content, style, generator)
        distances = styles.distance_from_drawings(pictures)
        assert torch.equal(distances.argmin(0), content) and float(distances.amin(0).max()) <= FLOAT32
        noisy = pictures.double() + 0.1 * torch.randn(pictures.shape, generator=generator, dtype=torch.float64)
        expected = min(
            (noisy[3] - drawing).square().mean().sqrt()
            for texture in styles.INKS[3].double()
            for drawing in [clean(noisy[3], texture)]
        )
        torch.testing.assert_close(styles.distance_from_drawings(noisy)[3, 3], expected)
    assert float(styles.distance_from_drawings(torch.full((1, 3, 16, 16), 1.5)).min()) == pytest.approx(0.5)


def clean(picture: torch.Tensor, ink: torch.Tensor) -> torch.Tensor:
    """The nearest picture with one colour in [0, 1] where there is ink, and one elsewhere."""
    found = torch.empty_like(picture)
    for where in (ink == 1, ink == 0):
        found[:, where] = picture[:, where].mean(1, keepdim=True).clamp(0, 1)
    return found


def test_style_mixing_runs(tmp_path: Path) -> None:
    for package in ("diffusers", "peft", "matplotlib"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    command = [sys.executable, str(EXAMPLES / "style_mixing.py"), "--quick", "--seeds", "1", "--out", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    tables = json.loads((tmp_path / "results.json").read_text())
    controls = ("without random directions", "without leading directions", "whole, as long as unique")
    for group in ("two alike", "two apart", "all four"):
        rows = tables[f"Mixes of {group}, τ = 0.3"]
        kinds = ("whole", "unique", "unique + shared once", *controls)
        assert {f"{kind}, c = {c}" for kind in kinds for c in (1, 2)} <= set(rows)
        gain = tables[f"Mixes of {group}, τ = 0.3: minus the whole"]["unique, c = 2"]["from a clean drawing"][0]
        whole, unique = (rows[f"{kind}, c = 2"]["from a clean drawing"][0] for kind in ("whole", "unique"))
        assert gain == unique - whole
    assert "unique, one by one, c = 1" in rows and "from neon" in rows["whole, c = 1"]
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("mixes.png", "mix.safetensors"))
