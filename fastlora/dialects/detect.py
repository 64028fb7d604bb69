"""Which family of models a single file belongs to, and what its modules are called there.

Names decide first: the families that have every name of the file. Between these, sizes of weights and numbers of
blocks decide, then what the metadata say. Where several families remain, no family is named; the modules still are,
if all families agree on them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from fastlora.dialects.encoders import CLIP, LANGUAGE, T5
from fastlora.dialects.families import families, family_named
from fastlora.dialects.family import Family, found
from fastlora.dialects.naming import Named, Shape
from fastlora.dialects.patterns import Found, Table
from fastlora.dialects.prefixes import DENOISER, Prefixed, split_prefix
from fastlora.errors import InputError

DENOISERS = (DENOISER, "transformer_2")
"""Components that a family's own table names: Wan 2.2 has two of them."""
HINTS = ("modelspec.architecture", "ss_base_model_version")
"""Metadata that name the family of the base model."""
OTHER = "other"
"""What to ask for where no family is known, or the wrong one: names are not looked at."""
KEPT = (
    "the names of its modules are kept as the file has them, without what stands before dotted ones: they mean the "
    "same in files of one trainer only"
)
_PUNCTUATION = re.compile(r"[^a-z0-9]+")
_ANYWHERE: Mapping[str, tuple[tuple[str, Table], ...]] = {
    **dict.fromkeys(
        ("te", "te1", "clip_l", "text_encoder"), tuple(("text_encoder", table) for table in (CLIP, T5, LANGUAGE))
    ),
    **dict.fromkeys(
        ("te2", "clip_g", "text_encoder_2"), tuple(("text_encoder_2", table) for table in (CLIP, T5, LANGUAGE))
    ),
    "text_encoder_3": (("text_encoder_3", T5),),
}
"""Text encoders of a file that has nothing else."""


@dataclass(frozen=True, slots=True)
class Identified:
    """What the names of a file mean.

    ``family``: its name, ``None`` where it is in doubt or none is known. ``candidates``: the families that have all
    the names. ``modules``: every stem that has a meaning. ``unmatched``: stems that the family, or the likeliest one,
    does not have. ``notes``: what a user should know, in sentences.
    """

    family: str | None
    candidates: tuple[str, ...]
    modules: Mapping[str, Named]
    unmatched: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default_factory=tuple)


def identify(
    stems: Mapping[str, Shape | None], metadata: Mapping[str, str] | None = None, family: str | None = None
) -> Identified:
    """The family of a file, and the modules that its names mean.

    Args:
        stems: names of modules as the file has them, without the suffixes of tensors → rows and columns of the weight,
            ``None`` where the file does not say (of a norm, or of a bias alone)
        metadata: of the file's header; what they say about the base model is a hint, which the names must bear out
        family: the family, or an alias of it, where the user says so; ``"other"`` takes all names as they are

    Raises :class:`InputError` for a family that is not known.
    """
    split = {stem: split_prefix(stem) for stem in stems}
    if family == OTHER:
        return Identified(None, (), {stem: _as_it_is(stem, p) for stem, p in split.items()}, notes=(KEPT,))
    chosen = _asked_for(family) if family is not None else None
    known = [chosen] if chosen is not None else list(families().values())
    fitting = _with_every_name(known, split)
    hinted, hint = _hinted(metadata or {})
    if not fitting:
        return _unmatched(known, split, stems, asked=chosen is not None)
    likely = fitting if chosen is not None else _likely(fitting, split, stems, hinted)
    notes = [] if hinted is None or hinted in likely else [_contradiction(hint, hinted, likely)]
    names = tuple(f.name for f in likely)
    modules = _named(likely[0], split, stems)
    if all(_alike(modules, _named(f, split, stems)) for f in likely[1:]):
        return Identified(names[0] if len(names) == 1 else None, names, modules, notes=tuple(notes))
    notes.append(
        f"the names of its modules fit {_listed(likely)}, which use them for different modules; they are kept as the "
        f"file has them. Say which it is with family={names[0]!r} (--family {names[0]})"
    )
    return Identified(None, names, {stem: _as_it_is(stem, p) for stem, p in split.items()}, notes=tuple(notes))


def _asked_for(name: str) -> Family:
    family = family_named(name)
    if family is None:
        known = ", ".join(sorted(families()))
        raise InputError(f"there is no family {name!r}; families are {known}, and {OTHER!r} keeps names as they are")
    return family


def _with_every_name(known: Sequence[Family], split: Mapping[str, Prefixed]) -> list[Family]:
    """The families that have every name."""
    left = list(known)
    for prefixed in split.values():
        if not (left := [f for f in left if _pattern(f, prefixed) is not None]):
            break
    return left


def _pattern(family: Family, prefixed: Prefixed) -> str | None:
    """The canonical pattern of a name in a family, ``None`` if it has none."""
    if prefixed.component in DENOISERS:
        known = _found(family, prefixed)
        return None if known is None else known.pattern
    return "" if _text_module(family.text_encoders, prefixed) is not None else None


def _named(family: Family, split: Mapping[str, Prefixed], shapes: Mapping[str, Shape | None]) -> dict[str, Named]:
    """The modules of a family that the names mean; names that it does not have are left out."""
    modules = {}
    for stem, prefixed in split.items():
        if (named := _module(family, prefixed, shapes[stem])) is not None:
            modules[stem] = named
    return modules


def _module(family: Family, prefixed: Prefixed, shape: Shape | None) -> Named | None:
    if prefixed.component not in DENOISERS:
        return _text_module(family.text_encoders, prefixed)
    known = _found(family, prefixed)
    if known is None:
        return None
    swapped = known.original and family.is_swapped(known.pattern, shape)
    return Named(prefixed.component, known.path, known.original, swapped)


def _found(family: Family, prefixed: Prefixed) -> Found | None:
    return found(family, _plain(prefixed.rest, prefixed.is_flat), prefixed.is_flat)


def _plain(rest: str, is_flat: bool) -> str:
    """A dotted path without the attention processor, which diffusers named before it used PEFT."""
    if is_flat or ".processor." not in rest:
        return rest
    attention, _, leaf = rest.rpartition(".processor.")
    if leaf.startswith(("qkv", "proj")):  # of XLabs, whose families have these names
        return rest
    return f"{attention}.{'to_out.0' if leaf == 'to_out' else leaf}"


def _text_module(encoders: Mapping[str, tuple[tuple[str, Table], ...]], prefixed: Prefixed) -> Named | None:
    for component, table in encoders.get(prefixed.component, ()):
        known = table.flat(prefixed.rest) if prefixed.is_flat else table.dotted(prefixed.rest)
        if known is not None:
            return Named(component, known.path)
    return None


def _likely(
    fitting: Sequence[Family], split: Mapping[str, Prefixed], shapes: Mapping[str, Shape | None], hinted: Family | None
) -> list[Family]:
    """The families among those that fit that the weights' sizes and the numbers of blocks speak for. What speaks
    against all of them, as of a model that was never published, is no reason."""
    left = list(fitting)
    for speaks_for in (_has_ratios, _has_columns, _has_blocks):
        if len(left) > 1:
            left = [f for f in left if all(speaks_for(f, *fact) for fact in _facts(f, split, shapes))] or left
    if hinted is not None and hinted in left:
        return [hinted]
    return [f for f in left if _has_all_blocks(f, split, shapes)] or left if len(left) > 1 else left


def _facts(
    family: Family, split: Mapping[str, Prefixed], shapes: Mapping[str, Shape | None]
) -> Iterator[tuple[Found, Shape | None]]:
    """The modules of the denoiser, as the family has them, with their shapes."""
    for stem, prefixed in split.items():
        if prefixed.component in DENOISERS:
            known = _found(family, prefixed)
            assert known is not None
            yield known, shapes[stem]


def _has_ratios(family: Family, known: Found, shape: Shape | None) -> bool:
    ratio = family.ratios.get(known.pattern)
    return ratio is None or shape is None or shape[0] == ratio * shape[1]


def _has_columns(family: Family, known: Found, shape: Shape | None) -> bool:
    columns = family.columns.get(known.pattern)
    return columns is None or shape is None or shape[1] in columns


def _has_blocks(family: Family, known: Found, shape: Shape | None) -> bool:
    most = family.blocks.get(known.pattern.partition(".#")[0])
    return most is None or int(known.numbers[0]) < most


def _has_all_blocks(family: Family, split: Mapping[str, Prefixed], shapes: Mapping[str, Shape | None]) -> bool:
    """Whether the file has every block of the family's model, of the kinds of block that it has at all."""
    numbers: dict[str, set[str]] = {}
    for known, _ in _facts(family, split, shapes):
        numbers.setdefault(known.pattern.partition(".#")[0], set()).update(known.numbers[:1])
    counts = {kind: len(met) for kind, met in numbers.items() if kind in family.blocks}
    return bool(counts) and all(count == family.blocks[kind] for kind, count in counts.items())


def _hinted(metadata: Mapping[str, str]) -> tuple[Family | None, str]:
    """The family that metadata name, and where."""
    for key in HINTS:
        text = _PUNCTUATION.sub("", metadata.get(key, "").lower())
        fits = [(len(hint), f) for f in families().values() for hint in f.hints if text.startswith(hint)]
        if fits:
            return max(fits, key=lambda fit: fit[0])[1], f"{key} = {metadata[key]!r}"
    return None, ""


def _contradiction(hint: str, hinted: Family, likely: Sequence[Family]) -> str:
    return f"its metadata ({hint}) name {hinted.title}, but its modules are those of {_listed(likely)}; it is read so"


def _alike(first: Mapping[str, Named], second: Mapping[str, Named]) -> bool:
    return all(
        (a.module, a.swapped) == (b.module, b.swapped) for a, b in zip(first.values(), second.values(), strict=True)
    )


def _as_it_is(stem: str, prefixed: Prefixed) -> Named:
    """A name whose meaning is not known: dotted without its prefix but with its component, flat whole."""
    return Named("", stem) if prefixed.is_flat else Named(prefixed.component, prefixed.rest)


def _unmatched(
    known: Sequence[Family], split: Mapping[str, Prefixed], shapes: Mapping[str, Shape | None], asked: bool
) -> Identified:
    """A file that has names no family has: of text encoders alone, of a language model, or of nothing known."""
    if not asked and all(p.component not in DENOISERS for p in split.values()):
        modules = {stem: named for stem, p in split.items() if (named := _text_module(_ANYWHERE, p)) is not None}
        return Identified(None, (), modules, tuple(s for s in split if s not in modules))
    best = max(known, key=lambda f: sum(_pattern(f, p) is not None for p in split.values()))
    modules = _named(best, split, shapes)
    own = all(not p.is_flat and p.prefix in ("", "base_model.model.") for p in split.values())
    if not modules and own and not asked:
        return Identified(None, (), {stem: _as_it_is(stem, p) for stem, p in split.items()})
    return Identified(
        best.name if asked else None,
        (best.name,) if modules else (),
        modules,
        tuple(stem for stem in split if stem not in modules),
    )


def _listed(likely: Iterable[Family]) -> str:
    return " or ".join(f"{f.title} ({f.name})" for f in likely)
