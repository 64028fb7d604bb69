"""Layers and kinds of modules, as their paths say."""

from __future__ import annotations

import pytest

from fastlora.pages.places import ELSEWHERE, places, without_beginning

Q, UP = "self_attn.q_proj", "mlp.up_proj"
LLAMA = [f"model.layers.{i}.{kind}" for i in (0, 2, 10) for kind in (Q, UP)]
EXPERTS = [f"model.layers.{i}.mlp.experts.{e}.up_proj" for i in range(2) for e in range(3)]
UNET = ["down.0.blocks.1.attn.to_out.0", "down.1.blocks.0.attn.to_out.0", "down.1.blocks.1.attn.to_out.0"]
PAIRS = {
    "a language model": (LLAMA, ["model.layers.0", "model.layers.2", "model.layers.10"], {Q, UP}),
    "experts": (EXPERTS, ["model.layers.0", "model.layers.1"], {"up_proj"}),
    "numbers that tell nothing apart": (UNET, ["down.0", "down.1"], {"attn.to_out.0"}),
    "one layer": (["layers.0.q", "layers.0.v"], ["layers.0"], {"q", "v"}),
    "outside of layers": (["head", "layers.3.q"], ["layers.3", ELSEWHERE], {"head", "q"}),
    "a number at the end": (["blocks.0", "blocks.1"], ["blocks.0", "blocks.1"], {"blocks"}),
}  # fmt: skip


@pytest.mark.parametrize("modules, layers, kinds", PAIRS.values(), ids=PAIRS)
def test_layers_and_kinds(modules: list[str], layers: list[str], kinds: set[str]) -> None:
    found = places(modules)
    assert found.layers == layers and set(found.kinds) == kinds
    assert len(found.layer) == len(found.kind) == len(modules)
    for module, layer, kind in zip(modules, found.layer, found.kind, strict=True):
        beginning = found.layers[layer]
        assert beginning == ELSEWHERE or module == beginning or module.startswith(f"{beginning}.")
        assert found.kinds[kind] in module


def test_common_beginnings_are_left_out() -> None:
    assert without_beginning(["model.layers.0", "model.layers.10"]) == ["0", "10"]
    assert without_beginning(["model.layers.0"]) == ["model.layers.0"]
    assert without_beginning(["down.0", "up.0"]) == ["down.0", "up.0"]
    assert without_beginning([]) == []
