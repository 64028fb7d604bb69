"""What is timed: every answer is checked before its time is taken, and every time stands beside its floor."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import fastlora as fl
from fastlora.adapter import Update
from fastlora.backends import resolve
from fastlora.backends.passes import CombineJob, CombineTerm, GramJob
from fastlora.bench.opponents import dense_unique, merge_by_dense_svd, merge_by_qr, plain_decompose
from fastlora.bench.timing import Machine, Run, alternate, thread_counts
from fastlora.bench.workloads import Workload, find, make_pool
from fastlora.engine import materialise, materialise_groups
from fastlora.memory import Room
from fastlora.ops.gram import blocks_of
from fastlora.pool import Pool

TAU = 0.85


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: seconds of fastlora by threads, of the opponent, and the floor on the most threads."""

    what: str
    ours: dict[int, float]
    opponent: str
    theirs: float
    floor: float | None
    note: str = ""

    def ratio(self, count: int) -> float:
        return self.theirs / self.ours[count]


Case = Callable[[Machine], list[Row]]


def require(what: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
    """Refuses to time a wrong answer."""
    scale = float(expected.double().abs().max()) or 1.0
    error = float((got.double() - expected.double()).abs().max()) / scale
    if not error <= tolerance:
        raise AssertionError(f"{what}: error {error:.2e} above {tolerance:.0e}; a wrong answer is not timed")


def compare(
    what: str, ours: Run, opponent: str, theirs: Run, *, their_threads: Sequence[int] = (1,), floor: float | None = None
) -> Row:
    """Our run by threads against the opponent at its best thread count, all alternated."""
    counts = thread_counts()
    runs = {f"ours {c}": (c, ours) for c in counts}
    runs |= {f"theirs {c}": (c, theirs) for c in their_threads if c in counts}
    times = alternate(runs)
    best = min((t, n) for n, t in times.items() if n.startswith("theirs"))
    return Row(
        what,
        {c: times[f"ours {c}"] for c in counts},
        f"{opponent}, {best[1][-1]} thread{'s' * (best[1][-1] != '1')}",
        best[0],
        floor,
    )


def gram_batch(n: int, batch: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(batch, n, 2 * n, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return x @ x.mT


def eigh(machine: Machine) -> list[Row]:
    rows = []
    for dtype in (torch.float32, torch.float64):
        rate = (machine.fp32 if dtype == torch.float32 else machine.fp64)[thread_counts()[-1]]
        for n, batch in ((8, 1792), (16, 1792), (32, 1792), (64, 1792), (128, 64), (256, 64)):
            a = gram_batch(n, batch, dtype)
            values, vectors = fl.ops.eigh(a)
            require("eigh", (vectors * values[..., None, :]) @ vectors.mT, a, 200 * torch.finfo(dtype).eps)
            name = f"eigh {str(dtype)[6:]} n={n}, batch {batch}"
            floor = 14 / 3 * n**3 * batch / rate
            rows.append(compare(name, partial(fl.ops.eigh, a), "torch", partial(torch.linalg.eigh, a), floor=floor))
    return rows


def svd(machine: Machine) -> list[Row]:
    rows = []
    for n, batch in ((8, 1792), (16, 1792), (32, 1792), (64, 448), (128, 64)):
        a = torch.randn(batch, n, n, generator=torch.Generator().manual_seed(0))
        u, s, vh = fl.ops.svd(a)
        require("svd", (u * s[..., None, :]) @ vh, a, 200 * torch.finfo(a.dtype).eps)
        floor = 9 * n**3 * batch / machine.fp32[thread_counts()[-1]]
        theirs = partial(torch.linalg.svd, a, full_matrices=False)
        name = f"svd float32 n={n}, batch {batch}"
        rows.append(compare(name, partial(fl.ops.svd, a), "torch", theirs, floor=floor))
    return rows


def stored(pool: Pool, side: str) -> list[list[Tensor]]:
    """``[module][adapter]`` stored factors of one side."""
    found = [[getattr(a.updates[m], side).stored for a in pool.adapters] for m in pool.modules]
    return [[x for x in row if x is not None] for row in found]


def gram(machine: Machine) -> list[Row]:
    workload = find("llama2-7b-8x16")
    pool = make_pool(workload)
    B, A = stored(pool, "B"), stored(pool, "A")
    k, r = workload.adapters, workload.rank
    jobs, checks = [], []
    for factors, rows, kind in ((B, False, "chain"), (A, True, "diagonal")):
        for own in factors:
            out = torch.zeros(k, k, r, r, dtype=torch.float64)
            jobs.append(GramJob(own, [(i, j, out[i, j]) for i, j in blocks_of(kind, k)], rows))
            checks.append((own, out, rows))

    def plain() -> None:
        for own, kind, rows in [(x, "chain", False) for x in B] + [(x, "diagonal", True) for x in A]:
            single = [(x if rows else x.mT).float() for x in own]
            for i, j in blocks_of(kind, k):
                single[i] @ single[j].mT

    run = partial(resolve("gram_pass", jobs).launch, jobs)
    run()
    for own, out, rows in (checks[0], checks[-1]):
        x = (own[1] if rows else own[1].mT).double()
        require("gram", out[1, 1], x @ x.mT, 1e-6)
    operations = (
        2
        * r
        * r
        * sum(
            len(blocks_of(kind, k)) * x[0].shape[rows]
            for f, kind, rows in ((B, "chain", 0), (A, "diagonal", 1))
            for x in f
        )
    )
    floor = max(workload.bytes / machine.copy[thread_counts()[-1]], operations / machine.fp32[thread_counts()[-1]])
    return [compare("gram pass, llama2-7b-8x16", run, "torch float32 blocks", plain, their_threads=(1, 2), floor=floor)]


def combine(machine: Machine) -> list[Row]:
    workload = find("llama2-7b-8x16")
    pool = make_pool(workload)
    k, r = workload.adapters, workload.rank
    generator = torch.Generator().manual_seed(1)

    def coefficient() -> Tensor:
        return torch.randn(r, r, generator=generator, dtype=torch.float64)

    rows = []
    for side, factors in (("B", stored(pool, "B")), ("A", stored(pool, "A"))):
        jobs, moved = [], 0
        for own in factors:
            if side == "B":
                terms = [[CombineTerm(i, None, 0, 1.0), CombineTerm(0, coefficient(), 0, 1.0)] for i in range(k)]
                terms.append([CombineTerm(0, coefficient(), 0, 1.0)])
            else:
                terms = [[CombineTerm(i, coefficient(), 0, 1.0) for i in range(k)]]
            outputs = [(torch.empty_like(own[0]), t) for t in terms]
            jobs.append(CombineJob(own, outputs, side == "A"))
            moved += sum(x.nbytes for x in own) + sum(out.nbytes for out, _ in outputs)
        run = partial(resolve("combine_pass", jobs).launch, jobs)
        run()
        out, last = jobs[0].outputs[-1]
        x = [f.double() for f in jobs[0].factors]
        parts = [
            t.coefficient @ x[t.factor] if side == "A" else x[t.factor] @ t.coefficient
            for t in last
            if t.coefficient is not None
        ]
        require("combine", out, torch.stack(parts).sum(0), 1e-2)
        buffer = torch.ones(moved // 2, dtype=torch.uint8)
        target = torch.empty_like(buffer)
        copy = partial(target.copy_, buffer)
        floor = moved / machine.copy[thread_counts()[-1]]
        rows.append(
            compare(
                f"combine pass, {side} side, llama2-7b-8x16",
                run,
                "a copy of as many bytes",
                copy,
                their_threads=(1, 2),
                floor=floor,
            )
        )
    return rows


def unique_factors(pool: Pool, room: Room | None = None) -> list[list[Tensor]]:
    """Every unique ``B`` and the shared factors, module by module: what a decomposition has to compute.

    ``room``: where results go, as when they are saved; memory of their own by default.
    """
    parts = fl.decompose(pool, threshold=TAU)
    adapters = [*(parts.unique_of(n) for n in pool.names), parts.shared]
    groups: list[list[Update]] = [[a.updates[m] for a in adapters] for m in pool.modules]
    return [[B for B, _ in pairs] for pairs in materialise_groups(groups, pool.adapters[0].dtype, room)]


def decompose(machine: Machine) -> list[Row]:
    rows = []
    for name in ("llama2-7b-8x16", "llama2-7b-8x16-fp32"):
        workload = find(name)
        small = make_pool(Workload(workload.modules, 1, workload.adapters, workload.rank, workload.dtype))
        tolerance = 2e-2 if workload.dtype == torch.bfloat16 else 1e-4
        for ours, (theirs, _) in zip(unique_factors(small), plain_decompose(small, TAU), strict=True):
            for a, b in zip(ours, theirs, strict=False):
                require("unique B", a, b, tolerance)
        pool = make_pool(workload)
        floor = 2 * workload.bytes / machine.copy[thread_counts()[-1]]
        what, opponent = f"decompose in memory, {name}", "plain torch in factor space"
        ours_run, their_run = partial(unique_factors, pool, Room()), partial(plain_decompose, pool, TAU)
        rows.append(compare(what, ours_run, opponent, their_run, their_threads=(1, 2), floor=floor))
        del ours_run, their_run
        del pool
    return rows


def dense(_: Machine) -> list[Row]:
    pool = make_pool(find("one-1024-8x16"))
    (module,) = pool.modules
    deltas = [a.delta(module) for a in pool.adapters]
    parts = fl.decompose(pool, threshold=TAU)
    for name, unique in zip(pool.names, dense_unique(deltas, TAU), strict=True):
        require("unique ΔW", parts.unique_of(name).delta(module), unique, 1e-4)
    ours = alternate({str(c): (c, lambda: unique_factors(pool)) for c in thread_counts()})
    count = thread_counts()[-1]
    theirs = alternate({"dense": (count, lambda: dense_unique(deltas, TAU))}, rounds=1)["dense"]
    what = "decompose one 1024×1024 module, 8 adapters of rank 16"
    return [
        Row(what, {int(c): t for c, t in ours.items()}, f"the paper's dense algorithm, {count} threads", theirs, None)
    ]


def merge(_: Machine) -> list[Row]:
    def ours(pool: Pool) -> list[tuple[Tensor, Tensor]]:
        merged = fl.merge(pool, method="svd", rank=16)
        return materialise([u.baked() for u in merged.updates.values()], torch.float32)

    many = Workload({"dense": (4096, 4096)}, 16, 2, 16, torch.float32)
    one = Workload({"dense": (1024, 1024)}, 1, 2, 16, torch.float32)
    rows = []
    for what, workload, opponent, theirs in (
        ("svd merge of 2 × r16, sixteen 4096×4096 modules", many, "torch QR and small SVD", merge_by_qr),
        ("svd merge of 2 × r16, one 1024×1024 module", one, "torch dense SVD", merge_by_dense_svd),
    ):
        pool = make_pool(workload)
        for (B, A), (Bt, At) in zip(ours(pool), theirs(pool), strict=True):
            require("merged ΔW", B[:256] @ A, Bt[:256] @ At, 1e-4)
        rows.append(compare(what, partial(ours, pool), opponent, partial(theirs, pool)))
    return rows


def files(_: Machine) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for adapter in make_pool(find("llama2-7b-8x16")).adapters:
            adapter.save(root / "in" / adapter.name)
        inputs = sorted((root / "in").iterdir())

        def ours() -> None:
            shutil.rmtree(root / "out", ignore_errors=True)
            fl.decompose(fl.Pool.load(inputs), threshold=TAU).save(root / "out")

        def clear() -> None:
            shutil.rmtree(root / "out", ignore_errors=True)

        def copy() -> None:
            shutil.rmtree(root / "copy", ignore_errors=True)
            (root / "copy").mkdir()
            for i, path in enumerate(sorted((root / "out").rglob("*.safetensors"))):
                shutil.copyfile(path, root / "copy" / str(i))

        count = thread_counts()[-1]
        times = alternate({"ours": (count, ours), "copy": (count, copy), "clear": (count, clear)})
        what = "load → decompose → save, llama2-7b-8x16, files to files, warm cache"
        return [
            Row(
                what,
                {count: times["ours"]},
                "shutil.copyfile of the bytes that are written",
                times["copy"],
                times["copy"],
            )
        ]


CASES: dict[str, Case] = {
    "eigh": eigh,
    "svd": svd,
    "gram": gram,
    "combine": combine,
    "decompose": decompose,
    "dense": dense,
    "merge": merge,
    "files": files,
}
