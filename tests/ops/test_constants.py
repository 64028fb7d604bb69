"""Numbers that Python has for itself, so as to need no compiled module, are those of the kernels."""

from __future__ import annotations

import pytest
import torch

from fastlora.backends.rows import ChainRow, CoefficientsRow, packed
from fastlora.backends.triton import tables
from fastlora.ops.chain import CHAINS
from fastlora.ops.eigh import NOT_CONVERGED, NOT_FINITE
from fastlora.reference import chain as reference

_core = pytest.importorskip("fastlora._core", reason="needs compiled kernels, whose numbers these are")


def test_dtype_codes() -> None:
    codes = {getattr(torch, name): code for name, code in _core.DTYPES.items()}
    assert codes.pop(torch.uint8) not in tables.CODES.values()
    assert codes == tables.CODES
    assert {dtype: tables.SIZES[code] for dtype, code in codes.items()} == {dtype: dtype.itemsize for dtype in codes}
    assert tuple(codes[dtype] for dtype in (torch.float16, torch.bfloat16)) == tables.HALVES


def test_dtype_codes_of_triton() -> None:
    values = pytest.importorskip("tritonkernels.values", reason="Triton is not installed", exc_type=ImportError)
    names = {"float32": "fp32", "float64": "fp64", "float16": "fp16", "bfloat16": "bf16"}
    codes = {names[name]: code for name, code in _core.DTYPES.items() if name in names}
    assert {dtype.name: code for code, dtype in enumerate(values.DTYPES)} == codes


def test_chains_and_what_solvers_say() -> None:
    assert {kind: code for code, kind in enumerate(CHAINS)} == _core.CHAIN_KINDS
    assert {"done": 0, "not finite": NOT_FINITE, "not converged": NOT_CONVERGED} == _core.INFO
    assert reference.LEAST_MEAN == _core.LEAST_MEAN


@pytest.mark.parametrize(("row", "fields"), [
    (ChainRow, _core.CHAIN_FIELDS), (CoefficientsRow, _core.COEFFICIENT_FIELDS),
])  # fmt: skip
def test_rows_have_the_fields_of_the_kernels(row: type, fields: tuple[tuple[str, str], ...]) -> None:
    hints = {name: getattr(hint, "__forward_arg__", hint) for name, hint in row.__annotations__.items()}
    assert tuple((name, "d" if hint == "float" else "q") for name, hint in hints.items()) == fields


def test_a_row_of_another_struct_is_refused() -> None:
    row = CoefficientsRow(*range(19))
    with pytest.raises(ValueError, match="CoefficientsRow has the fields projected, other"):
        packed(row, _core.CHAIN_FIELDS)
    with pytest.raises(ValueError, match="another length"):
        _core.chain(packed(row, _core.COEFFICIENT_FIELDS)[:-8])
