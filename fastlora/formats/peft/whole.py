"""Small adapters whose factors are stored matrices, as the bytes of their files. Nothing has to be computed, and what
the files of adapters of one shape say alike is remembered, so that the next takes as long as its numbers do."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from fastlora.core.card import adapter_card
from fastlora.core.data import LoraData
from fastlora.core.names import CARD_NAME, CONFIG_NAME
from fastlora.core.updates import EMBEDDING, LINEAR, Layout
from fastlora.engine import stream
from fastlora.engine.balance import is_narrow
from fastlora.engine.write import outline
from fastlora.files import spare
from fastlora.files.one_piece import in_one_piece
from fastlora.files.tensor_writing import SMALL_BYTES, TensorPlaces, header_around
from fastlora.files.whole_output import Pieces
from fastlora.formats.peft.names import WEIGHTS_NAME
from fastlora.formats.peft.ranks import with_readable_ranks
from fastlora.formats.peft.writing import LIBRARY, FileContents, add_factors, config_text, metadata_of
from fastlora.runtime import ranks

MOST_KNOWN = 8
"""How many shapes of adapters are remembered."""

WRITTEN = frozenset({torch.float16, torch.bfloat16, torch.float32})


@dataclass(frozen=True, slots=True)
class Shape:
    """What the files of adapters of one shape say alike.

    ``order``: of the tensors in the file, as positions in ``A, B, A, B, …`` of all modules. ``scales``: what every
    number in the file is multiplied by; ``None`` where all are as they are stored. ``layouts``: kept alive, since they
    are known by their identities."""

    places: TensorPlaces
    order: list[int]
    ranks: list[int]
    config: bytes
    scales: Tensor | None
    layouts: Sequence[Layout]


_known: OrderedDict[tuple[object, ...], Shape | None] = OrderedDict()
"""Of the adapters that were written last; ``None`` for those that are written in another way."""


def whole_files(adapter: LoraData, dtype: torch.dtype | str | None = None) -> dict[str, Pieces] | None:
    """The files of an adapter, those that :class:`fastlora.formats.peft.writing.AdapterFile` makes.

    ``None`` where it has to be written by such a class: because it is not small, is no PEFT adapter, or numbers have to
    be computed (but for scalings by powers of two, which round nothing); because it holds NaN or Inf; or because
    several processes, or a device, make the files, or they take the place of spare ones.
    """
    if adapter.extras or adapter.base.form is not None or adapter.dtype not in WRITTEN:
        return None
    if dtype not in (None, adapter.dtype) or ranks.current() or stream.current() or spare.current():
        return None
    stored: list[Tensor] = []
    modules: list[object] = [adapter.dtype, adapter.base]
    for module, update in adapter.updates.items():
        B, A = update.B, update.A
        if B.stored is None or A.stored is None:
            return None
        stored += (A.stored, B.stored)
        modules += (module, id(update.layout), update.scaling, B.length, B.rank, A.length)
    shape = _shape_of(tuple(modules), adapter)
    if shape is None:
        return None
    numbers = in_one_piece([stored[i] for i in shape.order], adapter.dtype, shape.scales)
    if numbers is None:
        return None
    card = adapter_card(adapter, kind="LoRA", library=LIBRARY, ranks=shape.ranks, dtype=adapter.dtype)
    header = header_around(shape.places.text, metadata_of(adapter))
    return {
        WEIGHTS_NAME: (header, numbers),
        CARD_NAME: (card.encode(),),
        CONFIG_NAME: (shape.config,),
    }


def _shape_of(key: tuple[object, ...], adapter: LoraData) -> Shape | None:
    found = _known.get(key, _UNKNOWN)
    if found is not _UNKNOWN:
        return cast(Shape | None, found)
    shape = _known[key] = _shape(adapter)
    while len(_known) > MOST_KNOWN:
        _known.popitem(last=False)
    return shape


_UNKNOWN = object()


def _shape(adapter: LoraData) -> Shape | None:
    dtype, updates = adapter.dtype, adapter.updates
    if sum(u.rank * sum(u.shape) for u in updates.values()) * dtype.itemsize > SMALL_BYTES:
        return None
    for u in updates.values():
        is_exact = u.scaling == 1.0 or (math.frexp(abs(u.scaling))[0] == 0.5 and not is_narrow(dtype, [u.scaling]))
        if not (u.rank and is_exact and u.layout in (LINEAR, EMBEDDING)):
            return None
    if not updates or with_readable_ranks(adapter, None) is not adapter:
        return None
    contents = FileContents()
    add_factors(contents, adapter, {m: outline(u, dtype) for m, u in updates.items()}, dtype)
    places = TensorPlaces(contents.tensors)
    position = {name: i for i, name in enumerate(contents.tensors)}
    order = [position[name] for name in places.places]
    own = [s for u in updates.values() for s in (1.0, u.scaling)]
    sizes = torch.tensor([x.numel() for x in contents.tensors.values()])[order]
    scales = torch.tensor(own, dtype=dtype)[order].repeat_interleave(sizes)
    return Shape(
        places,
        order,
        list(contents.ranks.values()),
        config_text(contents, adapter).encode(),
        None if all(s == 1.0 for s in own) else scales,
        [u.layout for u in updates.values()],
    )
