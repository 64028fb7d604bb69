"""Tests of the Triton kernels alone: run by test_interpreted.py in a process with TRITON_INTERPRET=1."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import pytest
import torch
from builders import gaussian
from tolerances import FLOAT64, HALF, ROUNDED32, SUMS32
from torch import Tensor
from triton.runtime import interpreter

import fastlora as fl
from fastlora.backends import triton
from fastlora.bench.gpu.checks import require_rounded_once
from fastlora.core.updates import TENSOR_CORE_RTOL
from fastlora.ops.dispatch import resolve
from fastlora.ops.gram import blocks_of
from fastlora.ops.passes import BlockPlace, CombineJob, CombineOutput, CombineTerm, GramJob

BF16, FP16 = HALVES = [torch.bfloat16, torch.float16]
# Of ‖x‖‖y‖: an inner product that tensor cores sum, which truncate. Its multiples of a unit are summed exactly; what is
# left of an element is 2⁻¹⁰ of the largest of 64 at the most, some 2⁻⁹ of their root mean square, and a sum of 4 steps
# with it, truncated to 24 bits each, loses some 2⁻²². There are two such sums.
TENSOR_CORES = 2.0**-29


def places(kind: str, k: int, r: int) -> list[BlockPlace]:
    return [(i, j, (i * k + j) * r * r) for i, j in blocks_of(kind, k)]


def exact(x: list[Tensor], blocks: list[BlockPlace], rows: bool) -> list[tuple[Tensor, Tensor]]:
    """The blocks, and the products of the lengths of their columns."""
    columns = [(f.mT if rows else f).double() for f in x]
    return [
        (columns[i].mT @ columns[j], columns[i].norm(dim=0)[:, None] * columns[j].norm(dim=0)) for i, j, _ in blocks
    ]


def truncating_dot(self: object, a: Any, b: Any, d: Any, *_: object) -> Any:
    """Sums of products as tensor cores make them, at their worst: 16 products and the sum so far are cut to 24 bits
    below the leading bit of the largest of them, added, and cut to float32."""
    sums = d.data.astype(np.float64)
    for k in range(0, a.data.shape[1], 16):
        terms = a.data[:, k : k + 16, None].astype(np.float64) * b.data[None, k : k + 16].astype(np.float64)
        terms = np.concatenate([terms, sums[:, None]], 1)
        unit = np.exp2(np.frexp(np.abs(terms).max(1))[1] - 24.0)
        total = (np.trunc(terms / unit[:, None]) * unit[:, None]).sum(1)
        unit = np.exp2(np.frexp(total)[1] - 24.0)
        sums = np.trunc(total / unit) * unit
    return interpreter.TensorHandle(sums.astype(np.float32), d.dtype.scalar)


def awkward(kind: str, n: int, r: int) -> Tensor:
    x = gaussian(n, r, seed=1, dtype=torch.float64)
    if kind == "constant":  # what is left of every element has one sign
        return torch.linspace(0.3, 1.7, r, dtype=torch.float64).expand(n, r)
    if kind == "tails":
        return x * (0.01 + gaussian(n, r, seed=2, dtype=torch.float64).pow(4))
    if kind == "growing":
        return x * torch.logspace(-3, 3, n, dtype=torch.float64)[:, None]
    if kind == "alike":  # columns that differ by 2⁻⁹ of their length: directions of 2⁻¹¹ of the largest
        return x[:, :1] + 2.0**-9 * x
    return x


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("kind", ["ordinary", "constant", "tails", "growing", "alike"])
def test_sums_that_tensor_cores_truncate(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks have the accuracy of TENSOR_CORES, so that directions of 2⁻¹² of the largest have their digits."""
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", truncating_dot)
    x = awkward(kind, 2048, 16).to(dtype)
    job = GramJob([x], [(0, 0, 0)], False, torch.zeros(16, 16, dtype=torch.float64), 16)
    plan = triton.prepare_gram([job])
    assert "DEPTH" in plan.launches[0].constants
    plan.run()
    [(wanted, size)] = exact([x], [(0, 0, 0)], False)
    found = job.block((0, 0, 0))
    assert ((found - wanted).abs() <= TENSOR_CORES * size).all()
    if kind != "constant":
        # Relative to the square of the floor, an error of 16 columns is 2⁻⁵ at the most, so half that of a root.
        found, sigma = torch.linalg.eigvalsh(found).flip(0).clamp(min=0).sqrt(), torch.linalg.svdvals(x.double())
        kept = sigma > TENSOR_CORE_RTOL * sigma[0]
        assert kind != "alike" or float(sigma[kept][-1] / sigma[0]) < 4 * TENSOR_CORE_RTOL
        assert ((found / sigma - 1).abs() < 2.0**-6)[kept].all()


@pytest.mark.parametrize("rows", [False, True], ids=["B", "A"])
@pytest.mark.parametrize("kind", ["chain", "diagonal"])
def test_units_and_tiles_of_tensor_cores(kind: str, rows: bool) -> None:
    """More rows than a unit, more slabs than two groups, ranks that are no multiple of a slab: three kinds of tiles."""
    n, ranks = 4096 + 1032, (16, 24, 8, 40, 32, 16, 16)
    x = [gaussian(n, r, seed=i, dtype=torch.bfloat16) for i, r in enumerate(ranks)]
    x = [f.mT.contiguous() for f in x] if rows else x
    blocks = places(kind, len(ranks), max(ranks))
    out = torch.full((len(ranks) ** 2 * max(ranks) ** 2,), torch.nan, dtype=torch.float64)
    job = GramJob(x, blocks, rows, out, max(ranks))
    plan = triton.prepare_gram([job])
    assert {launch.constants.get("VECTOR", 8) for launch in plan.launches} == {8}
    plan.run()
    for block, (wanted, size) in zip(blocks, exact(x, blocks, rows), strict=True):
        assert ((job.block(block) - wanted).abs() <= TENSOR_CORES * size).all(), block[:2]
        assert block[0] != block[1] or torch.equal(job.block(block), job.block(block).mT)


def test_bits_do_not_depend_on_the_tiles() -> None:
    """In a group of slabs with itself and in two groups, among other jobs, alone."""
    x = [gaussian(1100, 16, seed=i, dtype=torch.bfloat16) for i in range(6)]
    blocks = places("full", 6, 16)
    jobs = [GramJob(x, blocks, False, torch.zeros(6, 6, 16, 16, dtype=torch.float64), 16) for _ in range(2)]
    triton.prepare_gram(jobs).run()
    pair = GramJob(x[4:], places("full", 2, 16), False, torch.zeros(2, 2, 16, 16, dtype=torch.float64), 16)
    triton.prepare_gram([pair]).run()
    assert torch.equal(jobs[0].out, jobs[1].out)
    assert torch.equal(pair.out[0, 1], jobs[0].out[4, 5])
    chain = GramJob(x, places("chain", 6, 16), False, torch.zeros(6, 6, 16, 16, dtype=torch.float64), 16)
    triton.prepare_gram([chain]).run()  # in other groups
    assert all(torch.equal(chain.out[i, j], jobs[0].out[i, j]) for i, j, _ in chain.blocks)


def test_blocks_in_any_order_and_place() -> None:
    """The lower triangle, twice the same block, rows wider apart than the block."""
    x = [gaussian(70, r, seed=r) for r in (5, 20)]
    blocks: list[BlockPlace] = [(1, 0, 3), (0, 0, 1000), (1, 0, 2000)]
    out = torch.zeros(4000, dtype=torch.float64)
    job = GramJob(x, blocks, False, out, 30, 7)
    triton.prepare_gram([job]).run()
    for block, (wanted, _) in zip(blocks, exact(x, blocks, False), strict=True):
        torch.testing.assert_close(job.block(block), wanted, rtol=FLOAT64 / 10, atol=FLOAT64 / 10)  # a sum each
    assert int((out != 0).sum()) == 100 + 25 + 100


def test_a_round_of_several_kinds_is_repaired_by_dtype() -> None:
    """Both sides, half precision and single, in one launch that writes; each is summed again in its own dtype."""
    dtypes = [torch.float32, torch.float16, torch.bfloat16, torch.bfloat16]
    scales = [1.0, 1.0, 1.0, 1e-30]
    jobs = []
    for i, (dtype, scale) in enumerate(zip(dtypes, scales, strict=True)):
        for rows in (False, True):
            x = gaussian(1100, 8, seed=i, dtype=torch.float64).mul(scale).to(dtype)
            out = torch.full((8, 8), torch.nan, dtype=torch.float64)
            jobs.append(GramJob([x.mT.contiguous() if rows else x], [(0, 0, 0)], rows, out, 8))
    plan = triton.prepare_gram(jobs)
    names = [launch.kernel.fn.__name__ for launch in plan.launches]
    assert names.count("write_blocks") == 1 and names.count("repair_blocks") == 2
    plan.run()
    for job in jobs:
        [(wanted, size)] = exact(list(job.factors), [(0, 0, 0)], job.rows)
        assert ((job.out - wanted).abs() <= TENSOR_CORES * size).all()
    exactly = [job.out for job in jobs[-2:]]  # what tensor cores cannot hold is as exact as float64
    assert ((exactly[0] - exactly[1]).abs() <= 1e-14 * exactly[0].diagonal().max()).all()


def test_factors_of_several_dtypes() -> None:
    """Every block is summed as if its two factors were alone: two of one half precision on tensor cores."""
    dtypes = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
    x = [gaussian(1500, 3 + i, seed=i, dtype=d) for i, d in enumerate(dtypes)]
    blocks = places("pairs", 4, 6)
    job = GramJob(x, blocks, False, torch.zeros(4, 4, 6, 6, dtype=torch.float64), 6)
    triton.prepare_gram([job]).run()
    for block, (wanted, size) in zip(blocks, exact(x, blocks, False), strict=True):
        i, j, _ = block
        error = TENSOR_CORES if i == j < 2 else 1500 * 2.3e-16
        assert ((job.block(block) - wanted).abs() <= error * size).all()
        alone = [(0, 0 if i == j else 1, 0)]
        pair = GramJob([x[i], x[j]], alone, False, torch.zeros(6, 6, dtype=torch.float64), 6)
        triton.prepare_gram([pair]).run()
        assert torch.equal(pair.block(alone[0]), job.block(block))
    c = [gaussian(f.shape[1], 4, seed=9, dtype=torch.float64) for f in x]
    outs = [torch.full((1500, 4), torch.nan, dtype=d) for d in dtypes]
    made = [CombineOutput.into(out, [(i, c[i], 0, 0.5) for i in range(4)]) for out in outs]
    triton.prepare_combine([CombineJob(x, made, False)]).run()
    total = 0.5 * sum((f.double() @ m for f, m in zip(x, c, strict=True)), torch.zeros((), dtype=torch.float64))
    for out in outs:
        torch.testing.assert_close(out.double(), total, rtol=torch.finfo(out.dtype).eps, atol=ROUNDED32)


@pytest.mark.parametrize("rows", [False, True], ids=["B", "A"])
@pytest.mark.parametrize("stored", [16, 12])
def test_what_the_compiler_is_told_holds(rows: bool, stored: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiples and runs of equal numbers, by which it chooses how wide it loads: with lengths that are no multiples
    of a vector on the side where they need not be."""
    told = []

    def checked(self: Any, name: str, values: list[int]) -> None:
        told.append(name)
        if name == "tt.divisibility":
            assert not (self.data % values[0]).any(), (values, self.data)
        if name == "tt.constancy":
            runs = self.data.reshape(-1, values[0])
            assert (runs == runs[:, :1]).all(), (values, self.data)

    monkeypatch.setattr(interpreter.TensorHandle, "set_attr", checked)
    n, r = (1048, 5 if stored == 16 else 13) if rows else (1029, stored)
    x = [gaussian(n, r, seed=i, dtype=torch.bfloat16) for i in range(2)]
    x = [f.mT.contiguous() for f in x] if rows else x
    size = torch.zeros(2, 2, r, r, dtype=torch.float64)
    triton.prepare_gram([GramJob(x, places("full", 2, r), rows, size, r)]).run()
    c = gaussian(r, r, seed=3, dtype=torch.float64)
    outs = [torch.full_like(x[0], torch.nan) for _ in range(3)]
    terms = [[(0, None, 0, 1.0), (1, c, 0, -0.5)], [(1, c, 0, 2.0)], [(0, c, 0, 1.0), (1, c, 0, 1.0)]]
    made = [CombineOutput.into(out, own) for out, own in zip(outs, terms, strict=True)]
    triton.prepare_combine([CombineJob(x, made, rows)]).run()
    assert {"tt.divisibility", "tt.constancy"} <= set(told)


@pytest.mark.parametrize(("dtype", "rows", "width", "count"), [
    (BF16, False, 16, 1), (FP16, True, 16, 2), (BF16, True, 16, 8), (FP16, True, 32, 1), (BF16, False, 32, 2),
    (FP16, False, 32, 8), (BF16, True, 64, 1), (BF16, True, 64, 2), (FP16, False, 64, 8),
])  # fmt: skip
def test_results_on_tensor_cores(dtype: torch.dtype, rows: bool, width: int, count: int) -> None:
    """Every number is its float64 sum, rounded once: products alone, as of a shared part, and beside a copy, as of a
    unique one. Terms of other ranks, more rows than a tile. Every pair of values of two parameters."""
    n, ranks = 264 if width == 16 else 136, [16, 24, 8, 16, 32, 16, 40, 16][:count]
    x = [gaussian(n, r, seed=i, dtype=dtype) for i, r in enumerate((*ranks, width))]
    c = [gaussian(r, width, seed=20 + i, dtype=torch.float64) for i, r in enumerate(ranks)]
    shape = (width, n) if rows else (n, width)
    if rows:
        x, c = [f.mT.contiguous() for f in x], [m.mT.contiguous() for m in c]
    products = [(i, m, 0, (-0.3) ** i) for i, m in enumerate(c)]
    outs = [torch.full(shape, torch.nan, dtype=dtype) for _ in range(2)]
    made = [CombineOutput.into(outs[0], products), CombineOutput.into(outs[1], [(count, None, 0, 1.0), *products])]
    job = CombineJob(x, made, rows)
    plan = triton.prepare_combine([job])
    assert not any("exact_results" in launch.kernel.fn.__name__ for launch in plan.launches)
    plan.run()
    for number, output in enumerate(made):
        require_rounded_once(f"result {number}", job, output)


def test_plans_follow_the_contents() -> None:
    """A plan is launched again on whatever its tensors hold by then."""
    x = [gaussian(1040, 16, seed=i, dtype=torch.bfloat16) for i in range(2)]
    c, out = gaussian(16, 16, seed=3, dtype=torch.float64), torch.zeros(1040, 16, dtype=torch.bfloat16)
    job = GramJob(x, places("full", 2, 16), False, torch.zeros(2, 2, 16, 16, dtype=torch.float64), 16)
    made = CombineJob(x, [CombineOutput.into(out, [(0, None, 0, 1.0), (1, c, 0, -0.5)])], False)
    plans = triton.prepare_gram([job]), triton.prepare_combine([made])
    for scale in (1.0, 3.0):
        x[1].mul_(scale)
        c.mul_(scale)
        for plan in plans:
            plan.run()
        products = x[0].double().mT @ x[1].double()  # float32 sums of 1040 terms, some near zero
        torch.testing.assert_close(job.out[0, 1], products, rtol=SUMS32, atol=100 * SUMS32)
        torch.testing.assert_close(out, (x[0].double() - 0.5 * x[1].double() @ c).bfloat16(), rtol=HALF, atol=HALF)


def results_on_tensor_cores(ranks: list[int], count: int, rows: bool) -> list[tuple[int, list[CombineTerm]]]:
    """``(width, terms)``: the shared part, unique ones, one of another matrix, sums of two products and of all."""

    def c(i: int, q: int, seed: int) -> Tensor:
        made = gaussian(ranks[i], q, seed=seed, dtype=torch.float64)
        return made.mT.contiguous() if rows else made

    found: list[tuple[int, list[CombineTerm]]] = [(8, [(0, c(0, 8, 1), 0, 1.0)])]
    for i in range(count):
        own = i % len(ranks)
        found.append((ranks[own], [(own, None, 0, 0.75), (0, c(0, ranks[own], 2 + i), 0, -0.5)]))
    found.append((ranks[0], [(1, c(1, ranks[0], 50), 0, 2.0)]))
    found.append((ranks[1], [(i, c(i, ranks[1], 60 + i), 0, 1.0) for i in range(2)]))
    found.append((ranks[0], [(i, c(i, ranks[0] - 4, 70 + i), 0, 0.5) for i in range(len(ranks))]))
    return found


@pytest.mark.parametrize(
    ("dtype", "rows", "few"), [(BF16, False, 0), (FP16, True, 0), (BF16, True, 1), (FP16, False, 1)]
)
def test_results_of_one_matrix_and_sums(dtype: torch.dtype, rows: bool, few: int) -> None:
    """All of a stretch of rows in one program: what each would be alone, within a rounding of float64."""
    n, (ranks, count) = 600, (([16, 8, 12, 16], 18), ([32, 24, 8], 3))[few]
    x = [gaussian(n, r, seed=i, dtype=dtype) for i, r in enumerate(ranks)]
    x = [f.mT.contiguous() if rows else f for f in x]
    wanted = results_on_tensor_cores(ranks, count, rows)

    def made(chosen: list[tuple[int, list[CombineTerm]]]) -> tuple[list[Tensor], set[str]]:
        outs = [torch.full((w, n) if rows else (n, w), torch.nan, dtype=dtype) for w, _ in chosen]
        outputs = [CombineOutput.into(out, terms) for out, (_, terms) in zip(outs, chosen, strict=True)]
        job = CombineJob(x, outputs, rows)
        plan = triton.prepare_combine([job])
        plan.run()
        for number, output in enumerate(outputs):
            require_rounded_once(f"result {number}", job, output)
        return outs, {launch.kernel.fn.__name__ for launch in plan.launches}

    outs, kernels = made(wanted)
    assert kernels == {"cut_coefficients", "half_joint", "half_summed", "extreme_results"}
    for i in (1, len(wanted) - 2):
        assert torch.equal(made([wanted[i]])[0][0], outs[i])


def test_nothing_is_read_of_what_is_not_present() -> None:
    """Where the plan's counter says that nothing is shared, the factors are left alone; they hold NaN here."""
    x = [torch.full((16, 300), torch.nan, dtype=torch.bfloat16) for _ in range(3)]
    c = torch.zeros(3, 16, 16, dtype=torch.float64)
    present = torch.zeros(2, dtype=torch.int64)
    outs = [torch.ones(16, 300, dtype=torch.bfloat16) for _ in range(3)]
    made = [CombineOutput.into(out, [(i, c[i], 0, 1.0) for i in range(3)]) for out in outs]
    made[0].present, made[1].present = present[0], present[1]
    plan = triton.prepare_combine([CombineJob(x, made, True)])
    present[1] = 3
    plan.run()
    assert (outs[0] == 0).all() and outs[1].isnan().all() and outs[2].isnan().all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("scale", [1e-30, 1e25, 1e-300])
def test_extreme_coefficients_are_taken_in_float64(dtype: torch.dtype, scale: float) -> None:
    x = gaussian(80, 20, seed=1, dtype=dtype)
    c = gaussian(20, 18, seed=2, dtype=torch.float64)
    sums: list[tuple[Tensor, list[CombineTerm]]] = [
        ((x.double() @ c) * (1 + scale), [(0, c * scale, 0, 1 / scale), (0, c, 0, scale)]),
        ((x.double() @ c) * scale, [(0, c, 0, scale)]),
        (x.double() * scale, [(0, None, 0, scale)]),
        (x[:, :18].double() + x.double() @ c * scale, [(1, None, 0, 1.0), (0, c, 0, scale)]),
    ]
    outs = [torch.full_like(total, torch.nan, dtype=dtype) for total, _ in sums]
    made = [CombineOutput.into(out, terms) for out, (_, terms) in zip(outs, sums, strict=True)]
    triton.prepare_combine([CombineJob([x, x[:, :18]], made, False)]).run()
    for out, (wanted, _) in zip(outs, sums, strict=True):
        assert torch.equal(out.isinf(), wanted.to(dtype).isinf())
        held = ~out.isinf()
        half_ulp = torch.finfo(dtype).eps / 2 * wanted.abs() + torch.finfo(dtype).smallest_normal * 2.0**-11
        assert ((out.double() - wanted).abs() <= half_ulp * (1 + 2**-12))[held].all()


@pytest.mark.parametrize("rows", [False, True], ids=["B", "A"])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64], ids=str)
def test_copies_keep_their_bits(dtype: torch.dtype, rows: bool) -> None:
    x = gaussian(40, 24, seed=1, dtype=dtype)
    x[3, :4] = torch.tensor([-0.0, 0.0, torch.inf, torch.finfo(dtype).tiny / 4])
    out = torch.full_like(x, torch.nan)
    triton.prepare_combine([CombineJob([x], [CombineOutput.into(out, [(0, None, 0, 1.0)])], rows)]).run()
    assert torch.equal(out.view(torch.uint8), x.view(torch.uint8))


def test_float64_sums_are_rounded_once() -> None:
    """Halfway cases that an ordinary float32 on the way would round twice."""
    for dtype, bits in ((torch.bfloat16, 8), (torch.float16, 11)):
        base = 1 + 2.0**-bits  # halfway between two values
        x = torch.tensor([[base + 2.0**-40], [base - 2.0**-40], [base], [1 + 3 * 2.0**-bits], [-base - 2.0**-40]],
                         dtype=torch.float64)  # fmt: skip
        out = torch.full(x.shape, torch.nan, dtype=dtype)
        triton.prepare_combine([CombineJob([x], [CombineOutput.into(out, [(0, None, 0, 1.0)])], False)]).run()
        up = 1 + 2.0 ** (1 - bits)
        assert out.flatten().tolist() == [up, 1.0, 1.0, 1 + 2.0 ** (2 - bits), -up]


def sparse(count: int, r: int, stride: int, dtype: torch.dtype) -> Tensor:
    """``[count, r]`` with rows very far apart, in memory that is there only where it is touched."""
    size = ((count - 1) * stride + r) * dtype.itemsize
    no_reserve = 0x4000  # Linux's MAP_NORESERVE, which the module does not name
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    flat = torch.frombuffer(memory, dtype=dtype)
    return flat.as_strided((count, r), (stride, 1))


@pytest.mark.parametrize("rows", [False, True], ids=["B", "A"])
def test_offsets_beyond_32_bits(rows: bool) -> None:
    """Elements 2^31 and 2^32 further on are found, on either side and in results."""
    stride = 2**30 + 8
    x = sparse(6, 8, stride, torch.bfloat16)
    x.copy_(gaussian(6, 8, seed=1))
    out = torch.zeros(8, 8, dtype=torch.float64)
    r = 6 if rows else 8
    job = GramJob([x], [(0, 0, 0)], rows, out, r)
    triton.prepare_gram([job]).run()
    columns = (x.mT if rows else x).double()
    torch.testing.assert_close(job.block((0, 0, 0)), columns.mT @ columns, rtol=FLOAT64 / 10, atol=FLOAT64 / 10)
    made = sparse(6, 8, stride, torch.bfloat16)
    c = 2 * torch.eye(r, dtype=torch.float64)
    triton.prepare_combine([CombineJob([x], [CombineOutput.into(made, [(0, c, 0, 1.0)])], rows)]).run()
    assert torch.equal(made, 2 * x)


def test_refusals() -> None:
    x, out = gaussian(5, 4, seed=1), torch.zeros(5, 4)
    with pytest.raises(ValueError, match="must have contiguous rows"):
        triton.prepare_gram([GramJob([x.mT], [(0, 0, 0)], False, torch.zeros(25, dtype=torch.float64), 5)])
    to_file = CombineOutput((5, 4), torch.float32, [(0, None, 0, 1.0)], None, 1, 0)
    with pytest.raises(ValueError, match="results that go to files are computed on the CPU"):
        triton.prepare_combine([CombineJob([x], [to_file], False)])
    with pytest.raises(ValueError, match="a tensor is on meta, this backend needs the CPU"):
        triton.prepare_combine([CombineJob([x.to("meta")], [CombineOutput.into(out, [(0, None, 0, 1.0)])], False)])


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf, -torch.inf])
def test_finite(value: float) -> None:
    x = gaussian(5, 4, seed=1, dtype=torch.bfloat16)
    x[2, 3] = value
    assert resolve("finite", x).launch(x) == (value == 0)
    assert resolve("finite", x[:0]).launch(x[:0])


def test_compiled_calls() -> None:
    x, c = gaussian(2, 2, 9, 4, seed=1), gaussian(2, 2, 4, 3, seed=2, dtype=torch.float64)
    for call in (lambda x: fl.ops.gram(x, blocks="chain"), lambda x: fl.ops.combine(x, c)):
        assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(x), call(x))
