"""Changes of biases in files of diffusers: ``lora_B.bias``, as PEFT's ``lora_bias`` has them."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import gaussian
from pipelines import pipeline, quiet, shapes
from tolerances import FLOAT32
from written_files import adapter_of, chosen, contents, error

import fastlora as fl
from fastlora.core.data import Extra

BLOCK = "transformer_blocks.0.attn"
OUT = f"{BLOCK}.to_out.0"


def with_bias(adapter: fl.Adapter, *modules: str) -> fl.Adapter:
    biases = {f"{m}.bias": gaussian(adapter.updates[m].shape[0], seed=i) for i, m in enumerate(modules)}
    return replace(adapter, extras={name: Extra("delta", b) for name, b in biases.items()})


def test_diffusers_reads_the_biases_that_are_written(tmp_path: Path) -> None:
    adapter = with_bias(adapter_of(chosen(shapes("flux"), r"attn|ff", "text_|single"), "flux"), OUT)
    file = adapter.save(tmp_path / "tiny.safetensors", format="diffusers")
    pipe = pipeline("flux")
    with quiet(), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe.load_lora_weights(str(tmp_path), weight_name=file.name)
        pipe.fuse_lora()
    found = {n.replace(".base_layer", ""): p for n, p in pipe.transformer.named_parameters()}
    assert error(found[f"{OUT}.bias"], adapter.extras[f"{OUT}.bias"].tensor) < FLOAT32
    assert not found["transformer_blocks.1.attn.to_q.bias"].any()
    for module in adapter.modules:
        assert error(found[f"{module}.weight"], adapter.delta(module)) < FLOAT32
    again = fl.load(file, family="flux")
    assert torch.equal(again.extras[f"{OUT}.bias"].tensor, adapter.extras[f"{OUT}.bias"].tensor)
    one, other = contents(file)[0], contents(again.save(tmp_path / "again.safetensors"))[0]
    assert one.keys() == other.keys() and all(torch.equal(t, other[k]) for k, t in one.items())


def test_the_bias_of_a_fused_projection_goes_with_its_rows(tmp_path: Path) -> None:
    made = fl.Adapter.from_tensors({f"{BLOCK}.to_qkv": (gaussian(72, 2, seed=0), gaussian(2, 24, seed=1), 1.0)})
    made = with_bias(made, f"{BLOCK}.to_qkv")
    plain = adapter_of({OUT: (24, 24)}, "flux")
    made = replace(made, base=plain.base)
    tensors, _ = contents(made.save(tmp_path / "tiny.safetensors", format="diffusers"))
    parts = [tensors[f"transformer.{BLOCK}.to_{n}.lora_B.bias"] for n in "qkv"]
    assert torch.equal(torch.cat(parts), made.extras[f"{BLOCK}.to_qkv.bias"].tensor)


@pytest.mark.parametrize("format", ["xlabs"])
def test_what_has_no_place_is_refused_with_ways_out(format: str, tmp_path: Path) -> None:
    adapter = with_bias(adapter_of({f"{BLOCK}.to_out.0": (24, 24)}, "flux"), OUT)
    with pytest.raises(fl.OutputError, match=r"write format='comfy'\. Changes of biases have a place in .*'diffusers'"):
        adapter.save(tmp_path / "tiny.safetensors", format=format)
    norm = replace(adapter, extras={f"{BLOCK}.norm_q.weight": Extra("delta", torch.ones(12))})
    with pytest.raises(fl.OutputError, match=r"norm_q.weight beside its factors.*--drop-extras"):
        norm.save(tmp_path / "tiny.safetensors", format="diffusers")
    for way_out in ("comfy", "diffusers"):
        assert adapter.save(tmp_path / f"{way_out}.safetensors", format=way_out).exists()
    assert adapter.without_extras().save(tmp_path / "x.safetensors", format=format).exists()
