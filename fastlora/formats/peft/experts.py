"""Which layout the fused experts of a file have: its PEFT version says it, or its shapes do."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from fastlora.core.experts import own_evidence, settled, unsettled
from fastlora.core.updates import Update

ExpertOrder = Literal["out-in", "older", "unsaid"]

CHANGED_IN = (0, 19)
"""The version from which on ``[experts, out, in]`` is what it says."""

VERSIONS: Mapping[str, str | None] = {"out-in": "0.19.0", "older": "0.18.0", "unsaid": None}
"""What is written as ``peft_version``: it says the layout, and nothing else reads it."""


def expert_order(version: object) -> ExpertOrder:
    """The layout that a version of PEFT wrote; before 0.18 the field was not written."""
    found = re.match(r"(\d+)\.(\d+)", version) if isinstance(version, str) else None
    if found is None:
        return "unsaid"
    number = int(found[1]), int(found[2])
    if number in ((0, 18), CHANGED_IN) and ".dev" in str(version):
        return "unsaid"
    return "out-in" if number >= CHANGED_IN else "older"


def with_settled_order(updates: dict[str, Update], name: str) -> tuple[dict[str, Update], list[str]]:
    """The updates of adapter ``name`` with their experts ``[out, in]`` where its shapes tell, and what was changed."""
    order = unsettled(updates)
    if order is None:
        return updates, []
    turned = own_evidence(updates)
    if turned is not None:
        what = f"adapter {name!r}: its fused experts have the layout of peft before 0.19, as their shapes tell, and are"
        return settled(updates, turned), [f"{what} taken transposed; they are written as peft 0.19 reads them"] * turned
    if order == "unsaid":
        return updates, []
    told = (
        f"adapter {name!r}: its fused experts were laid out by peft before 0.19, which other versions may read as "
        "transposed, and its shapes do not tell; alone, they are written as they are, with that version"
    )
    return updates, [told]
