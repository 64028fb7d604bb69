"""Arithmetic of (IA)³ adapters, centred at one, against numbers in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders import gaussian
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import FLOAT64
from torch import Tensor

import fastlora as fl
from fastlora.adapters.ia3 import IA3
from fastlora.core.data import BaseInfo, Extra, Scaling

SHAPES = {"layers.0.key": (24, 1), "layers.0.up": (1, 16), "conv": (1, 6, 1, 1)}


def vectors(seed: int, dtype: torch.dtype = torch.float32, leave_out: str = "") -> dict[str, Scaling]:
    return {
        m: Scaling((1 + 0.3 * gaussian(*shape, seed=seed + i, dtype=torch.float64)).to(dtype), shape[0] == 1)
        for i, (m, shape) in enumerate(SHAPES.items())
        if m != leave_out
    }


def make(name: str, seed: int, dtype: torch.dtype = torch.float32, leave_out: str = "") -> IA3:
    return IA3(name, vectors(seed, dtype, leave_out), dtype=dtype)


A, B, C = make("a", 1), make("b", 50), make("c", 90)


def value(adapter: IA3, module: str) -> Tensor:
    """``l`` in float64, ones where the adapter lacks the module."""
    if module in adapter.vectors:
        return adapter.vectors[module].vector.double()
    return torch.ones(SHAPES[module], dtype=torch.float64)


def check(got: IA3, formula: object, *adapters: IA3, relative: float = FLOAT64) -> None:
    assert set(got.modules) == {m for a in adapters for m in a.modules}
    for module in got.modules:
        expected = formula(*(value(a, module) for a in adapters))  # type: ignore[operator]
        torch.testing.assert_close(value(got, module), expected, rtol=relative, atol=relative)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_operators(dtype: torch.dtype) -> None:
    a, b, c = make("a", 1, dtype), make("b", 50, dtype), make("c", 90, dtype)
    check(-a, lambda a: 2 - a, a)
    check(a + b, lambda a, b: a + b - 1, a, b)
    check(a - b, lambda a, b: a - b + 1, a, b)
    check(0.7 * a + 0.2 * b - 2 * c, lambda a, b, c: 1 + 0.7 * (a - 1) + 0.2 * (b - 1) - 2 * (c - 1), a, b, c)
    check(a / 4, lambda a: 1 + (a - 1) / 4, a)
    check(0 * a, torch.ones_like, a)
    check(a - a, torch.ones_like, a)


def test_negation() -> None:
    check(fl.negate(A), lambda a: 2 - a, A)
    for strength in (0.3, 1.0, 2.5, 0.0, -1.0):
        check(fl.negate(A, strength), lambda a: (1 + strength) - strength * a, A)  # noqa: B023
    check(fl.negate(-A), lambda a: a, A)


@pytest.mark.parametrize("semantics", ["exact", "pem"])
def test_analogy(semantics: str) -> None:
    check(fl.analogy(A, B, C, 0.7, 0.3, semantics=semantics), lambda a, b, c: 0.3 + 0.7 * a + 0.3 * (b - c), A, B, C)
    default = 1.0 if semantics == "exact" else 0.5
    check(fl.analogy(A, B, C, semantics=semantics), lambda a, b, c: 1 - default + default * (a + b - c), A, B, C)


@pytest.mark.parametrize("weights", [(0.3, 0.7), (1.5, -0.5), (0.0, 1.0), (2.0, 6.0)], ids=str)
def test_addition_of_the_paper_is_the_centred_one(weights: tuple[float, float]) -> None:
    x, y = (w / sum(weights) for w in weights)
    paper = fl.add([A, B], weights, semantics="pem")
    check(paper, lambda a, b: x * a + y * b, A, B)
    check(fl.add([A, B], [x, y]), lambda a, b: x * a + y * b, A, B)
    assert paper.provenance["semantics"] == "pem"


def test_a_missing_module_counts_as_one() -> None:
    short = make("short", 50, leave_out="layers.0.up")
    check(0.5 * A + 0.25 * short, lambda a, b: 1 + 0.5 * (a - 1) + 0.25 * (b - 1), A, short)
    check(fl.add([A, short], [0.5, 0.5], semantics="pem"), lambda a, b: 0.5 * a + 0.5 * b, A, short)
    check(fl.analogy(short, A, B), lambda s, a, b: s + a - b, short, A, B)
    assert short.modules == ["layers.0.key", "conv"]
    with pytest.raises(fl.InputError, match=r"has no module 'layers.0.up', which so is not scaled"):
        short.vector("layers.0.up")


def test_an_untouched_vector_keeps_its_bits(tmp_path: Path) -> None:
    a = make("a", 1, torch.bfloat16)
    again = fl.load((1.0 * a).save(tmp_path / "a"))
    assert all(torch.equal(again.vectors[m].vector, s.vector) for m, s in a.vectors.items())
    assert again.dtype == torch.bfloat16
    assert (a + make("b", 2, torch.float16)).dtype == torch.float32


numbers = st.floats(-3, 3, allow_nan=False)


@settings(max_examples=25, deadline=None)
@given(x=numbers, y=numbers, z=numbers)
def test_it_is_a_vector_space(x: float, y: float, z: float) -> None:
    for left, right in (
        ((x * A + y * B) + z * C, x * A + (y * B + z * C)),
        (x * A + y * B, y * B + x * A),
        (x * (A + y * B), x * A + x * y * B),
        ((x + y) * A, x * A + y * A),
        (A - x * B, A + (-x) * B),
    ):
        for m in SHAPES:
            torch.testing.assert_close(value(left, m), value(right, m), rtol=0, atol=FLOAT64)


def test_replaced_modules_are_kept_alone_and_refused_in_sums() -> None:
    a = IA3("a", vectors(1), extras={"head.weight": Extra("value", torch.ones(3))},
            base=BaseInfo(modules_to_save=("head",)))  # fmt: skip
    assert (1.0 * a).extras["head.weight"].tensor.tolist() == [1.0] * 3
    for expression in (lambda: a + B, lambda: -a, lambda: 0.5 * a):
        with pytest.raises(fl.InputError, match=r"adapter 'a' replaces head.weight .*without_extras"):
            expression()
    assert (a.without_extras() + B).extras == {}


def test_vectors_that_do_not_correspond_are_refused() -> None:
    other = IA3("other", {**vectors(2), "layers.0.key": Scaling(torch.ones(1, 16), True)})
    message = r"'layers.0.key': 'a' scales its outputs and bias \(\[24, 1\]\), 'other' its inputs"
    with pytest.raises(fl.InputError, match=message):
        A + other
    flipped = IA3("flipped", {**vectors(2), "conv": Scaling(torch.ones(1, 6, 1, 1), False)})
    with pytest.raises(fl.InputError, match="conv"):
        fl.add([A, flipped], semantics="pem")


DATA = Path(__file__).parents[1] / "data"
EXAMPLES = Path(__file__).parents[2] / "examples" / "adapters"


def test_kinds_do_not_mix() -> None:
    ia3, lora = fl.load(DATA / "movie_ia3_a"), fl.load(EXAMPLES / "spam")
    vector = fl.task_vector({"w": torch.zeros(2, 2)}, {"w": torch.ones(2, 2)}, "change")
    for run in (lambda: ia3 + lora, lambda: lora - ia3, lambda: fl.add([lora, ia3]),
                lambda: fl.add([ia3, lora], semantics="pem"), lambda: fl.analogy(lora, lora, ia3),
                lambda: ia3 + vector):  # fmt: skip
        with pytest.raises(fl.InputError, match=r"is an \(IA\)³ adapter.*write each into the base model"):
            run()
    with pytest.raises(fl.InputError, match=r"'spam' is a LoRA adapter and 'change' is a task vector.*\.extract\(rank"):
        lora + vector


def test_what_has_no_meaning_is_refused_by_name() -> None:
    ia3, lora = fl.load(DATA / "movie_ia3_a"), fl.load(EXAMPLES / "spam")
    for run in (lambda: fl.Pool([ia3]), lambda: fl.Pool([lora, ia3]), lambda: fl.Pool.load([DATA / "movie_ia3_a"])):
        with pytest.raises(
            fl.UnsupportedAdapter, match=r"'movie_ia3_a' is an \(IA\)³ adapter .* a pool needs .*`fl.add`"
        ):
            run()
    with pytest.raises(fl.UnsupportedAdapter, match="which compress needs"):
        fl.compress(ia3, 2)
