"""The reference formulas as a backend: slow, and right by inspection."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastlora.backends import reference_tiles, tiles_of_files
from fastlora.ops.add_products import ProductTask
from fastlora.ops.coefficients import fill
from fastlora.ops.difference_products import DifferenceProducts
from fastlora.ops.dispatch import Kernel, always
from fastlora.ops.gram import blocks_of
from fastlora.ops.passes import CombineJob, CombineOutput, GramJob, WriteProblem
from fastlora.reference.add_products import add_products
from fastlora.reference.chain import chain
from fastlora.reference.combine import combine
from fastlora.reference.difference_products import difference_products
from fastlora.reference.eigh import eigh
from fastlora.reference.finite import finite
from fastlora.reference.gram import gram, symmetric
from fastlora.reference.similarity import similarity
from fastlora.reference.svd import svd
from fastlora.reference.tucker import tucker
from fastlora.runtime.system import write_all_at


def unavailable() -> str | None:
    """``None``: plain torch is always there."""
    return None


def _gram(factors: Tensor, ranks: Tensor | None, blocks: str, rows: bool) -> Tensor:
    return gram(factors, ranks, blocks_of(blocks, factors.shape[-3]), blocks == "full", rows)


def _gram_pass(jobs: Sequence[GramJob]) -> None:
    for job in jobs:
        columns = [(x.mT if job.rows else x).double() for x in job.factors]
        for block in job.blocks:
            i, j, _ = block
            product = columns[i].mT @ columns[j]
            job.block(block).copy_(symmetric(product) if i == j else product)


def _combine_pass(jobs: Sequence[CombineJob]) -> WriteProblem | None:
    for j, job in enumerate(jobs):
        for o, output in enumerate(job.outputs):
            stored = output.file >= 0 and output.out is not None
            result = output.out if stored else _combined(job, output).to(output.dtype)
            assert result is not None
            if output.file < 0:
                assert output.out is not None
                output.out.copy_(result)
            elif output.check and not bool(result.isfinite().all()):
                return WriteProblem(j, o, None)
            elif (errno := _write(output.file, result, output.offset)) is not None:
                return WriteProblem(j, o, errno)
    return None


def _combined(job: CombineJob, output: CombineOutput) -> Tensor:
    total = torch.zeros(output.shape, dtype=torch.float64)
    for factor, coefficient, at, scale in output.terms:
        x = job.factors[factor].double()
        part = x if coefficient is None else coefficient @ x if job.rows else x @ coefficient
        covered = total[at : at + part.shape[0]] if job.rows else total[:, at : at + part.shape[1]]
        covered += scale * part
    return total


def _write(file: int, tensor: Tensor, offset: int) -> int | None:
    """The errno of what went wrong, or ``None``."""
    view = memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    try:
        write_all_at(file, view, offset)
    except OSError as error:
        return error.errno
    return None


def _added(task: ProductTask, W: Tensor) -> Tensor:
    return add_products(W, [(s.left, s.width, s.pairs, s.scales) for s in task.segments])


def _difference_products(
    new: Tensor,
    old: Tensor | None,
    right: Tensor | None,
    left: Tensor | None,
    back: bool,
    square: bool,
    precision: str,
    threads: int,
) -> DifferenceProducts:
    images, preimages, total = difference_products(new, old, right, left)
    return DifferenceProducts(
        images if right is not None else None, preimages if back else None, float(total) if square else None
    )


KERNELS: Mapping[str, Kernel] = {
    "gram": Kernel(_gram, always),
    "eigh": Kernel(eigh, always),
    "svd": Kernel(svd, always),
    "chain": Kernel(chain, always),
    "combine": Kernel(combine, always),
    "coefficients": Kernel(fill, always),
    "finite": Kernel(finite, always),
    "gram_pass": Kernel(_gram_pass, always),
    "combine_pass": Kernel(_combine_pass, always),
    "merge_select": Kernel(reference_tiles.select, always),
    "merge_count_varied": Kernel(reference_tiles.count_varied, always),
    "merge_row_masks": Kernel(reference_tiles.row_masks, always),
    "merge_tiles": Kernel(reference_tiles.merge, always),
    "similarity": Kernel(similarity, always),
    "tucker": Kernel(tucker, always),
    "difference_products": Kernel(_difference_products, always),
    "add_products": Kernel(functools.partial(tiles_of_files.add_products, formula=_added), always),
}
