"""Merges, similarities, compositions and modulations on a CUDA device: those of the CPU, wherever the factors start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from builders import gaussian
from merge_calls import OF_TWO, data_of
from tolerances import MODEL32, SUMS32

import fastlora as fl
from fastlora.bench.workloads import Workload, make_pool
from fastlora.errors import BackendError
from fastlora.ops import merge_tiles
from fastlora.ops.add_products import ProductTask, Segment, add_products
from fastlora.ops.difference_products import difference_products
from fastlora.ops.merge_tiles import TileOutputs, TileRule, TileTask
from fastlora.ops.tucker import tucker

MODULES = {"q": (96, 64), "k": (32, 64), "up": (160, 64)}
WEIGHTS = {"adapter0": 0.5, "adapter1": -1.0, "adapter2": 2.0}


def pool(dtype: torch.dtype = torch.float32, rank: int = 8, count: int = 3) -> fl.Pool:
    return make_pool(Workload(MODULES, count, rank, dtype))


def require_same(found: fl.Adapter, wanted: fl.Adapter, tolerance: float = MODEL32) -> None:
    """By the norm of every ``ΔW``: an element is as far off as the rounding of all."""
    assert found.modules == wanted.modules
    for module in wanted.modules:
        size = float(wanted.delta(module).norm())
        error = float((found.to("cpu").delta(module) - wanted.delta(module)).norm())
        assert error <= tolerance * size, (module, error / size)


METHODS: dict[str, dict[str, Any]] = {
    **{name: {} for name in fl.methods()},
    "svd": {"rank": 4},
    "svd by energy": {"method": "svd", "energy": 0.9},
    "iso_c": {"rank": 4},
    **{name: {"rank": 64, "min_energy": 0.1} for name in ("ties", "sce")},
    **{name: {"rank": 64, "min_energy": 0.1, "density": 0.5} for name in ("breadcrumbs", "magnitude")},
    **{name: {"rank": 64, "min_energy": 0.1, "density": 0.5, "seed": 3} for name in ("dare", "della")},
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method(name: str) -> None:
    options = {"method": name} | METHODS[name]
    own = pool(count=2 if name in OF_TWO else 3)
    weights = {adapter: WEIGHTS[adapter] for adapter in own.names}
    data = data_of(options["method"], own)
    wanted = fl.merge(own, weights, data=data, **options)
    found = fl.merge(own.to("cuda"), weights, data=data, **options)
    assert found.device.type == "cuda"
    require_same(found, wanted)
    require_same(fl.merge(own, weights, data=data, device="cuda", **options), wanted)


@pytest.mark.parametrize("method", ["svd", "cat", "iso_c", "ties"])
def test_streamed_through_little_memory(method: str) -> None:
    options: dict[str, Any] = {"method": method, "rank": None if method == "cat" else 8}
    options |= {"min_energy": 0.1} if method == "ties" else {}
    found = fl.merge(pool(), WEIGHTS, device="cuda", memory="64KiB", **options)
    assert found.device == torch.device("cpu")
    require_same(found, fl.merge(pool(), WEIGHTS, **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_elements_and_cuts_are_those_of_the_cpu(dtype: torch.dtype) -> None:
    """Bit for bit: an element is a chain of fused multiply-adds on either, and cuts and counts are of those."""
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    pairs = [(gaussian(97, r, seed=r, dtype=dtype), gaussian(r, 130, seed=9 + r, dtype=dtype)) for r in (5, 1, 16)]
    results = []
    for device in ("cpu", "cuda"):
        task = TileTask([(B.to(device), A.to(device)) for B, A in pairs], [1.0, -0.5, 2.0], (97, 130), kind)
        cuts = merge_tiles.select(task, [(0, 900), (1, 5000), (2, 12000)])
        keys = [merge_tiles.key_of(7, i) for i in range(3)]
        given: dict[str, Any] = {"votes": [1.0, 1.0, 1.0], "gains": [1.0, 2.0, 0.5]}
        rules = [
            TileRule("magnitude", cuts, elect="total", **given, shares=[1.0, 1.0, 1.0]),
            TileRule("random", keep=[2**30] * 3, keys=keys, module_key=5, gains=given["gains"]),
            TileRule("bits", bits=merge_tiles.row_masks(task, [(0.1, 0.4)] * 3, keys, 5), elect="frequency", **given),
        ]
        made: list[Any] = [cuts, merge_tiles.count_varied(task)]
        for rule in rules:
            dense = torch.full((97, 130), torch.nan, dtype=kind, device=device)
            told = merge_tiles.merge(task, rule, TileOutputs(dense=dense))
            made += [dense.cpu(), told.undecided, told.majority, told.finite]
        results.append(made)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_base_takes_a_merge(dtype: torch.dtype) -> None:
    """In its own dtype, rounded once, and products with thin matrices from either side."""
    pairs = [(gaussian(97, 4, seed=i).cuda(), gaussian(4, 130, seed=9 + i).cuda()) for i in range(2)]
    task = TileTask(pairs, [1.0, -0.5], (97, 130), torch.float32)
    rule, base = TileRule(gains=[1.0, 1.0]), gaussian(97, 130, seed=5, dtype=dtype)
    total = sum(s * B.cpu().double() @ A.cpu().double() for s, (B, A) in zip(task.scales, pairs, strict=True))
    dense = base.cuda()
    merge_tiles.merge(task, rule, TileOutputs(dense=dense, add=True))
    allowed = torch.finfo(dtype).eps / 2 * (base.double() + total).abs() + SUMS32
    assert ((dense.cpu().double() - (base.double() + total)).abs() <= allowed).all()
    right, left = (gaussian(n, 3, seed=6, dtype=torch.float64) for n in (130, 97))
    found = merge_tiles.merge(task, rule, TileOutputs(right=right.cuda())).product
    torch.testing.assert_close(found.cpu(), total @ right, rtol=SUMS32, atol=20 * SUMS32)
    found = merge_tiles.merge(task, rule, TileOutputs(left=left.cuda())).product
    torch.testing.assert_close(found.cpu(), total.mT @ left, rtol=SUMS32, atol=20 * SUMS32)


def test_products_onto_a_stored_matrix() -> None:
    W, L, R = gaussian(97, 130, seed=1), gaussian(97, 4, seed=2), gaussian(4, 100, seed=3)
    made = []
    for device in ("cpu", "cuda"):
        own, task = W.to(device).clone(), [Segment(0, 30), Segment(30, 100, [(L.to(device), R.to(device))], [0.5])]
        assert add_products(ProductTask((97, 130), task, W.dtype, W.dtype), own, own) is None
        made.append(own.cpu())
    torch.testing.assert_close(made[1], made[0], rtol=SUMS32, atol=SUMS32)


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_products_of_a_difference(precision: Any) -> None:
    """More than a stretch of rows, which are summed in their order; the same bits on another stream."""
    old, new = (gaussian(1100, 70, seed=i, dtype=torch.bfloat16) for i in range(2))
    thin = [gaussian(n, 5, seed=n, dtype=torch.float64) for n in (70, 1100)]
    wanted = difference_products(old, new, *thin, square=True, precision="float64")
    there = [x.cuda() for x in (old, new, *thin)]
    found = difference_products(*there, square=True, precision=precision)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        again = difference_products(*there, square=True, precision=precision)
    stream.synchronize()
    for one, two, expected in zip(found, again, wanted, strict=True):
        if isinstance(one, torch.Tensor) and isinstance(expected, torch.Tensor):
            assert one.device.type == "cuda" and torch.equal(one, two)
            size = float(expected.abs().max())
            torch.testing.assert_close(one.cpu(), expected, rtol=SUMS32, atol=SUMS32 * size)
        else:
            assert one == two == pytest.approx(expected, rel=SUMS32)


@pytest.mark.parametrize("ranks", [[3, 1, 8, 5] * 9, [64, 64, 20], [70, 4, 70]], ids=["tiles", "one each", "wide"])
def test_all_pairs(ranks: list[int]) -> None:
    """Tiles of many adapters, of one, and adapters wider than a tile."""
    adapters = [
        fl.Adapter.from_tensors(
            {m: (gaussian(n, r, seed=i), gaussian(r, w, seed=99 + i)) for m, (n, w) in {"q": (90, 80)}.items()},
            name=f"a{i}",
        )
        for i, r in enumerate(ranks)
    ]
    own = fl.Pool(adapters)
    wanted, found = fl.overlap(own), fl.overlap(own, device="cuda")
    torch.testing.assert_close(found.cosine, wanted.cosine, rtol=SUMS32, atol=SUMS32)
    torch.testing.assert_close(found.subspace, wanted.subspace, rtol=SUMS32, atol=SUMS32)


EXPRESSIONS = [
    "0.6*a + 0.4*b - 0.3*unique(c | a, b)",
    "compress(a - shared(a, b, threshold=0.3), 2)",
    "negate(compress(a, energy=0.9), 0.5) + analogy(a, b, c)",
]


@pytest.mark.parametrize("memory", [None, "64KiB"])
@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_compose(expression: str, memory: str | None) -> None:
    named = dict(zip("abc", pool().adapters, strict=True))
    found = fl.compose(expression, named, device="cuda", memory=memory)
    require_same(found, fl.compose(expression, named))  # type: ignore[arg-type]


@pytest.mark.parametrize("on", ["product", "B", "A"])
@pytest.mark.parametrize("granularity", ["column", "component", "matrix"])
@pytest.mark.parametrize("memory", [None, "64KiB"])
def test_modulate(memory: str | None, granularity: str, on: str) -> None:
    a, b, c = pool().adapters
    operators = [fl.dipm.shift(b, c, 0.3), fl.dipm.remove(c, 0.5), fl.dipm.scale(0.7)]
    settings: dict[str, Any] = {"granularity": granularity, "on": on}
    found = fl.modulate(a, operators, device="cuda", memory=memory, **settings)
    require_same(found, fl.modulate(a, operators, **settings))


@pytest.mark.parametrize("cut", [{"rank": 3}, {"energy": 0.9}], ids=["rank", "energy"])
def test_compress(cut: dict[str, Any]) -> None:
    adapter = pool()["adapter0"] + pool()["adapter2"]
    wanted = fl.compress(adapter, **cut)
    require_same(fl.compress(adapter, device="cuda", **cut), wanted)
    require_same(fl.compress(adapter, device="cuda", memory="64KiB", **cut), wanted)


NUMBERS: dict[str, Callable[[fl.Pool], Any]] = {
    "weights": lambda own: fl.weights(own, "least_interference"),
    "norms": lambda own: fl.PoolGram(own).norms(),
}


@pytest.mark.parametrize("number", NUMBERS.values(), ids=NUMBERS)
def test_numbers_of_a_pool(number: Callable[[fl.Pool], Any]) -> None:
    assert number(pool().to("cuda")) == pytest.approx(number(pool()), rel=SUMS32)


def test_the_best_of_several_merges() -> None:
    target = {m: sum(w * pool()[a].delta(m) for a, w in WEIGHTS.items()) for m in MODULES}

    def score(adapter: fl.Adapter) -> float:
        own = adapter.to("cpu")
        return -float(sum((own.delta(m) - target[m]).norm() for m in MODULES))

    methods = ["pico", {"method": "tsv", "spectrum": "flat"}]
    found, wanted = (fl.choose(own, score, methods=methods, rank=8) for own in (pool().to("cuda"), pool()))
    assert found.adapter.device.type == "cuda" and found.best.point == wanted.best.point
    for one, two in zip(found.sweep.rows, wanted.sweep.rows, strict=True):
        assert one.point == two.point and one.scores == pytest.approx(two.scores, rel=MODEL32)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_forced_backend_without_an_op_says_what_has_it(backend: str) -> None:
    left, right = (gaussian(1, 2, 3, n, seed=n, dtype=torch.float64).cuda() for n in (7, 6))
    U, V = (torch.eye(n, 2, dtype=torch.float64, device="cuda")[None] for n in (7, 6))
    with fl.use_backend(backend), pytest.raises(BackendError, match="has no kernel for tucker") as caught:
        tucker(left, right, U, V, iterations=2, tolerance=0.0)
    assert "use_backend('auto') (`--backend auto`) takes torch here" in str(caught.value)
    found = tucker(left, right, U, V, iterations=2, tolerance=0.0)
    wanted = tucker(left.cpu(), right.cpu(), U.cpu(), V.cpu(), iterations=2, tolerance=0.0)
    for one, two in zip(found[:2], wanted[:2], strict=True):
        torch.testing.assert_close(one.cpu(), two, rtol=SUMS32, atol=SUMS32)


@pytest.mark.parametrize("op", ["eigh", "svd", "gram", "combine", "chain"])
def test_plain_torch_where_no_kernel_takes_a_call(op: str) -> None:
    x = gaussian(2, 2, 37, 5, seed=1)
    square = torch.einsum("bina,bjnc->bijac", x.double(), x.double()).contiguous()
    right = square.diagonal(dim1=1, dim2=2).movedim(-1, 1).contiguous()
    calls: dict[str, Callable[[str], Any]] = {
        "eigh": lambda to: fl.ops.eigh(square[:, 0, 0].to(to))[0],
        "svd": lambda to: fl.ops.svd(x.to(to))[1],
        "gram": lambda to: fl.ops.gram(x.to(to)),
        "combine": lambda to: fl.ops.combine(x.to(to), gaussian(2, 2, 5, 3, seed=2).to(to)),
        "chain": lambda to: fl.ops.chain(square.to(to), right.to(to), threshold=0.3).values,
    }
    with fl.use_backend("torch"):
        found = calls[op]("cuda")
    assert found.device.type == "cuda"
    torch.testing.assert_close(found.cpu(), calls[op]("cpu"), rtol=SUMS32, atol=SUMS32)
