"""The hook for SGLang, on a stand-in for what it meets; SGLang itself was never run with it."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from builders import MODULES, make_adapter
from safetensors.torch import load_file

from fastlora.integrations import sglang as bridge


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What was registered, ``{target: hook}``."""
    registered: dict[str, Any] = {}
    registry = SimpleNamespace(register=lambda target, hook, kind: registered.update({target: hook}))
    contents: dict[str, dict[str, Any]] = {
        "sglang.srt.lora.lora_registry": {"LoRARef": SimpleNamespace},
        "sglang.srt.plugins.hook_registry": {"HookRegistry": registry, "HookType": SimpleNamespace(AROUND="around")},
    }
    for name in ("sglang", "sglang.srt", "sglang.srt.lora", "sglang.srt.plugins", *contents):
        module = ModuleType(name)
        module.__dict__.update(contents.get(name, {}))
        monkeypatch.setitem(sys.modules, name, module)
    return registered


def test_expressions_are_found_where_adapters_are_looked_up(
    hooks: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_adapter(tmp_path / "legal", rank={m: 2 + i for i, m in enumerate(MODULES)}, seed=1)
    make_adapter(tmp_path / "med", rank=3, seed=2)
    monkeypatch.setenv("FASTLORA_SGLANG_ADAPTERS", str(tmp_path))
    bridge.register()
    manager = SimpleNamespace(lora_ref_cache={}, server_args=SimpleNamespace(model_path="made-up/model"))

    async def original(self: Any, request: Any) -> str:
        assert self is manager
        return "looked up"

    async def ask(*names: Any) -> Any:
        return await hooks[bridge.TARGET](original, manager, SimpleNamespace(lora_path=names))

    asked = ["0.7*legal + 0.3*med", None, "legal", "0.5*nobody"]
    assert asyncio.run(ask(*asked)) == "looked up"
    (name,) = manager.lora_ref_cache
    reference = manager.lora_ref_cache[name]
    assert name == reference.lora_name == asked[0]
    rank = json.loads((Path(reference.lora_path) / "adapter_config.json").read_text())["r"]
    tensors = load_file(Path(reference.lora_path) / "adapter_model.safetensors")
    assert {t.shape[0] for key, t in tensors.items() if ".lora_A." in key} == {rank} == {8}
    assert asyncio.run(ask(*asked)) == "looked up" and manager.lora_ref_cache[name] is reference


def test_without_a_folder_nothing_is_registered(
    hooks: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        bridge.register()
        assert not hooks and not caplog.records
        monkeypatch.setenv("FASTLORA_SGLANG_ADAPTERS", "/no/such/folder")
        bridge.register()
    assert not hooks and "there is no folder" in caplog.text
