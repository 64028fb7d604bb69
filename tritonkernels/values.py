"""Reading stored matrices by address: any alignment, any floating dtype, ragged ranks."""

from __future__ import annotations

import triton
import triton.language as tl

from tritonkernels.launch import INTERPRETED

DTYPES = (tl.float32, tl.float64, tl.float16, tl.bfloat16)  # by dtype code, as in the tables
FLOAT32, FLOAT64, FLOAT16 = (tl.constexpr(DTYPES.index(dtype)) for dtype in DTYPES[:3])
SLAB = tl.constexpr(16)  # columns (B side) or rows (A side) of a factor that are handled together
SLAB_COLUMNS = tl.constexpr(4)  # of `slabs`: address, stride, width, dtype code

# The interpreter multiplies the bit patterns of bfloat16, loses its denormals and truncates instead of rounding.
EMULATED = tl.constexpr(INTERPRETED)


@triton.jit
def single(x):
    """Half precision or float32 as float32."""
    if EMULATED and x.dtype == tl.bfloat16:
        result = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        result = x.to(tl.float32)
    return result


@triton.jit
def load_values(
    address,  # int64, of the matrix or of each element's part of it
    offsets,  # int64, in elements
    mask,
    DTYPE: tl.constexpr,
    BYTES: tl.constexpr,  # the address may be odd: elements are put together from bytes
):
    """Elements in ``DTYPE``, zero where the mask is false."""
    if BYTES:
        SIZE: tl.constexpr = DTYPE.primitive_bitwidth // 8
        WORD: tl.constexpr = tl.uint16 if SIZE == 2 else tl.uint32 if SIZE == 4 else tl.uint64
        p_bytes = address.to(tl.pointer_type(tl.uint8)) + offsets * SIZE
        word = tl.load(p_bytes, mask=mask, other=0).to(WORD)
        for i in tl.static_range(1, SIZE):
            word |= tl.load(p_bytes + i, mask=mask, other=0).to(WORD) << (8 * i)
        values = word.to(DTYPE, bitcast=True)
    else:
        values = tl.load(address.to(tl.pointer_type(DTYPE)) + offsets, mask=mask, other=0.0)
    return values


@triton.jit
def _double(x):
    if x.dtype == tl.bfloat16:
        result = single(x).to(tl.float64)
    else:
        result = x.to(tl.float64)
    return result


@triton.jit
def load_double(
    address,
    offsets,
    mask,
    code,  # dtype code of the matrix, read where DTYPE is None
    DTYPE: tl.constexpr,
    BYTES: tl.constexpr,
):
    """Elements in float64; ``DTYPE`` None: a dtype that is known when the kernel runs, by its code."""
    if DTYPE is not None:
        values = _double(load_values(address, offsets, mask, DTYPE, BYTES))
    else:
        if code == FLOAT32:
            values = load_values(address, offsets, mask, tl.float32, BYTES).to(tl.float64)
        elif code == FLOAT64:
            values = load_values(address, offsets, mask, tl.float64, BYTES)
        elif code == FLOAT16:
            values = load_values(address, offsets, mask, tl.float16, BYTES).to(tl.float64)
        else:
            values = _double(load_values(address, offsets, mask, tl.bfloat16, BYTES))
    return values
