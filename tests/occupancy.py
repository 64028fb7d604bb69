"""How many blocks of a kernel one multiprocessor of an H100 holds, from what the kernel was compiled to."""

from __future__ import annotations

from fastlora.bench.gpu.targets import WARPS

REGISTERS, BLOCKS, SHARED = 65536, 32, 228 * 1024


def resident_blocks(registers: int, warps: int, shared: int) -> int:
    """Blocks of ``warps`` warps on a multiprocessor. Registers are given out by 256 a warp; a block costs 1 KiB of
    shared memory beyond its own."""
    taken = -(-32 * registers // 256) * 256 * warps
    return min(BLOCKS, WARPS // warps, REGISTERS // taken, SHARED // (shared + 1024))
