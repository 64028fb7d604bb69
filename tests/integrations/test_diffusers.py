"""LoRAs in tiny pipelines of diffusers: Flux, Stable Diffusion XL and 3, with their text encoders."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tolerances import FLOAT32
from torch import Tensor

import fastlora as fl

pipelines = pytest.importorskip("pipelines")  # diffusers and transformers
pytest.importorskip("peft")

from spelled_files import EACH, KOHYA, TRANSFORMER, UNET, Spelling, written  # noqa: E402

from fastlora.integrations import diffusers as bridge  # noqa: E402

DENOISERS = {"flux": "transformer", "sdxl": "unet", "sd3": "transformer"}
FAMILIES = pytest.mark.parametrize("family", DENOISERS)
ADAPTED = r"attn1?\.to_[qv]$|attn\.add_k_proj|ff\.net\.2|proj_mlp|conv1$|self_attn\.[qv]_proj"
"""Modules of the adapters: attentions, feed-forwards, convolutions, text encoders."""
METADATA = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules"}


@functools.cache
def _made(family: str) -> Any:
    torch.manual_seed(0)
    with warnings.catch_warnings(), pipelines.quiet():
        warnings.simplefilter("ignore")
        pipe = pipelines.MAKERS[family]()
    for model in pipelines.models(pipe).values():
        model.eval()
    return pipe


def file(family: str, folder: Path, seed: int, spelling: Spelling, ranks: tuple[int, ...], without: str) -> Path:
    """A LoRA with numbers of its own."""
    made = written(family, spelling, pipelines.shapes(family), EACH, ranks, only=ADAPTED, without=without)
    make = torch.Generator().manual_seed(seed)
    for key, tensor in made.tensors.items():
        if tensor.dim() > 1:
            made.tensors[key] = torch.randn(tensor.shape, generator=make) / 3
    folder.mkdir(parents=True)
    return made.save(folder)


@functools.cache
def _files(family: str, folder: Path) -> dict[str, Path]:
    plain = UNET if family == "sdxl" else TRANSFORMER
    return {
        "pixel": file(family, folder / "pixel", 1, plain, (4, 2), "$nothing"),
        "toy": file(family, folder / "toy", 2, plain, (3,), r"proj_mlp"),
        "plain": file(family, folder / "plain", 3, KOHYA if family == "sdxl" else plain, (2,), "text_encoder"),
    }


@contextlib.contextmanager
def silent() -> Iterator[None]:
    with warnings.catch_warnings(), pipelines.quiet():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="session")
def made_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("loras")


def loaded(family: str, folder: Path, *names: str) -> Any:
    """A pipeline of its own with LoRAs."""
    pipe = copy.deepcopy(_made(family))
    with silent():
        for name in names:
            path = _files(family, folder / family)[name]
            pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=name)
    return pipe


@pytest.fixture
def load(made_files: Path) -> Any:
    return lambda family, *names: loaded(family, made_files, *(names or ("pixel", "toy")))


def outputs(pipe: Any) -> dict[str, Tensor]:
    """What every component gives for fixed inputs."""
    make = torch.Generator().manual_seed(9)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make)

    found: dict[str, Tensor] = {}
    with torch.no_grad():
        for name in ("text_encoder", "text_encoder_2"):
            model = getattr(pipe, name, None)
            if model is not None:
                ids = torch.tensor([[0, 5, 9, 7, 1]])
                found[name] = model(ids).last_hidden_state
        kind = type(pipe).__name__
        if kind == "FluxPipeline":
            found["transformer"] = pipe.transformer(
                hidden_states=random(1, 6, 4), encoder_hidden_states=random(1, 3, 20), guidance=torch.ones(1),
                pooled_projections=random(1, 16), timestep=torch.tensor([0.5]), img_ids=torch.zeros(6, 3),
                txt_ids=torch.zeros(3, 3), return_dict=False,
            )[0]  # fmt: skip
        elif kind == "StableDiffusion3Pipeline":
            found["transformer"] = pipe.transformer(
                hidden_states=random(1, 4, 4, 4), encoder_hidden_states=random(1, 3, 20),
                pooled_projections=random(1, 40), timestep=torch.tensor([500]), return_dict=False,
            )[0]  # fmt: skip
        else:
            conditions = {"text_embeds": random(1, 20), "time_ids": random(1, 6)}
            found["unet"] = pipe.unet(
                random(1, 4, 4, 4), torch.tensor([500]), random(1, 3, 44), added_cond_kwargs=conditions
            ).sample
    return found


def gap(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    assert found.keys() == wanted.keys()
    return max(float((found[c] - wanted[c]).norm() / wanted[c].norm()) for c in wanted)


def everything(pipe: Any) -> dict[str, Any]:
    """What of a pipeline a failure must leave as it is: parameters, what is trained, scalings, what is active."""
    found: dict[str, Any] = {"adapters": pipe.get_list_adapters()}
    for component, model in pipelines.models(pipe).items():
        for path, parameter in model.named_parameters():
            found[f"{component}.{path}"] = parameter.detach().clone(), parameter.requires_grad
        for path, module in model.named_modules():
            if hasattr(module, "scaling"):
                found[f"{component}.{path}!"] = dict(module.scaling), list(module.active_adapters), module.training
    return found


def same(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    def alike(a: Any, b: Any) -> bool:
        return torch.equal(a[0], b[0]) and a[1] == b[1] if isinstance(a, tuple) and len(a) == 2 else bool(a == b)

    return found.keys() == wanted.keys() and all(alike(found[key], wanted[key]) for key in wanted)


def set_adapters(pipe: Any, weights: dict[str, Any]) -> dict[str, Tensor]:
    """The outputs under diffusers' own mix."""
    with silent():
        pipe.set_adapters(list(weights), list(weights.values()))
    return outputs(pipe)


@FAMILIES
def test_a_merge_gives_what_the_adapters_give_together(family: str, load: Any) -> None:
    pipe = load(family)
    denoiser = DENOISERS[family]
    for weights in ({"pixel": 0.7, "toy": -0.5}, {"pixel": 0.7, "toy": {denoiser: 0.4, "text_encoder": 1.5}}):
        wanted = set_adapters(pipe, weights)
        base = set_adapters(pipe, {"pixel": 0.0, "toy": 0.0})
        assert gap(wanted, base) > 0.01, "the adapters change something"
        bridge.merge_loaded(pipe, weights, method="cat")
        assert gap(outputs(pipe), wanted) < FLOAT32 and pipe.get_active_adapters() == ["merged"]
        with silent():
            pipe.delete_adapters("merged")


def test_weights_by_block_are_those_of_diffusers(load: Any) -> None:
    pipe = load("sdxl")
    weights = {"pixel": {"unet": {"down": 0.3, "mid": 2.0, "up": {"block_0": [0.1, 0.9, -1.0]}}}, "toy": 0.5}
    wanted = set_adapters(pipe, weights)
    before = everything(pipe)
    bridge.merge_loaded(pipe, weights, method="cat")
    assert gap(outputs(pipe), wanted) < FLOAT32
    with silent():
        pipe.delete_adapters("merged")
    pipe.set_adapters(list(weights), list(weights.values()))
    assert same(everything(pipe), before)
    flux = load("flux")
    blocks = {"pixel": {"transformer": {"transformer_blocks.0": 0.2}}, "toy": 1.0}
    with pytest.raises(fl.InputError, match="no adapted module is in 'up'"):
        bridge.merge_loaded(flux, {"toy": {"transformer": {"up": {"block_9": 1}}}}, method="cat")
    wanted = set_adapters(flux, blocks)
    bridge.merge_loaded(flux, blocks, method="cat")
    assert gap(outputs(flux), wanted) < FLOAT32


@FAMILIES
def test_the_saved_file_gives_the_same(family: str, load: Any, tmp_path: Path) -> None:
    pipe = load(family)
    bridge.merge_loaded(pipe, {"pixel": 0.7, "toy": 0.5}, "small", method="cat", delete=True)
    wanted = outputs(pipe)
    assert all(names == ["small"] for names in pipe.get_list_adapters().values())
    path = bridge.save_merged(pipe, "small", tmp_path / "out")
    with safe_open(path, "pt") as stored:
        fields = json.loads(stored.metadata()["lora_adapter_metadata"])
        assert {key.partition(".")[2] for key in fields} == METADATA and any(
            fields[k] for k in fields if "pattern" in k
        )
        assert not any(key.endswith(".alpha") for key in stored.keys())
    fresh = load(family, "plain")
    with silent():
        fresh.delete_adapters("plain")
        fresh.load_lora_weights(str(path.parent), adapter_name="again")
    assert gap(outputs(fresh), wanted) < FLOAT32
    with silent():
        there = [c for c in fresh._lora_loadable_modules if getattr(fresh, c, None) is not None]
        fresh.fuse_lora(components=there)
        fresh.unload_lora_weights()
    assert gap(outputs(fresh), wanted) < 10 * FLOAT32  # the sum is rounded to the weight's float32
    assert isinstance(fl.load(path), fl.Adapter)
    with pytest.raises(fl.OutputError, match="exists"):
        bridge.save_merged(pipe, "small", tmp_path / "out")
    bridge.save_merged(pipe, "small", tmp_path / "out", overwrite=True)


@FAMILIES
def test_unique_parts_and_what_is_shared_once(family: str, load: Any) -> None:
    pipe = load(family, "pixel", "toy", "plain")
    weights = {"pixel": 0.8, "plain": 1.2}
    found = bridge.mix_unique(pipe, weights, threshold=0.0, shared=0.5)
    denoiser = DENOISERS[family]
    assert list(found) == [denoiser], "the other components have one of the two"
    assert found[denoiser].report.shared_directions
    made = outputs(pipe)
    pool = fl.Pool([bridge_read(getattr(pipe, denoiser), name) for name in weights], align=False)
    parts = fl.decompose(pool, 0.0)
    mix = 0.8 * parts.unique_of("pixel") + 1.2 * parts.unique_of("plain") + 0.5 * parts.shared
    written_in = bridge_read(getattr(pipe, denoiser), "styles")
    for module in mix.modules:
        error = (written_in.delta(module) - mix.delta(module)).norm() / mix.delta(module).norm()
        assert float(error) < FLOAT32
    alone = set_adapters(pipe, {"pixel": 0.8})
    assert all(torch.allclose(made[c], alone[c], atol=1e-5) for c in made if c != denoiser)


def bridge_read(model: Any, name: str) -> fl.Adapter:
    from fastlora.integrations.peft import read

    adapter = read(model, name, "config")
    assert isinstance(adapter, fl.Adapter)
    return adapter


def test_where_nothing_is_shared_a_mix_is_the_sum(load: Any) -> None:
    pipe = load("flux")
    wanted = set_adapters(pipe, {"pixel": 0.8, "toy": 1.2})
    found = bridge.mix_unique(pipe, {"pixel": 0.8, "toy": 1.2}, "mix", threshold=0.999)
    assert not any(parts.report.shared_directions for parts in found.values())
    assert gap(outputs(pipe), wanted) < FLOAT32


def test_overlaps(load: Any) -> None:
    pipe = load("sdxl", "pixel", "toy", "plain")
    found = bridge.overlap(pipe)
    assert list(found) == ["unet", "text_encoder", "text_encoder_2"]
    assert found["unet"].names == ["pixel", "toy", "plain"] and found["text_encoder"].names == ["pixel", "toy"]
    pipe.set_adapters(["pixel"], [0.3])
    assert torch.equal(bridge.overlap(pipe)["unet"].cosine, found["unet"].cosine)
    with pytest.raises(fl.InputError, match="no adapter 'ink'"):
        bridge.overlap(pipe, ["pixel", "ink"])
    with pytest.raises(fl.InputError, match="has two of these"):
        bridge.overlap(pipe, ["pixel"])


FAILURES: dict[str, tuple[dict[str, Any], str]] = {
    "an adapter": ({"weights": {"pixel": 1.0, "ink": 1.0}}, "no adapter 'ink'; it has pixel, toy"),
    "a component": ({"weights": {"pixel": {"vae": 1.0}}}, "names 'vae', where that adapter has nothing"),
    "a weight": ({"weights": {"pixel": float("nan")}}, "must be a finite number"),
    "no weights": ({"weights": {}}, "give {adapter: weight}"),
    "a method": ({"weights": {"pixel": 1.0, "toy": 1.0}, "method": "mean_of_all"}, "does not exist"),
    "a parameter": ({"weights": {"pixel": 1.0, "toy": 1.0}, "density": 0.3}, "does not take density"),
    "a name": ({"weights": {"pixel": 1.0, "toy": 1.0}, "name": "toy"}, "has an adapter 'toy' already"),
    "a block": ({"weights": {"pixel": {"unet": {"up": {"block_7": 1}}}}}, "no adapted module is in 'up.block_7'"),
    "blocks": ({"weights": {"pixel": {"unet": {"up": {"block_0": [1, 2]}}}}}, "diffusers does not take"),
    "a method after blocks": (
        {"weights": {"pixel": {"unet": {"down": 0.7}, "text_encoder": 2.0}}, "method": "no"},
        "does not exist",
    ),
    "a dtype": ({"weights": {"pixel": 1.0, "toy": 1.0}, "dtype": "int8"}, "dtype"),
}


@pytest.fixture(scope="module")
def steady(made_files: Path) -> Any:
    """A pipeline that no test changes."""
    pipe = loaded("sdxl", made_files, "pixel", "toy")
    pipe.set_adapters(["toy", "pixel"], [0.3, 0.4])
    return pipe


@pytest.mark.parametrize("what", FAILURES)
def test_bad_calls_leave_the_pipeline_as_it_was(what: str, steady: Any) -> None:
    arguments, message = FAILURES[what]
    before = everything(steady)
    with silent(), pytest.raises(fl.InputError, match=message.replace("{", r"\{")):
        bridge.merge_loaded(steady, **arguments)
    assert same(everything(steady), before)


def test_a_failure_in_the_last_component_undoes_the_first(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = load("sdxl")
    pipe.set_adapters(["toy", "pixel"], [0.3, 0.4])
    before = everything(pipe)

    def broken(*_: Any) -> None:
        assert "merged" in pipe.unet.peft_config
        raise RuntimeError("no memory left")

    monkeypatch.setattr(type(pipe), "set_adapters", broken)
    with pytest.raises(fl.InputError, match="which is as it was: RuntimeError: no memory left"):
        bridge.merge_loaded(pipe, {"pixel": 1.0, "toy": 1.0})
    monkeypatch.undo()
    assert same(everything(pipe), before)
    bridge.merge_loaded(pipe, {"pixel": 1.0, "toy": 1.0})


def test_fused_loras_are_refused(load: Any) -> None:
    pipe = load("sdxl")
    with silent():
        pipe.fuse_lora(components=["unet"], adapter_names=["toy"])
    before = everything(pipe)
    with pytest.raises(fl.InputError, match=r"fused into unet .*pipe\.unfuse_lora\(\)"):
        bridge.merge_loaded(pipe, {"pixel": 1.0, "toy": 1.0})
    with pytest.raises(fl.InputError, match="fused into unet"):
        bridge.mix_unique(pipe, {"pixel": 1.0, "toy": 1.0})
    assert same(everything(pipe), before)


def test_what_is_no_pipeline_or_has_nothing_is_told(load: Any, tmp_path: Path) -> None:
    with pytest.raises(fl.InputError, match="a pipeline of diffusers that loads LoRAs is needed, not Linear"):
        bridge.merge_loaded(torch.nn.Linear(2, 2), {"a": 1.0})
    empty = copy.deepcopy(_made("flux"))
    with pytest.raises(fl.InputError, match="has no LoRAs; load some"):
        bridge.merge_loaded(empty, {"a": 1.0})
    with pytest.raises(fl.InputError, match="no adapter 'ink'; it has pixel, toy"):
        bridge.save_merged(load("flux"), "ink", tmp_path)
    with pytest.raises(fl.InputError, match="mode='pool'"):
        bridge.mix_unique(load("flux"), {"pixel": 1.0}, mode="pairs")


def test_the_code_of_the_page_runs(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text(encoding="utf-8")
    section = page.split("## diffusers\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", section, re.S)
    monkeypatch.chdir(tmp_path)
    pipe = load("flux")
    exec(compile(block, "docs/integrations.md", "exec"), {"pipe": pipe})
    assert pipe.get_active_adapters() == ["styles"] and (tmp_path / "out" / "styles").is_dir()
