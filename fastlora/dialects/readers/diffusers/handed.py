"""What a pipeline of diffusers hands over to its models, and the scales that PEFT gives it there."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastlora.core.patterns import Patterns
from fastlora.dialects.adapter_metadata import KEY as METADATA
from fastlora.dialects.file_facts import FileFacts, ModuleFacts
from fastlora.dialects.verdicts import Finding, Reading, Refused, lost, scaled
from fastlora.errors import InputError
from fastlora.files.json_files import shown

DEFAULT_RANK = DEFAULT_ALPHA = 8
UNSURE = "unsure"
"""In place of an error: what becomes of a file is not known here."""
ROOT = "text_model."
"""Begins the names of CLIP in files. With transformers 5.6 and later a CLIPTextModel has it no more, and diffusers cuts
it; a CLIPTextModelWithProjection still has it."""
PROJECTED = frozenset({("sdxl", "text_encoder_2"), ("sd3", "text_encoder"), ("sd3", "text_encoder_2")})
"""Families and components that are a CLIPTextModelWithProjection."""


def no_pattern(module: ModuleFacts) -> str | None:
    """The alpha of no module reaches it."""
    return None


def as_written(module: ModuleFacts) -> str | None:
    """Alphas are noted under the names of the file."""
    return module.rest


@dataclass(slots=True)
class Handed:
    """What the model of one component gets.

    ``scales``: by the file's name of a module, what is inside the factors already. ``astray``: modules under names that
    the model does not have, and why. ``alphas``: those that are beside the factors. ``pattern``: the name under which
    the alpha of a module is noted. ``first_counts``: where alphas differ, the first one is that of modules without a
    pattern, else the most common one is. ``root``: what the paths of modules begin with in files and not in the model.
    """

    scales: dict[str, float] = field(default_factory=dict)
    astray: dict[str, str] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    pattern: Callable[[ModuleFacts], str | None] = no_pattern
    first_counts: bool = False
    root: str = ""

    def name(self, path: str) -> str:
        """What the model itself calls a module."""
        return path.removeprefix(self.root)


@dataclass(slots=True)
class Conversion:
    """All that is handed over, by component (``""``: the denoiser), and modules that are not, and why; or that arrive
    as something else."""

    handed: dict[str, Handed] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, Finding] = field(default_factory=dict)

    def to(self, component: str) -> Handed:
        """What the model of a component gets."""
        return self.handed.setdefault(component, Handed())

    def take(self, module: ModuleFacts, scale: float = 1.0) -> None:
        """Hands a module over."""
        self.to(module.named.component).scales[module.stem] = scale

    def bake(self, module: ModuleFacts, *, multiplies: bool = True) -> None:
        """Hands a module over whose alpha goes into the factors; ``multiplies``: by 1 where there is none."""
        if module.alpha is not None and module.alpha < 0:
            raise Refused("no answer", f"its converter never ends, since the alpha of {module.stem!r} is negative")
        if "float8" in module.dtypes.get("down", "") and (multiplies or module.alpha is not None):
            raise Refused("NotImplementedError", f"torch cannot multiply factors of 8 bits ({module.stem!r})")
        self.take(module, module.own_scale)

    def stray(self, module: ModuleFacts, why: str = "the model has no module of that name") -> None:
        """Hands a module over under a name that the model does not have."""
        self.to(module.named.component).astray[module.stem] = why

    def drop(self, modules: Iterable[ModuleFacts], why: str) -> None:
        """Leaves modules out."""
        self.dropped |= {module.stem: why for module in modules}


def settled(file: FileFacts, conversion: Conversion, denoiser: str) -> Reading:
    """What becomes of a file: PEFT's scales for what is handed over, and the rest lost."""
    findings = {stem: lost(why) for stem, why in conversion.dropped.items()}
    for component, handed in conversion.handed.items():
        if not handed.scales and handed.astray:
            raise Refused("NoMatchingPeftModuleError", "none of its names is one of the model")
        findings |= {stem: lost(why) for stem, why in handed.astray.items()}
        handed.root = ROOT if component and (file.family, component) not in PROJECTED else ""
        found = _scales(file, component or denoiser, handed, bool(component))
        for stem, (scale, why) in found.items():
            finding = scaled(file.modules[stem].meant, scale, why) if math.isfinite(scale) else lost(why)
            if finding is not None:
                findings[stem] = finding
    findings |= {stem: f for stem, f in conversion.wrong.items() if stem not in findings or f.fault == "unsure"}
    reached = {stem for handed in conversion.handed.values() for stem in (*handed.scales, *handed.astray)}
    silent = "no part of the pipeline looks for names that begin so"
    findings |= {s: lost(silent) for s in file.modules if s not in reached and s not in findings}
    return Reading(None, {stem: findings[stem] for stem in file.modules if stem in findings})


def _scales(file: FileFacts, component: str, handed: Handed, is_text: bool) -> dict[str, tuple[float, str]]:
    modules = [file.modules[stem] for stem in handed.scales]
    if METADATA in file.metadata:
        return _by_metadata(file.metadata[METADATA], component, modules, handed, is_text)
    if not handed.alphas:
        return {m.stem: (handed.scales[m.stem], "it does not look at alpha here") for m in modules}
    values = list(handed.alphas.values())
    common = values[0] if handed.first_counts else Counter(values).most_common(1)[0][0]
    noted = {
        name: alpha
        for stem, alpha in handed.alphas.items()
        if alpha != common and (name := handed.pattern(file.modules[stem])) is not None
    }
    which = "first" if handed.first_counts else "most common"
    why = f"it gives the module an alpha of {common:g}, the {which} one of the component"
    found = {}
    for module in modules:
        name = handed.name(module.named.path)
        alpha = next((a for known, a in noted.items() if name == known or name.endswith(f".{known}")), common)
        found[module.stem] = (handed.scales[module.stem] * alpha / (module.rank or 1), why)
    return found


def _by_metadata(
    text: str, component: str, modules: Iterable[ModuleFacts], handed: Handed, is_text: bool
) -> dict[str, tuple[float, str]]:
    if handed.alphas:
        raise Refused("ValueError", f"it takes alphas or {METADATA}, not both")
    config = component_config(text, component)
    if not config.get("target_modules"):
        error = "ValueError" if is_text else "KeyError"
        raise Refused(error, f"its {METADATA} say nothing of the modules of {component}")
    found = {}
    for module in modules:
        names = [handed.name(path) for path in module.parts or (module.named.path,)]
        if is_text and not _targets(config["target_modules"], names[0]):
            found[module.stem] = (math.nan, f"its {METADATA} do not list it under target_modules")
            continue
        scales = {_scale_of(config, name, module) for name in names}
        why = f"it scales by alpha / r of {METADATA}"
        if len(scales) > 1:
            raise Refused(UNSURE, f"its {METADATA} give the parts of {module.stem!r} different scales")
        found[module.stem] = (handed.scales[module.stem] * scales.pop(), why)
    if found and all(math.isnan(scale) for scale, _ in found.values()):
        raise Refused("NoMatchingPeftModuleError", f"its {METADATA} list no module of {component}")
    return found


def _scale_of(config: Mapping[str, Any], name: str, module: ModuleFacts) -> float:
    rank = _looked_up(config, "rank_pattern", "r", name, DEFAULT_RANK)
    alpha = _looked_up(config, "alpha_pattern", "lora_alpha", name, DEFAULT_ALPHA)
    # Parts of a block-diagonal projection get their own rows of the rank.
    if rank <= 0 or (rank != module.rank and rank * len(module.parts) != module.rank):
        raise Refused("RuntimeError", f"its {METADATA} say rank {rank:g} of {name!r}, which has {module.rank}")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def component_config(text: str, component: str) -> dict[str, Any]:
    """The fields of ``lora_adapter_metadata`` about a component."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        raise Refused("JSONDecodeError", f"its {METADATA} are no JSON") from None
    if not isinstance(fields, dict):
        raise Refused("AttributeError", f"its {METADATA} are no object")
    prefix = f"{component}."
    return {key.removeprefix(prefix): value for key, value in fields.items() if key.startswith(prefix)}


def _looked_up(config: Mapping[str, Any], patterns: str, default: str, name: str, missing: float) -> float:
    table = config.get(patterns) or {}
    value = config.get(default, missing)
    if not isinstance(table, Mapping) or isinstance(value, bool) or not isinstance(value, int | float):
        raise Refused("TypeError", f"its {METADATA} have {shown(value)} for {default}")
    try:
        found = Patterns(table, METADATA).value(name)
    except (InputError, TypeError, ValueError) as error:
        raise Refused(UNSURE, f"its {METADATA} are not followed here ({error})") from None
    return float(value if found is None else found)


def _targets(targets: object, name: str) -> bool:
    if not isinstance(targets, list | tuple):
        return True
    return any(isinstance(t, str) and (name == t or name.endswith(f".{t}")) for t in targets)
