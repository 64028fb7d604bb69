"""Rules on elements of ``ΔW``: exact against the formulas where sums are exact, and bit for bit against themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from builders import gaussian, generator
from compiled import needs_same_bits
from factors import BACKENDS, at_odd_address
from tolerances import FLOAT64, SUMS32
from torch import Tensor

from fastlora.errors import InputError
from fastlora.ops import merge_tiles as op
from fastlora.ops.dispatch import use_backend
from fastlora.ops.merge_tiles import NOTHING, Cut, TileOutputs, TileResult, TileRule, TileTask
from fastlora.reference import merge_tiles as formula

KERNELS = [backend for backend in BACKENDS if backend != "reference"]
SAME_BITS = [backend for backend in KERNELS if backend != "torch"]  # torch's products sum in an order of their own
SHAPES = [(1, 1), (1, 300), (65, 1), (129, 65), (40, 200), (300, 130)]
"""Around the sizes of groups, panels and bands; the last is large enough for a sample."""

Pair = tuple[Tensor, Tensor] | None


def whole(*shape: int, seed: int, dtype: torch.dtype = torch.float32, most: int = 3) -> Tensor:
    """Integers, whose products and sums are exact in every dtype."""
    return torch.randint(-most, most + 1, shape, generator=generator(seed)).to(dtype)


def whole_task(shape: tuple[int, int], k: int = 4, dtype: torch.dtype = torch.float32) -> TileTask:
    """Updates of small integers: ragged ranks, several dtypes, a zero one, a duplicate."""
    n, m = shape
    stored = [torch.float32, torch.bfloat16, torch.float16, torch.float32]
    pairs: list[Pair] = []
    for i in range(k):
        r = (3, 1, 6, 17)[i % 4]
        kind = stored[i % 4]
        pairs.append((whole(n, r, seed=i, dtype=kind), whole(r, m, seed=50 + i, dtype=kind)))
    if k > 4:
        pairs[4], pairs[-1] = None, pairs[0]
    return TileTask(pairs, [1.0, -0.5, 2.0, 0.25][:k] + [1.0] * (k - 4), shape, dtype)


def gaussian_task(shape: tuple[int, int], dtype: torch.dtype, k: int = 3, size: float = 1.0) -> TileTask:
    n, m = shape
    pairs = [(gaussian(n, 5 + i, seed=i, dtype=dtype), gaussian(5 + i, m, seed=9 + i, dtype=dtype)) for i in range(k)]
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    return TileTask(pairs, [size, 0.7 * size, -1.3 * size][:k], shape, kind)


def dense(task: TileTask, rule: TileRule) -> Tensor:
    out = torch.full(task.shape, torch.nan, dtype=task.dtype)
    op.merge(task, rule, TileOutputs(dense=out))
    return out


def elements(task: TileTask) -> Tensor:
    """``x_i`` as the backend forms them: ``[k, n, m]``."""
    k = len(task.pairs)
    return torch.stack([dense(task, TileRule(gains=[float(j == i) for j in range(k)])) for i in range(k)])


def ranks_of(task: TileTask, densities: Sequence[float]) -> list[tuple[int, int]]:
    size = task.shape[0] * task.shape[1]
    return [(i, int(d * size)) for i, d in enumerate(densities)]


def held_by(sizes: Tensor, cut: Cut) -> Tensor:
    return formula.held(sizes, cut.magnitude, cut.order)


DENSITIES = [(0.2,) * 5, (0.0, 1.0, 0.001, 0.999, 0.5), (1.0,) * 5]


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("densities", DENSITIES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cuts_hold_the_first_of_equals(
    shape: tuple[int, int], densities: tuple[float, ...], dtype: torch.dtype, backend: str
) -> None:
    """Small integers: most magnitudes occur many times."""
    task = whole_task(shape, 5, dtype)
    ranks = ranks_of(task, densities)
    with use_backend(backend):
        found = op.select(task, ranks)
        varied = op.select(task, [(0, ranks[0][1])], "variance")[0]
    x = formula.elements(task.pairs, task.scales, shape)
    for cut, (i, q) in zip(found, ranks, strict=True):
        kept = held_by(x[i].abs(), cut)
        assert torch.equal(kept, held_by(x[i].abs(), Cut(*formula.cut(x[i].abs(), q)))) or cut.magnitude == 0.0
        assert int(kept.sum()) == q or cut.magnitude == 0.0  # which zeros are kept makes no difference
    if dtype == torch.float64 and varied.magnitude > 0:
        variance = formula.variance(x)
        assert varied.magnitude == pytest.approx(formula.cut(variance, ranks[0][1])[0], rel=FLOAT64)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1.0, 1e-18, 1e15])
def test_cuts_are_exact(dtype: torch.dtype, size: float, backend: str) -> None:
    """The ``q``-th of the elements that the same backend forms, far from powers of two and among denormal numbers."""
    task = gaussian_task((260, 150), dtype, size=size * (1e-22 if size < 1 else 1.0))
    for densities in ((0.2, 0.5, 0.9), (1e-4, 0.01, 0.37)):
        with use_backend(backend):
            found, x = op.select(task, ranks_of(task, densities)), elements(task).abs()
        for cut, (i, q) in zip(found, ranks_of(task, densities), strict=True):
            assert cut.magnitude == float(x[i].flatten().sort(descending=True).values[q - 1])
            assert int(held_by(x[i], cut).sum()) == q


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_places_that_vary_are_counted(shape: tuple[int, int], dtype: torch.dtype, backend: str) -> None:
    """All of them, and those whose variance is above one that some have; a mean of four integers is exact."""
    with use_backend(backend):
        task = whole_task(shape, dtype=dtype)
        variances = formula.variance(elements(task).double())
        assert op.count_varied(task) == int((variances > 0).sum())
        least = float(variances.median())
        assert op.count_varied(task, least) == int((variances > least).sum())


def misleading(kind: str) -> TileTask:
    """Updates whose regular rows and columns say nothing of the others."""
    left, right = gaussian(400, 4, seed=1), gaussian(4, 300, seed=2)
    if kind == "rows":
        left[3::6] *= 1e3
        left[4::6] = 0
    elif kind == "one row":
        left[:-1] = 0
    elif kind == "equal":
        left, right = torch.ones(400, 1), torch.ones(1, 300)
    elif kind == "two values":
        left, right = torch.ones(400, 1), torch.ones(1, 300)
        left[7] = 2
    elif kind == "zero":
        left[:] = 0
    return TileTask([(left, right)], [1.0], (400, 300), torch.float32)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("kind", ["rows", "one row", "equal", "two values", "zero"])
def test_samples_that_mislead_cost_time_alone(kind: str, backend: str) -> None:
    task = misleading(kind)
    with use_backend(backend):
        x = elements(task)[0].abs()
        for q in (0, 1, 299, 300, 301, 24_001, 119_999, 120_000):
            (cut,) = op.select(task, [(0, q)])
            magnitude, order = formula.cut(x, q)
            assert cut.magnitude == magnitude
            assert torch.equal(held_by(x, cut), held_by(x, Cut(magnitude, order))) or magnitude == 0.0


def rule_of(task: TileTask, name: str) -> TileRule:
    """One rule of every kind; cuts and masks are those of the backend in use."""
    k, size = len(task.pairs), task.shape[0] * task.shape[1]
    gains, votes = [1.0, 2.0, -0.5, 1.5, 1.0][:k], [1.0, 1.0, -1.0, 2.0, 1.0][:k]
    keys, module = [op.key_of(7, f"a{i}") for i in range(k)], op.key_of("model.layers.0.q_proj")

    def cuts(share: int, step: int = 1) -> list[Cut]:
        return op.select(task, [(i, size // (share + step * i)) for i in range(k)])

    def random(density: float) -> TileRule:
        return TileRule("random", keep=[op.bound_of(density)] * k, keys=keys, module_key=module, gains=gains)

    ties = TileRule("magnitude", [NOTHING] * k, elect="total", votes=[1.0] * k, gains=gains, shares=[1.0] * k)
    make: dict[str, Callable[[], TileRule]] = {
        "sum": lambda: TileRule(gains=gains, scale=0.5),
        "mean": lambda: TileRule(gains=gains, shares=[1.0] * k),
        "magnitude": lambda: TileRule("magnitude", cuts(2), gains=gains),
        "breadcrumbs": lambda: TileRule("magnitude", cuts(2), cuts(20, 0), gains=gains),
        "nothing": lambda: ties,
        "ties": lambda: replace(ties, low=cuts(2)),
        "ties, sum, minus": lambda: replace(ties, low=cuts(2), shares=None, zero=-1),
        "ties, weighted": lambda: replace(ties, low=cuts(2), votes=votes, gains=votes, shares=votes, least=1e-30),
        "ties, frequency": lambda: replace(ties, low=cuts(2), elect="frequency"),
        "dare": lambda: random(0.3),
        "dare, all": lambda: random(1.0),
        "della": lambda: replace(ties, trim="bits", bits=op.row_masks(task, [(0.1, 0.4)] * k, keys, module)),
        "sce": lambda: replace(
            ties, trim="variance", low=op.select(task, [(0, size // 3)], "variance"), least=1e-6, instead=1e-6
        ),
    }
    return make[name]()


NAMES = [
    "sum", "mean", "magnitude", "breadcrumbs", "nothing", "ties", "ties, sum, minus", "ties, weighted",
    "ties, frequency", "dare", "dare, all", "della", "sce",
]  # fmt: skip


def outcome(task: TileTask, name: str, dtype: torch.dtype) -> tuple[Tensor, TileResult]:
    out = torch.full(task.shape, torch.nan, dtype=dtype)
    return out, op.merge(task, rule_of(task, name), TileOutputs(dense=out, sums=True))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rules_are_their_formulas(shape: tuple[int, int], name: str, dtype: torch.dtype, backend: str) -> None:
    """Sums of small integers are exact: only the divisions round."""
    task = whole_task(shape, 4 if name == "sce" else 5, dtype)  # a quarter of integers is exact, too
    with use_backend(backend):
        found, told = outcome(task, name, dtype)
    with use_backend("reference"):
        expected, exact = outcome(task, name, torch.float64)
    tolerance = 3 * torch.finfo(dtype).eps  # a quotient and two products
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=0)
    assert told.square == pytest.approx(exact.square, rel=10 * tolerance)
    assert told.sums is not None and exact.sums is not None
    torch.testing.assert_close(told.sums, exact.sums, rtol=FLOAT64, atol=0)
    if "ties" in name:
        assert (told.undecided, told.majority) == (exact.undecided, exact.majority)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("k", [1, 2, 3, 6, 8, 11])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_any_number_of_updates_in_any_dtype(k: int, dtype: torch.dtype, backend: str) -> None:
    shape = 70, 90
    pairs = [(gaussian(70, 4, seed=i, dtype=dtype), gaussian(4, 90, seed=30 + i, dtype=dtype)) for i in range(k)]
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    task = TileTask(pairs, [1.0 + 0.1 * i for i in range(k)], shape, kind)
    rule = TileRule(elect="total", votes=[1.0] * k, gains=[1.0] * k, shares=[1.0] * k)
    with use_backend(backend):
        cuts = op.select(task, [(i, 1260) for i in range(k)])
        rule = replace(rule, trim="magnitude", low=cuts)
        found = dense(task, rule)
    x = formula.elements(pairs, task.scales, shape)
    v = torch.stack(
        [torch.where(held_by(x[i].abs(), op.Cut(*formula.cut(x[i].abs(), 1260))), x[i], 0.0) for i in range(k)]
    )
    expected, _ = formula.merged(
        v, elect="total", votes=[1.0] * k, gains=[1.0] * k, shares=[1.0] * k, least=0.5, instead=1.0, scale=1.0, zero=1
    )
    atol = (FLOAT64 if kind == torch.float64 else SUMS32) * float(x.abs().max())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("backend", KERNELS)
def test_products_with_thin_matrices(backend: str) -> None:
    task = gaussian_task((300, 170), torch.float32)
    for width in (1, 8, 19):
        right, left = (
            gaussian(170, width, seed=1, dtype=torch.float64),
            gaussian(300, width, seed=2, dtype=torch.float64),
        )
        with use_backend(backend):
            rule = rule_of(task, "ties")
            M = dense(task, rule).double()
            first = op.merge(task, rule, TileOutputs(right=right))
            second = op.merge(task, rule, TileOutputs(left=left))
        assert first.product is not None and second.product is not None
        size = float(M.abs().max()) * 300
        torch.testing.assert_close(first.product, M @ right, rtol=0, atol=FLOAT64 * size)
        torch.testing.assert_close(second.product, M.mT @ left, rtol=0, atol=FLOAT64 * size)
        for told in (first, second):
            assert told.square == pytest.approx(float(M.square().sum()), rel=FLOAT64)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_a_base_takes_the_merge_rounded_once(dtype: torch.dtype, backend: str) -> None:
    task = whole_task((67, 131))
    base = gaussian(67, 140, seed=5, dtype=dtype)
    out = base.clone()
    with use_backend(backend):
        M = dense(task, rule_of(task, "ties"))
        op.merge(task, rule_of(task, "ties"), TileOutputs(dense=out[:, 4:135], add=True))
    assert torch.equal(out[:, :4], base[:, :4]) and torch.equal(out[:, 135:], base[:, 135:])
    assert torch.equal(out[:, 4:135], (base[:, 4:135].to(torch.promote_types(dtype, torch.float32)) + M).to(dtype)) or (
        dtype == torch.float64  # sums of the rule are float32 there: so is the base that it is added to
    )


@needs_same_bits
@pytest.mark.parametrize("backend", SAME_BITS)
@pytest.mark.parametrize("name", NAMES)
def test_bits_do_not_depend_on_threads(name: str, backend: str, threads: Any) -> None:
    task = gaussian_task((300, 190), torch.bfloat16)
    left = gaussian(300, 9, seed=2, dtype=torch.float64)
    found = []
    with use_backend(backend):
        for count in (1, 2, 3):
            threads(count)
            rule = rule_of(task, name)
            product = op.merge(task, rule, TileOutputs(left=left)).product
            assert product is not None
            found.append((product, *outcome(task, name, torch.float32)))
    for product, out, told in found[1:]:
        assert torch.equal(product, found[0][0]) and torch.equal(out, found[0][1])
        assert told.square == found[0][2].square and torch.equal(told.sums, found[0][2].sums)  # type: ignore[arg-type]


@needs_same_bits
@pytest.mark.parametrize("backend", SAME_BITS)
def test_elements_do_not_depend_on_tiles(backend: str) -> None:
    """Any part of a module has the bits that it has in the whole."""
    task = gaussian_task((211, 203), torch.bfloat16)
    with use_backend(backend):
        x = elements(task)
        for rows, columns in (
            (slice(1, 2), slice(0, 203)),
            (slice(7, 150), slice(63, 130)),
            (slice(200, 211), slice(5, 6)),
        ):
            pairs = [None if p is None else (p[0][rows], p[1][:, columns]) for p in task.pairs]
            part = TileTask(pairs, task.scales, (rows.stop - rows.start, columns.stop - columns.start), task.dtype)
            assert torch.equal(elements(part), x[:, rows, columns])


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_factors_anywhere_in_memory(dtype: torch.dtype, backend: str) -> None:
    task = gaussian_task((50, 70), dtype, k=1)
    assert task.pairs[0] is not None
    B, A = task.pairs[0]
    wide = torch.zeros(50, 9, dtype=dtype)
    wide[:, 2:7] = B
    with use_backend(backend):
        x = elements(task)
        for pair in ((wide[:, 2:7], A.mT.contiguous().mT), (at_odd_address(B), at_odd_address(A))):
            assert torch.equal(elements(replace(task, pairs=[pair])), x)


def test_peft_has_the_same_ties() -> None:
    theirs = pytest.importorskip("peft.utils.merge_utils", reason="peft is not installed")
    task = gaussian_task((90, 80), torch.float32)
    weights = [0.5, -1.0, 2.0]
    for elect in ("total", "frequency"):
        for density in (0.1, 0.5):
            cuts = op.select(task, ranks_of(task, [density] * 3))
            rule = TileRule("magnitude", cuts, elect=elect, votes=[1.0] * 3, gains=weights, shares=[1.0] * 3)  # type: ignore[arg-type]
            expected = theirs.ties(list(elements(task)), torch.tensor(weights), density, elect)
            torch.testing.assert_close(dense(task, rule), expected, rtol=SUMS32, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_nothing_to_merge(shape: tuple[int, int], backend: str) -> None:
    task = TileTask([(torch.zeros(shape[0], 2), torch.zeros(2, shape[1])), None], [1.0, 1.0], shape, torch.float32)
    with use_backend(backend):
        assert op.select(task, [(0, 0)]) == [NOTHING]
        told = op.merge(task, TileRule(gains=[1.0, 1.0]), TileOutputs(right=torch.zeros(shape[1], 3).double()))
        assert told.square == 0.0 and told.product is not None and not told.product.any()
        assert op.count_varied(task) == 0


SUM = TileRule(gains=[1.0])


@pytest.mark.parametrize(("make", "error", "said"), [
    (lambda t: TileTask([None] * 1025, [1.0] * 1025, (2, 4), torch.float32), InputError, "1025 updates .* 1 to 1024"),
    (lambda t: op.select(t, [(0, -1)]), ValueError, "rank -1 of adapter 0: needed is 0 to 8"),
    (lambda t: op.select(t, [(1, 2)]), ValueError, "rank 2 of adapter 1"),
    (lambda t: op.merge(t, TileRule(), TileOutputs()), ValueError, "gains has 0 entries, needed are 1"),
    (lambda t: op.merge(t, TileRule("bits", gains=[1.0]), TileOutputs()), ValueError, "bits has 0 entries"),
    (lambda t: op.merge(t, SUM, TileOutputs(right=torch.zeros(4, 2))), ValueError, r"float64 \[4, l\]"),
    (lambda t: op.merge(t, SUM, TileOutputs(dense=torch.zeros(4, 2))), ValueError, r"dense must be \[2, 4\]"),
    (lambda t: replace(t, dtype=torch.float16), TypeError, "elements are float32 or float64"),
    (lambda t: replace(t, shape=(2, 5)), ValueError, r"factors \[2, 3\] and \[3, 4\] of a module \[2, 5\]"),
    (lambda t: replace(t, scales=[]), ValueError, "1 updates and 0 scales"),
    (lambda t: replace(t, pairs=[(t.pairs[0][0].double(), t.pairs[0][1])]), TypeError, "need elements in float64"),
])  # fmt: skip
def test_what_is_refused(make: Any, error: type[Exception], said: str) -> None:
    task = TileTask([(torch.ones(2, 3), torch.ones(3, 4))], [1.0], (2, 4), torch.float32)
    with pytest.raises(error, match=said):
        make(task)
