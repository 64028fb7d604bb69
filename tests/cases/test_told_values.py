"""What sums keep of replaced modules and biases, and one behaviour for what is not finite."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import gaussian, make_adapter, make_config, make_factors, peft_tensors, write_peft
from command import done, refused, run
from told import COMMANDS, SMALL
from tolerances import FLOAT32

import fastlora as fl
from fastlora.core.data import Extra
from fastlora.errors import NonFiniteError


def with_head(folder: Path, head: torch.Tensor | None, seed: int, *, bias: torch.Tensor | None = None) -> Path:
    tensors = peft_tensors(make_factors(SMALL, seed=seed))
    fields: dict[str, object] = {}
    if head is not None:
        tensors["base_model.model.score.weight"] = head
        fields["modules_to_save"] = ["score"]
    if bias is not None:
        tensors["base_model.model.model.norm.bias"] = bias
        fields["bias"] = "all"
    return write_peft(folder, tensors, make_config(**fields))


HEAD = gaussian(2, 16, seed=5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("weights", "kept"),
    [
        ((0.25, 0.75), True),
        ((0.1, 0.9), True),
        ((1.0, 0.0), True),
        ((0.0, 1.0), True),
        ((2.0, -1.0), True),
        ((1.0, -1.0), False),
        ((1.0, 1.0), None),
        ((0.5, 0.4), None),
    ],
)
def test_equal_values_are_kept_where_weights_add_up_to_one(
    weights: tuple[float, float], kept: bool | None, bias: bool, tmp_path: Path
) -> None:
    values = {"bias": HEAD[0]} if bias else {}
    for i, name in enumerate("ab"):
        with_head(tmp_path / name, None if bias else HEAD, i, **values)
    arguments = [f"{n}:{w}" for n, w in zip("ab", weights, strict=True)]
    expression = f"{weights[0]}*a + {weights[1]}*b"
    commands = [
        ["merge", *arguments, "-o", "svd"],
        ["merge", *arguments, "--method", "cat", "-o", "cat"],
        ["compose", expression, "a=a", "b=b", "-o", "sum"],
    ]
    for command in commands:
        if kept is None:
            found = run(*command, cwd=tmp_path)  # an error in an expression has lines that show the place
            message = found.err
            assert found.code == 2 and "replaces" in message and f"they add up to {sum(weights):g}" in message
            continue
        done(*command, cwd=tmp_path)
        extras = fl.load(tmp_path / command[-1]).extras
        assert len(extras) == kept
        assert all(torch.equal(e.tensor, HEAD[0] if bias else HEAD) for e in extras.values())


def test_values_of_some_adapters_and_different_ones(tmp_path: Path) -> None:
    a, b, c = (
        fl.load(with_head(tmp_path / n, h, i)) for i, (n, h) in enumerate({"a": HEAD, "b": 2 * HEAD, "c": None}.items())
    )
    assert torch.equal(fl.add([a, c], [1.0, 0.0]).extras["score.weight"].tensor, HEAD)
    with pytest.raises(fl.InputError, match=r"'a' replaces score\.weight.*'c' has none"):
        fl.merge(fl.Pool([a, c]))
    with pytest.raises(fl.InputError, match=r"'a' replaces score\.weight.*different"):
        fl.merge(fl.Pool([a, b]), {"a": 0.5, "b": 0.5})
    with pytest.raises(fl.InputError, match=r"replaces score\.weight.*add up to 0\.5"):
        0.5 * a
    slerp = fl.merge(fl.Pool([a, replace(a, name="d")]), method="slerp", t=0.3)
    assert torch.equal(slerp.extras["score.weight"].tensor, HEAD)
    with pytest.raises(fl.InputError, match=r"replaces score\.weight"):
        fl.merge(fl.Pool([a, c]), method="slerp", t=0.3)


def test_a_bias_that_is_replaced_and_changed_is_their_sum() -> None:
    pair = {"q": (gaussian(4, 2, seed=1), gaussian(2, 3, seed=2))}
    a, b = (fl.Adapter.from_tensors(pair, name=n) for n in "ab")
    value, change = gaussian(4, seed=3), gaussian(4, seed=4)
    a = replace(a, extras={"q.bias": Extra("value", value)})
    b = replace(b, extras={"q.bias": Extra("delta", change)})
    for total in (a + 0.5 * b, 0.5 * b + a):
        assert total.extras["q.bias"].kind == "value"
        torch.testing.assert_close(total.extras["q.bias"].tensor, value + 0.5 * change, rtol=0, atol=FLOAT32)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_refused_like_factors(bad: float, tmp_path: Path) -> None:
    head = HEAD.clone()
    head[1, 3] = bad
    with_head(tmp_path / "x", head, 1)
    with_head(tmp_path / "b", None, 2, bias=head[1])
    make_adapter(tmp_path / "trained", SMALL, seed=3)
    commands = {n: c for n, c in COMMANDS.items() if n not in ("overlap", "modulate", "modulate by")}
    for command in (*commands.values(), ["inspect", "x"]):
        assert "score.weight" in refused(*command, cwd=tmp_path)
    assert "model.norm.bias" in refused("compress", "b", "--rank", "2", "-o", "out", cwd=tmp_path)
    done("compose", "x", "x=x", "--drop-extras", "-o", "clean", cwd=tmp_path)  # the way out that the message names
    done("merge", "clean", "trained", "-o", "out", cwd=tmp_path)
    with pytest.raises(NonFiniteError, match=r"score\.weight"):
        fl.load(tmp_path / "x").save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("method", [name for name, m in fl.methods().items() if not m.takes_data])
def test_an_adapter_with_nan_is_refused_at_weight_zero(method: str, tmp_path: Path) -> None:
    factors = make_factors(SMALL)
    next(iter(factors.values()))[1][2, 3] = torch.nan
    write_peft(tmp_path / "x", peft_tensors(factors))
    make_adapter(tmp_path / "trained", SMALL, seed=3)
    message = "adapter 'x': lora_A of model.layers.0.self_attn.q_proj holds NaN"
    parameters = fl.methods()[method].parameters
    cut = ["--rank", 2] if "rank" in parameters else []
    needed = {p.name: 0.5 for p in parameters.values() if p.required}
    cut += [text for name, value in needed.items() for text in ("--set", f"{name}={value}")]
    assert message in refused("merge", "trained", "x:0", "--method", method, *cut, "-o", "out", cwd=tmp_path)
    pool = fl.Pool.load([tmp_path / "trained", tmp_path / "x"])
    for build in (
        lambda: fl.merge(pool, {"trained": 1.0}, method=method, rank=2 if "rank" in parameters else None, **needed),
        lambda: pool["trained"] + 0.0 * pool["x"],
        lambda: 0 * pool["x"],
        lambda: fl.add(pool.adapters, [1.0, 0.0]),
        lambda: fl.add(pool.adapters, [1.0, 0.0], semantics="pem"),
        lambda: fl.compose("a + 0*b", {"a": pool["trained"], "b": pool["x"]}),
        lambda: fl.PoolGram(pool),
        lambda: fl.weights(pool),
        lambda: fl.sweep("a + w*b", {"w": [0.0]}, adapters={"a": pool["trained"], "b": pool["x"]}, score=len),
    ):
        with pytest.raises(NonFiniteError, match=message.partition(": ")[2]):
            build()
