"""What kernels are asked for: each stored matrix once, and nothing that cannot be computed together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pools
import pytest
import torch
from builders import gaussian
from compiled import needs_kernels

import fastlora as fl
from fastlora import formats
from fastlora.backends import cpu
from fastlora.core.factors import Factor, Term, add, concatenate
from fastlora.core.updates import Layout, Update
from fastlora.engine import gram
from fastlora.engine import materialise as materialising
from fastlora.engine.combine_jobs import WantedFactor, combine_job
from fastlora.engine.gram import GramPass, read_gram
from fastlora.engine.materialise import materialise, materialise_factor, materialise_groups

B = gaussian(9, 3, seed=1)
SMALL = gaussian(3, 2, seed=2, dtype=torch.float64)


def test_a_matrix_behind_several_factors_is_there_once() -> None:
    whole, part = Factor.of("B", B), Factor.of("B", B).times(SMALL)
    again = Factor.of("B", B.view(9, 3))  # another tensor on the same memory
    outs = [torch.empty(9, f.rank) for f in (whole, part, again)]
    wanted = [WantedFactor(f, torch.float32, out) for f, out in zip((whole, part, again), outs, strict=True)]
    job = combine_job(wanted)
    assert len(job.factors) == 1 and not job.rows
    assert [o.out is out for o, out in zip(job.outputs, outs, strict=True)] == [True] * 3


def test_coefficients_are_used_where_they_lie() -> None:
    for factor, small in ((Factor.of("B", B), SMALL), (Factor.of("A", B.mT.contiguous()), SMALL.mT.contiguous().mT)):
        sum_of_two = add([factor.times(small), factor.times(small)])
        job = combine_job([WantedFactor(sum_of_two, torch.float32, torch.empty(sum_of_two.shape))])
        assert {c.data_ptr() for _, c, _, _ in job.outputs[0].terms if c is not None} == {small.data_ptr()}


def test_a_file_gets_a_stored_matrix_as_it_is_and_anything_else_computed() -> None:
    factors = Factor.of("B", B), Factor.of("B", B).times(SMALL), Factor.of("B", B.bfloat16()), Factor.of("B", B[:, :2])
    job = combine_job([WantedFactor(f, torch.float32, None, 64 * i) for i, f in enumerate(factors)])
    assert [o.out is None for o in job.outputs] == [False, True, True, True]  # the last lies with gaps
    assert [o.offset for o in job.outputs] == [0, 64, 128, 192] and all(o.check for o in job.outputs)


def updates_of_two_modules(scale: float = 1.0) -> list[Update]:
    return [
        Update(Factor.of("B", gaussian(n, 3, seed=n)).scaled(scale), Factor.of("A", gaussian(3, 14, seed=m)))
        for n, m in ((9, 2), (8, 3))
    ]


@pytest.mark.parametrize("scale", [1.0, 2.0], ids=["stored", "computed"])
def test_updates_of_different_modules_are_refused(scale: float) -> None:
    one, two = updates_of_two_modules(scale)
    with pytest.raises(fl.InputError, match="of different modules: their factors have the lengths 8, 9"):
        materialise([one, two], torch.float32)
    (first,), (second,) = materialise_groups([[one], [two]], torch.float32)
    for (left, right), update in ((first, one), (second, two)):
        torch.testing.assert_close(left @ right, pools.exact(update).float())


EXPERT = Layout("expert", container="experts.w1", expert=0, experts=2)
OTHERS = {
    "another kind": (Layout("embedding"), "one is of the kind 'linear' and another of the kind 'embedding'"),
    "another kernel": (Layout("conv", kernel=(2,)), r"another of a convolution \[2\]"),
    "an expert": (EXPERT, "another expert 0 of 2 of 'experts.w1'"),
}


@pytest.mark.parametrize("scale", [1.0, 2.0], ids=["stored", "computed"])
@pytest.mark.parametrize(("layout", "message"), OTHERS.values(), ids=OTHERS)
def test_updates_of_other_layouts_are_refused(layout: Layout, message: str, scale: float) -> None:
    """Also where their shapes are the same: what shares a group is one module's."""
    one, _ = updates_of_two_modules(scale)
    with pytest.raises(fl.InputError, match=message):
        materialise([one, replace(one, layout=layout)], torch.float32)
    assert len(materialise_groups([[one], [replace(one, layout=layout)]], torch.float32)) == 2


@pytest.mark.parametrize("change", [{"expert": 1}, {"container": "experts.w2"}, {"experts": 4}], ids=str)
def test_updates_of_other_experts_are_refused(change: dict[str, Any]) -> None:
    one, _ = updates_of_two_modules()
    with pytest.raises(fl.InputError, match=r"of different modules: one is expert 0 of 2 of 'experts\.w1' and"):
        materialise([replace(one, layout=EXPERT), replace(one, layout=replace(EXPERT, **change))], torch.float32)


def test_updates_on_different_devices_are_refused() -> None:
    one, _ = updates_of_two_modules()
    away = Update(Factor.of("B", torch.empty(9, 3, device="meta")), Factor.of("A", torch.empty(3, 14, device="meta")))
    with pytest.raises(fl.InputError, match=r"on different devices \(cpu, meta\)"):
        materialise([one, away], torch.float32)


def test_factors_of_unequal_ranks_are_no_update() -> None:
    with pytest.raises(fl.InputError, match=r"do not fit: B is \[9, 2\] and A \[3, 14\]"):
        Update(Factor.of("B", B[:, :2]), Factor.of("A", gaussian(3, 14, seed=1)))


@needs_kernels
def test_factors_are_computed_as_their_jobs_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the core reads of factors itself gives the bits of the jobs that other backends take."""
    wide = gaussian(9, 8, seed=7)
    views = (
        Factor.of("B", B.view(9, 3)).times(SMALL),
        Factor.of("B", wide[:, ::2]).times(gaussian(4, 2, seed=8).double()),
    )
    stacked = concatenate([Factor.of("B", B).scaled(0.5), Factor.of("B", wide)])
    empty = Factor("B", 9, 2, (Term(B, torch.empty(3, 0, dtype=torch.float64)), Term(B, SMALL)))
    left = [
        Factor.of("B", B), Factor.of("B", B.bfloat16()), Factor.of("B", B).times(SMALL), add(views), stacked, empty,
        Factor("B", 9, 2, ()), Factor("B", 9, 0, ()), Factor("B", 9, 5, (Term(B, None, 1, -2.0), Term(B, SMALL, 3))),
    ]  # fmt: skip
    groups = [[Update(f, Factor.of("A", gaussian(f.rank, 14, seed=3)).scaled(2.0)) for f in left]]
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        found = []
        for shortcut in (materialising.shortcut, lambda *_: None):
            monkeypatch.setattr(materialising, "shortcut", shortcut)
            found.append(materialise_groups(groups, dtype))
            monkeypatch.undo()
        for one, other in zip(*([x for pair in f[0] for x in pair] for f in found), strict=True):
            assert torch.equal(one, other) and one.dtype == dtype


@needs_kernels
def test_blocks_of_stored_factors_are_those_of_their_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the core reads of factors itself, alone or side by side and scaled, gives the bits of the jobs, and zeros
    where nothing was asked for; other factors go by jobs, whatever the memory held."""
    wide = gaussian(9, 8, seed=7)
    stored = [Factor.of("B", x) for x in (B, wide[:, ::2], wide[:, :1], B.bfloat16(), wide[:, :0])]
    others = [Factor.of("A", x) for x in (B.mT, gaussian(2, 9, seed=1), gaussian(5, 9, seed=3, dtype=torch.float64))]
    summed = [stored[0], stored[1].scaled(2.0), concatenate([stored[0], stored[2]])]
    turned = [stored[0], stored[1].times(gaussian(4, 2, seed=8, dtype=torch.float64)), stored[2]]
    core = cpu._core.GramFactors
    for factors in (stored, others, summed, turned):
        k, taken = len(factors), []
        asked = [(i, j) for i in range(k) for j in range(i, k) if (i, j) != (0, 1)]

        def noted(*arguments: Any, taken: list[bool] = taken) -> bool:
            taken.append(core(*arguments).run(2))
            return taken[-1]

        found = []
        for shortcut in (lambda *given: noted(given[-1], torch.Tensor), lambda *_: None):
            with monkeypatch.context() as patch:
                patch.setattr(gram, "shortcut", shortcut)
                patch.setattr(gram, "_room", lambda *shape, device: torch.full(shape, torch.nan, dtype=torch.float64))
                grams = GramPass()
                answers = [
                    grams.blocks([factors, factors[::-1]], 8, asked),
                    grams.diagonal([factors], 8),
                    grams.products([factors], [factors[:1]], 8),
                ]
                grams.run()
                found.append(answers)
        assert taken == [factors is not turned]
        for one, other in zip(*found, strict=True):
            assert torch.equal(one, other)
        left = [(f.stored if f.stored is not None else materialise_factor(f, torch.float64)).double() for f in factors]
        x, y = (x if factors[0].side == "B" else x.mT for x in (left[0], left[2]))
        block = found[0][0][0, 0, 2]
        expected = torch.zeros(8, 8, dtype=torch.float64)
        expected[: x.shape[1], : y.shape[1]] = x.mT @ y
        assert torch.allclose(block, expected, atol=1e-12) and not found[0][0][0, 0, 1].any()


@needs_kernels
def test_blocks_that_would_not_fit_are_not_written() -> None:
    one, long = Factor.of("B", B), Factor.of("B", gaussian(12, 3, seed=5))
    crooked, out = Factor("B", 12, 3, (Term(B),)), torch.zeros(1, 2, 2, 3, 3, dtype=torch.float64)
    a_side = Factor.of("A", gaussian(3, 9, seed=1))
    for modules, memory, r, places in (
        ([[one, long]], out, 3, [(0, 1, 0)]),
        ([[one, a_side]], out, 3, [(0, 1, 0)]),
        ([[crooked, crooked]], out, 3, [(0, 0, 0)]),
        ([[one, one]], out, 2, [(0, 0, 0)]),
        ([[one, one]], out, 3, [(0, 2, 0)]),
        ([[one, one]], out, 3, [(0, 1, 28)]),
        ([[one, one], [one]], out, 3, [(0, 0, 0)]),
        ([[one, one]], out.float(), 3, [(0, 0, 0)]),
    ):
        assert not cpu._core.GramFactors([(modules, memory, r, places)], torch.Tensor).run(1)


def test_nothing_is_computed_where_one_factor_is_refused() -> None:
    good, bad = Factor.of("B", B).times(SMALL), Factor("B", 9, 2, (Term(B, SMALL, 1),))
    outs = [torch.zeros(9, 2) for _ in range(2)]
    with pytest.raises(fl.InputError, match="a term at 1 of width 2 does not fit"):
        materialising._compute([([good], outs[:1]), ([bad], outs[1:])], torch.device("cpu"))
    assert not any(out.any() for out in outs)


def test_a_pool_is_decomposed_as_it_is_by_then() -> None:
    """Nothing of an earlier call is kept: matrices that are changed in place, of other memory, dtypes and ranks, and
    modules that are replaced."""

    def made(seed: int, rank: int = 3, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        common = gaussian(20, rank, seed=1)
        return (common + 0.02 * gaussian(20, rank, seed=seed)).to(dtype), gaussian(rank, 12, seed=seed).to(dtype)

    def parts(pool: fl.Pool) -> list[torch.Tensor]:
        found = fl.decompose(pool, threshold=0.5)
        return [x for a in found.adapters().values() for pair in a.tensors().values() for x in pair]

    def check(**tensors: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        adapters = [{m: factors[i] for m, factors in tensors.items()} for i in range(2)]
        fresh = fl.Pool([fl.Adapter.from_tensors(t, name=f"a{i}") for i, t in enumerate(adapters)])
        assert all(torch.equal(x, y) for x, y in zip(parts(pool), parts(fresh), strict=True))

    q, v = [made(2), made(3)], [made(4), made(5)]
    pool = fl.Pool([fl.Adapter.from_tensors({"q": q[i], "v": v[i]}, name=f"a{i}") for i in range(2)])
    check(q=q, v=v)
    q[0][0].mul_(torch.linspace(0.5, 2.0, 20)[:, None])
    check(q=q, v=v)
    v[1], updates = made(6), pool["a1"].updates
    for x, y in zip((updates["v"].B.stored, updates["v"].A.stored), v[1], strict=True):
        assert x is not None
        x.set_(y.clone())  # type: ignore[call-overload]
    check(q=q, v=v)
    q[1] = made(7, rank=5, dtype=torch.bfloat16)
    assert isinstance(updates, dict)
    updates["q"] = Update(Factor.of("B", q[1][0]), Factor.of("A", q[1][1]))
    check(q=q, v=v)


LONG = gaussian(12, 3, seed=5)
FOREIGN = {
    "too short": (Factor("B", 12, 3, (Term(B, scale=2.0),)), r"length 12 has a term of shape \[9, 3\]"),
    "too long": (Factor("A", 9, 3, (Term(LONG.mT.contiguous()),)), r"length 9 has a term of shape \[3, 12\]"),
    "beyond its rank": (Factor("B", 9, 2, (Term(B),)), "a term at 0 of width 3 does not fit into a factor B of rank 2"),
    "behind its rank": (Factor("B", 9, 4, (Term(B, at=2),)), "a term at 2 of width 3"),
    "a wide coefficient": (Factor("B", 9, 1, (Term(B, SMALL),)), "a term at 0 of width 2"),
    "a tall coefficient": (Factor("B", 9, 2, (Term(B, gaussian(4, 2, seed=1, dtype=torch.float64)),)),
                           r"a coefficient \[4, 2\] does not fit its matrix \[9, 3\]"),
}  # fmt: skip


@pytest.mark.parametrize(("factor", "message"), FOREIGN.values(), ids=FOREIGN)
def test_terms_that_are_not_of_their_factor_are_refused(factor: Factor, message: str) -> None:
    """A kernel would read or write beyond the memory of a matrix."""
    for ask in (
        lambda: materialise_factor(factor, torch.float64),
        lambda: combine_job([WantedFactor(factor, torch.float64)]),
        lambda: read_gram([[factor, factor]], 4, [(0, 0), (0, 1), (1, 1)]),
    ):
        with pytest.raises(fl.InputError, match=message):
            ask()


def test_a_gram_pass_over_factors_of_different_lengths_is_refused() -> None:
    one, two = Factor.of("B", B), Factor.of("B", LONG)
    for factors in ([one, two], [one.times(SMALL), two], [one, one.scaled(2.0), two]):
        with pytest.raises(fl.InputError, match="their factors have the lengths 9, 12"):
            read_gram([factors], 3, [(0, 0), (0, 1)])


def test_saving_one_module_in_two_layouts_is_refused(tmp_path: Path) -> None:
    one, _ = updates_of_two_modules()
    adapters = [fl.Adapter("a", {"q": one}), fl.Adapter("b", {"q": replace(one, layout=Layout("embedding"))})]
    folders = [tmp_path / a.name for a in adapters]
    for folder in folders:
        folder.mkdir()
    with pytest.raises(fl.InputError, match="of different modules: one is of the kind 'linear'"):
        formats.write_adapters(dict(zip(folders, adapters, strict=True)), None, lambda: None)


def test_writing_one_module_in_two_shapes_is_refused() -> None:
    wanted = [WantedFactor(u.B, torch.float32) for u in updates_of_two_modules()]
    with pytest.raises(fl.InputError, match="of different modules"):
        combine_job(wanted)


def test_a_gram_pass_over_sums_is_not_prepared() -> None:
    """A plan would run the launches without what a sum needs afterwards."""
    grams = GramPass()
    grams.blocks([[Factor("B", 9, 3, (Term(B, scale=2.0),))]], 3, [(0, 0)])
    with pytest.raises(ValueError, match="over sums of matrices cannot be prepared"):
        grams.prepared()
