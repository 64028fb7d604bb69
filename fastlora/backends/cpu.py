"""The compiled CPU kernels: tensors become addresses here, and are checked here."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastlora.backends import cpu_tiles, padded
from fastlora.backends.padded import aligned
from fastlora.backends.rows import ChainCall, packed, packed_numbers
from fastlora.ops.coefficients import fill
from fastlora.ops.difference_products import DifferenceProducts
from fastlora.ops.dispatch import Kernel, always
from fastlora.ops.passes import CombineJob, FactorSide, GramAsked, GramJob, WriteProblem

try:
    from fastlora import _core
except ImportError as error:
    _core = None  # type: ignore[assignment]
    _import_error = str(error)

DTYPES: dict[torch.dtype, int] = {}
_JOINS = _core is not None
if _core is not None:
    DTYPES.update((getattr(torch, name), code) for name, code in _core.DTYPES.items())


def unavailable() -> str | None:
    """Why the compiled CPU kernels cannot be used, or ``None`` where they can."""
    if _core is not None:
        return None
    return (
        f"the compiled module fastlora._core cannot be imported ({_import_error}). Either the package was "
        "built without it (FASTLORA_CORE=OFF), or a source folder on the path hides an installed package: run from "
        "another folder, or `pip install -e .` here"
    )


def isa() -> str:
    """Name of the instruction set in use."""
    return str(_core.isa())


def cuda_build() -> str:
    """Whether CUDA code was compiled in, for which architectures, and whether a device is there."""
    if not _core.has_cuda:
        return "no (built without nvcc, or with FASTLORA_CUDA=OFF)"
    count, reason = _core.cuda_device_count()
    return f"{_core.cuda_archs}; {count} devices" + (f" ({reason})" if reason else "")


def joined(tensors: list[Tensor], dtype: torch.dtype) -> bytearray | None:
    """The numbers of tensors, one tensor after another. ``None`` where one is of a class of its own, has another dtype,
    is on a device, or does not lie in the order of its numbers; where a number is NaN or Inf; and without the compiled
    module.

    It is no op: nothing is computed. It takes a fifth of the time of torch's calls.
    """
    return _core.joined(Tensor, tensors, DTYPES[dtype]) if _JOINS else None


def _on_cpu(*tensors: object) -> str | None:
    for tensor in tensors:
        if isinstance(tensor, Tensor) and not tensor.is_cpu:
            return f"a tensor is on {tensor.device}, this backend needs the CPU"
    return None


def _supports(*args: object) -> str | None:
    return _on_cpu(*args)


def _supports_jobs(jobs: Sequence[GramJob | CombineJob]) -> str | None:
    if all([x.is_cpu for job in jobs for x in job.factors]):
        return None
    return _on_cpu(*[x for job in jobs for x in job.factors])


def _matrix(x: Tensor) -> tuple[int, int, int, int, int]:
    """A row of the Matrix table; the last dimension is contiguous (or has one element)."""
    rows, columns = x.shape
    stride, step = x.stride()
    if columns > 1 and step != 1:
        raise ValueError(f"a factor must have contiguous rows, got strides {x.stride()} for shape {tuple(x.shape)}")
    # torch gives a single row any stride; what is copied as it lies is rows times the stride.
    return x.data_ptr(), rows, columns, columns if rows == 1 else stride, DTYPES[x.dtype]


def _address(table: np.ndarray[Any, Any]) -> int:
    address: int = table.__array_interface__["data"][0]  # table.ctypes.data takes five times as long
    return address


def _gram_pass(jobs: Sequence[GramJob]) -> None:
    _core.GramJobs(jobs, Tensor).run(torch.get_num_threads())


class PreparedCombine:
    """The tables of a combine pass. :meth:`run` works on what the tensors hold by then, and writes to the files that
    the outputs name by then; :meth:`renew` before it looks at their places in files and the scales of their terms."""

    def __init__(self, jobs: Sequence[CombineJob]) -> None:
        self._tables = _core.CombineJobs(jobs, Tensor, DTYPES)

    def renew(self) -> None:
        """Takes the scales of terms and the places in files anew from the jobs."""
        self._tables.renew()

    def run(self) -> WriteProblem | None:
        """Computes all outputs and writes those that have a file; returns what stopped it, or ``None``."""
        kind, job, output, errno = self._tables.run(torch.get_num_threads())
        return WriteProblem(job, output, errno if kind == _core.SYSTEM_ERROR else None) if kind else None


def _combine_pass(jobs: Sequence[CombineJob]) -> WriteProblem | None:
    return PreparedCombine(jobs).run()


def _gram_factors(asked: Sequence[GramAsked]) -> bool:
    return _core.GramFactors(asked, Tensor).run(torch.get_num_threads())


def _factor_pass(sides: Sequence[FactorSide]) -> bool:
    return _core.FactorJobs(sides, Tensor).run(torch.get_num_threads())


def _finite(x: Tensor) -> bool:
    # As one row: rows of a narrow matrix are shorter than what a loop needs to be fast.
    return _core.finite(*_matrix(x.view(1, x.numel()) if x.is_contiguous() else x))


def _eigh(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    a = aligned(a)
    n = a.shape[-1]
    values, vectors = torch.empty(a.shape[:-1], dtype=a.dtype), torch.empty_like(a)
    info = (torch.empty if n else torch.zeros)(a.shape[:-2], dtype=torch.int32)
    tensors = a.data_ptr(), values.data_ptr(), vectors.data_ptr(), info.data_ptr()
    _core.eigh(*tensors, info.numel(), n, a.dtype == torch.float64, torch.get_num_threads())
    return values, vectors.mT, info


def _svd(a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a = aligned(a)
    *batch, p, q = a.shape
    m = min(p, q)
    ut, s, vt = (torch.empty((*batch, *shape), dtype=a.dtype) for shape in ((m, p), (m,), (m, q)))
    info = torch.zeros(batch, dtype=torch.int32)
    _core.svd(
        a.data_ptr(), ut.data_ptr(), s.data_ptr(), vt.data_ptr(), info.data_ptr(), batch=info.numel(), p=p, q=q,
        is_double=a.dtype == torch.float64, threads=torch.get_num_threads(),
    )  # fmt: skip
    return ut.mT, s, vt, info


class PreparedChain:
    """A chain on tensors that stay where they are: :meth:`run` computes it from what they hold by then."""

    def __init__(self, *arguments: Any) -> None:
        self._call = ChainCall(*arguments)
        self._row = self._call.row(_core.CHAIN_KINDS, torch.get_num_threads())

    def run(self) -> None:
        """Computes the chain of every module."""
        if self._call.left.numel():
            row = self._row._replace(threads=torch.get_num_threads())
            _core.chain(packed(row, _core.CHAIN_FIELDS))


def _similarity(left: Tensor, right: Tensor, starts: Tensor, kept: Tensor, split: int) -> tuple[Tensor, Tensor]:
    k = len(kept)
    left, right, starts, kept = (x.contiguous() for x in (left, right, starts, kept))
    inner, shared = (torch.zeros(k, k, dtype=torch.float64) for _ in range(2))
    numbers = {
        "left": left.data_ptr(), "right": right.data_ptr(), "starts": starts.data_ptr(), "kept": kept.data_ptr(),
        "inner": inner.data_ptr(), "shared": shared.data_ptr(), "n": left.shape[0], "m": right.shape[0],
        "width": left.shape[1], "k": k, "split": split, "threads": torch.get_num_threads(),
    }  # fmt: skip
    _core.similarity(packed_numbers("SimilarityArgs", numbers, _core.SIMILARITY_FIELDS))
    return inner, shared


def _tucker(
    left: Tensor, right: Tensor, U: Tensor, V: Tensor, iterations: int, tolerance: float
) -> tuple[Tensor, Tensor, Tensor]:
    left, right, U, V = (aligned(x) for x in (left, right, U, V))
    g, k, r, n = left.shape
    ends, steps = (torch.empty_like(U), torch.empty_like(V)), torch.empty(g, dtype=torch.int64)
    numbers = {
        "left": left.data_ptr(), "right": right.data_ptr(), "u": U.data_ptr(), "v": V.data_ptr(),
        "u_end": ends[0].data_ptr(), "v_end": ends[1].data_ptr(), "steps": steps.data_ptr(), "modules": g, "k": k,
        "r": r, "n": n, "m": right.shape[3], "c": U.shape[2], "iterations": iterations, "tolerance": tolerance,
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    _core.tucker(packed_numbers("TuckerArgs", numbers, _core.TUCKER_FIELDS))
    return *ends, steps


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
    n, m = new.shape
    given = right if right is not None else left
    width = 0 if given is None else given.shape[1]
    right, left = (None if x is None else aligned(x) for x in (right, left))
    given_rows = [x if x.stride(1) == 1 or x.shape[1] < 2 else x.contiguous() for x in (new, old) if x is not None]
    table = np.array([_matrix(x) for x in given_rows], dtype=np.int64)
    images = None if right is None else torch.empty(n, width, dtype=torch.float64)
    preimages = torch.empty(m, width, dtype=torch.float64) if back else None
    total = torch.zeros(1, dtype=torch.float64) if square else None
    first = _address(table)
    numbers = {
        "old": 0 if old is None else first + table.strides[0], "current": first, "right": _place(right),
        "left": _place(left), "images": _place(images), "preimages": _place(preimages), "square": _place(total),
        "n": n, "m": m, "width": width, "precision": _core.PRECISIONS[precision], "threads": threads,
    }  # fmt: skip
    _core.difference_products(packed_numbers("DifferenceArgs", numbers, _core.DIFFERENCE_FIELDS))
    return DifferenceProducts(images, preimages, None if total is None else float(total))


def _place(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


KERNELS: Mapping[str, Kernel] = {
    "gram": Kernel(functools.partial(padded.gram, _gram_pass), _supports),
    "eigh": Kernel(_eigh, _supports),
    "svd": Kernel(_svd, _supports),
    "chain": Kernel(functools.partial(padded.chain, PreparedChain), _supports, PreparedChain),
    "combine": Kernel(functools.partial(padded.combine, _combine_pass), _supports),
    "coefficients": Kernel(fill, _supports),
    "finite": Kernel(_finite, _supports),
    "gram_pass": Kernel(_gram_pass, _supports_jobs),
    "combine_pass": Kernel(_combine_pass, _supports_jobs, PreparedCombine),
    "factor_pass": Kernel(_factor_pass, always),
    "gram_factors": Kernel(_gram_factors, always),
    "merge_select": Kernel(cpu_tiles.select, cpu_tiles.supports),
    "merge_count_varied": Kernel(cpu_tiles.count_varied, cpu_tiles.supports),
    "merge_row_masks": Kernel(cpu_tiles.row_masks, cpu_tiles.supports),
    "merge_tiles": Kernel(cpu_tiles.merge, cpu_tiles.supports),
    "similarity": Kernel(_similarity, _supports),
    "tucker": Kernel(_tucker, _supports),
    "difference_products": Kernel(_difference_products, _supports),
    "add_products": Kernel(cpu_tiles.add_products, cpu_tiles.supports),
}
