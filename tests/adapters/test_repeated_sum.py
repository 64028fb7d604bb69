"""Sums that are written again with other weights: the bits of sums that are made anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import MODULES, make_adapter, shared_pool
from compiled import ON_HOST
from safetensors.torch import load_file

import fastlora as fl
from fastlora import formats
from fastlora.adapters.repeated_sum import RepeatedSum
from fastlora.expressions.compose import evaluated, restated
from fastlora.ops.dispatch import use_backend

FILES = "adapter_model.safetensors", "adapter_config.json", "README.md"
RAGGED = {module: 1 + i for i, module in enumerate(MODULES)}
OTHERWISE = {module: 4 - i for i, module in enumerate(MODULES)}
WEIGHTS = [(0.7, 0.3), (-0.25, 1.0), (1.0, -1.0), (3.0, 1e-3)]


def loaded(folder: Path, *ranks: Any, dtype: torch.dtype = torch.float32, **fields: Any) -> list[fl.Adapter]:
    """An adapter of each rank, or of ranks by module."""
    for i, rank in enumerate(ranks):
        make_adapter(folder / f"in{i}", rank=rank, seed=i + 1, dtype=dtype, alpha=3 + 2 * i, **fields)
    return [fl.load(folder / f"in{i}", f"in{i}") for i in range(len(ranks))]


def terms(adapters: Sequence[fl.Adapter], weights: Sequence[float]) -> list[tuple[float, fl.Adapter]]:
    return list(zip(weights, adapters, strict=True))


def summed(adapters: Sequence[fl.Adapter], weights: Sequence[float]) -> fl.Adapter:
    return fl.Adapter.weighted_sum(terms(adapters, weights))


def anew(mix: fl.Adapter, most_rank: int, uniform_rank: bool | None, folder: Path) -> Path:
    """As it is written without anything from before."""
    cut = mix.compress(most_rank) if max(u.rank for u in mix.updates.values()) > most_rank else mix
    formats.write_adapter(cut, folder, uniform_rank=uniform_rank)
    return folder


def contents(folder: Path) -> list[bytes]:
    return [(folder / file).read_bytes() for file in FILES]


@pytest.mark.parametrize("backend", ON_HOST)
@pytest.mark.parametrize(
    ("ranks", "dtype", "most_rank", "uniform_rank"),
    [
        ((4, 4), torch.bfloat16, 16, None),
        ((4, 4), torch.bfloat16, 5, None),
        ((RAGGED, OTHERWISE), torch.float32, 4, None),  # every module is split in its own way
        ((RAGGED, 3), torch.float32, 4, True),
    ],
)
def test_the_bits_are_those_of_sums_that_are_made_anew(
    tmp_path: Path, backend: str, ranks: Any, dtype: torch.dtype, most_rank: int, uniform_rank: bool | None
) -> None:
    adapters = loaded(tmp_path, *ranks, dtype=dtype)
    with use_backend(backend):
        first = summed(adapters, WEIGHTS[0])
        kept = RepeatedSum.of(first, terms(adapters, WEIGHTS[0]), most_rank, uniform_rank)
        assert kept is not None
        for i, weights in enumerate(WEIGHTS):
            # A long name takes more pages of a header, so that tensors lie elsewhere in the file.
            mix = replace(summed(adapters, weights), name=f"{'long ' * 1000 * (i == 1)}sum {i}")
            mix = replace(mix, provenance={"expression": mix.name})
            result = kept.at(mix, weights)
            assert result is not None
            again = tmp_path / f"again {i}"
            kept.write(result, weights, again)
            assert contents(again) == contents(anew(mix, most_rank, uniform_rank, tmp_path / f"anew {i}"))


@pytest.mark.parametrize("most_rank", [16, 4])
@pytest.mark.parametrize(
    "text",
    [
        "{}*a - {}*unique(b | a)",
        "{}*unique(a | b, c) + {}*shared(a, b)",
        "{}*a + {}*compress(b, 2)",
        "{}*a - {}*unique(a | c)",  # a stored matrix twice
        "{}*a + {}*compress(zero, 2)",  # an update of rank 0 beside one alone
        "{}*(a + b) - {}*unique(c | a, b)",
    ],
)
def test_results_of_functions_are_added_up_with_other_weights(tmp_path: Path, text: str, most_rank: int) -> None:
    """To the rounding of small matrices in float64: as good as never seen in a file."""
    paths = shared_pool(tmp_path, 3, rank=4, shared=2)
    adapters: dict[str, fl.Adapter] = {name: fl.load(path, name) for name, path in zip("abc", paths, strict=True)}
    adapters["zero"] = fl.load(make_adapter(tmp_path / "zero"), "zero")
    for update in adapters["zero"].updates.values():
        update.B.terms[0].source.zero_()
    first = text.format(1, 0.5)
    mix, parts = evaluated(first, adapters)
    assert isinstance(mix, fl.Adapter)
    own = [(w, a) for w, a in parts if isinstance(a, fl.Adapter)]
    kept = RepeatedSum.of(mix, own, most_rank)
    assert kept is not None
    for i, numbers in enumerate([(1, 0.5), (0.3, 0.7), (2, 0.125)]):
        spelled = text.format(*numbers)
        wanted, parts = evaluated(spelled, adapters)
        assert isinstance(wanted, fl.Adapter)
        weights = [w for w, _ in parts]
        result = kept.at(restated(mix, spelled, weights), weights)
        assert result is not None and kept.nbytes > 0
        again = tmp_path / f"again {i}"
        kept.write(result, weights, again)
        fresh = anew(wanted, most_rank, None, tmp_path / f"anew {i}")
        assert contents(again)[1] == contents(fresh)[1]
        one, other = load_file(again / FILES[0]), load_file(fresh / FILES[0])
        assert list(one) == list(other)
        for name, tensor in one.items():
            torch.testing.assert_close(tensor, other[name], rtol=1e-6, atol=1e-6 * float(tensor.abs().max()))


def test_three_adapters_and_what_a_cut_keeps(tmp_path: Path) -> None:
    adapters = loaded(tmp_path, 2, 3, 2)
    kept = RepeatedSum.of(summed(adapters, (1.0, 1.0, 1.0)), terms(adapters, (1.0, 1.0, 1.0)), 4)
    assert kept is not None and kept.nbytes > 0
    weights = (0.5, -0.3, 2.0)
    mix = summed(adapters, weights)
    result, exact = kept.at(mix, weights), mix.compress(4)
    assert result is not None and result.provenance == exact.provenance and result.details == exact.details
    kept.write(result, weights, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(anew(mix, 4, None, tmp_path / "anew"))


def test_other_ranks_than_the_first_are_left_to_others(tmp_path: Path) -> None:
    """``a − a'`` with ``a'`` equal to ``a`` is zero, and of rank 0."""
    for name in ("a", "b"):
        make_adapter(tmp_path / name, rank=3, seed=5)
    adapters = [fl.load(tmp_path / name) for name in ("a", "b")]
    kept = RepeatedSum.of(summed(adapters, (0.5, 0.3)), terms(adapters, (0.5, 0.3)), 4)
    assert kept is not None
    for weights, there in [((0.5, 0.3), True), ((1.0, -1.0), False), ((2.0, 1.0), True)]:
        mix = summed(adapters, weights)
        result = kept.at(mix, weights)
        assert (result is not None) == there
        if result is not None:
            kept.write(result, weights, tmp_path / f"{weights}")
            assert contents(tmp_path / f"{weights}") == contents(anew(mix, 4, None, tmp_path / f"anew {weights}"))


@pytest.mark.parametrize("weights", [(1e-13, 1.0), (1.0, 1e13)])
def test_weights_that_may_leave_the_range_are_left_to_others(tmp_path: Path, weights: tuple[float, float]) -> None:
    adapters = loaded(tmp_path, 2, 3)
    kept = RepeatedSum.of(summed(adapters, (1.0, 1.0)), terms(adapters, (1.0, 1.0)), 16)
    assert kept is not None and kept.at(summed(adapters, weights), weights) is None


def test_a_number_that_does_not_fit_is_told_as_ever(tmp_path: Path) -> None:
    adapters = loaded(tmp_path, 2, 2, dtype=torch.bfloat16)
    next(iter(adapters[1].updates.values())).B.terms[0].source[0, 0] = torch.inf
    kept = RepeatedSum.of(summed(adapters, (1.0, 1.0)), terms(adapters, (1.0, 1.0)), 16)
    assert kept is not None
    result = kept.at(summed(adapters, (1.0, 1.0)), (1.0, 1.0))
    assert result is not None
    with pytest.raises(fl.FastloraError, match=r"lora_B.weight does not fit bfloat16 \(NaN or Inf after rounding\)"):
        kept.write(result, (1.0, 1.0), tmp_path / "out")
    assert not (tmp_path / "out" / "adapter_config.json").exists()


@pytest.mark.parametrize("what", ["other modules", "float16", "too large"])
def test_what_nothing_can_be_kept_of(tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = torch.float16 if what == "float16" else torch.float32
    adapters = loaded(tmp_path, 2, 2, dtype=dtype)
    if what == "other modules":
        first = next(iter(MODULES))
        adapters[1] = replace(adapters[1], updates={m: u for m, u in adapters[1].updates.items() if m != first})
    if what == "too large":
        monkeypatch.setattr("fastlora.adapters.repeated_sum.PART_BYTES", 1000)
    assert RepeatedSum.of(summed(adapters, (1.0, 0.5)), terms(adapters, (1.0, 0.5)), 3) is None
