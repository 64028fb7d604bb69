"""The Triton kernels: tensors on a CUDA device become tables of addresses here, and are checked here.

A prepared pass holds its tables on the device and is launched again and again, on whatever the tensors hold by then:
``run()`` allocates nothing and waits for nothing, so it can be captured in a CUDA graph, once each of its kernels
has been compiled by a first run.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastlora.backends import padded
from fastlora.backends.triton import combine_tables, gram_tables, merge_bands, pair_tiles
from fastlora.backends.triton.tables import HALVES, IntTable, Matrix, Sections
from fastlora.ops.dispatch import Kernel
from fastlora.ops.merge_tiles import TileTask
from fastlora.ops.passes import CombineJob, CombineOutput, GramJob

OLDEST = (3, 6)
PIECES = {2: torch.float32, 3: torch.bfloat16}  # what coefficients are cut into for float16 and bfloat16 factors


def is_interpreted() -> bool:
    """Whether the kernels run on CPU tensors, in Triton's interpreter: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _installed() -> str | None:
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "Triton is not installed: `pip install 'fastlora[triton]'`, or use the cpu backend"
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        return f"Triton {version} is installed, but {'.'.join(map(str, OLDEST))} or later is needed"
    return None


def unavailable() -> str | None:
    """Why the Triton kernels cannot be used, or ``None`` where they can."""
    if not is_interpreted() and not torch.cuda.is_available():
        return "there is no CUDA device that torch can use; use the cpu backend"
    return _installed()


def _refused(tensors: Sequence[object]) -> str | None:
    """Why tensors cannot be used together, or ``None``."""
    kind = "cpu" if is_interpreted() else "cuda"
    devices: set[torch.device] = set()
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            continue
        if tensor.device.type != kind:
            return f"a tensor is on {tensor.device}, this backend needs {'the CPU' if kind == 'cpu' else 'CUDA'}"
        devices.add(tensor.device)
    if len(devices) > 1:
        return f"tensors are on {' and '.join(sorted(map(str, devices)))}: move them to one device first"
    return None


def _supports(*args: object) -> str | None:
    return _refused(args)


def _supports_gram(jobs: Sequence[GramJob]) -> str | None:
    return _refused([x for job in jobs for x in (*job.factors, job.out)])


def _supports_combine(jobs: Sequence[CombineJob]) -> str | None:
    outputs = [output for job in jobs for output in job.outputs]
    if any(output.file >= 0 for output in outputs):
        return "results that go to files are computed on the CPU: move the factors there, or give each result memory"
    coefficients = [c for output in outputs for _, c, _, _ in output.terms]
    own = [x for output in outputs for x in (output.out, output.present)]
    return _refused([*(x for job in jobs for x in job.factors), *own, *coefficients])


def _supports_tiles(task: TileTask, *_: object) -> str | None:
    return _refused(task.factors)


def _supports_stacks(left: Tensor, right: Tensor, *_: object) -> str | None:
    return _refused([left, right])


@dataclass(frozen=True, slots=True)
class PassLaunches:
    """Launches of one pass in order, and the tensors that they read and write."""

    launches: tuple[Any, ...]  # tritonkernels.launch.Launch
    device: torch.device
    alive: tuple[Tensor, ...]

    def run(self) -> None:
        """Launches on the current stream of the device."""
        with torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext():
            for launch in self.launches:
                launch.run()


def _require(reason: str | None) -> None:
    if reason is not None:
        raise ValueError(f"triton: {reason}")


def prepare_gram(jobs: Sequence[GramJob]) -> PassLaunches:
    """The gram pass of some jobs, for as long as their tensors stay where they are. Rows must be contiguous."""
    _require(_supports_gram(jobs))
    alive = tuple(x for job in jobs for x in (*job.factors, job.out))
    device = alive[0].device if alive else torch.device("cpu")
    addressed_jobs = [
        gram_tables.AddressedJob(
            tuple(Matrix.of(x, job.rows) for x in job.factors),
            job.blocks, job.rows, job.out.data_ptr() + 8 * job.start, job.stride,
        )
        for job in jobs
    ]  # fmt: skip
    rounds = list(gram_tables.rounds(gram_tables.chunks(addressed_jobs)))
    sections = Sections()
    sections_of = [_RoundSections.of(chunks, sections) for chunks in rounds]
    buffer = sections.to(device)
    # The rounds take turns with the workspace.
    size = max((sum(c.size for c in chunks) for chunks in rounds), default=0)
    parts = torch.empty(size, dtype=torch.float64, device=device)
    launches = [
        launch
        for chunks, places in zip(rounds, sections_of, strict=True)
        for launch in _launches_of_round(chunks, places, buffer, parts)
    ]
    return PassLaunches(tuple(launches), device, (*alive, buffer, parts))


@dataclass(frozen=True, slots=True)
class _RoundSections:
    """Where the tables of some chunks are in the buffer."""

    slabs: tuple[slice, ...]  # one after another
    sums: tuple[Mapping[gram_tables.Sums, slice], ...]
    blocks: slice

    @staticmethod
    def of(chunks: Sequence[gram_tables.JobChunk], sections: Sections) -> _RoundSections:
        slabs = tuple([sections.add(c.slabs) for c in chunks])
        sums = tuple([{kind: sections.add(t) for kind, t in c.sums.items() if len(t)} for c in chunks])
        return _RoundSections(slabs, sums, sections.add(gram_tables.joined_blocks(chunks)))


def _launches_of_round(
    chunks: Sequence[gram_tables.JobChunk], places: _RoundSections, buffer: Tensor, parts: Tensor
) -> Iterator[Any]:
    """The sums of all chunks, each with parts of its own; then all of their blocks at once."""
    from tritonkernels import gram

    start = 0
    for chunk, slabs, sums in zip(chunks, places.slabs, places.sums, strict=True):
        rows, _, code, odd, vector = chunk.kind
        for kind, section in sums.items():
            programs, tables = len(chunk.sums[kind]), (buffer[section], buffer[slabs], parts[start:])
            if kind == "slabs":
                yield gram.exact_sums_launch(programs, *tables, rows=rows, code=code, odd=odd)
            else:
                common = {"rows": rows, "code": code, "vector": vector}
                yield gram.half_sums_launch(programs, *tables, one_group=kind == "one group", **common)
        start += chunk.size
    blocks, all_slabs = buffer[places.blocks], buffer[places.slabs[0].start :]
    yield gram.write_blocks_launch(sum(len(c.blocks) for c in chunks), blocks, all_slabs, parts)
    for code, alike in itertools.groupby(chunks, lambda c: c.repaired):
        count = sum(len(c.blocks) for c in alike)
        if code >= 0:
            yield gram.repair_blocks_launch(count, blocks, all_slabs, parts, code=code)
        blocks = blocks[count * gram_tables.BLOCK_COLUMNS :]


def prepare_combine(jobs: Sequence[CombineJob]) -> PassLaunches:
    """The combine pass of some jobs, for as long as their tensors stay where they are. Rows must be contiguous."""
    from tritonkernels import combine

    _require(_supports_combine(jobs))
    alive: list[Tensor] = []
    result_rows = [[_result(output, job, alive) for output in job.outputs] for job in jobs]
    device = alive[0].device if alive else torch.device("cpu")
    batches = list(combine_tables.batches(result_rows, _shapes()))
    sections = Sections()
    batch_sections = [[sections.add(t) for t in (b.tiles, b.results, b.terms, b.operands, b.flags)] for b in batches]
    cut_sections = [(code, len(cuts), sections.add(cuts), size) for code, cuts, size in _cuts(batches, batch_sections)]
    buffer = sections.to(device)
    launches: list[Any] = []
    pieces: dict[int | None, Tensor] = {}
    for half, count, section, size in cut_sections:
        pieces[half] = torch.empty(size, dtype=PIECES[half], device=device)
        launches.append(combine.cut_coefficients_launch(count, buffer[section], buffer, pieces[half], code=half))
    used = dict.fromkeys(pieces, 0)
    for batch, sections_of_batch in zip(batches, batch_sections, strict=True):
        tiles, results, terms, operands, flags = (buffer[p] for p in sections_of_batch)
        rows, form, code, out, odd, vector, tall, wide = batch.kind
        common, programs = {"rows": rows, "code": code, "out": out}, len(batch.tiles)
        if form == "exact":
            launches.append(combine.exact_results_launch(programs, tiles, results, terms, odd=odd, **common))
            continue
        if form == "half":
            shape = {"vector": vector, "tall": tall, "wide": wide, "odd": odd}
            launches.append(combine.half_results_launch(programs, tiles, terms, **shape, **common))
        else:
            launch = combine.half_joint_launch if form == "joint" else combine.half_summed_launch
            own = pieces[code][used[code] :]
            used[code] += batch.pieces
            launches.append(launch(programs, tiles, operands, own, vector=vector, side=wide, **common))
        if batch.may_be_extreme:
            tables = results, terms, flags
            launches.append(combine.extreme_results_launch(len(batch.results), *tables, odd=odd, **common))
    return PassLaunches(tuple(launches), device, (*alive, buffer, *pieces.values()))


def _shapes() -> combine_tables.TileShapes:
    from tritonkernels import combine

    stretches, half = (
        tuple((tall, wide) for wide, tall in tiles.items()) for tiles in (combine.STRETCHES, combine.HALF_TILES)
    )
    return combine_tables.TileShapes(
        stretches, half, combine.ROUGH_TILES, combine.EXACT_TILE, combine.MOST_JOINT
    )  # fmt: skip


def _cuts(
    batches: Sequence[combine_tables.TileBatch], batch_sections: Sequence[Sequence[slice]]
) -> Iterator[tuple[int, IntTable, int]]:
    """The coefficients that are cut, by the dtype code of their factors, and the elements that their pieces take."""
    for code in HALVES:
        moved, size = [], 0
        for batch, sections in zip(batches, batch_sections, strict=True):
            if batch.kind.code == code and len(batch.cuts):
                moved.append(batch.cuts + np.array([0, 0, 0, 0, 0, 0, sections[-1].start, size, 0, 0]))
                size += batch.pieces
        if moved:
            yield code, np.concatenate(moved), size


def _result(output: CombineOutput, job: CombineJob, alive: list[Tensor]) -> combine_tables.ResultRow:
    if output.out is None:
        raise ValueError("triton: a result without memory has nowhere to go")
    out = Matrix.of(output.out, job.rows)
    if not combine_tables.is_writable(out):
        raise ValueError(f"triton: a result lies at address {out.address}, which its dtype {output.dtype} cannot have")
    alive.append(output.out)
    terms = []
    for f, c, at, scale in output.terms:
        x = Matrix.of(job.factors[f], job.rows)
        if not x.width:
            continue
        alive.append(job.factors[f])
        if c is None:
            terms.append(combine_tables.TermRow(x, 0, 0, x.width, at, scale))
            continue
        width = c.shape[0 if job.rows else 1]
        if not width:
            continue
        if c.dtype != torch.float64 or (c.shape[1] > 1 and c.stride(1) != 1) or c.data_ptr() % 8:
            raise ValueError(f"a coefficient must be float64 with contiguous rows: {c.dtype} {c.stride()}")
        alive.append(c)
        terms.append(combine_tables.TermRow(x, c.data_ptr(), c.stride(0), width, at, scale))
    present = 0
    if output.present is not None:
        alive.append(output.present)
        present = output.present.data_ptr()
    return combine_tables.ResultRow(out, tuple(terms), job.rows, present)


def _with_contiguous_rows(x: Tensor) -> Tensor:
    return x.contiguous() if x.shape[1] > 1 and x.stride(1) != 1 else x


def _gram_pass(jobs: Sequence[GramJob]) -> None:
    prepare_gram([replace(job, factors=[_with_contiguous_rows(x) for x in job.factors]) for job in jobs]).run()


def _combine_pass(jobs: Sequence[CombineJob]) -> None:
    prepare_combine([replace(job, factors=[_with_contiguous_rows(x) for x in job.factors]) for job in jobs]).run()


def _finite(x: Tensor) -> bool:
    """One read: the largest absolute value is NaN or Inf exactly when an element is."""
    return not x.numel() or bool(torch.linalg.vector_norm(x, ord=torch.inf).isfinite())


KERNELS: Mapping[str, Kernel] = {
    "gram": Kernel(functools.partial(padded.gram, _gram_pass), _supports),
    "combine": Kernel(functools.partial(padded.combine, _combine_pass), _supports),
    "finite": Kernel(_finite, _supports),
    "gram_pass": Kernel(_gram_pass, _supports_gram, prepare_gram),
    "combine_pass": Kernel(_combine_pass, _supports_combine, prepare_combine),
    "merge_select": Kernel(merge_bands.select, _supports_tiles),
    "merge_count_varied": Kernel(merge_bands.count_varied, _supports_tiles),
    "merge_row_masks": Kernel(merge_bands.row_masks, _supports_tiles),
    "merge_tiles": Kernel(merge_bands.merge, _supports_tiles),
    "similarity": Kernel(pair_tiles.compare, _supports_stacks),
}
