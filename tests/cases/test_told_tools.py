"""Folders and files of other tools say what they are; an adapter in several files is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from builders import gaussian, make_adapter, peft_tensors, write_peft
from command import done, refused
from safetensors.torch import load_file, save_file
from told import SMALL
from tolerances import FLOAT32

import fastlora as fl
from fastlora.formats.peft.kinds import UNMERGEABLE

DOWN, UP = gaussian(2, 6, seed=1), gaussian(5, 2, seed=2)
FOREIGN: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "mlx": ({"model.q_proj.lora_a": DOWN.mT, "model.q_proj.lora_b": UP.mT}, "a LoRA of MLX"),
    "other model": (
        {"stages.0.to_q.lora_down.weight": DOWN, "stages.0.to_q.lora_up.weight": UP},
        "a LoRA of a model that is not known here",
    ),
    "other model, loha": ({"stages.0.q.hada_w1_a": UP, "stages.0.q.alpha": torch.tensor(1.0)}, "a LyCORIS adapter of"),
    "loralib": ({"layers.0.q.lora_A": DOWN, "layers.0.q.lora_B": UP}, "loralib or LitGPT"),
    "adapterhub": ({"encoder.layer.0.output.adapters.mine.adapter_down.0.weight": DOWN}, "an adapter of AdapterHub"),
    "llama adapter": ({"llama.adapter_query.weight": DOWN}, "a LLaMA-Adapter"),
    "textual inversion": ({"<cat>": DOWN}, "embeddings of textual inversion"),
    "no config": (peft_tensors({"q": (UP, DOWN)}), "the tensors of a PEFT adapter"),
    "no config, named": ({"base_model.model.q.lora_A.default.weight": DOWN}, "the tensors of a PEFT adapter"),
}


@pytest.mark.parametrize("tool", FOREIGN)
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_files_of_other_tools_say_what_they_are(tool: str, suffix: str, tmp_path: Path) -> None:
    tensors, what = FOREIGN[tool]
    (tmp_path / "lora").mkdir()
    file = tmp_path / "lora" / f"style.{suffix}"
    if suffix == "bin":
        torch.save(tensors, file)
    else:
        save_file({k: t.contiguous() for k, t in tensors.items()}, file)
    for path in ("lora", f"lora/style.{suffix}"):
        message = refused("inspect", path, cwd=tmp_path)
        assert what in message and ("from_tensors" in message or "no way" in message or "copy it beside" in message)
        with pytest.raises(fl.UnsupportedAdapter, match=r"which is not read|has no adapter_config"):
            fl.load(tmp_path / path)
    assert what in refused("merge", "lora", "lora/style.bin" if suffix == "bin" else "lora", "-o", "x", cwd=tmp_path)


@pytest.mark.parametrize("tool", ["other model", "mlx", "loralib"])
def test_the_way_out_of_other_tools_works(tool: str, tmp_path: Path) -> None:
    """What the message says, run as Python: the same ΔW as the tool's own definition."""
    tensors, _ = FOREIGN[tool]
    save_file({k: t.contiguous() for k, t in tensors.items()}, tmp_path / "style.safetensors")
    message = refused("inspect", "style.safetensors", cwd=tmp_path)
    text = message.partition("{module: ")[2].partition(", …}")[0]
    key = next(iter(tensors)).rpartition(".lora_")[0]
    factors = eval(text, {"tensors": tensors, "key": key, "alpha": 1.0, "rank": 2, "scale": 0.5})
    adapter = fl.Adapter.from_tensors({"layers.0.q": factors}, name="converted")
    torch.testing.assert_close(adapter.delta("layers.0.q"), 0.5 * UP @ DOWN, rtol=0, atol=FLOAT32)
    assert fl.load(adapter.save(tmp_path / "peft")).modules == ["layers.0.q"]


def test_links_to_nowhere_inside_an_adapter(tmp_path: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        folder = make_adapter(tmp_path / name.partition(".")[0], SMALL)
        (folder / name).unlink()
        (folder / name).symlink_to("../blobs/gone")
        message = refused("inspect", folder.name, cwd=tmp_path)
        assert f"{name} is a link to ../blobs/gone, which does not exist" in message
    (tmp_path / "linked").symlink_to(make_adapter(tmp_path / "there", SMALL))
    done("compress", "linked", "--rank", "2", "-o", "out", cwd=tmp_path)


def test_a_task_vector_of_wrapped_models_is_a_task_vector(tmp_path: Path) -> None:
    """Its parameters may be called like those of an adapter."""
    states = [{f"blocks.{n}.diff": gaussian(2, 3, seed=i) for n in "ab"} for i in range(2)]
    vector = fl.task_vector(*states, "v")
    assert set(fl.load(vector.save(tmp_path / "v.safetensors")).deltas) == set(states[0])


def test_configurations_of_other_tools(tmp_path: Path) -> None:
    mlx = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": {"rank": 2, "scale": 20.0}}
    hub = {"config": {"architecture": "lora"}, "model_class": "BertAdapterModel", "model_type": "bert", "name": "x"}
    for fields, what in ((mlx, "a LoRA of MLX"), (hub, "an adapter of AdapterHub")):
        folder = tmp_path / what.rpartition(" ")[2]
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(fields))
        assert what in refused("inspect", folder.name, cwd=tmp_path)
    save_file({"x": UP}, tmp_path / "AdapterHub" / "adapters.safetensors")
    assert what in refused("inspect", "AdapterHub", cwd=tmp_path)
    (tmp_path / "lora.gguf").write_bytes(b"GGUF" + b"\0" * 20 + b"general.type" + b"\0" * 12 + b"adapter")
    assert "llama.cpp" in refused("inspect", "lora.gguf", cwd=tmp_path)
    (tmp_path / "run" / "global_step5").mkdir(parents=True)
    assert "DeepSpeed" in refused("inspect", "run", cwd=tmp_path)


def test_a_folder_says_which_folders_in_it_are_adapters(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        make_adapter(tmp_path / "run" / f"checkpoint-{step}", SMALL)
    with pytest.raises(fl.InputError, match=r"3 adapters \(checkpoint-9, checkpoint-10, checkpoint-100\).*-100$"):
        fl.load(tmp_path / "run")
    make_adapter(tmp_path / "deep" / "a" / "checkpoint-9", SMALL)
    assert "1 adapters (a/checkpoint-9)" in refused("compress", "deep", "--rank", "2", "-o", "x", cwd=tmp_path)


def split(folder: Path, suffix: str, index: bool) -> None:
    """Puts the tensors of an adapter into two files, as transformers does."""
    whole = folder / "adapter_model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    names = [f"adapter_model-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    places = {key: names[i % 2] for i, key in enumerate(sorted(tensors))}
    for name in names:
        part = {key: tensors[key] for key in tensors if places[key] == name}
        torch.save(part, folder / name) if suffix == "bin" else save_file(part, folder / name)
    if index:
        (folder / f"adapter_model.{suffix}.index.json").write_text(json.dumps({"weight_map": places}))


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("index", [True, False])
def test_adapters_in_several_files(suffix: str, index: bool, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "x", SMALL)
    expected = {m: fl.load(folder).delta(m) for m in SMALL}
    split(folder, suffix, index)
    adapter = fl.load(folder)
    assert adapter.notes == () and all(torch.equal(adapter.delta(m), d) for m, d in expected.items())
    (folder / f"adapter_model-00002-of-00002.{suffix}").unlink()
    assert "adapter_model-0000" in refused("inspect", "x", cwd=tmp_path)


def test_several_files_that_do_not_belong_together(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "x", SMALL)
    split(folder, "safetensors", True)
    index = folder / "adapter_model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {k: v for i, (k, v) in enumerate(places.items()) if i}}))
    assert "do not belong together" in refused("inspect", "x", cwd=tmp_path)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(places, "../../etc/passwd")}))
    assert "names the file" in refused("inspect", "x", cwd=tmp_path)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("PROMPT_TUNING", "peft cannot merge it"),
        ("P_TUNING", "peft cannot merge it"),
        ("PREFIX_TUNING", "peft cannot merge it"),
        ("ADAPTION_PROMPT", "peft cannot merge it"),
        ("XLORA", "load those adapters"),
        ("POLY", "peft cannot merge it"),
        ("LOHA", "merge_and_unload"),
        ("VERA", "merge_and_unload"),
        ("NEW_KIND", "merge_and_unload"),
    ],
)
def test_other_kinds_of_peft_say_a_way_out_that_exists(kind: str, words: str, tmp_path: Path) -> None:
    write_peft(tmp_path / "x", {"prompt_embeddings": DOWN}, {"peft_type": kind})
    message = refused("inspect", "x", cwd=tmp_path)
    assert words in message and ("merge_and_unload" in message) == (words == "merge_and_unload")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("alora_invocation_tokens", [1, 2], "peft cannot merge it"),
        ("arrow_config", {"top_k": 2}, "load the LoRA adapters that it mixes"),
        ("use_qalora", True, "peft cannot merge it"),
        ("trainable_token_indices", [1], "fastlora extract BASE MERGED"),
    ],
)
def test_variants_of_lora_say_a_way_out_that_exists(field: str, value: object, words: str, tmp_path: Path) -> None:
    make_adapter(tmp_path / "x", SMALL, **{field: value})
    assert words in refused("inspect", "x", cwd=tmp_path)


def test_peft_has_the_ways_out() -> None:
    """Every type of the installed PEFT: those without a merged form are in the table."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    for kind, config in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items():
        tuner = peft.PEFT_TYPE_TO_TUNER_MAPPING.get(kind)
        if issubclass(config, peft.PromptLearningConfig) or not hasattr(tuner, "merge_and_unload"):
            assert str(kind.value) in UNMERGEABLE, kind
    assert callable(peft.save_as_lora)
    base = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with pytest.raises(NotImplementedError):
        peft.get_peft_model(base, peft.PolyConfig(r=2, target_modules=["0"])).merge_and_unload()
