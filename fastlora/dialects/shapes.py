"""Convolutions of 1×1 and linear modules: one weight in two shapes. Files get that of the model."""

from __future__ import annotations

from dataclasses import replace

from fastlora.core.data import LoraData
from fastlora.core.updates import Layout, Update
from fastlora.dialects.family import Family

LINEAR, POINT = Layout(), Layout("conv", (1, 1))
CONTEXT_OF_SD1 = 768
"""What Stable Diffusion 1 knows of a text, in columns; version 2 has linear projections around its attentions."""


def with_kernels(adapter: LoraData, family: Family | None) -> LoraData:
    """The adapter with 1×1 convolutions where the family's model has them, and linear modules where it has those."""
    if family is None or family.name not in ("sd15", "sdxl", "sdxl_refiner"):
        return adapter
    changed = {
        m: replace(u, layout=wanted) for m, u in adapter.updates.items() if (wanted := _wanted(m, u, adapter, family))
    }
    return replace(adapter, updates={**adapter.updates, **changed}) if changed else adapter


def _wanted(module: str, update: Update, adapter: LoraData, family: Family) -> Layout | None:
    """The layout that the model's module has, where that of the update is another one of the same size."""
    if update.layout not in (LINEAR, POINT):
        return None
    leaf = module.rpartition(".")[2]
    if leaf == "conv_shortcut":
        wanted = POINT
    elif leaf in ("proj_in", "proj_out") and ".attentions." in module:
        if family.name != "sd15":
            wanted = LINEAR
        elif _context(adapter) == CONTEXT_OF_SD1:
            wanted = POINT
        else:
            return None
    else:
        return None
    return wanted if wanted != update.layout else None


def _context(adapter: LoraData) -> int | None:
    return next((u.shape[1] for m, u in adapter.updates.items() if m.endswith((".attn2.to_k", ".attn2.to_v"))), None)
