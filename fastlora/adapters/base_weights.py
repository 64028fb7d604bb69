"""The weights of a base model that a DoRA rescales, and the norms of their rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastlora.adapters.model_names import matched_names
from fastlora.core.architectures import WEIGHT, is_conv1d
from fastlora.core.data import DoraData
from fastlora.engine.tile_source import row_tiles
from fastlora.errors import InputError
from fastlora.files.checkpoint import ModelSource, read_checkpoint
from fastlora.files.shards import listed


class BaseWeights:
    """``W [out, in]`` of some ``modules`` of a DoRA, as its updates have them, from a model of any size.

    Names are matched with the model's. Raises :class:`InputError` for a model that cannot be read, and for modules that
    it does not have.
    """

    def __init__(self, adapter: DoraData, modules: Iterable[str], source: ModelSource) -> None:
        self.adapter = adapter
        self.model = read_checkpoint(source)
        self.notes = self.model.notes
        self._names = self._matched(list(modules))

    def weight(self, module: str) -> Tensor:
        """``W``. Scaled weights are multiplied out. Raises :class:`InputError` for another shape."""
        name, update = self._names[module], self.adapter.updates[module]
        value = self.model.value(name)
        wanted, is_turned = self._stored_shape(module), self._is_turned(module)
        if update.layout.kind == "linear" and tuple(value.shape) != wanted and tuple(value.shape) == wanted[::-1]:
            wanted, is_turned = wanted[::-1], not is_turned  # one of the modules of another class
        if tuple(value.shape) != wanted or not value.is_floating_point():
            raise InputError(
                f"DoRA adapter {self.adapter.name!r}: {name} of {self.model.where} is {str(value.dtype)[6:]} "
                f"{list(value.shape)}; the adapter needs {list(wanted)}; pass the model that it is of"
            )
        return value.mT if is_turned else value.reshape(value.shape[0], -1)

    def _matched(self, modules: list[str]) -> dict[str, str]:
        """``{module: name of its weight in the model}``."""
        model = self.model
        names = {m: m + WEIGHT for m in modules}
        if any(name not in model.tensors for name in names.values()):
            wanted = {n: torch.empty(self._stored_shape(m), device="meta") for m, n in names.items()}
            parameters = {n: model.tensors[n] for n in model.parameters}
            ours, theirs, _ = matched_names(parameters, wanted)
            stored = {common: own for own, common in ours.items()}
            names = {m: stored.get(theirs[n], n) for m, n in names.items()}
        lacking = [m for m, n in names.items() if n not in model.tensors]
        if lacking:
            raise InputError(
                f"DoRA adapter {self.adapter.name!r} adapts {listed(lacking)}, which {model.where} does not have (it "
                f"has {listed([n for n in model.parameters if n.endswith(WEIGHT)])}); pass the model that it is of, or "
                "rename its modules (rename=, --map OLD=NEW)"
            )
        return names

    def _is_turned(self, module: str) -> bool:
        """Whether the model stores the weight as ``[in, out]``."""
        layout = self.adapter.updates[module].layout
        if layout.kind != "linear":
            return layout.kind == "embedding"
        types = self.model.config.model_types if self.model.config is not None else ()
        return self.adapter.base.fan_in_fan_out or any(is_conv1d(module, t) for t in types)

    def _stored_shape(self, module: str) -> tuple[int, ...]:
        update = self.adapter.updates[module]
        n, m = update.shape
        if update.layout.kind == "conv":
            kernel = update.layout.kernel
            size = int(torch.Size(kernel).numel())
            return (n, m // size, *kernel)
        return (m, n) if self._is_turned(module) else (n, m)


def square_norms(weight: Tensor, axis: Literal["out", "in"], count: int, left: Tensor, right: Tensor) -> Tensor:
    """``‖·‖²`` of the rows of ``W + L R`` (``axis="out"``) or of its columns, in float64 ``[count]``.

    ``left [out, r]`` and ``right [r, in]`` in float64. An input channel has all the columns of its kernel: ``count`` is
    the number of channels. Cost: one pass over ``W``.
    """
    n, m = weight.shape
    if axis == "out":
        squares = torch.empty(n, dtype=torch.float64)
        for rows, tile in row_tiles(_Sum(weight, left, right), torch.float64):
            squares[rows] = tile.square().sum(1)
        return squares
    sums = torch.zeros(m, dtype=torch.float64)
    for _, tile in row_tiles(_Sum(weight, left, right), torch.float64):
        sums += tile.square().sum(0)
    return sums.view(count, -1).sum(1)


@dataclass(frozen=True, slots=True, eq=False)
class _Sum:
    """``W + L R``."""

    weight: Tensor
    left: Tensor
    right: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    def tile(self, rows: slice, columns: slice, out: Tensor) -> Tensor:
        out.copy_(self.weight[rows, columns])
        return out.addmm_(self.left[rows], self.right[:, columns]) if self.left.shape[1] else out
