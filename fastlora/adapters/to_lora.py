"""A LoRA of a DoRA: with the base model, what it changes is known, and its best approximation of low rank too."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastlora.adapters.base_weights import BaseWeights, square_norms
from fastlora.adapters.cuts import Cut
from fastlora.adapters.dora import DoRA
from fastlora.adapters.lora import Adapter
from fastlora.core.data import Magnitude
from fastlora.core.factors import Factor
from fastlora.core.updates import Update
from fastlora.engine import shares
from fastlora.engine.low_rank import LowRank, low_rank, operations
from fastlora.engine.materialise import materialise
from fastlora.errors import InputError, NonFiniteError
from fastlora.files.checkpoint import ModelSource
from fastlora.runtime import memory, ranks
from fastlora.runtime.progress import track

SHARE, MOST = 0.99, 256
"""What is kept where nothing is said: this share of ``‖ΔW‖²``, at this rank at the most."""


def to_lora(
    adapter: DoRA | Adapter,
    base: ModelSource,
    *,
    rank: int | None = None,
    energy: float | None = None,
    exact: bool = False,
    seed: int = 0,
) -> Adapter:
    """The LoRA adapter that is nearest to a DoRA on its base model.

    What a DoRA changes depends on the base weight ``W``: with ``D = diag(m / ‖W + s B A‖)``, its norms over rows,
    ``ΔW = (D − I) W + D s B A`` (D1). It is formed tile by tile, and cut as
    :meth:`TaskVector.extract` cuts the change of a weight. Modules without a magnitude stay as they are.

    Args:
        adapter: a DoRA; an :class:`Adapter` is returned as it is.
        base: its base model: a state dict, a file of tensors or a model's directory. Names of modules are matched with
            it.
        rank: the largest rank of a module.
        energy: the share of ``‖ΔW‖²`` that is kept, in ``(0, 1]``, at ``rank`` at the most. By default 0.99 of it, at
            rank 256 at the most.
        exact: decompose large weights exactly, too; by default their error is within 1 % of the least possible.
        seed: of the random numbers that takes.

    Returns:
        :class:`Adapter` in float32, under the adapter's names of modules. ``details["retained_energy"]`` has the share
        that is kept of each module, ``provenance["retained_energy"]`` of all, and a note says both.

    Raises:
        InputError: a rank or share out of range, a module that the base model does not have or has in another shape, a
            base model that cannot be read or is quantised otherwise than in scaled float8.
        NonFiniteError: NaN or Inf in the base model or the adapter.

    Cost: six passes over every adapted weight of the base model; memory for the factors.
    """
    if rank is not None and rank < 1:
        raise InputError(f"to_lora: rank={rank} must be at least 1")
    if energy is not None and not 0.0 < energy <= 1.0:
        raise InputError(f"to_lora: energy={energy} must be above 0 and at most 1")
    if isinstance(adapter, Adapter):
        return adapter
    if rank is None and energy is None:
        rank, energy = MOST, SHARE
    model = BaseWeights(adapter, adapter.magnitudes, base)

    def work() -> dict[str, Cut]:
        shapes = [adapter.updates[m].shape for m in adapter.magnitudes]
        mine = ranks.own(list(adapter.magnitudes), [operations(n, m, rank, exact=exact) for n, m in shapes])
        return {m: cut(m) for m in track(mine, "DoRA to LoRA")}

    def cut(module: str) -> Cut:
        rescaled = RescaledWeight(model.weight(module), adapter.updates[module], adapter.magnitudes[module], module)
        return Cut.of(_cut(adapter.name, rescaled, rank, energy, exact, seed))

    cuts = shares.each("DoRA to LoRA", work, (), repr([(m, u.shape) for m, u in adapter.updates.items()]))
    updates = {m: _cut_update(cuts[m], u) if m in cuts else u for m, u in adapter.updates.items()}
    found = {m: (cuts[m].kept, cuts[m].total) for m in adapter.updates if m in cuts}
    kept, total = sum(k for k, _ in found.values()), sum(t for _, t in found.values())
    kept_of = {m: k / t if t > 0 else 1.0 for m, (k, t) in found.items()}
    retained = kept / total if total > 0 else 1.0
    return Adapter(
        adapter.name,
        updates,
        extras=adapter.extras,
        base=adapter.base,
        dtype=torch.float32 if found else adapter.dtype,
        provenance={
            "to_lora": adapter.provenance,
            "rank": rank,
            "energy": energy,
            "retained_energy": retained,
        },
        notes=(*adapter.notes, *model.notes, *_told(adapter.name, kept_of, retained)),
        details={"retained_energy": kept_of},
    )


def _cut_update(cut: Cut, like: Update) -> Update:
    return Update(Factor.of("B", cut.left), Factor.of("A", cut.right), 1.0, like.layout)


def _told(name: str, shares: Mapping[str, float], retained: float) -> list[str]:
    if not shares:
        return []
    worst = min(shares, key=lambda m: shares[m])
    told = (
        f"DoRA adapter {name!r} was made a LoRA on its base model, which keeps {100 * retained:.4g} % of ‖ΔW‖² "
        f"(the least, {100 * shares[worst]:.4g} %, of {worst})"
    )
    return [told]


def _cut(name: str, source: RescaledWeight, rank: int | None, energy: float | None, exact: bool, seed: int) -> LowRank:
    try:
        return low_rank(source, rank, energy, key=f"{seed}:{source.module}", exact=exact)
    except NonFiniteError:
        raise NonFiniteError(
            f"{source.module} holds NaN or Inf in the base model or in DoRA adapter {name!r}; save both again"
        ) from None


class RescaledWeight:
    """``ΔW = (D − I) W + D s B A`` of one module, tile by tile (D1); ``W [out, in]``."""

    def __init__(self, weight: Tensor, update: Update, magnitude: Magnitude, module: str) -> None:
        self.weight = weight
        self.update = update
        self.magnitude = magnitude
        self.module = module
        left, right = materialise([update.baked()], torch.float32)[0]
        self._left, self._right = left.double(), right.double()
        self._stretch = self._measured()

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        return self.update.shape

    @property
    def precise(self) -> torch.dtype:
        """float32 on half-precision weights, else float64."""
        return torch.float32 if self.weight.dtype.itemsize <= 2 else torch.float64

    def _measured(self) -> Tensor:
        """``m / ‖W + s B A‖``: of every output ``[out, 1]``, or of every column ``[1, in]``."""
        values = self.magnitude.vector.double().flatten()
        squares = square_norms(self.weight, self.magnitude.axis, len(values), self._left, self._right)
        if not bool(squares.isfinite().all()):
            raise NonFiniteError(f"{self.module} holds NaN or Inf in the base model or in the adapter; save both again")
        if bool((squares == 0).any()):
            raise InputError(
                f"{self.module}: the norm of a row of W + ΔW is 0, by which a DoRA divides; pass the base model that "
                "the adapter was trained on"
            )
        stretch = values / squares.sqrt()
        if self.magnitude.axis == "out":
            return stretch[:, None]
        return stretch.repeat_interleave(self.shape[1] // len(values))[None]

    def tile(self, rows: slice, columns: slice, out: Tensor) -> Tensor:
        """See :class:`fastlora.engine.tile_source.TileSource`."""
        wide = out if out.dtype.itemsize >= 4 else torch.empty(out.shape, dtype=torch.float32)
        by_rows = self.magnitude.axis == "out"
        stretch = self._stretch[rows] if by_rows else self._stretch[:, columns]
        wide.copy_(self.weight[rows, columns]).mul_((stretch - 1.0).to(wide.dtype))
        if by_rows:
            wide.addmm_((self._left[rows] * stretch).to(wide.dtype), self._right[:, columns].to(wide.dtype))
        else:
            wide.addmm_(self._left[rows].to(wide.dtype), (self._right[:, columns] * stretch).to(wide.dtype))
        return wide if wide is out else out.copy_(wide)

    def stored(self) -> None:
        """``None``: tiles are computed."""
        return None

    def release(self) -> None:
        """Gives back what is mapped."""
        memory.release([self.weight])
