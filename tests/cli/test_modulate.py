"""``fastlora modulate`` and ``fastlora merge --weights-by`` on real adapters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command import ADAPTERS, done, refused
from tolerances import FLOAT32, SUMS32

import fastlora as fl

SPAM, MOVIE, TREC = ADAPTERS / "spam", ADAPTERS / "movie_a", ADAPTERS / "trec_rslora"


def test_operators_are_those_of_python(tmp_path: Path) -> None:
    ops = ("--op", f"shift:{MOVIE}:{TREC}:0.3", "--op", "reverse:0.5", "--op", f"remove:{MOVIE},{TREC}:0.25")
    found = done("modulate", SPAM, *ops, "--out", "out", cwd=tmp_path)
    assert found.out.startswith("out: 18 modules, rank ")
    spam, movie, trec = (fl.load(p) for p in (SPAM, MOVIE, TREC))
    operators = [fl.dipm.shift(movie, trec, 0.3), fl.dipm.reverse(0.5), fl.dipm.remove([movie, trec], 0.25)]
    expected, loaded = fl.modulate(spam, operators), fl.load(tmp_path / "out")
    for module in spam.modules:
        x, y = loaded.delta(module), expected.delta(module)
        assert (x - y).norm() <= FLOAT32 * y.norm()
        norms = (x.double().norm(dim=0), 0.5 * spam.delta(module).double().norm(dim=0))
        torch.testing.assert_close(*norms, rtol=SUMS32, atol=0)


@pytest.mark.parametrize("ops", [(), ("--op", "scale:1"), ("--op", f"shift:{SPAM}:{ADAPTERS}/../adapters/spam:3")])
def test_the_identity_writes_the_same_tensors(ops: tuple[str, ...], tmp_path: Path) -> None:
    done("modulate", SPAM, *ops, "--out", "out", cwd=tmp_path)
    plain = fl.load(SPAM).save(tmp_path / "plain")
    name = "adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (plain / name).read_bytes()


def test_rank_and_granularity(tmp_path: Path) -> None:
    given = ("--op", f"interpolate:{MOVIE}:0.4", "--granularity", "component", "--on", "B", "--rank", "5", "--json")
    found = done("modulate", SPAM, *given, "--out", "out", cwd=tmp_path).json()
    assert found["rank"] == 5 and 0.5 < found["retained_energy"] < 1
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 5


@pytest.mark.parametrize(("arguments", "message"), [
    (["--op", "turn:1"], "there is no operator 'turn'; use reverse"),
    (["--op", "scale"], "write scale:λ"), (["--op", "scale:x"], "write scale:λ"),
    (["--op", "reverse:0.5:2"], "write reverse"), (["--op", f"shift:{SPAM}"], "write shift:SOURCE:TARGET"),
    (["--op", f"shift:{SPAM}:{MOVIE}:x"], "write shift"),
    (["--op", f"interpolate:{SPAM}"], "write interpolate:OTHER:t"),
    (["--op", "remove:"], "write remove"), (["--op", "reverse:-1"], "negative magnitude"),
    (["--op", f"interpolate:{MOVIE}:2"], "between 0 and 1"),
    (["--op", "shift:nowhere:else:1"], "there is no file or directory nowhere"),
    (["--op", "reverse", "--granularity", "row"], "'row' does not exist"),
    (["--op", f"shift:{MOVIE}:{ADAPTERS / 'trec_r16'}:1", "--on", "B"], "needs equal ranks"),
])  # fmt: skip
def test_messages(arguments: list[str], message: str, tmp_path: Path) -> None:
    assert message in refused("modulate", SPAM, *arguments, "--out", "out", cwd=tmp_path)


def test_weights_from_the_gram(tmp_path: Path) -> None:
    pool = fl.Pool.load([str(SPAM), str(MOVIE)])
    found = done(
        "merge", SPAM, MOVIE, "--weights-by", "least_interference", "--method", "cat", "--out", "out", cwd=tmp_path
    )
    weights = fl.weights(pool)
    assert f"note: weight of spam: {weights['spam']:.6g}" in found.err
    merged = fl.load(tmp_path / "out")
    for module in pool.modules:
        expected = sum(weights[n] * pool[n].delta(module) for n in pool.names)
        assert (merged.delta(module) - expected).norm() <= SUMS32 * expected.norm()  # type: ignore[union-attr]
    assert "'best' does not exist" in refused("merge", SPAM, "--weights-by", "best", "--out", "x", cwd=tmp_path)
    message = refused("merge", f"{SPAM}:2", MOVIE, "--weights-by", "equal_energy", "--out", "x", cwd=tmp_path)
    assert "weights have no meaning" in message
