"""What modulating refuses, keeps and tells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pools
import pytest
import torch
from pools import MODULE
from test_dipm import INPUTS, M, N, adapters, part

import fastlora as fl
from fastlora.core.data import Extra


def test_messages(tmp_path: Path) -> None:
    own, other, ragged = adapters(part(1), part(3), part(5, rank=2))
    own = replace(own, name="own")

    def refused(message: str, adapter: fl.Adapter = own, **arguments: object) -> None:
        given: Mapping[str, object] = {"operators": fl.dipm.shift(other, ragged), **arguments}
        with pytest.raises(fl.InputError, match=message):
            fl.modulate(adapter, **given)  # type: ignore[arg-type]

    refused("'row' does not exist: use one of component, column, matrix", granularity="row")
    refused("on='C' does not exist", on="C")
    for granularity in ("column", "matrix"):
        for on in ("B", "A"):
            refused(
                f"granularity='{granularity}', on='{on}' works on the entries.*'a2' has rank 2",
                granularity=granularity,
                on=on,
            )
    for make, message in (
        (lambda: fl.dipm.scale(-1), "negative magnitude"), (lambda: fl.dipm.reverse(float("nan")), "finite number"),
        (lambda: fl.dipm.interpolate(other, 1.5), "between 0 and 1"),
        (lambda: fl.dipm.remove([]), "at least one adapter"),
        (lambda: fl.dipm.shift(own, other, "x"), "finite number"),
        (lambda: fl.dipm.shift(own, "other"), "not of 'other'"), (lambda: fl.modulate(3, []), "not of 3"),
    ):  # fmt: skip
        with pytest.raises(fl.InputError, match=message):
            make()  # type: ignore[no-untyped-call]
    with pytest.raises(fl.InputError, match=r"must be \[17\] finite numbers"):
        fl.dipm.recombine(fl.dipm.decouple(own), magnitudes={MODULE: -torch.ones(M)})
    with pytest.raises(fl.InputError, match="magnitudes for 'x', a module"):
        fl.dipm.recombine(fl.dipm.decouple(own), magnitudes={"x": torch.ones(M)})
    head = {"head.weight": Extra("value", torch.ones(2))}
    refused("'own' also changes head.weight .*without_extras", replace(own, extras=head))
    shift = fl.dipm.shift(replace(other, extras=head), ragged)
    refused(f"'{other.name}' also changes head.weight .*without_extras", operators=shift)
    broken = pools.make_adapter("broken", {MODULE: (part(1)[0] * torch.nan, part(1)[1], 1.0)})
    refused("'broken': lora_B of .* holds NaN", operators=fl.dipm.shift(other, broken))
    wider = pools.make_adapter("wider", {MODULE: (torch.ones(N + 1, 2), torch.ones(2, M), 1.0)})
    refused("different base models", operators=fl.dipm.shift(other, wider))


def test_copies_of_adapted_embeddings_are_kept_where_all_agree() -> None:
    own, other, third = adapters(*INPUTS["plain"])
    name = f"{MODULE}.weight"  # as peft saves an embedding beside its update
    copy = {name: Extra("value", torch.ones(N, M))}
    own, other = replace(own, extras=copy), replace(other, extras=copy)
    assert list(fl.modulate(own, fl.dipm.shift(other, third)).extras) == [name]
    other = replace(other, extras={name: Extra("value", torch.zeros(N, M))})
    with pytest.raises(fl.InputError, match="also changes"):
        fl.modulate(own, fl.dipm.shift(other, third))


def test_parts_tell_what_they_are() -> None:
    own, other, third = adapters(*INPUTS["plain"])
    parts = fl.dipm.decouple(own, "matrix").apply(fl.dipm.shift(other, third, 0.3)).apply(fl.dipm.scale(2))
    assert repr(parts) == "Parts('a0', matrix on product: shift(0.3), scale(2))"
    assert float(parts.magnitudes[MODULE]) == pytest.approx(2 * float(pools.dense(INPUTS["plain"][0]).norm()))
    operators = fl.dipm.recombine(parts).provenance["operators"]
    assert [o["operator"] for o in operators] == ["shift", "scale"]  # type: ignore[attr-defined]
