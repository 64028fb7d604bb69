"""Results as bytes on their way to other processes of the same run.

Tensors that all processes have are sent by their number. Who can send a parcel could run any program here: they come
from the processes of one `torchrun` only.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

_known: ContextVar[Sequence[Tensor]] = ContextVar("fastlora_known_tensors")


class _Packer(pickle.Pickler):
    def __init__(self, file: io.BytesIO, known: Sequence[Tensor]) -> None:
        super().__init__(file, protocol=5)
        self._numbers = {id(tensor): i for i, tensor in enumerate(known)}

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return NotImplemented
        number = self._numbers.get(id(value))
        if number is not None:
            return _numbered, (number,)
        flat = value.detach().cpu().contiguous().reshape(-1)
        data = pickle.PickleBuffer(flat.view(torch.uint8).numpy().data) if flat.numel() else bytearray()
        return _rebuilt, (data, value.dtype, tuple(value.shape), value.device.type)


def packed(value: object, known: Sequence[Tensor]) -> bytes:
    """``value`` as bytes."""
    file = io.BytesIO()
    _Packer(file, known).dump(value)
    return file.getvalue()


def unpacked(data: bytes, known: Sequence[Tensor]) -> Any:
    """What was :func:`packed`, with the tensors of this process."""
    token = _known.set(known)
    try:
        return pickle.loads(data)
    finally:
        _known.reset(token)


def _numbered(number: int) -> Tensor:
    return _known.get()[number]


def _rebuilt(data: bytearray, dtype: torch.dtype, shape: tuple[int, ...], device: str) -> Tensor:
    tensor = torch.frombuffer(data, dtype=dtype).reshape(shape) if data else torch.empty(shape, dtype=dtype)
    return tensor if device == "cpu" else tensor.to(device)
