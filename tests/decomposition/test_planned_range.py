"""Results of a plan in a narrow dtype: they have the digits that saved results of a decomposition have."""

from __future__ import annotations

import warnings
from pathlib import Path

import pools
import pytest
import torch
from builders import gaussian
from pools import MODULE, Part
from torch import Tensor

import fastlora as fl
from fastlora.adapters.lora import Adapter

THRESHOLD = 0.5
SIDES = ["left", "right"]
# Both factors rounded to float16 once, 2⁻¹¹ of every entry, and as much again for entries below its normal numbers.
FLOAT16 = 2e-3


def common(left_size: float, right_size: float, scaling: float = 0.5, dtype: torch.dtype = torch.float32) -> fl.Pool:
    """Two adapters that share two directions on either side, of entries of these sizes; beside the module one whose
    sizes are ordinary."""
    parts = []
    for i in range(2):
        left, right = gaussian(48, 5, seed=10 + i), gaussian(5, 36, seed=20 + i)
        left[:, :2] = gaussian(48, 2, seed=1) + 0.1 * left[:, :2]
        right[:2] = gaussian(2, 36, seed=2) + 0.1 * right[:2]
        own: Part = ((left_size * left).to(dtype), (right_size * right).to(dtype), scaling)
        parts.append({MODULE: own, "ordinary": (0.1 * left.to(dtype), 0.2 * right.to(dtype), 1.0)})
    return fl.Pool(pools.make_adapter(f"a{i}", part) for i, part in enumerate(parts))


def planned(pool: fl.Pool, side: str, dtype: torch.dtype = torch.float16) -> fl.DecompositionPlan:
    plan = fl.DecompositionPlan(pool, THRESHOLD, side=side, dtype=dtype)
    plan.run()
    return plan


def right_values(pool: fl.Pool, side: str) -> dict[str, dict[str, Tensor]]:
    parts = fl.decompose(pool, THRESHOLD, side=side).adapters()
    assert parts["shared"].update(MODULE).rank == 2
    return {place: {m: pools.exact(part.update(m)) for m in part.modules} for place, part in parts.items()}


def error(found: Tensor, right: Tensor) -> float:
    return float((found - right).norm() / right.norm())


def require_digits(found: dict[str, Adapter], right: dict[str, dict[str, Tensor]], folder: Path, dtype: str) -> None:
    """What is saved, what is handed out as tensors, and what is looked at."""
    assert list(found) == list(right)
    bound = FLOAT16 if dtype == "float16" else 4 * torch.finfo(getattr(torch, dtype)).eps
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for place, adapter in found.items():
            saved, tensors = fl.load(adapter.save(folder / place)), adapter.tensors(dtype)
            for module, wanted in right[place].items():
                B, A = tensors[module]
                assert {str(x.dtype)[6:] for x in (B, A, saved.update(module).B.terms[0].source)} == {dtype}
                assert error(B.double() @ A.double(), wanted) < bound, (place, module)
                assert error(pools.exact(saved.update(module)), wanted) < bound, (place, module)
                assert error(pools.exact(adapter.update(module)), wanted) < bound, (place, module)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("left", "right"), [(1e-5, 1.0), (1.0, 1e-6), (1e-7, 1e2), (1e6, 1e-5), (1e-5, 1e6), (1, 1)])
def test_float16_results_have_their_digits(side: str, left: float, right: float, tmp_path: Path) -> None:
    pool = common(left, right)
    require_digits(planned(pool, side).adapters(), right_values(pool, side), tmp_path, "float16")


@pytest.mark.parametrize("side", SIDES)
def test_columns_of_many_sizes_have_their_digits(side: str, tmp_path: Path) -> None:
    pool = common(1e-2, 1.0)
    for adapter in pool.adapters:
        update, powers = adapter.updates[MODULE], torch.logspace(-14, 14, 5, base=2.0)
        update.B.terms[0].source.mul_(powers)
        update.A.terms[0].source.div_(powers[:, None])
    require_digits(planned(pool, side).adapters(), right_values(pool, side), tmp_path, "float16")


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extreme_scalings_leave_the_digits_of_wide_dtypes(side: str, dtype: torch.dtype, tmp_path: Path) -> None:
    pool = common(1.0, 1e36, 1e-42, dtype)
    plan = planned(pool, side, dtype)
    require_digits(plan.adapters(), right_values(pool, side), tmp_path, str(dtype)[6:])


def test_the_next_run_is_looked_at_anew(tmp_path: Path) -> None:
    plan = planned(common(1.0, 1.0), "left")
    before = plan.adapters()["unique/a0"].update(MODULE)
    assert before.B.stored is plan.unique_parts["a0"][MODULE]
    small = common(1e-6, 1.0)
    plan.fill(small)
    plan.run()
    require_digits(plan.adapters(), right_values(small, "left"), tmp_path, "float16")


@pytest.mark.parametrize("side", SIDES)
def test_what_lies_inside_the_range_is_the_memory_of_the_plan(side: str) -> None:
    """Also beside a module that does not, and in dtypes of a wide range, which nothing looks at."""
    for size, dtype in ((1e-6, torch.float16), (1.0, torch.float16), (1e-6, torch.bfloat16), (1e-6, torch.float32)):
        plan = planned(common(size, size), side, dtype)
        parts = plan.adapters()
        for module in ["ordinary"] if size < 1 and dtype == torch.float16 else ["ordinary", MODULE]:
            shared, unique = parts["shared"].update(module), parts["unique/a0"].update(module)
            Z = plan.shared_parts[module][0]
            assert (shared.B if side == "left" else shared.A).terms[0].source.data_ptr() == Z.data_ptr()
            assert (unique.B if side == "left" else unique.A).stored is plan.unique_parts["a0"][module]


def test_little_that_is_left_is_read_in_the_memory() -> None:
    """The small matrices do not tell its size, since most of it is shared."""
    left, right = gaussian(48, 5, seed=1), gaussian(5, 36, seed=2)
    for size in (1.0, 1e-3):
        near: Part = (size * (left + 0.01 * gaussian(48, 5, seed=3)), right, 1.0)
        plan = planned(pools.make_pool([(size * left, right, 1.0), near]), "left")
        found = plan.adapters()["unique/a1"].update(MODULE).B.stored
        assert (found is plan.unique_parts["a1"][MODULE]) == (size == 1.0)


def test_nothing_is_left_of_twins(tmp_path: Path) -> None:
    """What is unique of two equal adapters is rounding, and adapters of zeros have nothing: neither is told as lost."""
    part: Part = (gaussian(48, 5, seed=1), gaussian(5, 36, seed=2), 1.0)
    zero: Part = (torch.zeros(48, 5), gaussian(5, 36, seed=2), 1.0)
    for parts in ([part, part], [zero, zero], [part, zero]):
        pool = pools.make_pool(parts)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for place, adapter in planned(pool, "left").adapters().items():
                saved = fl.load(adapter.save(tmp_path / place, overwrite=True))
                wanted = pools.exact(fl.decompose(pool, THRESHOLD).adapters()[place].update(MODULE))
                found = pools.exact(saved.update(MODULE)) if MODULE in saved.modules else torch.zeros(48, 36)
                assert float((found - wanted).norm()) <= FLOAT16 * float(pools.dense(part).norm())


def test_digits_that_are_lost_all_the_same_are_told(tmp_path: Path) -> None:
    parts = planned(common(1e-5, 1e-6), "left").adapters()
    for place in ("shared", "unique/a0"):
        with pytest.warns(UserWarning, match=rf"{MODULE} is too small for float16.*change its ΔW by .* %; save"):
            parts[place].save(tmp_path / place)
        with pytest.warns(UserWarning, match="too small for float16"):
            parts[place].tensors("float16")
