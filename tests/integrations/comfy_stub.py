"""What of ComfyUI a node pack meets, for machines without it: schemas, node outputs, folders; how it loads a pack, and
how it runs a workflow."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@dataclass
class Socket:
    """An input or an output of a node."""

    id: str
    type: str
    options: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def is_widget(self) -> bool:
        return self.type in ("COMBO", "FLOAT", "INT", "STRING")

    def require(self, value: Any) -> None:
        """Fails for a value that the frontend would not take."""
        if self.type == "COMBO":
            assert value in self.options, (self.id, value)
        elif self.type in ("FLOAT", "INT"):
            assert isinstance(value, int if self.type == "INT" else int | float), (self.id, value)
            assert self.facts["min"] <= value <= self.facts["max"], (self.id, value)
        else:
            assert isinstance(value, str), (self.id, value)


class Kind:
    """A type of values: ``Input(id, …)`` and ``Output(…)``."""

    def __init__(self, type: str) -> None:
        self.type = type

    def Input(self, id: str, *, options: list[str] | None = None, **facts: Any) -> Socket:
        known = {"optional", "default", "min", "max", "step", "tooltip", "multiline"}
        assert facts.keys() <= known and (options is not None) == (self.type == "COMBO"), (id, facts)
        return Socket(id, self.type, options or [], facts)

    def Output(self, id: str | None = None, *, display_name: str = "") -> Socket:
        return Socket(id or display_name, self.type)


@dataclass
class Schema:
    node_id: str
    display_name: str
    category: str
    inputs: list[Socket]
    outputs: list[Socket]
    description: str = ""
    is_output_node: bool = False


class NodeOutput:
    def __init__(self, *values: Any) -> None:
        self.result = values


class ComfyNode:
    """Nodes are classes: ComfyUI never keeps an object of one."""

    def __init__(self) -> None:
        raise AssertionError("nodes are not made")


class ComfyExtension:
    async def on_load(self) -> None:
        pass


def install(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Lets the pack import ComfyUI, whose LoRAs and outputs are in a folder, until the test ends."""
    patch.delitem(sys.modules, "fastlora.integrations.comfy.nodes", raising=False)  # has that of another test
    io = ModuleType("io")
    io.__dict__.update(Custom=Kind, Schema=Schema, ComfyNode=ComfyNode, NodeOutput=NodeOutput)
    io.__dict__.update({n: Kind(n.upper()) for n in ("Combo", "Float", "Int", "String")})
    latest = ModuleType("comfy_api.latest")
    latest.__dict__.update(io=io, ComfyExtension=ComfyExtension)
    paths = ModuleType("folder_paths")

    def place(prefix: str, output: str) -> tuple[str, str, int, str, str]:
        inside = Path(output) / Path(prefix).parent
        inside.mkdir(parents=True, exist_ok=True)
        count = 1 + len(list(inside.glob(f"{Path(prefix).name}_*")))
        return str(inside), Path(prefix).name, count, "", prefix

    paths.__dict__.update(
        get_filename_list=lambda kind: sorted(p.name for p in (folder / kind).iterdir()),
        get_full_path_or_raise=lambda kind, name: str(folder / kind / name),
        get_output_directory=lambda: str(folder / "output"),
        get_save_image_path=place,
    )
    for name, module in (("comfy_api", ModuleType("comfy_api")), ("comfy_api.latest", latest), ("folder_paths", paths)):
        patch.setitem(sys.modules, name, module)


def load_pack(folder: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """``{node id: class}``, loaded as ComfyUI loads a pack: by its path, under a name that is none."""
    name = str(folder).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    patch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    assert not hasattr(module, "NODE_CLASS_MAPPINGS"), "ComfyUI would look at these alone"

    async def nodes() -> list[Any]:
        extension = await module.comfy_entrypoint()
        await extension.on_load()
        return list(await extension.get_node_list())

    return {node.define_schema().node_id: node for node in asyncio.run(nodes())}


def execute(node: Any, **inputs: Any) -> tuple[Any, ...]:
    """Runs a node on inputs that its schema takes; what it gives fits its outputs."""
    schema = node.define_schema()
    sockets = {socket.id: socket for socket in schema.inputs}
    assert inputs.keys() <= sockets.keys(), (schema.node_id, set(inputs) - set(sockets))
    for name, socket in sockets.items():
        if socket.is_widget and name in inputs:
            socket.require(inputs[name])
    result: tuple[Any, ...] = node.execute(**inputs).result
    assert len(result) == len(schema.outputs)
    assert all(isinstance(v, str) == (s.type == "STRING") for v, s in zip(result, schema.outputs, strict=True))
    return result


def arguments(node: Any) -> set[str]:
    """The names of the arguments of a node's ``execute``."""
    return set(inspect.signature(node.execute).parameters)


def run_workflow(file: Path, nodes: Mapping[str, Any]) -> dict[int, tuple[Any, ...]]:
    """Runs a workflow as the frontend saves it, ``{id of a node: its outputs}``; fails where nodes do not fit it."""
    workflow = json.loads(file.read_text(encoding="utf-8"))
    links = {number: link for number, *link in workflow["links"]}
    results: dict[int, tuple[Any, ...]] = {}
    for node in sorted(workflow["nodes"], key=lambda n: n["order"]):
        if node["type"] == "PreviewAny":  # of ComfyUI itself
            continue
        schema = nodes[node["type"]].define_schema()
        widgets = [s for s in schema.inputs if s.is_widget]
        wired = [s for s in schema.inputs if not s.is_widget]
        assert [(i["name"], i["type"]) for i in node["inputs"]] == [(s.id, s.type) for s in wired]
        assert [(o["name"], o["type"]) for o in node["outputs"]] == [(s.id, s.type) for s in schema.outputs]
        inputs = dict(zip((s.id for s in widgets), node["widgets_values"], strict=True))
        for at, socket in enumerate(node["inputs"]):
            if socket["link"] is None:
                assert wired[at].facts.get("optional"), (node["type"], socket["name"])
                continue
            source, slot, target, place, kind = links[socket["link"]]
            assert (target, place, kind) == (node["id"], at, socket["type"])
            inputs[socket["name"]] = results[source][slot]
        results[node["id"]] = execute(nodes[node["type"]], **inputs)
    return results
