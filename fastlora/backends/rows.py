"""Arguments of a kernel as one row: the fields of a struct of ``csrc``, 8 bytes each, in the order it says itself."""

from __future__ import annotations

import functools
import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from fastlora.backends.padded import aligned
from fastlora.ops.chain import Chain, width
from fastlora.ops.coefficients import PartCoefficients


class ChainRow(NamedTuple):
    """``ChainArgs`` of ``kernels.h``: addresses of the tensors, sizes, cuts."""

    left: int
    right: int
    floor: int
    basis: int
    values: int
    shared: int
    kept: int
    sigma: int
    info: int
    groups: int
    k: int
    r: int
    width: int
    kind: int
    threshold: float
    rtol: float
    rank: int
    energy: float
    threads: int


class ChainCall(NamedTuple):
    """What a prepared ``chain`` is given: the arguments of the op, and its results."""

    left: Tensor
    right: Tensor
    floor: Tensor
    threshold: float
    kind: str
    rtol: float
    rank: int
    energy: float
    out: Chain

    def row(self, kinds: dict[str, int], threads: int) -> ChainRow:
        """``kinds``: the module's number of every kind of chain. Raises :class:`ValueError` for tensors that a kernel
        cannot read by plain pointers."""
        left, right, floor, threshold, kind, rtol, rank, energy, out = self
        for tensor in (left, right, floor, *out):
            if aligned(tensor) is not tensor:
                raise ValueError(f"chain: a plan needs contiguous tensors, got strides {tensor.stride()}")
        *_, k, _, r, _ = left.shape
        basis, values, shared, kept, sigma, info = [tensor.data_ptr() for tensor in out]
        return ChainRow(
            left.data_ptr(), right.data_ptr(), floor.data_ptr(), basis, values, shared, kept, sigma, info,
            out.info.numel(), k, r, width(kind, k, r), kinds[kind], threshold, rtol, rank, energy, threads,
        )  # fmt: skip


class CoefficientsRow(NamedTuple):
    """``CoefficientArgs`` of ``cuda.h``: addresses of the tensors, sizes, strides of the last two results."""

    projected: int
    other: int
    basis: int
    scaling: int
    strength: int
    H: int
    norms: int
    shared: int
    removal: int
    mixing: int
    groups: int
    k: int
    r: int
    w: int
    movers: int
    removal_row: int
    removal_column: int
    mixing_row: int
    mixing_column: int

    @staticmethod
    def of(
        projected: Tensor, other: Tensor, basis: Tensor, scaling: Tensor, strength: Tensor, out: PartCoefficients
    ) -> CoefficientsRow:
        """The row of a call on ``g`` modules; ``removal`` and ``mixing`` of ``out`` may be transposed in memory."""
        groups, k, w, r = out.H.shape
        removal_row, removal_column = out.removal.stride()[-2:]
        mixing_row, mixing_column = out.mixing.stride()[-2:]
        return CoefficientsRow(
            projected=projected.data_ptr(), other=other.data_ptr(), basis=basis.data_ptr(),
            scaling=scaling.data_ptr(), strength=strength.data_ptr(), H=out.H.data_ptr(), norms=out.norms.data_ptr(),
            shared=out.shared.data_ptr(), removal=out.removal.data_ptr(), mixing=out.mixing.data_ptr(),
            groups=groups, k=k, r=r, w=w, movers=out.removal.shape[2], removal_row=removal_row,
            removal_column=removal_column, mixing_row=mixing_row, mixing_column=mixing_column,
        )  # fmt: skip


def packed(row: ChainRow | CoefficientsRow, fields: Sequence[tuple[str, str]]) -> bytes:
    """``fields``: ``(name, struct code)`` as the module has them."""
    known, layout = _in_order.get(type(row), (None, None))
    if layout is not None and known is fields:  # as in every call but the first
        return layout.pack(*row)
    names, layout = _layout(tuple(fields))
    if row._fields != names:
        return packed_numbers(type(row).__name__, row._asdict(), fields)
    _in_order[type(row)] = fields, layout
    return layout.pack(*row)


_in_order: dict[type, tuple[Sequence[tuple[str, str]], struct.Struct]] = {}
"""How rows are packed whose fields are in the order of a module's."""


def packed_numbers(name: str, numbers: Mapping[str, int | float], fields: Sequence[tuple[str, str]]) -> bytes:
    """:func:`packed` of numbers by their names; ``name`` is that of the row."""
    names, layout = _layout(tuple(fields))
    if numbers.keys() != set(names):
        raise ValueError(f"{name} has the fields {', '.join(numbers)}, the kernel {fields}")
    return layout.pack(*[numbers[field] for field in names])


@functools.cache
def _layout(fields: tuple[tuple[str, str], ...]) -> tuple[tuple[str, ...], struct.Struct]:
    """The names of the fields of a row, in order, and how it is packed."""
    return tuple(name for name, _ in fields), struct.Struct("=" + "".join(code for _, code in fields))
