"""What the rules about readers need to know of a single file: names, shapes and alphas, but no factors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from fastlora.dialects.adapter_metadata import read_configs
from fastlora.dialects.family import Family
from fastlora.dialects.looks import file_in, open_file
from fastlora.dialects.lycoris import dimension
from fastlora.dialects.named_modules import named_modules
from fastlora.dialects.naming import Named, Shape
from fastlora.dialects.prefixes import split_prefix
from fastlora.dialects.suffixes import Stored, group
from fastlora.dialects.weights import weight_shape
from fastlora.errors import InputError


@dataclass(frozen=True, slots=True)
class ModuleFacts:
    """One module of a file.

    ``stem``: its name there, ``prefix + rest``; ``is_flat``: with underscores for dots. ``named``: what it means.
    ``original``: its dotted name in the original code, ``None`` where that has no such module. ``parts``: the paths of
    those that a fused projection stands for. ``keys``: the names of its tensors, by what they are (``up``, ``down``,
    ``alpha``, ``dora_scale``, …). ``shapes``, ``dtypes``: theirs. ``alpha``: stored beside the factors. ``meant``: the
    scale of ``B·A`` that the file means.
    """

    stem: str
    prefix: str
    rest: str
    is_flat: bool
    named: Named
    original: str | None
    parts: tuple[str, ...]
    keys: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str] = field(default_factory=dict)
    alpha: float | None = None
    meant: float = 1.0

    @property
    def rank(self) -> int:
        """Of the factors; 0 where it has none."""
        shape = self.shapes.get("down", ())
        return shape[0] if shape else 0

    @property
    def rows(self) -> int:
        """Of the weight, as its ``B`` has them; 0 where it has none."""
        shape = self.shapes.get("up", ())
        return shape[0] if shape else 0

    @property
    def is_plain(self) -> bool:
        """Whether it is ``B·A`` and a scale, and nothing else."""
        return {"up", "down"} <= self.keys.keys() <= {"up", "down", "alpha"}

    @property
    def suffix(self) -> str:
        """How the file calls its ``A``: the end of the tensor's name."""
        return self.keys["down"].removeprefix(self.stem) if "down" in self.keys else ""

    @property
    def in_diffusers_names(self) -> bool:
        """Whether the file spells it as diffusers does, flat or dotted."""
        path = self.named.path
        return self.rest in ((path.replace(".", "_"),) if self.is_flat else (path, *_older(path)))

    @property
    def in_original_names(self) -> bool:
        """Whether the file spells it as the original code does, flat or dotted."""
        original = self.original
        return original is not None and self.rest == (original.replace(".", "_") if self.is_flat else original)

    @property
    def own_scale(self) -> float:
        """``alpha / rank``, or 1 without alpha."""
        return 1.0 if self.alpha is None or not self.rank else self.alpha / self.rank


def _older(path: str) -> tuple[str, ...]:
    """How diffusers called an attention's projections while they belonged to its processor."""
    attention, _, leaf = path.removesuffix(".0").rpartition(".")
    return (f"{attention}.processor.{leaf}",) if attention else ()


@dataclass(frozen=True, slots=True)
class FileFacts:
    """A file. ``family``: of its model. ``modules``: by stem. ``keys``: all names of tensors, in the order in which
    they lie there. ``metadata``: of its header."""

    family: str | None
    modules: Mapping[str, ModuleFacts]
    keys: tuple[str, ...]
    metadata: Mapping[str, str]

    def of(self, component: str) -> list[ModuleFacts]:
        """The modules of a component, ``""`` for the denoiser."""
        return [m for m in self.modules.values() if m.named.component == component]

    def owners(self) -> dict[str, tuple[ModuleFacts, str]]:
        """What every tensor is: its module, and which part of it. Tensors of no module are left out."""
        return {key: (module, part) for module in self.modules.values() for part, key in module.keys.items()}

    def starts(self, *prefixes: str) -> bool:
        """Whether some name begins so."""
        return any(key.startswith(prefixes) for key in self.keys)

    def has(self, text: str) -> bool:
        """Whether some name contains a text."""
        return any(text in key for key in self.keys)


def facts_of(path: Path, family: str | None = None, *, certain: bool = True) -> tuple[Path, FileFacts]:
    """The single file at a path, or in the folder that stands for it, and what is known of it.

    ``certain``: the family must be known. Raises :class:`InputError` for what cannot be read, for alphas that are no
    numbers, and where the family is not known or in doubt.
    """
    file = file_in(path) if path.is_dir() else path
    if file is None:
        raise InputError(f"{path} is a folder and not a single file; PEFT directories are read by PEFT alone")
    tensors, metadata = open_file(file)
    return file, facts_from(tensors, metadata, family, file, certain=certain)


def facts_from(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], family: str | None, file: Path, *, certain: bool = True
) -> FileFacts:
    """The same of the contents of a ``file``; of its tensors, only scales are looked at."""
    modules = group(tensors, file).modules
    known = named_modules(modules, metadata, family, file)
    if known.family is None and certain:
        raise InputError(f"{file}: {_doubt(known.candidates)}")
    configs = read_configs(metadata, file)
    found = {}
    for stem, stored in modules.items():
        facts = _module(stored, known.named[stem], known.family, file)
        config = configs.get(facts.named.component)
        size = dimension(stored.parts)
        if config is not None and size is not None and not any("alpha" in m.parts for m in modules.values()):
            scale = config.scaling(facts.parts or (facts.named.path,), size)
            facts = replace(facts, meant=scale)
        found[stem] = facts
    return FileFacts(known.family.name if known.family else None, found, tuple(tensors), metadata)


def _doubt(candidates: tuple[str, ...]) -> str:
    if not candidates:
        return (
            "its names fit no family of models that is known here, and what programs make of it depends on that; for "
            "language models there is nothing to check"
        )
    return (
        f"its names fit {' or '.join(candidates)}, and what programs make of it depends on that; say which it is: "
        f"family={candidates[0]!r} (--family {candidates[0]})"
    )


def _module(stored: Stored, named: Named, family: Family | None, file: Path) -> ModuleFacts:
    prefixed = split_prefix(stored.stem)
    shapes = {part: tuple(tensor.shape) for part, tensor in stored.parts.items()}
    up, down = shapes.get("up"), shapes.get("down")
    if up is not None and down is not None and (min(len(up), len(down)) < 2 or up[1] != down[0] or 0 in up + down):
        raise InputError(
            f"{file}: module {stored.stem!r} has A {list(down)} and B {list(up)}; needed are [rank, in] and "
            "[out, rank]: save or download the file again"
        )
    size: Shape | None = weight_shape(shapes)
    table = family if not named.component or named.component.startswith("transformer") else None
    original = None if table is None else table.original(named.path, size)
    alpha = _alpha(stored, file)
    rank = dimension(stored.parts)
    return ModuleFacts(
        stored.stem,
        prefixed.prefix,
        prefixed.rest,
        prefixed.is_flat,
        named,
        None if original is None else original[0],
        (None if table is None else table.parts(named.path)) or (),
        stored.keys,
        shapes,
        {part: str(tensor.dtype)[6:] for part, tensor in stored.parts.items()},
        alpha,
        1.0 if alpha is None or rank is None else alpha / rank,
    )


def _alpha(stored: Stored, file: Path) -> float | None:
    """The alpha of a module; 0 is one here, since readers differ in it."""
    tensor: Tensor | None = stored.parts.get("alpha")
    if tensor is None:
        return None
    value = float(tensor) if tensor.numel() == 1 else math.nan
    if not math.isfinite(value):
        raise InputError(f"{file}: tensor {stored.keys['alpha']!r} is no number, so the scaling is unknown; correct it")
    return value
