"""``adapter_config.json``: every field that changes numbers is used or refused by name."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeGuard

from fastlora.core.data import BaseInfo
from fastlora.core.names import CONFIG_NAME, WRAPPERS
from fastlora.core.patterns import Patterns
from fastlora.errors import InputError, UnsupportedAdapter
from fastlora.files.json_files import is_plain, parse_object, require_file, shown
from fastlora.formats.peft.experts import expert_order
from fastlora.formats.peft.kinds import MERGE_FIRST, VARIANTS, way_out_of
from fastlora.formats.peft.selection import read_selection

LARGEST_CONFIG = 64 << 20
LARGEST_RANK = 1 << 24

USED = frozenset(
    "alpha_pattern base_model_name_or_path bias fan_in_fan_out layer_replication lora_alpha lora_bias"
    " modules_to_save peft_type r rank_pattern revision target_parameters task_type use_rslora".split()
)
NEUTRAL = frozenset(
    "auto_mapping corda_config eva_config exclude_modules inference_mode layers_pattern layers_to_transform"
    " loftq_config lora_dropout lora_ga_config megatron_config megatron_core merge_weights peft_version"
    " qalora_group_size runtime_config target_modules".split()
)
"""Which modules were chosen, how they were trained and how they run: the factors are the result of it."""

TRAINING_ONLY = {
    "velora_config": "VeLoRA compresses activations in the backward pass",
    "monteclora_config": "MonteCLoRA samples during training",
}
"""Variants whose update after training is the plain ``s·B·A``."""

RESIDUAL = {
    "pissa": "PiSSA",
    "olora": "OLoRA",
    "corda": "CorDA",
    "lora_ga": "LoRA-GA",
    "loftq": "LoftQ",
}
"""Initialisations that also change the base weight: the stored factors are relative to what is left of it."""

HARMLESS_INITIALISATIONS = frozenset({"gaussian", "eva", "orthogonal", "mica", "true", "false"})


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """What ``adapter_config.json`` says about the numbers of an adapter."""

    path: Path
    rank: int
    alpha: float
    rank_pattern: Patterns
    alpha_pattern: Patterns
    rslora: bool = False
    dora: bool = False
    lora_bias: bool = False
    target_parameters: tuple[str, ...] = ()
    expert_order: Literal["out-in", "older", "unsaid"] = "out-in"
    base: BaseInfo = field(default_factory=BaseInfo)
    notes: tuple[str, ...] = ()
    as_trained: Callable[[str], str] = str
    """The path that a module had when it was trained, maybe inside wrappers: patterns are also looked up by it."""

    def rank_of(self, module: str) -> int:
        """The rank of a module: of the first pattern that matches, else of all."""
        rank = self._of(self.rank_pattern, module)
        return self.rank if rank is None else int(rank)

    def scaling_of(self, module: str, rank: int) -> float:
        """``s = α/r``, or ``α/√r`` with rsLoRA, with this module's own ``α``."""
        alpha = self._of(self.alpha_pattern, module)
        return (self.alpha if alpha is None else alpha) / (math.sqrt(rank) if self.rslora else rank)

    def of_wrapped(self, as_trained: Callable[[str], str]) -> PeftConfig:
        """The same for a model that was wrapped when it was trained: a pattern that chose modules there chooses none by
        their own names, and paths of parameters may lead through wrappers."""
        base = replace(self.base, selection=replace(self.base.selection, verbatim=""))
        paths = (".".join(s for s in p.split(".") if s not in WRAPPERS) for p in self.target_parameters)
        return replace(self, as_trained=as_trained, base=base, target_parameters=tuple(dict.fromkeys(paths)))

    def _of(self, patterns: Patterns, module: str) -> float | None:
        value = patterns.value(module)
        for other in (self.as_trained(module), module.replace(".module.", ".")):
            if value is None and other != module:
                value = patterns.value(other)
        return value


def read_configuration(path: Path) -> bytes:
    """A PEFT directory's configuration as it is stored; ``path``: of the file."""
    try:
        require_file(path, LARGEST_CONFIG)
    except InputError:
        if path.exists() or path.is_symlink():
            raise
        raise InputError(
            f"{path.parent} has no {CONFIG_NAME}, so it is no PEFT adapter directory; "
            "pass the directory that `model.save_pretrained(...)` of a PEFT model wrote"
        ) from None
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check the permissions") from None


def fields_of(path: Path, raw: bytes) -> Fields:
    """The fields of such a configuration, not yet judged."""
    return Fields(path, parse_object(raw, str(path)), raw)


def read_config(reader: Fields, name: str) -> PeftConfig:
    """Judges the configuration of the LoRA adapter called ``name``.

    Raises :class:`InputError` for a missing, damaged or contradictory file and :class:`UnsupportedAdapter`
    for an adapter that is no plain low-rank update.
    """
    _refuse_other_kinds(reader, name)
    rank = reader.integer("r", minimum=1, maximum=LARGEST_RANK)
    bias = reader.text("bias", "none") or "none"
    if bias not in ("none", "all", "lora_only"):
        reader.fail("bias", 'one of "none", "all", "lora_only"')
    base = BaseInfo(
        model=reader.text("base_model_name_or_path"),
        revision=reader.text("revision"),
        task_type=reader.text("task_type"),
        fan_in_fan_out=reader.flag("fan_in_fan_out"),
        layer_replication=reader.ranges("layer_replication"),
        modules_to_save=tuple(dict.fromkeys(reader.texts("modules_to_save"))),
        bias=bias,
        selection=read_selection(reader.values),
    )
    return PeftConfig(
        path=reader.path,
        rank=rank,
        alpha=reader.number("lora_alpha"),
        rslora=reader.flag("use_rslora"),
        dora=reader.flag("use_dora"),
        rank_pattern=reader.pattern("rank_pattern", whole=True),
        alpha_pattern=reader.pattern("alpha_pattern", whole=False),
        lora_bias=reader.flag("lora_bias"),
        target_parameters=tuple(dict.fromkeys(reader.texts("target_parameters"))),
        expert_order=expert_order(reader.values.get("peft_version")),
        base=base,
        notes=tuple(
            f"adapter {name!r}: {why}; that state is not kept"
            for key, why in TRAINING_ONLY.items()
            if reader.values.get(key)
        ),
    )


def _refuse_other_kinds(reader: Fields, name: str) -> None:
    values, path = reader.values, reader.path
    kind = values.get("peft_type")
    if kind != "LORA":
        if not isinstance(kind, str):
            reader.fail("peft_type", 'the text "LORA" or "IA3"')
        raise UnsupportedAdapter(
            f"adapter {name!r} is of PEFT type {kind[:40]!r} ({path}): only LoRA and (IA)³ adapters can be read; "
            f"{way_out_of(kind)}"
        )
    for key, (what, way_out) in VARIANTS.items():
        if values.get(key):
            raise UnsupportedAdapter(f"adapter {name!r} is {what} ({path}); {way_out}")
    _refuse_residual_base(reader, name)
    if values.get("ensure_weight_tying") and values.get("modules_to_save"):
        raise UnsupportedAdapter(
            f"adapter {name!r} ties trained modules to each other (ensure_weight_tying with "
            f"modules_to_save, {path}), which a saved adapter cannot express by tensors; {MERGE_FIRST}"
        )
    known = (
        USED
        | NEUTRAL
        | TRAINING_ONLY.keys()
        | VARIANTS.keys()
        | {
            "init_lora_weights",
            "ensure_weight_tying",
            "use_dora",
        }
    )
    refuse_unknown(reader, name, known)


def refuse_unknown(reader: Fields, name: str, known: Set[str]) -> None:
    """Refuses fields that say something and are not known."""
    for key, value in reader.values.items():
        if key not in known and value not in (None, False, "", [], {}):
            raise UnsupportedAdapter(
                f"adapter {name!r}: field {key[:80]!r} = {shown(value)} in {reader.path} is unknown, and it "
                "may change what the tensors mean; if it does not, remove the field or set it to null"
            )


def _refuse_residual_base(reader: Fields, name: str) -> None:
    value = reader.values.get("init_lora_weights", True)
    if value is None or isinstance(value, bool):
        return
    if not isinstance(value, str):
        reader.fail("init_lora_weights", "true, false or the name of an initialisation")
    start = value.lower()
    method = next((title for prefix, title in RESIDUAL.items() if start.startswith(prefix)), None)
    if method is not None:
        convert = (
            "merge it into its quantised base model"
            if method == "LoftQ"
            else "save it again with `save_pretrained(..., path_initial_model_for_weight_conversion=...)`, "
            "which makes it a plain LoRA adapter"
        )
        raise UnsupportedAdapter(
            f"adapter {name!r} was started with {method} (init_lora_weights = {value[:40]!r} in {reader.path}): "
            f"its factors belong to a residual of the base model, not to the base model; {convert}"
        )
    if start not in HARMLESS_INITIALISATIONS:
        raise UnsupportedAdapter(
            f"adapter {name!r}: init_lora_weights = {value[:40]!r} in {reader.path} is an unknown "
            "initialisation, and some change the base model; set it to true if the factors belong to the "
            "unchanged base model"
        )


@dataclass(frozen=True, slots=True)
class Fields:
    """Typed access to the fields of one file; a failure names file, field, what was found and is needed. ``raw``: the
    file's bytes."""

    path: Path
    values: dict[str, Any]
    raw: bytes = b""

    def fail(self, key: str, needed: str) -> NoReturn:
        """Raises :class:`InputError` for a field: what it is, and what is ``needed``."""
        found = f"is {shown(self.values[key])}" if key in self.values else "is missing"
        raise InputError(f"{self.path}: field {key!r} {found}, needed is {needed}; correct the file")

    def integer(self, key: str, minimum: int, maximum: int) -> int:
        """A whole number that must be there and within bounds."""
        value = self.values.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            self.fail(key, f"a whole number of at least {minimum} and at most {maximum}")
        return value

    def number(self, key: str) -> float:
        """A finite number that must be there."""
        value = self.values.get(key)
        if not _is_number(value):
            self.fail(key, "a finite number")
        return float(value)

    def flag(self, key: str) -> bool:
        """True or false; false where it is missing or null."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            self.fail(key, "true or false")
        return bool(value)

    def text(self, key: str, default: str | None = None) -> str | None:
        """A text, or the default where it is missing, null or empty."""
        value = self.values.get(key)
        if value is not None and not (isinstance(value, str) and is_plain(value)):
            self.fail(key, "a text without control characters, or null")
        return value or default

    def texts(self, key: str) -> list[str]:
        """A list of texts, empty where it is missing or null."""
        value = self.values.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(v, str) and v and is_plain(v) for v in value):
            self.fail(key, "a list of texts without control characters, or null")
        return list(value)

    def ranges(self, key: str) -> tuple[tuple[int, int], ...] | None:
        """``[first, end)`` pairs of layer numbers, or ``None`` where there are none."""
        value = self.values.get(key)
        if not value:
            return None
        pairs = isinstance(value, list) and all(
            isinstance(p, list) and len(p) == 2 and all(type(x) is int for x in p) for p in value
        )
        if not pairs:
            self.fail(key, "a list of [first, end) pairs of layer numbers or null")
        return tuple((first, end) for first, end in value)

    def pattern(self, key: str, *, whole: bool) -> Patterns:
        """Numbers by module pattern, none where it is missing; with ``whole`` they are ranks."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            self.fail(key, "an object {module pattern: number} or null")
        for number in (value or {}).values():
            sound = type(number) is int and 0 <= number <= LARGEST_RANK if whole else _is_number(number)
            if not sound:
                self.fail(key, f"a {'whole' if whole else 'finite'} number for each pattern")
        return Patterns(value or {}, f"{self.path}: field {key!r}")


def _is_number(value: object) -> TypeGuard[int | float]:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and -sys.float_info.max <= value <= sys.float_info.max
    )
