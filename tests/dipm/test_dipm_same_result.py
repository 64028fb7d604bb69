"""Ways to one result: nothing to do, one call or several, other factors, groups, backends, and a saved file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pools
import pytest
import torch
from builders import make_adapter
from pools import MODULE
from test_dipm import CHAINS, GRANULARITIES, INPUTS, SIDES, R, adapters, close, got, part
from tolerances import FLOAT32, FLOAT64, SUBSPACE64
from torch import Tensor

import fastlora as fl
from fastlora.adapters.lora import Adapter
from fastlora.dipm import Operator
from fastlora.runtime import memory

IDENTITIES: dict[str, Callable[[Adapter, Adapter], list[Operator]]] = {
    "nothing": lambda a, b: [],
    "scale": lambda a, b: [fl.dipm.scale(1)],
    "shift": lambda a, b: [fl.dipm.shift(a, b, 0.0)],
    "shift-nowhere": lambda a, b: [fl.dipm.shift(b, b, 5.0)],
    "interpolate": lambda a, b: [fl.dipm.interpolate(b, 0.0)],
    "remove": lambda a, b: [fl.dipm.remove([b], 0.0)],
    "all": lambda a, b: [fl.dipm.scale(1.0), fl.dipm.shift(a, b, 0.0), fl.dipm.interpolate(b, 0)],
}


@pytest.mark.parametrize("identity", IDENTITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_identity_is_the_same_adapter_bit_for_bit(identity: str, dtype: torch.dtype, tmp_path: Path) -> None:
    # rsLoRA with a scaling of 4: what is written are B·4 and A, as for the adapter itself
    own = fl.load(make_adapter(tmp_path / "own", dtype=dtype, use_rslora=True))
    other = fl.load(make_adapter(tmp_path / "other", seed=1, dtype=dtype))
    operators = IDENTITIES[identity](own, other)
    for granularity in GRANULARITIES:
        assert fl.modulate(own, operators, granularity=granularity) is own
        assert fl.dipm.recombine(fl.dipm.decouple(own, granularity)) is own
    saved = fl.modulate(own, operators).save(tmp_path / "saved") / "adapter_model.safetensors"
    plain = own.save(tmp_path / "plain") / "adapter_model.safetensors"
    assert saved.read_bytes() == plain.read_bytes()
    unit = fl.load(make_adapter(tmp_path / "unit", dtype=dtype, alpha=4))
    written = fl.load(fl.modulate(unit, operators).save(tmp_path / "written"))
    for module in unit.modules:
        for side in ("B", "A"):
            assert torch.equal(getattr(written.update(module), side).stored, getattr(unit.update(module), side).stored)


def test_operators_that_only_scale_touch_no_factor() -> None:
    own, other, _ = adapters(*INPUTS["plain"])
    for granularity in GRANULARITIES:
        for on in SIDES:
            result = fl.modulate(own, [fl.dipm.reverse(0.5), fl.dipm.scale(3)], granularity=granularity, on=on)
            assert result.update(MODULE).scaling == -3.0 and result.update(MODULE).B is own.update(MODULE).B
    assert fl.modulate(own, fl.dipm.interpolate(other, 1.0), granularity="matrix").update(MODULE).rank == R


@pytest.mark.parametrize("on", SIDES)
@pytest.mark.parametrize("granularity", ["column", "matrix"])
def test_operators_in_one_call_or_one_after_the_other(granularity: str, on: str) -> None:
    own, other, third = adapters(*INPUTS["plain"])
    first, second = fl.dipm.shift(other, third, 0.4), fl.dipm.remove([third], 0.8)
    together = fl.modulate(own, [first, second], granularity=granularity, on=on)
    between = fl.modulate(own, first, granularity=granularity, on=on)
    one_by_one = fl.modulate(between, second, granularity=granularity, on=on)
    close(pools.exact(one_by_one.update(MODULE)), pools.exact(together.update(MODULE)))


def test_components_do_not_depend_on_the_factoring() -> None:
    parts = [part(i, dtype=torch.float64) for i in (1, 3, 5)]
    x = pools.mixing(R, 8)
    other = [(b @ x, torch.linalg.solve(x, a), s) for b, a, s in parts]
    for on in SIDES:
        for chain in (CHAINS["shift"], CHAINS["interpolate"]):
            one, two = (pools.exact(got(adapters(*p), chain, "component", on).update(MODULE)) for p in (parts, other))
            close(one, two, SUBSPACE64)


def test_saved_results_load_with_the_same_effect(tmp_path: Path) -> None:
    paths = [make_adapter(tmp_path / str(i), seed=i, rank=3 + i, dtype=torch.bfloat16) for i in range(3)]
    pool = [fl.load(p) for p in paths]
    result = fl.modulate(pool[0], [fl.dipm.shift(pool[1], pool[2], 0.5)])
    loaded = fl.load(result.save(tmp_path / "out", dtype="float32"))
    for module in result.modules:
        close(loaded.delta(module).double(), pools.exact(result.update(module)))
        norms = [pools.exact(x.update(module)).norm(dim=0) for x in (loaded, pool[0])]
        torch.testing.assert_close(*norms, rtol=FLOAT32, atol=0)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_results_do_not_depend_on_grouping_or_backend(granularity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {f"layer.{i}": [part(10 * i + j, rank=2 + (i + j) % 3) for j in range(3)] for i in range(5)}
    pool = [pools.make_adapter(f"a{j}", {m: p[j] for m, p in modules.items()}) for j in range(3)]

    def run() -> list[Tensor]:
        result = fl.modulate(
            pool[0], [fl.dipm.shift(pool[1], pool[2], 0.4), fl.dipm.reverse(2)], granularity=granularity
        )
        return [pools.exact(result.update(m)) for m in modules]

    found = run()
    for module, x in zip(modules, found, strict=True):
        alone = [pools.make_adapter(f"a{j}", {module: modules[module][j]}) for j in range(3)]
        single = fl.modulate(alone[0], fl.dipm.shift(alone[1], alone[2], 0.4), granularity=granularity)
        close(-2 * pools.exact(single.update(module)), x, FLOAT64)
    with monkeypatch.context() as patch, memory.bounded(1):  # one module at a time
        patch.setattr(memory, "LEAST", 1)
        assert all(torch.equal(x, y) for x, y in zip(run(), found, strict=True))
    with fl.use_backend("reference"):
        for x, y in zip(run(), found, strict=True):
            close(x, y)
