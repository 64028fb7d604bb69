"""Expressions as model names of vLLM: on a stand-in for its classes, and on its own where they can be imported."""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm_stub
from builders import MODULES, make_adapter
from safetensors.torch import load_file, save_file
from tolerances import FLOAT32
from torch import Tensor

import fastlora as fl
from fastlora.integrations import vllm as bridge
from fastlora.integrations.serving import composer
from fastlora.integrations.serving.settings import Settings

BASE = "made-up/model"
LEAVES = {module.rpartition(".")[2] for module in MODULES}
SUM = "0.7*legal + 0.3*med"
UNIQUE = "legal - 0.5*unique(med | legal)"
MAX_RANK = 8


def plainly_loaded(request: Any) -> dict[str, Tensor]:
    """``{module: ΔW}`` by what a server must be told: one scaling for all, ranks within its bound."""
    path = Path(request.lora_path)
    config = json.loads((path / "adapter_config.json").read_text())
    stored = load_file(path / "adapter_model.safetensors")
    assert config["base_model_name_or_path"] == BASE and not config["modules_to_save"]
    assert max([config["r"], *config["rank_pattern"].values()]) <= MAX_RANK
    deltas = {}
    for module in {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in stored}:
        B, A = (stored[f"base_model.model.{module}.lora_{side}.weight"].double() for side in "BA")
        rank = config["rank_pattern"].get(f"^{module.replace('.', chr(92) + '.')}", config["r"])
        assert B.shape[1] == rank or config["rank_pattern"]
        deltas[module] = B @ A
    return deltas


def loaded_by_vllm(request: Any) -> dict[str, Tensor]:
    """``{module: ΔW}`` by vLLM's own checks and loader."""
    helper = importlib.import_module("vllm.lora.peft_helper").PEFTHelper.from_local_dir(request.lora_path, None)
    helper.validate_legal(SimpleNamespace(max_lora_rank=MAX_RANK))
    model = importlib.import_module("vllm.lora.lora_model").LoRAModel.from_local_checkpoint(
        request.lora_path, LEAVES, helper, lora_model_id=request.lora_int_id, device="cpu", dtype=torch.float32
    )
    scaled = {module: (lora.scaling, lora.lora_b, lora.lora_a) for module, lora in model.loras.items()}
    return {module: s * (b.double() @ a.double()) for module, (s, b, a) in scaled.items()}


class Setup:
    """A folder of adapters and the environment of a server."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, load: Any) -> None:
        self.folder, self.patch, self.load = folder, patch, load
        make_adapter(folder / "legal", rank=4, seed=1)
        make_adapter(folder / "med", rank=3, seed=2, alpha=5, use_rslora=True)
        make_adapter(folder / "law-2", rank={m: 2 + i for i, m in enumerate(MODULES)}, seed=3)
        make_adapter(folder / "other", rank=2, seed=4, base_model_name_or_path="another/model")
        self.set(ADAPTERS=str(folder), MAX_RANK=str(MAX_RANK))

    def set(self, **values: str) -> None:
        for name, value in values.items():
            self.patch.setenv(f"FASTLORA_VLLM_{name}", value)

    def server(self) -> vllm_stub.Server:
        registry = importlib.import_module("vllm.lora.resolver").LoRAResolverRegistry
        registry.resolvers.clear()
        bridge.register()
        bridge.register()  # as vLLM does in some processes
        return vllm_stub.Server(registry, BASE, self.load)

    @property
    def results(self) -> list[str]:
        composed = self.folder / ".composed"
        return sorted(p.name for p in composed.iterdir() if p.name[0] != ".") if composed.exists() else []


@pytest.fixture(params=["stand-in", "vLLM"])
def setup(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setup:
    if request.param == "vLLM":
        try:
            loader = importlib.import_module("vllm.lora.lora_model")
            importlib.import_module("vllm.lora.resolver")
        except Exception as reason:  # it needs much else
            pytest.skip(f"vLLM's LoRA classes cannot be imported: {reason}")
        monkeypatch.setattr(loader, "PIN_MEMORY", False)  # there may be no device to pin it for
        return Setup(tmp_path, monkeypatch, loaded_by_vllm)
    vllm_stub.install(monkeypatch)
    return Setup(tmp_path, monkeypatch, plainly_loaded)


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setup:
    vllm_stub.install(monkeypatch)
    return Setup(tmp_path, monkeypatch, plainly_loaded)


def gap(found: dict[str, Tensor], wanted: fl.Adapter) -> float:
    """The largest error over the largest element."""
    assert set(found) == set(wanted.modules)
    exact = {m: wanted.delta(m).double() for m in wanted.modules}
    return max(float((found[m] - exact[m]).abs().max() / exact[m].abs().max()) for m in exact)


def test_expressions_are_served(setup: Setup) -> None:
    server = setup.server()
    spelled = "0.70 *legal+.3* med"  # another name for the server, the same result for us
    quoted = "legal - 'law-2'"
    assert server.ask(SUM, UNIQUE, spelled, quoted) == [200] * 4
    legal, med, law = (fl.load(setup.folder / name) for name in ("legal", "med", "law-2"))
    assert gap(server.loaded[SUM], 0.7 * legal + 0.3 * med) < FLOAT32
    assert gap(server.loaded[quoted], (legal - law).compress(MAX_RANK)) < FLOAT32
    exact = fl.compose(UNIQUE, {"legal": legal, "med": med})
    assert isinstance(exact, fl.Adapter) and gap(server.loaded[UNIQUE], exact) < FLOAT32
    assert server.known[SUM].lora_path == server.known[spelled].lora_path and len(setup.results) == 3
    assert sorted(r.lora_int_id for r in server.known.values()) == [1, 2, 3, 4]


def test_the_api_server_of_vllm_finds_expressions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own look-up of models, over an engine that loads nothing."""
    try:
        serving = importlib.import_module("vllm.entrypoints.openai.models.serving")
    except Exception as reason:  # it needs much else
        pytest.skip(f"vLLM's API server cannot be imported: {reason}")
    setup = Setup(tmp_path, monkeypatch, loaded_by_vllm)
    setup.server()  # registers
    loaded: list[Any] = []

    async def add_lora(request: Any) -> bool:
        loaded.append(request)
        return True

    model = SimpleNamespace(model=BASE, max_model_len=16)
    engine = SimpleNamespace(model_config=model, add_lora=add_lora, renderer=None, input_processor=None)
    names = [SUM, UNIQUE, SUM, "0.7*legal + 0.3*nobody", "legal"]

    async def ask() -> list[Any]:
        models = serving.OpenAIServingModels(engine, [SimpleNamespace(name="served", model_path=BASE)])
        return [await models.resolve_lora(name) for name in names]

    first, second, again, *refused = asyncio.run(ask())
    assert [r.lora_name for r in loaded] == [SUM, UNIQUE] and first is again and second is loaded[1]
    assert [r.error.code for r in refused] == [404, 404]


def test_ranks_above_the_bound_are_cut_and_told(setup: Setup, caplog: pytest.LogCaptureFixture) -> None:
    make_adapter(setup.folder / "wide", rank=7, seed=8)
    server = setup.server()
    with caplog.at_level(logging.WARNING, "fastlora"):
        assert server.ask("legal + wide") == [200]
    assert "rank 11 is cut to 8 (MAX_RANK), which keeps " in caplog.text
    exact = fl.load(setup.folder / "legal") + fl.load(setup.folder / "wide")
    assert gap(server.loaded["legal + wide"], exact.compress(MAX_RANK)) < FLOAT32


def test_nothing_is_an_adapter_too(setup: Setup) -> None:
    """What cancels out is served, and is the base model."""
    server = setup.server()
    assert server.ask("legal - legal") == [200]
    assert all(not delta.any() for delta in server.loaded["legal - legal"].values())


REFUSED = {
    "0.7*legal + 0.3*nobody": "no adapter is called 'nobody'",
    "0.7*legal + ": "ends too early",
    "0.5*other": "names the base model 'another/model'",
    "0.5*'../legal'": "no adapter is called '../legal'",
    "0.5*'/etc/passwd'": "no adapter is called",
    "0.5*'.composed'": "no adapter is called",
    "1*" + "(" * 300 + "legal": "more than 100 parentheses",
    "1 + 2": "this is a number",
    "no such(legal)": "expected",
    "org/name": "no adapter is called 'org'",
    "\ud800*legal": "expected",
    "+".join(f"'a{i}'" for i in range(17)): "more than 16",
}


@pytest.mark.parametrize("name", REFUSED, ids=lambda name: ascii(name[:12]))
def test_what_cannot_be_composed_is_refused_and_told(
    stub: Setup, name: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    server = stub.server()
    with caplog.at_level(logging.WARNING, "fastlora"):
        assert server.ask(name) == [404]
    assert [r.levelname for r in caplog.records] == ["WARNING"] and REFUSED[name] in caplog.text
    assert "\n" not in caplog.records[0].getMessage() and not stub.results
    assert server.ask(SUM) == [200]


@pytest.mark.parametrize("name", ["legal", "law-2", "nobody", "", "a" * 401, "+".join(["legal"] * 90)])
def test_names_that_are_none_of_ours_are_left_to_others(
    stub: Setup, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "fastlora"):
        assert stub.server().ask(name) == [404]
    assert not caplog.records


def test_nothing_is_raised_whatever_happens(stub: Setup, caplog: pytest.LogCaptureFixture) -> None:
    server = stub.server()

    def broken(*_: Any) -> None:
        raise RuntimeError("a bug")

    server.resolvers[0].composer._look_up = broken
    assert server.ask(SUM) == [404] and "a bug" in caplog.text


def test_a_damaged_adapter_is_refused_and_its_repair_is_served(stub: Setup) -> None:
    file = stub.folder / "med" / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    server = stub.server()
    assert server.ask(SUM) == [404] and not stub.results
    file.write_bytes(whole)
    assert server.ask(SUM) == [200] and len(stub.results) == 1
    assert not list((stub.folder / ".composed" / ".unfinished").iterdir())


def test_with_a_cache_in_memory_the_next_file_is_there_before(
    stub: Setup, memory_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(composer, "REST", 0.0)
    take, taken = composer.Spare.take, list[int | None]()

    def noted(*args: Any) -> int | None:
        taken.append(take(*args))
        return taken[-1]

    monkeypatch.setattr(composer.Spare, "take", noted)
    settings = Settings(stub.folder, memory_folder / "cache", max_rank=MAX_RANK)

    async def ask(*names: str) -> list[Path | None]:
        answers, ours = [], composer.Composer(settings)
        for name in names:
            answers.append(await ours.answer(BASE, name))
            await asyncio.sleep(0.01)
            await asyncio.get_running_loop().run_in_executor(ours._worker, lambda: None)
        return answers

    first, second = asyncio.run(ask(SUM, "0.5*legal + 0.3*med"))
    assert first is not None and second is not None
    assert taken[0] is None and taken[1] is not None
    legal, med = (fl.load(stub.folder / name) for name in ("legal", "med"))
    exact = 0.5 * legal + 0.3 * med
    for module in exact.modules:
        assert torch.allclose(fl.load(second).delta(module), exact.delta(module), rtol=0, atol=1e-6)


def test_an_adapter_that_changed_is_composed_anew(stub: Setup) -> None:
    first = stub.server()
    first.ask(SUM)
    make_adapter(stub.folder / "med", rank=3, seed=9, alpha=5, use_rslora=True)  # the same sizes
    second = stub.server()  # the first server keeps what it loaded, by its name
    second.ask(SUM)
    assert len(stub.results) == 2 and first.known[SUM].lora_path != second.known[SUM].lora_path
    wanted = 0.7 * fl.load(stub.folder / "legal") + 0.3 * fl.load(stub.folder / "med")
    assert gap(second.loaded[SUM], wanted) < FLOAT32


def test_a_server_that_keeps_adapters_open_sees_that_they_changed(stub: Setup) -> None:
    server = stub.server()
    server.ask(SUM)
    make_adapter(stub.folder / "med", rank=3, seed=9, alpha=5, use_rslora=True)
    assert server.ask("0.5*legal + 0.25*med") == [200]
    wanted = 0.5 * fl.load(stub.folder / "legal") + 0.25 * fl.load(stub.folder / "med")
    assert gap(server.loaded["0.5*legal + 0.25*med"], wanted) < FLOAT32
    loaded = server.resolvers[0].composer._loaded
    assert {path.name for path in loaded} == {"legal", "med"}


def test_numbers_that_are_none_are_refused_each_time(stub: Setup, caplog: pytest.LogCaptureFixture) -> None:
    file = stub.folder / "med" / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, file)
    server = stub.server()
    assert server.ask(SUM) + server.ask(SUM) == [404, 404] and not stub.results
    assert caplog.text.count("holds NaN or Inf") == 2 and "'med'" in caplog.text


def test_few_adapters_are_kept_open(stub: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(composer, "MOST_LOADED", 1)
    server = stub.server()
    assert server.ask("legal + med") + server.ask("2*legal") == [200, 200]
    assert [path.name for path in server.resolvers[0].composer._loaded] == ["legal"]


def test_names_are_bounded(stub: Setup, caplog: pytest.LogCaptureFixture) -> None:
    stub.set(MAX_NAMES="2")
    server = stub.server()
    assert server.ask("1*legal") + server.ask("2*legal") + server.ask("3*legal") == [200, 200, 404]
    assert "2 names have been answered" in caplog.text
    del server.known["1*legal"]  # unloaded by its operator, and asked for again
    assert server.ask("1*legal") == [200]


def test_other_base_models_are_served_where_that_is_allowed(stub: Setup) -> None:
    stub.load = dict
    stub.set(ANY_BASE="1")
    server = stub.server()
    server.load = lambda request: json.loads((Path(request.lora_path) / "adapter_config.json").read_text())
    assert server.ask("2*other") == [200]
    assert server.loaded["2*other"]["base_model_name_or_path"] == "another/model"


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        ("ADAPTERS", "/no/such/folder", "there is no folder /no/such/folder"),
        ("MAX_RANK", "12", "the server takes 1, 8, 16"),
        ("MAX_RANK", "x", "a whole number"),
        ("CACHE_SIZE", "much", "a size such as 20GiB"),
        ("ANY_BASE", "maybe", "set it to 1 or 0"),
    ],
)
def test_wrong_settings_are_told_and_stop_no_server(
    stub: Setup, variable: str, value: str, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    stub.set(**{variable: value})
    assert not stub.server().resolvers
    assert f"FASTLORA_VLLM_{variable}" in caplog.text and told in caplog.text


def test_without_a_folder_nothing_is_registered(stub: Setup) -> None:
    stub.patch.delenv("FASTLORA_VLLM_ADAPTERS")
    assert not stub.server().resolvers


def test_the_page_names_the_settings(stub: Setup) -> None:
    """The defaults of the page are those of the code."""
    page = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| `FASTLORA_VLLM_(\w+)` \|.* \| (\S*) ?.*\|$", page, re.M)
    assert [n for n, _ in named] == ["ADAPTERS", "MAX_RANK", "CACHE", "CACHE_SIZE", "MAX_NAMES", "ANY_BASE"]
    given = {f"FASTLORA_VLLM_{name}": default for name, default in named[3:]} | {
        "FASTLORA_VLLM_ADAPTERS": str(stub.folder),
        "FASTLORA_VLLM_MAX_RANK": named[1][1],
    }
    told = Settings.read(given, "FASTLORA_VLLM_")
    assert (
        told
        == Settings(stub.folder, stub.folder / ".composed")
        == Settings.read({"FASTLORA_VLLM_ADAPTERS": str(stub.folder)}, "FASTLORA_VLLM_")
    )
