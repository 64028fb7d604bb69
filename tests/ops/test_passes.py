"""The combine pass of the engine: ragged terms, several results at once, in memory and to files."""

from __future__ import annotations

import errno
import itertools
import math
from pathlib import Path

import pytest
import torch
from builders import gaussian, generator
from compiled import needs_kernels, needs_same_bits
from factors import BACKENDS, at_odd_address
from tolerances import SUMS32
from torch import Tensor

import fastlora as fl
from fastlora.backends import cpu
from fastlora.ops.dispatch import prepared, resolve
from fastlora.ops.passes import CombineJob, CombineOutput, CombineTerm, GramJob, WriteProblem

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(1, (1,)), (33, (5, 16)), (700, (16, 17, 40)), (1100, (16,) * 4), (515, (3, 70)), (2309, (16, 3, 9))]
"""``(n, ranks)``: around the sizes of tiles."""


def run(jobs: list[CombineJob]) -> WriteProblem | None:
    problem: WriteProblem | None = resolve("combine_pass", jobs).launch(jobs)
    return problem


def factors_of(n: int, ranks: tuple[int, ...], dtype: torch.dtype, rows: bool) -> list[Tensor]:
    made = [gaussian(n, r, seed=100 + i, dtype=dtype) for i, r in enumerate(ranks)]
    return [x.mT.contiguous() if rows else x for x in made]


def terms_of(ranks: tuple[int, ...], rows: bool, scale: float) -> list[tuple[int, list[CombineTerm]]]:
    """``(width, terms)`` of results: of one factor and of all, with and without the identity, side by side, scaled."""

    def c(r: int, q: int, seed: int) -> Tensor:
        made = gaussian(r, q, seed=seed, dtype=torch.float64) * scale
        return made.mT.contiguous() if rows else made

    first, widest = ranks[0], max(ranks)
    found: list[tuple[int, list[CombineTerm]]] = [
        (r, [(i, None, 0, 1.0), (0, c(first, r, i), 0, 1.0)]) for i, r in enumerate(ranks)
    ]
    found.append((7, [(i, c(r, 7, 20 + i), 0, 0.5) for i, r in enumerate(ranks)]))
    found.append((widest + first + 3, [(0, None, 2, -3.0), (0, c(first, widest, 40), first + 1, 2.0)]))
    found.append((first, [(0, None, 0, 0.25)]))
    found.append((4, []))
    return found


def exact(job_factors: list[Tensor], width: int, terms: list[CombineTerm], rows: bool) -> tuple[Tensor, Tensor]:
    """The result ``[n, width]`` and the sum of the sizes of its terms, in float64."""
    n = job_factors[0].shape[1 if rows else 0]
    total, size = torch.zeros(2, n, width, dtype=torch.float64).unbind()
    for i, c, at, scale in terms:
        x = (job_factors[i].mT if rows else job_factors[i]).double()
        m = torch.eye(x.shape[1], dtype=torch.float64) if c is None else c.mT if rows else c
        total[:, at : at + m.shape[1]] += scale * x @ m
        size[:, at : at + m.shape[1]] += abs(scale) * x.abs() @ m.abs()
    return total, size


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e-10])
@pytest.mark.parametrize("rows", [False, True], ids=["B", "A"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_results_are_rounded_once(backend: str, dtype: torch.dtype, rows: bool, scale: float, tmp_path: Path) -> None:
    with fl.use_backend(backend):
        for n, ranks in SHAPES:
            x = factors_of(n, ranks, dtype, rows)
            wanted = terms_of(ranks, rows, scale)
            shapes = [(w, n) if rows else (n, w) for w, _ in wanted]
            outs = [torch.full(s, torch.nan, dtype=dtype) for s in shapes]
            made = [CombineOutput.into(out, terms) for out, (_, terms) in zip(outs, wanted, strict=True)]
            assert run([CombineJob(x, made, rows)]) is None
            for out, (width, terms) in zip(outs, wanted, strict=True):
                total, size = exact(x, width, terms, rows)
                half_ulp = torch.finfo(dtype).eps / 2 * total.abs() + torch.finfo(dtype).smallest_normal * 2**-11
                error = ((out.mT if rows else out).double() - total).abs()
                # Half-precision results are summed in float32, others in float64.
                slack = (2.0**-22 if dtype != torch.float32 else 2.0**-50) * size
                assert (error <= half_ulp * (1 + 2**-12) + slack).all(), (n, ranks, width)
            if backend == "triton":
                check_odd_addresses(x, wanted, outs, rows)
            else:
                check_files(x, wanted, outs, rows, tmp_path / f"{n}")


def check_odd_addresses(
    x: list[Tensor], wanted: list[tuple[int, list[CombineTerm]]], outs: list[Tensor], rows: bool
) -> None:
    """The same bits in memory, for a backend that leaves files to the CPU."""
    again = [torch.full_like(out, torch.nan) for out in outs]
    made = [CombineOutput.into(out, terms) for out, (_, terms) in zip(again, wanted, strict=True)]
    run([CombineJob([at_odd_address(f) for f in x], made, rows)])
    assert all(torch.equal(a, b) for a, b in zip(again, outs, strict=True))


def check_files(
    x: list[Tensor], wanted: list[tuple[int, list[CombineTerm]]], outs: list[Tensor], rows: bool, path: Path
) -> None:
    """The same bits in a file, and from factors at odd addresses; stored matrices are written as they are."""
    made, offset = [], 1
    with path.open("w+b") as file:
        for out, (_, terms) in zip(outs, wanted, strict=True):
            shape = (out.shape[0], out.shape[1])
            made.append(CombineOutput(shape, out.dtype, terms, None, file.fileno(), offset, True))
            offset += out.nbytes
        made.append(CombineOutput.copy(x[0], file.fileno(), offset, True))
        assert run([CombineJob([at_odd_address(f) for f in x], made, rows)]) is None
        file.seek(1)
        for out in [*outs, x[0]]:
            assert file.read(out.nbytes) == bytes(out.view(torch.uint8).numpy().tobytes())
        assert not file.read()


@pytest.mark.parametrize("rows", [False, True], ids=["B", "A"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@needs_same_bits
def test_same_bits(dtype: torch.dtype, rows: bool) -> None:
    """Results depend on neither threads nor the other results and factors of a job."""
    n, ranks = 2309, (16, 16, 9)
    x, wanted = factors_of(n, ranks, dtype, rows), terms_of(ranks, rows, 1.0)
    found: list[list[Tensor]] = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        outs = [torch.empty((w, n) if rows else (n, w), dtype=dtype) for w, _ in wanted]
        made = [CombineOutput.into(out, terms) for out, (_, terms) in zip(outs, wanted, strict=True)]
        run([CombineJob(x, made, rows)] * 3)
        found.append(outs)
    torch.set_num_threads(before)
    alone = []
    for w, terms in wanted:
        out = torch.empty((w, n) if rows else (n, w), dtype=dtype)
        run([CombineJob(x, [CombineOutput.into(out, terms)], rows)])
        alone.append(out)
    for one, two, single in zip(*found, alone, strict=True):
        assert torch.equal(one, two) and torch.equal(one, single)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_survives(dtype: torch.dtype) -> None:
    """A sum with zeros rounds every finite value to itself, subnormal ones too."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()][: 2**15 // 64 * 64].reshape(-1, 32)
    zeros = torch.zeros(every.shape[0], 4, dtype=dtype)
    c = torch.ones(4, 32, dtype=torch.float64)
    out = torch.empty_like(every)
    run([CombineJob([every, zeros], [CombineOutput.into(out, [(0, None, 0, 1.0), (1, c, 0, 1.0)])], False)])
    assert torch.equal(out, every)


@pytest.mark.parametrize("rows", [False, True], ids=["B", "A"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_to_the_nearest_even(dtype: torch.dtype, rows: bool) -> None:
    """Halfway between neighbours, next to it, beyond the largest value and below the smallest, as torch rounds."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    low = every[every.isfinite()].float()
    high = torch.cat([low[1:], low[-1:]])
    middle = low + (high - low) / 2
    inf = torch.tensor(math.inf)
    numbers = torch.cat([middle, middle.nextafter(inf), middle.nextafter(-inf), 1.01 * low, low / 3])
    x = numbers[: len(numbers) // 32 * 32].reshape(-1, 32)
    x = x.mT.contiguous() if rows else x
    out = torch.empty_like(x, dtype=dtype)
    run([CombineJob([x], [CombineOutput.into(out, [(0, None, 0, 1.0)])], rows)])
    assert torch.equal(out, x.to(dtype))


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])
def test_problems_name_the_output(backend: str, tmp_path: Path) -> None:
    x = gaussian(50, 4, seed=1)
    bad = x.clone()
    bad[3, 2] = torch.inf
    with fl.use_backend(backend), (tmp_path / "f").open("w+b") as file:
        fd = file.fileno()

        def copy(*stored: Tensor, to: int = fd) -> list[CombineOutput]:
            return [CombineOutput.copy(s, to, 0, True) for s in stored]

        jobs = [CombineJob([], copy(x), False), CombineJob([], copy(x, bad), False)]
        assert run(jobs) == WriteProblem(1, 1, None)
        computed = CombineOutput((50, 4), torch.float16, [(0, None, 0, 1e9)], None, fd, 0, True)
        assert run([CombineJob([x], [computed], False)]) == WriteProblem(0, 0, None)
        with (tmp_path / "f").open("rb") as read_only:
            problem = run([CombineJob([], copy(x, to=read_only.fileno()), False)])
    assert problem == WriteProblem(0, 0, errno.EBADF)


@pytest.mark.parametrize("rows", [False, True], ids=["B", "A"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@needs_same_bits
def test_results_that_no_cache_holds_have_the_same_bits(dtype: torch.dtype, rows: bool) -> None:
    """Large results go past the caches where their rows allow it: here some at even and some at odd addresses."""
    n, ranks = 3000, (16, 16, 9)
    x, wanted = factors_of(n, ranks, dtype, rows), terms_of(ranks, rows, 1.0)
    shapes = [(w, n) if rows else (n, w) for w, _ in wanted]
    few = [torch.empty(s, dtype=dtype) for s in shapes]
    run([CombineJob(x, [CombineOutput.into(o, terms) for o, (_, terms) in zip(few, wanted, strict=True)], rows)])
    jobs, many = [], []
    for copy in range(12 * 2**20 // sum(o.nbytes for o in few)):
        outs = [torch.empty(o.numel() + 8, dtype=dtype)[copy % 5 :][: o.numel()].view(o.shape) for o in few]
        made = [CombineOutput.into(o, terms) for o, (_, terms) in zip(outs, wanted, strict=True)]
        jobs.append(CombineJob(x, made, rows))
        many.append(outs)
    run(jobs)
    assert sum(o.nbytes for outs in many for o in outs) > 8 * 2**20
    assert all(torch.equal(a, b) for outs in many for a, b in zip(outs, few, strict=True))


F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
EDGES = [
    # factor, result, the last value that fits and the first that does not
    (F64, F16, 65519.99, 65520.0),
    (F64, BF16, 3.389e38, float.fromhex("0x1.ffp+127")),
    (F64, F32, torch.finfo(F32).max, float.fromhex("0x1.ffffffp+127")),
    (F64, F64, torch.finfo(F64).max, torch.inf),
    (F32, BF16, torch.finfo(BF16).max, float.fromhex("0x1.ffp+127")),
    (BF16, F16, 65280.0, 65536.0),
    (F16, F16, 65504.0, torch.inf),
    (BF16, BF16, torch.finfo(BF16).max, torch.inf),
]


@pytest.mark.parametrize("rows", [False, True], ids=["B", "A"])
@pytest.mark.parametrize(("dtype", "result", "fits", "overflows"), EDGES, ids=lambda x: str(x).removeprefix("torch."))
def test_only_finite_results_are_written(
    dtype: torch.dtype, result: torch.dtype, fits: float, overflows: float, rows: bool, tmp_path: Path
) -> None:
    """Whole factors, sums of them and products, of every width that a kernel has a loop for."""
    with (tmp_path / "f").open("w+b") as file:
        for width, (value, is_fine) in itertools.product(
            (1, 3, 8, 16, 21, 32, 64),
            ((fits, True), (-fits, True), (overflows, False), (-torch.inf, False), (torch.nan, False)),
        ):
            x = torch.zeros(70, width, dtype=dtype)
            x[67, width - 1] = value
            zeros, eye = torch.zeros_like(x), torch.eye(width, dtype=F64)
            ways: list[list[CombineTerm]] = [
                [(0, None, 0, 1.0)], [(0, None, 0, 1.0), (1, None, 0, 1.0)], [(0, None, 0, 1.0), (1, eye, 0, 1.0)],
            ]  # fmt: skip
            if abs(value) < torch.inf:
                ways.append([(0, eye, 0, 1.0)])
            factors = [x.mT.contiguous(), zeros.mT.contiguous()] if rows else [x, zeros]
            for terms in ways:
                shape = (width, 70) if rows else (70, width)
                made = CombineOutput(shape, result, terms, None, file.fileno(), 0, True)
                found = run([CombineJob(factors, [made], rows)])
                assert found == (None if is_fine else WriteProblem(0, 0, None)), (width, value, len(terms))


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])
def test_what_was_prepared_works_on_what_is_there_by_then(backend: str, tmp_path: Path) -> None:
    """New values, also of a factor whose rows are not contiguous, and another file."""
    x, columns = gaussian(40, 4, seed=1), gaussian(4, 40, seed=2).mT
    c = gaussian(4, 4, seed=3, dtype=torch.float64)
    out = torch.empty(40, 4)
    terms: list[CombineTerm] = [(0, None, 0, 1.0), (1, c, 0, 1.0)]
    into = CombineOutput.into(out, terms)
    to_file = CombineOutput((40, 4), torch.float32, terms, None, -1, 0, True)
    with fl.use_backend(backend):
        ready = prepared("combine_pass", [CombineJob([x, columns], [into, to_file], False)])
        for name in ("a", "b"):
            x.neg_()
            columns.mul_(3.0)
            c.add_(1.0)
            with (tmp_path / name).open("w+b") as file:
                to_file.file = file.fileno()
                assert ready.run() is None
            expected = (x.double() + columns.double() @ c).float()
            assert (out - expected).abs().max() < SUMS32
            assert (tmp_path / name).read_bytes() == bytes(out.view(torch.uint8).numpy().tobytes())


def check_results(x: list[Tensor], wanted: list[tuple[int, list[CombineTerm]]], rows: bool) -> None:
    """The bfloat16 results ``(width, terms)`` of one job."""
    n = x[0].shape[1 if rows else 0]
    outs = [torch.empty((width, n) if rows else (n, width), dtype=torch.bfloat16) for width, _ in wanted]
    made = [CombineOutput.into(out, terms) for out, (_, terms) in zip(outs, wanted, strict=True)]
    run([CombineJob(x, made, rows)])
    for out, (width, terms) in zip(outs, wanted, strict=True):
        total, size = exact(x, width, terms, rows)
        error = ((out.mT if rows else out).double() - total).abs()
        assert (error <= 2**-8 * 1.001 * total.abs() + 2.0**-21 * size).all()


@pytest.mark.parametrize("rows", [False, True], ids=["B", "A"])
def test_neighbours_that_go_into_different_results(rows: bool) -> None:
    """One after the other: results of different widths at the same place, and of the same width at different ones."""
    ranks = (16, 16, 20, 20)
    x = factors_of(300, ranks, torch.bfloat16, rows)
    wanted: list[tuple[int, list[CombineTerm]]] = []
    for width, into in ((40, [(0, 16), (1, 40)]), (16, [(2, 16)]), (16, [(3, 16)])):
        coefficients = [(i, gaussian(ranks[i], q, seed=i, dtype=torch.float64)) for i, q in into]
        terms = [(i, c.mT.contiguous() if rows else c, 0, 1.0) for i, c in coefficients]
        wanted.append((width, terms))
    check_results(x, wanted, rows)


def test_random_results_of_random_sizes() -> None:
    """Layouts that no method makes: coefficients that leave gaps, results that few factors go into."""
    rng = generator(5)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=rng))

    for _ in range(40):
        rows, n = bool(pick(0, 2)), pick(1, 600)
        ranks = tuple(pick(1, 40) for _ in range(pick(1, 5)))
        x = factors_of(n, ranks, torch.bfloat16, rows)
        wanted: list[tuple[int, list[CombineTerm]]] = []
        for _ in range(pick(1, 6)):
            width, terms = pick(1, 60), []
            for _ in range(pick(0, 4)):
                i = pick(0, len(ranks))
                q = pick(1, width + 1)
                c = gaussian(ranks[i], q, seed=pick(0, 1000), dtype=torch.float64)
                whole = ranks[i] <= width and pick(0, 2) == 0
                at = pick(0, width - (ranks[i] if whole else q) + 1)
                terms.append((i, None if whole else c.mT.contiguous() if rows else c, at, float(pick(-2, 3))))
            wanted.append((width, terms))
        check_results(x, wanted, rows)


@needs_kernels
@pytest.mark.parametrize("tensor", [Tensor, object], ids=["dlpack", "attributes"])
def test_tables_say_where_matrices_lie(tensor: type) -> None:
    """Also where torch does not tell compiled code of its tensors, and these are asked for their attributes."""
    x = gaussian(40, 24, seed=1)
    views = [x, x[:, :3], x[::2, 5:], x[3:4, 2:5], x[3:4], x[:, 2:3], x[:0], x[:, :0], torch.nn.Parameter(x)]
    views += [x.to(dtype) for dtype in cpu.DTYPES if dtype.is_floating_point] + [at_odd_address(x.half())]
    views += [x.mT, x[:, ::2]]  # whose rows are scattered: they are copied
    for rows in (False, True):
        ranks = [f.shape[0 if rows else 1] for f in views]
        outs = [torch.full((r, r), torch.nan, dtype=torch.float64) for r in ranks]
        places = [(0, 0, 0)]
        jobs = [GramJob([f], places, rows, out, r) for f, out, r in zip(views, outs, ranks, strict=True)]
        cpu._core.GramJobs(jobs, tensor).run(1)
        for view, out in zip(views, outs, strict=True):
            wide = view.detach().double()
            assert torch.allclose(out, wide @ wide.mT if rows else wide.mT @ wide, rtol=1e-12, atol=1e-12)
        # A result, a coefficient: x itself, and twice its rows turned over.
        turned = torch.eye(ranks[0], dtype=torch.float64).flip(0) * 2.0
        made = [torch.empty_like(x) for _ in range(2)]
        terms: list[list[CombineTerm]] = [[(0, None, 0, 1.0)], [(0, turned, 0, 1.0)]]
        outputs = [CombineOutput.into(out, t) for out, t in zip(made, terms, strict=True)]
        assert cpu._core.CombineJobs([CombineJob([x], outputs, rows)], tensor, cpu.DTYPES).run(1) == (0, 0, 0, 0)
        assert torch.equal(made[0], x) and torch.equal(made[1], 2 * x.flip(0 if rows else 1))


@needs_kernels
def test_tables_refuse_what_kernels_cannot_read() -> None:
    x, c = gaussian(40, 24, seed=1), torch.eye(24, dtype=torch.float64)

    def combined(factor: object, coefficient: object, out: object) -> None:
        output = CombineOutput((40, 24), torch.float32, [(0, coefficient, 0, 1.0)], out)  # type: ignore[arg-type, list-item]
        run([CombineJob([factor], [output], False)])  # type: ignore[list-item]

    scattered = torch.empty(24, 40).mT
    with pytest.raises(ValueError, match=r"must have contiguous rows, got strides \(1, 40\) for shape \(40, 24\)"):
        combined(x, c, scattered)
    for wrong in (c.float(), c.mT.flip(0).mT[:, ::2]):
        with pytest.raises(ValueError, match="a coefficient must be float64 with contiguous rows"):
            combined(x, wrong, torch.empty(40, 24))
    with pytest.raises(ValueError, match="dtype that kernels do not read"):
        combined(x.to(torch.int32), c, torch.empty(40, 24))
    with pytest.raises(ValueError, match="two dimensions"):
        combined(x[None], c, torch.empty(40, 24))
    for job in (GramJob([x], [(0, 0)], False, c, 24), GramJob([x], [(0, 0, 0)], False, c.float(), 24)):  # type: ignore[list-item]
        with pytest.raises(ValueError, match=r"a block is|blocks are float64"):
            cpu._core.GramJobs([job], Tensor)
    with pytest.raises(TypeError, match="no tensor"):
        cpu._core.GramJobs([GramJob([None], [(0, 0, 0)], False, c, 24)], Tensor)  # type: ignore[list-item]


@needs_kernels
def test_tables_hold_what_they_point_to() -> None:
    """A prepared pass runs after its jobs and their tensors are gone elsewhere, and follows what they hold."""
    x, c, out = gaussian(300, 8, seed=1), gaussian(8, 5, seed=2, dtype=torch.float64), torch.empty(300, 5)
    wide = torch.empty(300, 16)[:, ::2]  # scattered: a copy of it is read, made anew every time
    job = CombineJob([x, wide], [CombineOutput.into(out, [(0, c, 0, 1.0), (1, c, 0, 1.0)])], False)
    tables = prepared("combine_pass", [job])
    keep = [x, wide]
    del job, c
    for i in range(3):
        keep[0].copy_(gaussian(300, 8, seed=10 + i))
        keep[1].copy_(gaussian(300, 8, seed=20 + i))
        assert tables.run() is None
        expected = (keep[0].double() + keep[1].double()) @ gaussian(8, 5, seed=2, dtype=torch.float64)
        assert torch.allclose(out.double(), expected, atol=1e-5)
