"""The scale of every module of a single file: ``alpha / rank``, or what the metadata say, or 1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastlora.dialects.adapter_metadata import header_alpha, read_configs
from fastlora.dialects.family import Family
from fastlora.dialects.lycoris import dimension
from fastlora.dialects.naming import Named
from fastlora.dialects.suffixes import Stored
from fastlora.dialects.weights import read_alphas
from fastlora.errors import InputError

LISTED = 3
CLOSE = 1e-6
"""Of a scale that is stored a second time: what is closer is the same."""


@dataclass(frozen=True, slots=True)
class Scales:
    """``{stem: scale}`` of every module, the alphas that are stored, and what is worth telling."""

    of: Mapping[str, float]
    alphas: Mapping[str, float]
    notes: tuple[str, ...]


def read_scales(
    modules: Mapping[str, Stored],
    named: Mapping[str, Named],
    family: Family | None,
    metadata: Mapping[str, str],
    file: Path,
) -> Scales:
    """The scale of every module.

    Raises :class:`InputError` for alphas without a meaning, and for metadata that contradict the factors.
    """
    alphas = read_alphas(modules, file)
    sizes = {stem: dimension(stored.parts) for stem, stored in modules.items()}
    lacking = [stem for stem, size in sizes.items() if size is not None and stem not in alphas]
    if alphas:
        scales = {s: alphas[s] / size if size and s in alphas else 1.0 for s, size in sizes.items()}
        notes = [_on_missing(lacking)] if lacking else []
        zero = [stem for stem, alpha in alphas.items() if alpha == 0.0]
        notes += [_on_zero(zero)] if zero else []
        return Scales(scales, alphas, (*notes, *_on_second_scales(modules, scales)))
    configs = read_configs(metadata, file)
    scales = dict.fromkeys(modules, 1.0)
    for stem in lacking:
        name, size = named[stem], sizes[stem]
        config = configs.get(name.component)
        if config is not None and size:
            paths = (family.parts(name.path) if family is not None and not name.component else None) or (name.path,)
            scales[stem] = config.scaling(paths, size)
            if config.dora and not {"dora_scale", "magnitude"} & modules[stem].parts.keys():
                raise InputError(
                    f"{config.place} says that the adapter is a DoRA, but module {stem!r} has no magnitude; the file "
                    "is incomplete: save or download it again"
                )
    said = header_alpha(metadata) if lacking and not configs else None
    notes = [] if said is None else [_on_header(*said, sizes[lacking[0]] or 1)]
    return Scales(scales, alphas, (*notes, *_on_second_scales(modules, scales)))


def _on_missing(stems: list[str]) -> str:
    return (
        f"{len(stems)} modules have no alpha while others have one ({_first(stems)}): theirs is the "
        "rank, a scale of 1, as trainers have it; diffusers takes the alpha of the others"
    )


def _on_zero(stems: list[str]) -> str:
    return (
        f"{len(stems)} modules have alpha 0 ({_first(stems)}): they change nothing here, in diffusers and in ComfyUI, "
        "and are scaled by 1 in sd-scripts and LyCORIS. Remove these alphas where 1 is meant"
    )


def _first(stems: list[str]) -> str:
    more = f" and {len(stems) - LISTED} more" if len(stems) > LISTED else ""
    return f"{', '.join(stems[:LISTED])}{more}"


def _on_header(key: str, alpha: str, rank: int) -> str:
    return (
        f"it stores no alpha, so that scales are 1, as readers take them; its header says {key} = {alpha} (at rank "
        f"{rank}). If training had that alpha, multiply the adapter by {float(alpha) / rank:g}"
    )


def _on_second_scales(modules: Mapping[str, Stored], scales: Mapping[str, float]) -> list[str]:
    """What is told of ``.scalar`` and ``.scale``, which count nowhere but in one reader."""
    notes = []
    if any("scalar" in stored.parts for stored in modules.values()):
        notes.append("scalars are left out: LyCORIS has multiplied its factors by them when it saved the file")
    other = [
        stem
        for stem, stored in modules.items()
        if "scale" in stored.parts
        and not (
            stored.parts["scale"].numel() == 1
            and abs(float(stored.parts["scale"]) - scales[stem]) <= CLOSE * abs(scales[stem])
        )
    ]
    if any("scale" in stored.parts for stored in modules.values()):
        what = f"; {other[0]} and {len(other) - 1} others have another one" if other else ""
        notes.append(
            f"tensors called .scale are left out: alpha / rank counts, but A1111 takes them in its place{what}"
        )
    return notes
