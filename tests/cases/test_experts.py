"""Experts one by one and fused: one weight in two forms.

The right value is a dense sum over what each adapter says of the fused weight; or a refusal that names both forms.
Never both forms side by side in one result.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import make_config, peft_tensors, write_peft
from tolerances import SUMS32
from two_forms import (
    ALPHA,
    HIDDEN,
    INNER,
    NAMES,
    RANK,
    WHERE,
    assert_is,
    changes,
    combined,
    factors,
    fused_adapter,
    fused_deltas,
    fused_layer,
    fused_tensors,
    mixtral,
    run,
    single_adapter,
)

import fastlora as fl


@pytest.fixture(params=[False, True], ids=["single first", "fused first"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    both = single_adapter(tmp_path / "single"), fused_adapter(tmp_path / "fused")
    return both[::-1] if request.param else both


def test_merge_is_the_sum_of_the_fused_weights(tmp_path: Path, pair: tuple[Path, Path], capsys: Any) -> None:
    a, b = pair
    run("merge", f"{a}:0.5", f"{b}:-2", "--method", "cat", "--out", tmp_path / "out")
    assert_is(fl.load(tmp_path / "out"), combined([(0.5, a), (-2, b)]))
    ranks = {m.rpartition(".")[2].partition("[")[0]: u.rank for m, u in fl.load(tmp_path / "out").updates.items()}
    assert ranks["gate_up_proj"] == 3 * RANK and ranks["down_proj"] == 2 * RANK
    assert "single" in (said := capsys.readouterr().err) and "gate_up_proj of rank 4" in said


@pytest.mark.parametrize("method", ["svd", "ties"])
def test_merge_methods_see_one_weight(tmp_path: Path, pair: tuple[Path, Path], method: str) -> None:
    options = ["--set", "density=1.0"] if method == "ties" else []
    run("merge", *pair, "--method", method, "--rank", "16", *options, "--out", tmp_path / "out")
    found = fl.load(tmp_path / "out")
    expected = combined([(1, pair[0]), (1, pair[1])])
    assert set(found.modules) == set(expected)
    if method == "svd":
        assert_is(found, expected, SUMS32)


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("prefix", [WHERE, f"base.{WHERE}"])
def test_names_and_prefixes(tmp_path: Path, kind: str, prefix: str) -> None:
    single = single_adapter(tmp_path / "single", kind=kind, prefix=prefix)
    fused = fused_adapter(tmp_path / "fused")
    merged = fl.merge(fl.Pool.load([fused, single]), method="cat")
    expected = combined([(1, fused)])
    for module, delta in fused_deltas(single).items():
        expected[module.removeprefix("base.")] += delta
    assert_is(merged, expected)


@pytest.mark.parametrize("parts", [(0,), (1,), (2,), (0, 1), (0, 2)], ids=repr)
@pytest.mark.parametrize("attention", [False, True])
def test_parts_and_experts_that_are_missing_are_zero(tmp_path: Path, parts: tuple[int, ...], attention: bool) -> None:
    single = single_adapter(tmp_path / "single", experts=[2, 0], parts=parts, attention=attention)
    fused = fused_adapter(tmp_path / "fused", attention=attention)
    for order in ([single, fused], [fused, single]):
        assert_is(fl.merge(fl.Pool.load(order), method="cat"), combined([(1, single), (1, fused)]))


def test_operators_and_expressions(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    a, b = (fl.load(p) for p in pair)
    assert_is(a + b, combined([(1, pair[0]), (1, pair[1])]))
    assert_is(fl.add([a, b, a], [1.0, 2.0, 0.5]), combined([(1.5, pair[0]), (2, pair[1])]))
    assert any("take" in note for note in (0.5 * a - b).notes)
    run("compose", "a - 0.5*b", f"a={pair[0]}", f"b={pair[1]}", "--out", tmp_path / "out")
    assert_is(fl.load(tmp_path / "out"), combined([(1, pair[0]), (-0.5, pair[1])]))
    zero = fl.compose("a + b - add(a, b)", {"a": pair[0], "b": pair[1]})
    assert max(float(zero.delta(m).abs().max()) for m in zero.modules) <= SUMS32


def test_overlap_compares_one_weight(pair: tuple[Path, Path]) -> None:
    one, two = (fused_deltas(p) for p in pair)
    inner = sum(float((one[m] * two[m]).sum()) for m in one)
    norms = [sum(float(d.square().sum()) for d in x.values()) ** 0.5 for x in (one, two)]
    cosine = fl.overlap(fl.Pool.load(pair)).cosine
    assert float(cosine[0, 1]) == pytest.approx(inner / (norms[0] * norms[1]), abs=SUMS32)


def test_decomposition_of_both_forms(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    run("decompose", *pair, "--threshold", "0.05", "--out", tmp_path / "out")
    parts = fl.decompose(fl.Pool.load(pair), threshold=0.05)
    for path in pair:
        expected = fused_deltas(path)
        shared, unique = parts.shared_of(path.name), parts.unique_of(path.name)
        assert set(fl.load(tmp_path / "out" / "unique" / path.name).modules) == set(expected)
        for module, delta in expected.items():
            total = shared.delta(module).double() + unique.delta(module).double()
            torch.testing.assert_close(total, delta, rtol=0, atol=SUMS32 * float(delta.abs().max()))


def test_modulation_with_another_form(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    a, b = (fl.load(p) for p in pair)
    moved = fl.modulate(a, fl.dipm.interpolate(b, 1.0), granularity="matrix")
    one, two = (fused_deltas(p) for p in pair)
    assert set(one) == set(two)
    assert_is(moved, two, SUMS32)
    run("modulate", pair[0], "--op", f"interpolate:{pair[1]}:1", "--granularity", "matrix", "--out", tmp_path / "out")
    assert_is(fl.load(tmp_path / "out"), two, SUMS32)


def test_two_of_the_same_form_stay_as_they_are(tmp_path: Path) -> None:
    a, b = single_adapter(tmp_path / "a"), single_adapter(tmp_path / "b", seed=8)
    merged = fl.merge(fl.Pool.load([a, b]), method="cat")
    assert merged.modules == fl.load(a).modules and not any("take" in n for n in merged.notes)


def test_sums_of_sums_in_both_forms(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    third = single_adapter(tmp_path / "third", seed=9)
    a, b, c = (fl.load(p) for p in (*pair, third))
    expected = combined([(1, pair[0]), (-1, third), (0.25, pair[1])])
    assert_is(a - c + 0.25 * b, expected)
    assert_is((a - c + 0.25 * b).compress(rank=12), expected, SUMS32)


def test_both_forms_in_one_adapter_are_refused(tmp_path: Path) -> None:
    both = fused_tensors(fused_layer()) | peft_tensors({f"{WHERE}mlp.experts.0.up_proj": factors(INNER, HIDDEN, 1)})
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    config = make_config(r=RANK, lora_alpha=ALPHA, target_modules=["up_proj"], target_parameters=parameters)
    mixed = write_peft(tmp_path / "mixed", both, config)
    with pytest.raises(fl.InputError, match=r"both for single experts.*experts\.0\.up_proj.*together"):
        fl.Pool.load([mixed, fused_adapter(tmp_path / "fused")])


def test_too_many_experts_are_refused(tmp_path: Path) -> None:
    single = single_adapter(tmp_path / "single", experts=[0, 5])
    with pytest.raises(fl.InputError, match=r"expert 5 of .*block_sparse_moe.experts, and .* has 3"):
        fl.Pool.load([single, fused_adapter(tmp_path / "fused")])


def test_fused_parameters_that_are_not_known_are_refused(tmp_path: Path) -> None:
    where = f"{WHERE}block_sparse_moe.experts"
    tensors = peft_tensors({where: (torch.ones(24, 6), torch.ones(6, 16))})
    config = make_config(r=RANK, lora_alpha=ALPHA, target_modules=[], target_parameters=["experts.weights"])
    other = write_peft(tmp_path / "other", tensors, config)
    single = single_adapter(tmp_path / "single")
    for order in ([other, single], [single, other]):
        with pytest.raises(fl.InputError, match=r"single experts .*w1.*experts\.weights"):
            fl.Pool.load(order)


def test_rows_in_turn_are_refused_by_name(tmp_path: Path) -> None:
    single = single_adapter(tmp_path / "single", kind="qwen")
    config = json.loads((single / "adapter_config.json").read_text())
    (single / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "openai/gpt-oss-20b"}))
    with pytest.raises(fl.InputError, match=r"gpt-oss-20b.*gate and up in turn"):
        fl.Pool.load([single, fused_adapter(tmp_path / "fused")])


def test_peft_loads_the_sum_of_both_forms(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    run("merge", *pair, "--method", "cat", "--out", tmp_path / "out")
    one, two = (changes(mixtral(), p) for p in pair)
    found = changes(mixtral(), tmp_path / "out")
    assert len(found) == 3 and found.keys() == one.keys() == two.keys()
    for name, change in found.items():
        expected = one[name] + two[name]
        torch.testing.assert_close(change, expected, rtol=0, atol=SUMS32 * float(expected.abs().max()))


@pytest.mark.parametrize("order", [("mixtral", "qwen"), ("qwen", "mixtral")])
def test_two_spellings_of_single_experts_are_one(tmp_path: Path, order: tuple[str, str]) -> None:
    a, b = (single_adapter(tmp_path / kind, seed, kind) for seed, kind in enumerate(order, 3))
    merged = fl.merge(fl.Pool.load([a, b]), method="cat")
    assert merged.modules == fl.load(a).modules
    merged.save(tmp_path / "out")
    assert_same_fused(tmp_path / "out", combined([(1, a), (1, b)]))
    assert_same_fused((fl.load(a) - 2 * fl.load(b)).save(tmp_path / "sum"), combined([(1, a), (-2, b)]))


def assert_same_fused(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    found = fused_deltas(folder)
    assert found.keys() == expected.keys()
    for module, delta in expected.items():
        torch.testing.assert_close(found[module], delta, rtol=0, atol=SUMS32 * float(delta.abs().max()))
