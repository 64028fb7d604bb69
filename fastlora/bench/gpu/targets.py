"""What the GPU kernels have to reach, and what their bytes and operations predict, as data."""

from __future__ import annotations

from dataclasses import dataclass

# Of an H100 SXM: bytes read or written a second; operations a second in float32 and in float64 on tensor cores, in
# bfloat16 on tensor cores; float64 without them.
BANDWIDTH = 3.35e12
RATES = {"fp32": 67e12, "fp64 tensor": 67e12, "fp64": 33.5e12, "bf16": 990e12}

WARPS = 64  # that are resident at once on one of its multiprocessors


@dataclass(frozen=True, slots=True)
class Target:
    """One line of the table: ``key`` is the name that a measurement has; ``must`` and ``aim`` are a time in seconds
    (``unit="s"``), a multiple of the floor (``"floor"``, ``"copy"``) or of the opponent's speed (``"opponent"``)."""

    key: str
    what: str
    floor: str
    must: float
    aim: float
    unit: str

    def limit(self, value: float) -> str:
        """``must`` or ``aim`` as text."""
        if self.unit == "s":
            return f"{1e3 * value:g} ms"
        return f"{value:g} × {'' if self.unit == 'opponent' else self.unit}".strip()

    def reached(self, seconds: float, reference: float) -> float:
        """How a measurement stands, in the unit of the limits. ``reference``: seconds of the floor or the opponent."""
        if self.unit == "s":
            return seconds
        return reference / seconds if self.unit == "opponent" else seconds / reference

    def holds(self, reached: float, limit: float) -> bool:
        """Whether what was reached keeps a limit: a speed is at least it, a time or a multiple at most."""
        return reached >= limit if self.unit == "opponent" else reached <= limit


MAIN = "llama2-7b-8x16"

TARGETS = (
    Target("decompose", f"decompose {MAIN}, factors on the device", "each byte once", 3e-3, 1e-3, "s"),
    Target("gram", f"gram pass, {MAIN}", "bytes", 1.5, 1.15, "floor"),
    Target("combine", f"combine pass, {MAIN}", "bytes", 1.5, 1.15, "floor"),
    *(
        Target(f"eigh {n} cupy", f"eigh float32 n={n}, batch 1792, against CuPy", "–", *limits, "opponent")
        for n, limits in ((16, (3.0, 10.0)), (32, (3.0, 10.0)), (64, (1.5, 3.0)), (128, (1.5, 3.0)))
    ),
    *(
        Target(f"eigh {n} torch", f"eigh float32 n={n}, batch 1792, against torch", "–", 50.0, 200.0, "opponent")
        for n in (33, 64, 128)
    ),
    *(
        Target(f"svd {n} torch", f"svd float32 n={n}, batch {batch}, against torch", "–", 3.0, 10.0, "opponent")
        for n, batch in ((16, 1792), (32, 1792), (64, 448))
    ),
    Target("files", f"load → decompose → save, {MAIN}, files to files", "copy of the bytes", 2.0, 1.2, "copy"),
)


@dataclass(frozen=True, slots=True)
class Resident:
    """How many blocks of a compiled kernel, each of some warps, a multiprocessor holds at once."""

    kernel: str
    blocks: int
    warps: int
    shared: int = 0  # bytes that are asked for at the launch

    def __str__(self) -> str:
        return f"{self.blocks} × {self.warps}"


@dataclass(frozen=True, slots=True)
class Prediction:
    """Bytes moved and operations of a kernel on a workload; ``resident``: its occupancy, by the resources that it was
    compiled to; ``latency``: seconds of its steps that depend on each other and the waves of its blocks, by the model
    of docs/gpu_kernels.md, where that is longer."""

    kernel: str
    work: str
    moved: float
    operations: float
    rate: str
    resident: tuple[Resident, ...]
    latency: float = 0.0
    note: str = ""

    @property
    def seconds(self) -> float:
        """The longest of moving the bytes, doing the operations at the H100's peak, and the latency."""
        return max(self.moved / BANDWIDTH, self.operations / RATES[self.rate], self.latency)


# llama2-7b-8x16: 224 modules, Σ out 1,359,872 and Σ in 1,138,688, eight adapters of rank 16 in bfloat16.
_B, _A = 1_359_872 * 8 * 16, 1_138_688 * 8 * 16  # elements of all B and all A
_MODULES, _K, _R = 224, 8, 16
_BLOCKS = 3 * _K - 3

_BATCH = 1792


def _eigh(n: int, latency: float, resident: Resident) -> Prediction:
    """9·n³: the tridiagonal form, its vectors and Q, before anything deflates."""
    moved, operations = 4 * _BATCH * (2 * n * n + n), 9 * n**3 * _BATCH
    return Prediction(f"eigh n={n} (CUDA)", f"float32, batch {_BATCH}", moved, operations, "fp32", (resident,), latency)


def _svd(n: int, batch: int, latency: float, resident: Resident) -> Prediction:
    """6·n³ a sweep of one-sided Jacobi, eight sweeps."""
    moved, operations = 12 * batch * n * n, 48 * n**3 * batch
    return Prediction(f"svd n={n} (CUDA)", f"float32, batch {batch}", moved, operations, "fp32", (resident,), latency)


PREDICTIONS = [
    Prediction(
        "gram (Triton)", f"{MAIN}: chain blocks of B, diagonal of A",
        2 * (2 * _B + _A) + 8 * _MODULES * (_BLOCKS + _K) * _R * _R,
        3 * 2 * _R * (1_359_872 * _BLOCKS * _R + 1_138_688 * _K * _R), "bf16",
        (Resident("half_sums B one bf16", 3, 4), Resident("half_sums B two bf16", 2, 4)), 450e-6,
        "one group, two groups; B is read twice; three products: a column is a sum of two",
    ),
    Prediction(
        "chain (CUDA)", f"{MAIN}: {_MODULES} modules, k = {_K}, r = {_R}",
        8 * _MODULES * _R * _R * (_K * (_K + 3) / 2 + _K), _MODULES * (53 * _K + 25) * _R**3, "fp64",
        (Resident("chain_kernel<true, true>", 2, 8, 71 * 1024),), 125e-6,
    ),
    Prediction(
        "coefficients (CUDA)", MAIN,
        8 * _MODULES * _K * 7 * _R * _R, 6 * _MODULES * _K * _R**3, "fp64",
        (Resident("coefficients_kernel", 4, 8),), note="out of L2 less",
    ),
    Prediction(
        "combine (Triton)", f"{MAIN}: {_K} unique parts, the shared part of width {_R}",
        2 * (2 * _B + _A + 1_359_872 * _R + 1_138_688 * _R),
        2 * _R * (2 * _B + _A), "bf16",
        (Resident("half_joint B 16 bf16", 7, 4), Resident("half_summed A 16 bf16", 7, 4)), 385e-6,
        "B, A; three products: a coefficient is a sum of bfloat16 numbers",
    ),
    _eigh(16, 20e-6, Resident("eigh_warp_kernel<float>", 2, 9)),
    _eigh(32, 38e-6, Resident("eigh_warp_kernel<float>", 2, 9)),
    _eigh(64, 0.183e-3, Resident("eigh_divide_kernel<float, 32>", 7, 3)),
    _eigh(128, 1.08e-3, Resident("eigh_divide_kernel<float, 64>", 3, 5)),
    _svd(16, _BATCH, 20e-6, Resident("svd_warp_kernel<float, 16>", 7, 2)),
    _svd(32, _BATCH, 0.13e-3, Resident("svd_warp_kernel<float, 32>", 6, 2)),
    _svd(64, 448, 3.5e-3 / 4, Resident("svd_block_kernel<float, false>", 2, 8)),
]  # fmt: skip
