"""How a file stores the scales of its modules: ``alpha`` beside the factors, read as ``alpha / rank``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import torch

from fastlora.core.updates import Update
from fastlora.dialects.laying import Laid, scaled_alike

ROUNDING = 1e-12
"""Of a quotient and a product of float64 numbers: what lies closer to 1 is 1."""


def stored_scales(laid: Laid, ranks: Mapping[str, int], *, alike: bool) -> tuple[dict[str, float], dict[str, Update]]:
    """The alpha of every stem, and the updates that are left with it: their scaling is 1.

    ``alike``: one alpha for the whole file, the most frequent one. Diffusers knows one alpha only in some modules of
    Stable Diffusion. Others take ``s r`` of each module, so that stored factors stay as they are. A scaling that no
    file should have (0, negative, different in the parts of one tensor) goes into ``B``.
    """
    laid = replace(laid, updates={module: _with_outer_scale(update) for module, update in laid.updates.items()})
    scalings = scaled_alike(laid)
    alphas = {
        stem: _float32(float(rank) if (s := scalings[stem]) is None else s * rank) for stem, rank in ranks.items()
    }
    if alike:
        usual = Counter(alphas.values()).most_common(1)[0][0]
        alphas = dict.fromkeys(alphas, usual)
    updates: dict[str, Update] = {}
    for module, update in laid.updates.items():
        stem = laid.places[module].stem
        left = update.scaling * ranks[stem] / alphas[stem]
        if abs(left - 1.0) <= (ROUNDING if alike or scalings[stem] is None else 1e-6):
            updates[module] = update if update.scaling == 1.0 else replace(update, scaling=1.0)
        else:
            updates[module] = replace(update, B=update.B.scaled(left), scaling=1.0)
    return alphas, updates


def _with_outer_scale(update: Update) -> Update:
    """The update with a scale that all stored matrices of its ``B`` share taken out of it: they stay as they are."""
    scales = {term.scale for term in update.B.joined or ()}
    if len(scales) != 1 or (scale := scales.pop()) == 1.0 or not scale > 0:
        return update
    terms = tuple(replace(term, scale=1.0) for term in update.B.terms)
    return replace(update, B=replace(update.B, terms=terms), scaling=update.scaling * scale)


def _float32(alpha: float) -> float:
    return float(torch.tensor(alpha, dtype=torch.float32))


def as_stored(alpha: float, dtype: str) -> torch.Tensor:
    """An alpha as a tensor of no dimension: in the dtype of the input's where that holds it, else float32."""
    exact = torch.tensor(alpha, dtype=torch.float32)
    kind = getattr(torch, dtype, torch.float32)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point or kind.itemsize not in (2, 4):
        return exact
    return exact.to(kind) if float(exact.to(kind)) == float(exact) else exact
