"""The node pack for ComfyUI, without ComfyUI: every node runs, and the workflow that comes with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy_stub
import pytest
import torch
from comfy_stub import execute
from files import sample
from safetensors import safe_open
from tolerances import FLOAT32
from torch import Tensor

import fastlora as fl
from fastlora.integrations.comfy.states import adapter_of

PACK = Path(__file__).parents[2] / "comfy"
WORKFLOW = PACK / "example_workflows" / "merge_and_decompose.json"
Deltas = Mapping[str, Tensor]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """ComfyUI's folders; two LoRAs for Flux in two dialects, with scales and ranks that differ."""
    (tmp_path / "loras").mkdir()
    sample("flux", "kohya, original names", text=False).save(tmp_path / "loras" / "ink.safetensors")
    sample("flux", "component", ranks=(3, 2), text=False).save(tmp_path / "loras" / "toy.safetensors")
    return tmp_path


@pytest.fixture
def nodes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    comfy_stub.install(monkeypatch, folder)
    return comfy_stub.load_pack(PACK, monkeypatch)


def loaded(nodes: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    load = nodes["FastloraLoad"]
    first, second = (execute(load, lora_name=f"{n}.safetensors", family="flux")[0] for n in ("ink", "toy"))
    return first, second


def as_comfyui_reads(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``{stem: ΔW}`` by ComfyUI's rule: an alpha over the rank, or a scale of 1."""
    deltas = {}
    for key, up in state.items():
        stem, end, _ = key.partition(".lora_up.weight")
        if end:
            down = state[f"{stem}.lora_down.weight"]
            scale = float(state[f"{stem}.alpha"]) / down.shape[0] if f"{stem}.alpha" in state else 1.0
            deltas[stem] = scale * up.double().flatten(1) @ down.double().flatten(1)
    assert len(deltas) * 3 == len(state), "every tensor is one that ComfyUI knows"
    return deltas


def combined(*terms: tuple[float, Deltas]) -> dict[str, Tensor]:
    stems = dict.fromkeys(stem for _, deltas in terms for stem in deltas)
    return {s: torch.stack([w * d[s] for w, d in terms if s in d]).sum(0) for s in stems}


def gap(found: Deltas, wanted: Deltas) -> float:
    zero = {s: torch.zeros_like(d) for s, d in wanted.items()}
    return max(float((found.get(s, zero[s]) - d).norm() / d.norm().clamp(min=1e-30)) for s, d in wanted.items())


def same(state: Mapping[str, Tensor], wanted: Any) -> bool:
    """Whether a state is an adapter, as its numbers are rounded for a file; modules that are zero may be left out."""
    found = adapter_of(state, "found")
    norm = sum(float(wanted.delta(m).square().sum()) for m in wanted.modules) ** 0.5
    zero = 0.0 * wanted
    gaps = [(found if m in found.modules else zero).delta(m) - wanted.delta(m) for m in wanted.modules]
    return sum(float(g.square().sum()) for g in gaps) ** 0.5 < FLOAT32 * norm


def test_inputs_are_arguments_and_names_are_of_the_pack(nodes: dict[str, Any]) -> None:
    assert len(nodes) == 8
    for name, node in nodes.items():
        schema = node.define_schema()
        assert {s.id for s in schema.inputs} == comfy_stub.arguments(node), name
        assert name.startswith("Fastlora") and schema.display_name.endswith("(fastlora)")
    listed = nodes["FastloraLoad"].define_schema().inputs[0].options
    assert listed == ["ink.safetensors", "toy.safetensors"]


def test_what_is_loaded_is_what_comfyui_reads_in_full(nodes: dict[str, Any], folder: Path) -> None:
    for name in ("ink", "toy"):
        state, report = execute(nodes["FastloraLoad"], lora_name=f"{name}.safetensors", family="flux")
        exact = fl.load(folder / "loras" / f"{name}.safetensors")
        assert isinstance(exact, fl.Adapter)
        assert all(stem.startswith("diffusion_model.") for stem in as_comfyui_reads(state)) and "flux" in report
        norm = sum(float(d.square().sum()) for d in as_comfyui_reads(state).values()) ** 0.5
        meant = sum(float(exact.delta(m).double().square().sum()) for m in exact.modules) ** 0.5
        assert norm == pytest.approx(meant, rel=FLOAT32)


def test_names_stay_where_the_family_is_in_doubt(nodes: dict[str, Any]) -> None:
    """The sizes of this file are those of no model, and its names are also those of another."""
    state, report = execute(nodes["FastloraLoad"], lora_name="toy.safetensors")
    assert all(key.startswith("transformer.") for key in state) and "may be of flux or hunyuan_video" in report


def test_a_file_that_changed_is_loaded_again(nodes: dict[str, Any], folder: Path) -> None:
    before = nodes["FastloraLoad"].fingerprint_inputs(lora_name="ink.safetensors", family="detected")
    sample("flux", "component", text=False).save(folder / "loras" / "ink.safetensors")
    assert before != nodes["FastloraLoad"].fingerprint_inputs(lora_name="ink.safetensors", family="detected")


def test_a_merge_is_the_weighted_sum(nodes: dict[str, Any]) -> None:
    ink, toy = loaded(nodes)
    wanted = combined((0.7, as_comfyui_reads(ink)), (-0.5, as_comfyui_reads(toy)))
    given = {"lora_a": ink, "lora_b": toy, "weight_a": 0.7, "weight_b": -0.5}
    exact, report = execute(nodes["FastloraMerge"], **given, method="cat")
    assert gap(as_comfyui_reads(exact), wanted) < FLOAT32 and "modules, rank" in report
    small, report = execute(nodes["FastloraMerge"], **given, method="svd", rank=2)
    assert "% of Σσ² kept" in report and gap(as_comfyui_reads(small), wanted) < 1
    cut, _ = execute(nodes["FastloraMerge"], **given, method="cat", rank=2)
    assert gap(as_comfyui_reads(cut), as_comfyui_reads(small)) < FLOAT32
    ties, _ = execute(nodes["FastloraMerge"], **given, method="ties", rank=64, settings="density=1, min_energy=0.5")
    assert as_comfyui_reads(ties)
    three, _ = execute(nodes["FastloraMerge"], **given, lora_d=ink, weight_d=0.3, method="cat")
    assert gap(as_comfyui_reads(three), combined((1.0, wanted), (0.3, as_comfyui_reads(ink)))) < FLOAT32


def test_an_expression_and_what_two_share(nodes: dict[str, Any]) -> None:
    ink, toy = loaded(nodes)
    pool = fl.Pool([adapter_of(ink, "a"), adapter_of(toy, "b")])
    shared, unique_a, unique_b, report = execute(nodes["FastloraDecompose"], lora_a=ink, lora_b=toy, threshold=0.3)
    parts = fl.decompose(pool, 0.3)
    assert parts.report.shared_directions and "directions shared in" in report and "expected by chance" in report
    for state, part in ((shared, parts.shared), (unique_a, parts.unique_of("a")), (unique_b, parts.unique_of("b"))):
        assert same(state, part)
    text = "a - 0.5*unique(b | a, threshold=0.3)"
    found, _ = execute(nodes["FastloraCompose"], lora_a=ink, lora_b=toy, expression=text)
    assert same(found, fl.compose(text, {"a": pool["a"], "b": pool["b"]}))


def test_resizing_and_converting(nodes: dict[str, Any]) -> None:
    ink, _ = loaded(nodes)
    small, report = execute(nodes["FastloraResize"], lora=ink, rank=1)
    ranks = {t.shape[0] for k, t in small.items() if "lora_down" in k}
    assert 1 in ranks and "% of Σσ² kept" in report
    most, _ = execute(nodes["FastloraResize"], lora=ink, by="energy", energy=1.0)
    assert gap(as_comfyui_reads(most), as_comfyui_reads(ink)) < FLOAT32
    for format, start in (("diffusers", "transformer."), ("kohya", "lora_unet_")):
        state, report = execute(nodes["FastloraConvert"], lora=ink, format=format)
        assert all(key.startswith(start) for key in state) and f"in the names of {format}" in report
        back, _ = execute(nodes["FastloraConvert"], lora=state, format="comfy")
        assert gap(as_comfyui_reads(back), as_comfyui_reads(ink)) < FLOAT32


def test_saving(nodes: dict[str, Any], folder: Path) -> None:
    ink, toy = loaded(nodes)
    merged, _ = execute(nodes["FastloraMerge"], lora_a=ink, lora_b=toy, method="cat")
    (first,) = execute(nodes["FastloraSave"], lora=merged, filename_prefix="loras/mix")
    (second,) = execute(
        nodes["FastloraSave"], lora=merged, filename_prefix="loras/mix", format="diffusers", dtype="float16"
    )
    assert [Path(p).name for p in (first, second)] == ["mix_00001_.safetensors", "mix_00002_.safetensors"]
    assert Path(first).parent == folder / "output" / "loras"
    with safe_open(first, "pt") as file:
        assert gap(as_comfyui_reads({k: file.get_tensor(k) for k in file.keys()}), as_comfyui_reads(merged)) == 0
    with safe_open(second, "pt") as file:
        assert {str(file.get_slice(k).get_dtype()) for k in file.keys()} == {"F16"}
        assert "fastlora" in file.metadata()


def test_a_report_compares(nodes: dict[str, Any]) -> None:
    ink, toy = loaded(nodes)
    (alone,) = execute(nodes["FastloraReport"], lora_a=ink)
    (both,) = execute(nodes["FastloraReport"], lora_a=ink, lora_b=toy)
    assert "cosine" not in alone and "cosine" in both and "subspace" in both and "1.000" in both


def test_what_is_wrong_is_told(nodes: dict[str, Any]) -> None:
    ink, _ = loaded(nodes)
    merge = nodes["FastloraMerge"]
    with pytest.raises(fl.InputError, match="a holds no adapter"):
        execute(merge, lora_a={"x": torch.ones(2)}, lora_b=ink)
    with pytest.raises(fl.InputError, match="a LORA_MODEL is needed"):
        execute(merge, lora_a=[1], lora_b=ink)
    with pytest.raises(fl.InputError, match=r"write name=value"):
        execute(merge, lora_a=ink, lora_b=ink, settings="density = 0.3")
    with pytest.raises(fl.InputError, match="does not take density"):
        execute(merge, lora_a=ink, lora_b=ink, settings="density=0.3")


def test_the_workflow_runs(nodes: dict[str, Any], folder: Path) -> None:
    results = comfy_stub.run_workflow(WORKFLOW, nodes)
    used = {node["type"] for node in json.loads(WORKFLOW.read_text())["nodes"]}
    assert used == {*nodes, "PreviewAny"} and len(results) == 10
    written = sorted(p.name for p in (folder / "output" / "loras").iterdir())
    assert written == ["merged_00001_.safetensors", "unique_of_ink_00001_.safetensors"]
