"""``lora_adapter_metadata`` in the header of a file: the configuration of PEFT that diffusers keeps with an adapter.

It says the scales of files that hold no alpha. Beside alphas it is stale or says the same again, and is not used.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlora.core.patterns import Patterns
from fastlora.errors import InputError
from fastlora.files.json_files import parse_object, shown

KEY = "lora_adapter_metadata"
DENOISERS = ("unet", "transformer")
COMPONENTS = (*DENOISERS, "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3")
HEADER_ALPHAS = ("ss_network_alpha", "network_alpha", "lora_alpha", "alpha")
"""Where tools put alpha in a header."""


@dataclass(frozen=True, slots=True)
class Config:
    """What is said of one component. ``place`` says in messages where."""

    place: str
    rank: int
    alpha: float
    rank_pattern: Patterns
    alpha_pattern: Patterns
    rslora: bool
    dora: bool

    def scaling(self, paths: Sequence[str], rank: int) -> float:
        """``α/r``, or ``α/√r`` with rsLoRA, of a module of rank ``rank``. ``paths``: its path in the component, or
        those of the parts of a fused projection, which must agree.

        Raises :class:`InputError` where the rank is another one than the file's, so that the scale is not known.
        """
        found = {self._of(path) for path in paths}
        if len(found) > 1:
            raise InputError(f"{self.place} has different scales for {' and '.join(paths)}, which are one tensor here")
        said, alpha = found.pop()
        scaling = alpha / (math.sqrt(said) if self.rslora else said)
        if said != rank and scaling != 1.0:
            raise InputError(
                f"{self.place} says rank {said} and alpha {alpha:g} of {paths[0]}, whose factors have rank {rank}, so "
                "its scale is unknown. The metadata are of an earlier version of the file: remove or correct them"
            )
        return scaling

    def _of(self, path: str) -> tuple[int, float]:
        rank, alpha = self.rank_pattern.value(path), self.alpha_pattern.value(path)
        return self.rank if rank is None else int(rank), self.alpha if alpha is None else alpha


def read_configs(metadata: Mapping[str, str], file: Path) -> dict[str, Config]:
    """The configurations by component, ``""`` for the denoiser; none where the header has none.

    Fields without a component are the denoiser's: a model of diffusers saves its own adapter so, a pipeline does not.

    Raises :class:`InputError` for fields that are damaged.
    """
    text = metadata.get(KEY)
    if text is None:
        return {}
    place = f"{file}: {KEY} in its header"
    fields = parse_object(text.encode("utf-8", "replace"), place)
    by_component: dict[str, dict[str, Any]] = {}
    for key, value in fields.items():
        component, dot, field = key.partition(".")
        if dot and component in COMPONENTS:
            by_component.setdefault("" if component in DENOISERS else component, {})[field] = value
    by_component.setdefault("", {key: value for key, value in fields.items() if "." not in key})
    return {component: _config(values, place) for component, values in by_component.items() if "r" in values}


def _config(values: Mapping[str, Any], place: str) -> Config:
    rank, alpha = values.get("r"), values.get("lora_alpha")
    if type(rank) is not int or not 0 < rank < 1 << 24:
        raise InputError(f"{place} has r = {shown(rank)}, needed is a whole number; correct or remove it")
    if not _is_number(alpha):
        raise InputError(f"{place} has lora_alpha = {shown(alpha)}, needed is a number; correct or remove it")
    patterns = {}
    for key in ("rank_pattern", "alpha_pattern"):
        value = values.get(key) or {}
        whole = key == "rank_pattern"
        sound = isinstance(value, dict) and all(
            (type(n) is int and 0 < n < 1 << 24) if whole else _is_number(n) for n in value.values()
        )
        if not sound:
            raise InputError(f"{place} has {key} = {shown(value)}, needed are numbers by pattern; correct or remove it")
        patterns[key] = Patterns(value, f"{place}, {key},")
    return Config(
        place,
        rank,
        float(alpha),  # type: ignore[arg-type]
        patterns["rank_pattern"],
        patterns["alpha_pattern"],
        values.get("use_rslora") is True,
        values.get("use_dora") is True,
    )


def _is_number(value: object) -> bool:
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and -sys.float_info.max <= value <= sys.float_info.max  # type: ignore[operator]


def header_alpha(metadata: Mapping[str, str]) -> tuple[str, str] | None:
    """Where a header says an alpha, and which; ``None`` where it says none."""
    return next(((key, metadata[key]) for key in HEADER_ALPHAS if _says(metadata.get(key, ""))), None)


def _says(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
