"""The reference formulas as a backend: slow, and right by inspection."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor

from fastlora.backends import Kernel, always
from fastlora.backends.passes import CombineJob, GramJob
from fastlora.ops.gram import blocks_of
from fastlora.reference.chain import chain
from fastlora.reference.combine import combine
from fastlora.reference.eigh import eigh
from fastlora.reference.gram import gram
from fastlora.reference.svd import svd


def unavailable() -> str | None:
    return None


def _gram(factors: Tensor, ranks: Tensor | None, blocks: str, rows: bool) -> Tensor:
    return gram(factors, ranks, blocks_of(blocks, factors.shape[-3]), blocks == "full", rows)


def _gram_pass(jobs: list[GramJob]) -> None:
    for job in jobs:
        columns = [(x.mT if job.rows else x).double() for x in job.factors]
        for i, j, out in job.blocks:
            out.copy_(columns[i].mT @ columns[j])


def _combine_pass(jobs: list[CombineJob]) -> None:
    for job in jobs:
        for out, terms in job.outputs:
            total = torch.zeros(out.shape, dtype=torch.float64)
            for term in terms:
                x = job.factors[term.factor].double()
                part = x if term.coefficient is None else term.coefficient @ x if job.rows else x @ term.coefficient
                place = (
                    total[term.at : term.at + part.shape[0]]
                    if job.rows
                    else total[:, term.at : term.at + part.shape[1]]
                )
                place += term.scale * part
            out.copy_(total)


def _write(file: int, tensors: list[Tensor], offsets: list[int], check: bool) -> int | None:
    for i, (tensor, offset) in enumerate(zip(tensors, offsets, strict=True)):
        if check and not bool(tensor.isfinite().all()):
            return i
        view = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        while len(view):
            written = os.pwrite(file, view, offset)
            view, offset = view[written:], offset + written
    return None


KERNELS: Mapping[str, Kernel] = {
    "gram": Kernel(_gram, always),
    "eigh": Kernel(eigh, always),
    "svd": Kernel(svd, always),
    "chain": Kernel(chain, always),
    "combine": Kernel(combine, always),
    "write": Kernel(_write, always),
    "finite": Kernel(lambda x: bool(x.isfinite().all()), always),
    "gram_pass": Kernel(_gram_pass, always),
    "combine_pass": Kernel(_combine_pass, always),
}
