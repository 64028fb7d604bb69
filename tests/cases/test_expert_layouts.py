"""Fused experts as PEFT laid them out before 0.19 and since: one update, transposed in one of the two."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import SUMS32
from torch import Tensor
from two_forms import (
    EXPERTS,
    HIDDEN,
    assert_is,
    changes,
    combined,
    factors,
    fused_adapter,
    fused_deltas,
    fused_layer,
    mixtral,
    run,
    single_adapter,
)

import fastlora as fl


def square_layer(seed: int = 5) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """``gate_up_proj`` alone, and square."""
    return {"gate_up_proj": [factors(HIDDEN, HIDDEN, 100 * seed + e) for e in range(EXPERTS)]}


LAYERS: dict[str, Callable[[], dict[str, list[tuple[Tensor, Tensor]]]]] = {
    "both": fused_layer,
    "gate_up_proj": lambda: {"gate_up_proj": fused_layer()["gate_up_proj"]},
    "down_proj": lambda: {"down_proj": fused_layer()["down_proj"]},
    "square gate_up_proj": square_layer,
    "both, gate_up_proj square": lambda: fused_layer(inner=HIDDEN // 2),
    "both, down_proj square": lambda: fused_layer(inner=HIDDEN),
}


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("version", ["0.17.1", "0.18.0", "0.18.1", None])
def test_one_update_in_two_layouts(
    tmp_path: Path, layer: Callable[[], Any], version: str | None, attention: bool, capsys: Any
) -> None:
    later = fused_adapter(tmp_path / "later", layer=layer(), attention=attention, peft_version="0.20.0")
    told = {} if version is None else {"peft_version": version}
    earlier = fused_adapter(tmp_path / "earlier", layer=layer(), attention=attention, older=True, **told)
    if version is None and layer is square_layer:  # nothing tells
        with pytest.raises(fl.InputError, match="does not say by which peft"):
            run("merge", later, earlier, "--out", tmp_path / "a")
        return
    run("merge", f"{later}:1", f"{earlier}:-1", "--method", "cat", "--out", tmp_path / "a")
    run("merge", f"{earlier}:-1", f"{later}:1", "--method", "svd", "--rank", "2", "--out", tmp_path / "b")
    for out in ("a", "b"):
        found = fl.load(tmp_path / out)
        assert max(float(found.delta(m).abs().max()) for m in found.modules) <= SUMS32
        assert json.loads((tmp_path / out / "adapter_config.json").read_text())["peft_version"] == "0.19.0"
    assert "peft before 0.19" in capsys.readouterr().err
    assert_is(fl.load(later) + fl.load(earlier), {m: 2 * d for m, d in fused_deltas(later).items()})


@pytest.mark.parametrize("name", ["both", "gate_up_proj", "down_proj"])
@pytest.mark.parametrize("version", ["0.18.0", None])
def test_parameters_that_are_in_out_were_never_transposed(tmp_path: Path, name: str, version: str | None) -> None:
    """Of models with ``[experts, in, out]`` both versions of peft store the same."""
    told = {} if version is None else {"peft_version": version}
    later = fused_adapter(tmp_path / "later", layer=LAYERS[name](), attention=False, peft_version="0.19.1")
    earlier = fused_adapter(tmp_path / "earlier", layer=LAYERS[name](), attention=False, **told)
    difference = fl.load(later) - fl.load(earlier)
    assert max(float(difference.delta(m).abs().max()) for m in difference.modules) <= SUMS32


def test_an_older_layout_alone_is_told_and_kept_or_converted(tmp_path: Path, capsys: Any) -> None:
    kept = fused_adapter(tmp_path / "kept", layer=square_layer(), attention=False, older=True, peft_version="0.18.1")
    run("compress", kept, "--rank", "2", "--out", tmp_path / "a")
    assert "before 0.19" in capsys.readouterr().err
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["peft_version"].startswith("0.18")
    assert_is(fl.load(tmp_path / "a"), fused_deltas(kept), SUMS32)
    known = fused_adapter(tmp_path / "known", older=True, peft_version="0.18.1")
    later = fused_adapter(tmp_path / "later", peft_version="0.19.0")
    run("compress", known, "--rank", "2", "--out", tmp_path / "b")
    assert "before 0.19" in capsys.readouterr().err
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["peft_version"] == "0.19.0"
    assert_is(fl.load(tmp_path / "b"), fused_deltas(later), SUMS32)


def test_two_of_the_same_older_layout_stay_in_it(tmp_path: Path) -> None:
    paths = [
        fused_adapter(tmp_path / str(v), seed, layer=square_layer(seed), attention=False, older=True, peft_version=v)
        for v, seed in (("0.18.0", 1), ("0.18.1", 2))
    ]
    run("merge", *paths, "--method", "cat", "--out", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["peft_version"].startswith("0.18")
    assert_is(fl.load(tmp_path / "out"), combined([(1, p) for p in paths]))


@pytest.mark.parametrize("order", [("said", "unsaid"), ("unsaid", "said")])
def test_unsaid_and_older_with_the_same_shapes_are_of_one_layout(tmp_path: Path, order: tuple[str, str]) -> None:
    layer = LAYERS["down_proj"]()
    for name, told in (("said", {"peft_version": "0.18.0"}), ("unsaid", {})):
        fused_adapter(tmp_path / name, layer=layer, attention=False, older=True, **told)
    run("merge", *(tmp_path / name for name in order), "--method", "cat", "--out", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["peft_version"].startswith("0.18")
    assert_is(fl.load(tmp_path / "out"), combined([(1, tmp_path / "said"), (1, tmp_path / "unsaid")]))


def test_unsaid_and_older_with_transposed_shapes(tmp_path: Path) -> None:
    layer = LAYERS["down_proj"]()
    older = fused_adapter(tmp_path / "older", layer=layer, attention=False, older=True, peft_version="0.18.0")
    unsaid = fused_adapter(tmp_path / "unsaid", layer=layer, attention=False)
    assert_is(fl.load(older) + fl.load(unsaid), {m: 2 * d for m, d in fused_deltas(unsaid).items()})


def test_a_version_that_is_not_said_stays_so(tmp_path: Path) -> None:
    folder = fused_adapter(tmp_path / "a", layer=square_layer(), attention=False)
    run("compress", folder, "--rank", "2", "--out", tmp_path / "out")
    assert "peft_version" not in json.loads((tmp_path / "out" / "adapter_config.json").read_text())


@pytest.mark.parametrize(("version", "said"), [("0.18.0", "was saved by peft before 0.19"), (None, "does not say")])
def test_what_nothing_tells_is_refused(tmp_path: Path, version: str | None, said: str) -> None:
    layer = {"down_proj": [factors(HIDDEN, HIDDEN, e) for e in range(EXPERTS)]}
    later = fused_adapter(tmp_path / "later", layer=layer, attention=False, peft_version="0.20.0")
    told = {} if version is None else {"peft_version": version}
    earlier = fused_adapter(tmp_path / "earlier", layer=layer, attention=False, **told)
    with pytest.raises(fl.InputError, match=rf"'earlier' {said}.*0\.19.*\[16, 16\]"):
        fl.Pool.load([later, earlier])
    with pytest.raises(fl.InputError, match="peft_version"):
        fl.load(earlier) - fl.load(later)
    config = json.loads((earlier / "adapter_config.json").read_text())
    (earlier / "adapter_config.json").write_text(json.dumps(config | {"peft_version": "0.19.0"}))  # the way out
    assert len(fl.Pool.load([later, earlier]).modules) == EXPERTS


def test_single_experts_tell_how_fused_ones_lie(tmp_path: Path) -> None:
    fused = fused_adapter(tmp_path / "fused", layer=LAYERS["down_proj"](), attention=False, older=True)
    straight = fused_adapter(tmp_path / "straight", layer=LAYERS["down_proj"](), attention=False, peft_version="0.20.0")
    single = single_adapter(tmp_path / "single", attention=False)
    expected = combined([(1, single), (1, straight)])
    for order in ([fused, single], [single, fused]):
        assert_is(fl.merge(fl.Pool.load(order), method="cat"), expected)


def test_peft_loads_what_was_in_the_older_layout(tmp_path: Path) -> None:
    later = fused_adapter(tmp_path / "later", peft_version="0.19.0")
    earlier = fused_adapter(tmp_path / "earlier", older=True, peft_version="0.18.1")
    run("compress", earlier, "--rank", "2", "--out", tmp_path / "out")
    found, expected = changes(mixtral(), tmp_path / "out"), changes(mixtral(), later)
    assert found.keys() == expected.keys()
    for name, change in expected.items():
        torch.testing.assert_close(found[name], change, rtol=0, atol=SUMS32 * float(change.abs().max()))
