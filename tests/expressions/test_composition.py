"""Expressions evaluated, against dense arithmetic and against the functions that they stand for."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path

import pools
import pytest
import torch
from builders import MODULES, gaussian, make_adapter, make_factors, peft_tensors, shared_pool, write_peft
from tolerances import FLOAT32, FLOAT64, SUMS32, WEAK64
from torch import Tensor

import fastlora as fl
from fastlora.adapters.lora import Adapter
from fastlora.core.data import Extra
from fastlora.expressions.grammar import ExpressionError

DATA = Path(__file__).parents[1] / "data"
EXAMPLES = Path(__file__).parents[2] / "examples" / "adapters"
Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"


def adapter(name: str, seed: int, rank: int = 4, dtype: torch.dtype = torch.float32) -> Adapter:
    parts = {m: (*f, 0.5 + seed) for m, f in make_factors(rank=rank, seed=seed, dtype=dtype).items()}
    return pools.make_adapter(name, parts)


POOL = {"a": adapter("one", 1), "b": adapter("two", 2, 7), "c": adapter("three", 3, 1, torch.bfloat16)}
DENSE = {n: {m: pools.exact(u) for m, u in x.updates.items()} for n, x in POOL.items()}


def assert_is(got: fl.Adapter, expected: dict[str, Tensor], relative: float = FLOAT32) -> None:
    assert set(got.modules) == set(expected)
    for module, value in expected.items():
        error = float((pools.exact(got.update(module)) - value).norm())
        assert error <= relative * max(float(value.norm()), 1e-3), module


def same(got: fl.Adapter, expected: fl.Adapter, relative: float = FLOAT32) -> None:
    assert_is(got, {m: pools.exact(u) for m, u in expected.updates.items()}, relative)


LINEAR = ["a", "-a", "a + b", "a - b + c", "0.7*a - 0.3*b", "2*(a - (b - c))/4", "a/3 + b*(1/3)", "-(a + b)*0.5",
          "a + a + a", "a - a + b", "0*a + b", "a - 2*a", "2*-a", "a*2*3 - 1e-3*c", "3*(1 - 0.5)*a", "+a"]  # fmt: skip


@pytest.mark.parametrize("text", LINEAR)
def test_arithmetic(text: str) -> None:
    got = fl.compose(text, POOL)
    expected = {m: eval(text, {n: d[m] for n, d in DENSE.items()}) for m in MODULES}
    assert_is(got, expected)
    assert got.name == text and got.provenance["expression"] == text


def random_expression(depth: int) -> str:
    if depth == 0:
        return random.choice("abc")
    kind = random.randrange(6)
    inner = random_expression(depth - 1)
    if kind == 0:
        return f"({inner} + {random_expression(depth - 1)})"
    if kind == 1:
        return f"({inner} - {random_expression(depth - 1)})"
    if kind == 2:
        return f"{random.choice(['2', '0.5', '-1.5', '(1/3)', '(2 - 3)'])}*{inner}"
    if kind == 3:
        return f"({inner})/{random.choice(['4', '(1 + 2)'])}"
    return f"-({inner})" if kind == 4 else f"({inner})*0.25"


def test_random_arithmetic() -> None:
    random.seed(1)
    for _ in range(100):
        text = random_expression(random.randint(1, 6))
        got = fl.compose(text, POOL)
        used = [n for n in POOL if n in text]
        for m in MODULES:
            value = eval(text, {n: d[m] for n, d in DENSE.items()})
            scale = sum(float(DENSE[n][m].norm()) for n in used)
            assert float((pools.exact(got.update(m)) - value).norm()) <= WEAK64 * scale, text


def test_an_adapter_takes_part_once() -> None:
    assert fl.compose("a + 2*(a - 0.5*b) + b", POOL).update(Q).rank == 4  # b cancels out
    assert fl.compose("a + a - 3*b", POOL).update(Q).rank == 11
    assert fl.compose("a - a", POOL).update(Q).rank == 0


def test_paths_and_adapters(tmp_path: Path) -> None:
    path = make_adapter(tmp_path / "x", seed=5)
    got = fl.compose("a + 0.5*x", {"a": POOL["a"], "x": path})
    whole = fl.load(path)
    assert_is(got, {m: DENSE["a"][m] + 0.5 * pools.exact(whole.update(m)) for m in MODULES})
    assert POOL["a"].name == "one"  # the caller's adapter is left as it is
    assert fl.compose("a", POOL, name="mine").name == "mine"


def test_numbers_by_name() -> None:
    got = fl.compose("a - λ*b + (μ/2)*c", POOL, numbers={"λ": 0.3, "μ": -2})
    same(got, fl.compose("a - 0.3*b - c", POOL), 1e-12)
    assert got.provenance["numbers"] == {"λ": 0.3, "μ": -2}
    same(fl.compose("compress(a + b, r)", POOL, numbers={"r": 3}), fl.compose("compress(a + b, 3)", POOL), 1e-12)
    got = fl.compose("shared(a, b, threshold=t, chain=mean)", POOL, numbers={"t": 0.5, "mean": 1.0})
    same(got, fl.compose("shared(a, b, threshold=0.5, chain=mean)", POOL), 1e-12)
    with pytest.raises(fl.InputError, match="'a' is the name of an adapter and of a number"):
        fl.compose("a", POOL, numbers={"a": 1.0})
    with pytest.raises(fl.InputError, match="the number 'λ' is nan"):
        fl.compose("λ*a", POOL, numbers={"λ": math.nan})
    with pytest.raises(ExpressionError, match="this is a number"):
        fl.compose("λ", POOL, numbers={"λ": 1.0})


def test_what_is_no_adapter_is_refused() -> None:
    with pytest.raises(fl.InputError, match="'a' is of type int; an adapter is needed"):
        fl.compose("a", {"a": 3})  # type: ignore[dict-item]


def test_names_that_are_not_used_are_told_and_not_loaded() -> None:
    got = fl.compose("a", {**POOL, "missing": "/nowhere"})
    assert list(got.notes) == [f"{n} is not used by the expression" for n in ("b", "c", "missing")]


def test_functions_are_what_they_say(tmp_path: Path) -> None:
    paths = {f"p{i}": p for i, p in enumerate(shared_pool(tmp_path, 3, shared=2))}
    pool = fl.Pool.load(paths)
    p0, p1, p2 = pool.adapters
    for text, expected in {
        "unique(p0 | p1, p2)": fl.decompose(pool, mode="iterative", target="p0").unique_of("p0"),
        "unique(p0 | p2, p1)": fl.decompose(pool, mode="iterative", target="p0", order=["p2", "p1"]).unique_of("p0"),
        "unique(p1 | p0, threshold=0.5, side=right, chain=mean)": fl.decompose(
            fl.Pool([p1, p0]), 0.5, mode="iterative", target="p1", side="right", chain="mean").unique_of("p1"),
        "shared(p0, p1, p2)": fl.decompose(pool).shared,
        "shared(p0, p1, p2, threshold=0.3, chain=palindrome, rank=2)": fl.decompose(
            pool, 0.3, chain="palindrome", rank=2).shared,
        "shared(p0, p1, p2, threshold=soft, chain=mean)": fl.decompose(pool, "soft", chain="mean").shared,
        "unique(p0 | p1, threshold=soft, chain=palindrome, weighting=energy, rho=0.5)": fl.decompose(
            fl.Pool([p0, p1]), "soft", mode="iterative", target="p0", chain="palindrome", weighting="energy",
            rho=0.5).unique_of("p0"),
        "shared(p0, p1, threshold=0.1, weighting=energy)": fl.decompose(
            fl.Pool([p0, p1]), 0.1, weighting="energy").shared,
        "compress(p0 + p1, 3)": fl.compress(p0 + p1, 3),
        "compress(p0 + p1, rank=3)": fl.compress(p0 + p1, 3),
        "compress(p0 + p1, energy=0.9)": fl.compress(p0 + p1, energy=0.9),
        "negate(p0)": -p0,
        "negate(p0 - p1, 0.5)": -0.5 * (p0 - p1),
        "negate(p0, 2, semantics=pem)": -2 * p0,
        "analogy(p0, p1, p2)": p0 + p1 - p2,
        "analogy(p0, p1, p2, 0.5, 2)": 0.5 * p0 + 2 * (p1 - p2),
        "analogy(p0, p1, p2, 0.5, 2, semantics=pem)": fl.analogy(p0, p1, p2, 0.5, 2, semantics="pem"),
        "add(p0, p1, 0.5, 2)": 0.5 * p0 + 2 * p1,
        "add(p0, p1, semantics=pem)": fl.add([p0, p1], semantics="pem"),
        "add(p0, p1, 1, 3, semantics=pem)": fl.add([p0, p1], [1, 3], semantics="pem"),
        "p0 - 0.3*unique(p1 | p0) + shared(p1, p2)/2":
            p0 - 0.3 * fl.decompose(fl.Pool([p1, p0])).unique_of("p1") + fl.decompose(fl.Pool([p1, p2])).shared / 2,
    }.items():  # fmt: skip
        same(fl.compose(text, paths), expected, 1e-9)


def test_unique_has_lost_what_is_shared(tmp_path: Path) -> None:
    """Against the definition in dense float64: no column of the unique part lies in the planted common directions."""
    paths = {f"p{i}": p for i, p in enumerate(shared_pool(tmp_path, 2, shared=2))}
    whole = {n: fl.load(p) for n, p in paths.items()}
    got = fl.compose("unique(p0 | p1)", paths)
    for module in got.modules:
        left, _ = whole["p0"].factors(module)
        other, _ = whole["p1"].factors(module)
        u0, u1 = (torch.linalg.qr(x.double()).Q for x in (left, other))
        inner = torch.linalg.svd(u0.mT @ u1)
        common = u0 @ inner.U[:, inner.S > 0.9]
        assert common.shape[1] == 2
        dense = whole["p0"].delta(module).double()
        expected = dense - common @ (common.mT @ dense)
        assert float((pools.exact(got.update(module)) - expected).norm()) <= SUMS32 * float(dense.norm())


def test_parts_of_expressions_are_adapters_too(tmp_path: Path) -> None:
    paths = {f"p{i}": p for i, p in enumerate(shared_pool(tmp_path, 3, shared=2))}
    p0, p1, p2 = fl.Pool.load(paths).adapters
    mixed = replace(p0 + p1, name="mixed")
    expected = fl.decompose(fl.Pool([mixed, p2]), 0.3).shared
    same(fl.compose("shared(p0 + p1, p2, threshold=0.3)", paths), expected, 1e-6)
    same(fl.compose("unique(unique(p0 | p1) | p2)", paths), fl.compose("unique(p0 | p1, p2)", paths), 1e-6)


def test_results_are_written_with_their_expression(tmp_path: Path) -> None:
    got = fl.compose("0.6*a - b", POOL)
    again = fl.load(got.save(tmp_path / "out"))
    same(again, got)
    header = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()[:2000]
    assert b"0.6*a - b" in header


def test_differently_wrapped_adapters_are_aligned(tmp_path: Path) -> None:
    plain = make_adapter(tmp_path / "plain")
    tensors = {
        k.replace("model.layers", "encoder.model.layers"): t for k, t in peft_tensors(make_factors(seed=3)).items()
    }
    wrapped = write_peft(tmp_path / "wrapped", tensors)
    got = fl.compose("p + w", {"p": plain, "w": wrapped})
    assert set(got.modules) == set(MODULES) and got.update(Q).rank == 8
    assert len(got.notes) == 1 and "differently wrapped" in got.notes[0]


def test_adapters_of_different_models_are_refused(tmp_path: Path) -> None:
    other = make_adapter(tmp_path / "other", {"transformer.h.0.attn": (9, 9)})
    with pytest.raises(fl.InputError, match="no module in common"):
        fl.compose("a + o", {**POOL, "o": other})


def test_replaced_modules_are_refused_or_dropped() -> None:
    a = replace(adapter("a", 1), extras={"head.weight": Extra("value", torch.ones(3))})
    with pytest.raises(ExpressionError, match=r"replaces head.weight .*\n  a \+ b\n  \^"):
        fl.compose("a + b", {**POOL, "a": a})
    assert fl.compose("a + b", {**POOL, "a": a}, drop_extras=True).extras == {}
    assert set(fl.compose("a", {"a": a}).extras) == {"head.weight"}


def test_nan_is_found_by_name() -> None:
    broken = adapter("x", 4)
    stored = broken.update(UP).A.stored
    assert stored is not None
    stored[0, 0] = math.nan
    with pytest.raises(fl.InputError, match=f"adapter 'x': lora_A of {UP} holds NaN"):
        fl.compose("a + 0*x", {**POOL, "x": broken})


def test_memory_is_bounded_with_the_same_bits(tmp_path: Path) -> None:
    paths = {f"p{i}": p for i, p in enumerate(shared_pool(tmp_path, 2))}
    text = "p0 - unique(p1 | p0)"
    free, bounded = (fl.compose(text, paths, memory=m) for m in (None, "1GiB"))
    for m in MODULES:
        assert torch.equal(pools.exact(free.update(m)), pools.exact(bounded.update(m)))
    with pytest.raises(fl.InputError, match="memory='much'"):
        fl.compose(text, paths, memory="much")


def test_ia3() -> None:
    paths = {n: DATA / f"movie_ia3_{n}" for n in "ab"}
    a, b = (fl.load(p) for p in paths.values())
    for text, formula in {
        "0.6*a + 0.4*b": lambda a, b: 0.6 * a + 0.4 * b,
        "-a": lambda a, b: 2 - a,
        "negate(a, 0.3)": lambda a, b: 1.3 - 0.3 * a,
        "analogy(a, b, a, 0.5, 0.5)": lambda a, b: 0.5 + 0.5 * a + 0.5 * (b - a),
        "add(a, b, semantics=pem)": lambda a, b: (a + b) / 2,
        "2*(a - b)": lambda a, b: 1 + 2 * (a - b),
    }.items():
        got = fl.compose(text, paths)
        assert isinstance(got, fl.IA3) and got.modules == a.modules
        for m in a.modules:
            torch.testing.assert_close(got.vector(m), formula(a.vector(m), b.vector(m)), rtol=FLOAT64, atol=FLOAT64)


def test_ia3_of_different_models_are_refused() -> None:
    from fastlora.adapters.ia3 import IA3
    from fastlora.core.data import Scaling

    other = IA3("o", {"transformer.h.0.attn": Scaling(torch.ones(3, 1), False)})
    with pytest.raises(fl.InputError, match="'o' has no module in common with 'a'"):
        fl.compose("a + o", {"a": DATA / "movie_ia3_a", "o": other})
    a = fl.load(DATA / "movie_ia3_a")
    wrapped = fl.compose("a + w", {"a": a, "w": (0.5 * a).renamed("", "bert.")})
    assert wrapped.modules == a.modules and "differently wrapped" in wrapped.notes[0]


def test_task_vectors(tmp_path: Path) -> None:
    base = {"w": gaussian(6, 4, seed=1), "b": gaussian(6, seed=2)}
    tuned = [{n: t + gaussian(*t.shape, seed=s) for n, t in base.items()} for s in (3, 4)]
    vectors = {n: fl.task_vector(base, t) for n, t in zip("xy", tuned, strict=True)}
    path = vectors["x"].save(tmp_path / "x.safetensors")
    got = fl.compose("0.5*x - negate(y, 2)", {"x": path, "y": vectors["y"]})
    for n in base:
        expected = 0.5 * (tuned[0][n] - base[n]) + 2 * (tuned[1][n] - base[n])
        torch.testing.assert_close(got.deltas[n], expected, rtol=SUMS32, atol=SUMS32)


KNOWN = "(known: a, b, c, ia3, trec-r16)"
MISTAKES = {
    "a + d": (f"no adapter is called 'd' {KNOWN}", 4),
    "abc": (f"no adapter is called 'abc' {KNOWN}", 0),
    "ai3": (f"no adapter is called 'ai3'; did you mean ia3? {KNOWN}", 0),
    "a + trec-r16": ("no adapter is called 'trec'; did you mean trec-r16? Write it in quotes, 'trec-r16'", 4),
    "2": ("this is a number; an expression over adapters is needed", 0),
    "1 + 2*3": ("this is a number; an expression over adapters is needed", 0),
    "a + 1": ("an adapter and a number cannot be added; multiply one by the other, or add adapters", 4),
    "1 - a": ("a number and an adapter cannot be added; multiply one by the other, or add adapters", 4),
    "b + 2*(a - 1)": ("an adapter and a number cannot be added; multiply one by the other, or add adapters", 11),
    "a*b": ("two adapters cannot be multiplied; one of them must be a number", 2),
    "2/a": ("nothing can be divided by an adapter; a number is needed here", 2),
    "a/(2 - 2)": ("division by 0", 3),
    "a*(1/0)": ("division by 0", 5),
    "(1e300*1e300)*a": ("this is too large for a number", 1),
    "ties(a, b)": ("no function is called 'ties' (known: unique, shared, compress, negate, analogy, add)", 0),
    "uniqe(a | b)": ("no function is called 'uniqe'; did you mean unique? (known: unique, ", 0),
    "a + shared(b)": ("shared has 1 adapter here; write shared(", 4),
    "unique(a, b)": ('unique needs a "|" after its first argument; write unique(', 0),
    "shared(a | b)": ('shared takes no "|"; write shared(', 0),
    "unique(2 | a)": ("this is a number, an adapter is needed; write unique(", 7),
    "unique(a | a)": ("unique has a twice", 11),
    "shared(a, b, a)": ("shared has a twice", 13),
    "shared(a, b, c, 2)": ("shared has 1 number here; write shared(", 16),
    "shared(a, b, threshold=2)": ("threshold=2.0: must be at least 0 and below 1 (the paper uses 0.85)", 0),
    "shared(a, b, threshold=hard)": ("threshold='hard': give a number of at least 0 and below 1, or 'soft'", 0),
    "shared(a, b, threshold=soft)": ("threshold='soft' needs a symmetric chain", 0),
    "shared(a, b, weighting=2)": ("weighting is a word, such as weighting=energy", 23),
    "shared(a, b, rho=0.1)": ("rho belongs to weighting='energy'", 0),
    "shared(a, b, chain=sum)": ("chain='sum' does not exist", 0),
    "shared(a, b, chain=2)": ("chain is a word, such as chain=product", 19),
    "shared(a, b, rank=1.5)": ("rank is a whole number", 18),
    "shared(a, b, rank=a)": ("a number is needed here", 18),
    "shared(a, b, mode=pairs)": ("shared has no option 'mode'; it takes threshold, chain, side, rank, ", 18),
    "compress(a)": ("compress: give rank=N or energy=X", 0),
    "compress(a, 2.5)": ("compress: the rank 2.5 is no whole number; a share is written energy=0.9", 0),
    "compress(a, 0)": ("compress: rank=0 must be at least 1", 0),
    "compress(a, 2, rank=3)": ("compress: the rank is given twice", 0),
    "compress(a, b)": ("compress has 2 adapters here; write compress(", 12),
    "negate(a, 1, 2)": ("negate has 2 numbers here; write negate(", 10),
    "negate(a, semantics=fisher)": ("semantics='fisher' does not exist: use one of exact, pem", 0),
    "analogy(a, b)": ("analogy has 2 adapters here; write analogy(", 0),
    "add(a, 2, b)": ("adapters come before numbers; write add(", 10),
    "add(a, b, 2)": ("add has 1 number here; write add(", 10),
    "b - add(a, b, semantics=pem)": ("pem: model.layers.0.self_attn.q_proj has rank 4 in 'a' and 7 in 'b'", 4),
    "a + 2*ia3": ("'a' is a LoRA adapter and 'ia3' is an (IA)³ adapter: what they add up to depends on the base", 6),
    "compress(ia3, 2)": ("'ia3' is an (IA)³ adapter and has no low-rank updates s·B·A, which compress needs", 0),
    "unique(ia3 | a)": ("'ia3' is an (IA)³ adapter and has no low-rank updates s·B·A, which unique needs", 0),
    "a + shared(b, ia3)": ("'ia3' is an (IA)³ adapter and has no low-rank updates s·B·A, which shared needs", 4),
}  # fmt: skip


@pytest.mark.parametrize("text", MISTAKES)
def test_mistakes_are_shown_in_their_place(text: str) -> None:
    message, at = MISTAKES[text]
    with pytest.raises(ExpressionError) as found:
        fl.compose(text, {**POOL, "ia3": DATA / "movie_ia3_a", "trec-r16": EXAMPLES / "trec_r16"} | POOL)
    first, shown, caret = str(found.value).split("\n")
    assert first.startswith(message)
    assert shown == f"  {text}" and caret == "  " + " " * at + "^"
