"""Linear modules against convolutions of kernel 1: files of one model write both for the same weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from fastlora.core.data import LoraData
from fastlora.core.updates import Layout

A = TypeVar("A", bound=LoraData)


def with_one_pointwise_form(adapters: Sequence[A]) -> list[A]:
    """The adapters with every such module in the form that the first of them has; the numbers are the same."""
    layouts: dict[str, Layout] = {}
    result = []
    for adapter in adapters:
        changed = {}
        for module, update in adapter.updates.items():
            first = layouts.setdefault(module, update.layout)
            both = _is_pointwise(first) and _is_pointwise(update.layout)
            if first is not update.layout and both and first != update.layout:
                changed[module] = replace(update, layout=first)
        result.append(replace(adapter, updates={**adapter.updates, **changed}) if changed else adapter)
    return result


def _is_pointwise(layout: Layout) -> bool:
    return layout.kind == "linear" or (layout.kind == "conv" and all(k == 1 for k in layout.kernel))
