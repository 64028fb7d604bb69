"""Model cards: the ``README.md`` beside a result, which people read, and the Hub for its base model and tags.

A card says only what is true anywhere: names of this machine's files are left out of it. Names and notes come from
files of others, so that nothing in them is taken for markup.
"""

from __future__ import annotations

import functools
import hashlib
import html
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastlora._version import __version__

if TYPE_CHECKING:
    import torch

    from fastlora.core.data import ModulesData

CARD_HEADING = b"---\n# Card by fastlora, sha256 "
"""How a card begins. The sum of what follows its line tells whether somebody has edited it since."""
CARD_START = CARD_HEADING.decode()

LOCAL_PATH = re.compile(r"(?<![\w:/.~-])(~/|\.\.?/|/[A-Za-z_][\w.-]*/|[A-Za-z]:\\)[\w.-]+[^\s`'\")\]]*")
"""A path of this machine in a text: from the root, the home or the current folder."""

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

MARKUP = re.compile(r"([\\`*_{}\[\]()#+!|~$:@-])")

LONGEST_RECIPE = 200
"""Lines of a recipe that a card shows."""

LINE = 80
"""Characters of a line of YAML that is not broken."""

DEEPEST = 20
"""Operations on results of operations that a recipe shows."""

PLAIN = frozenset({str, int, float, bool, type(None)})
"""Types of what has nothing in it, as most of a provenance."""


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What a card is made of.

    ``name``: its title. ``kind``: in words, ``"LoRA"``. ``library``: of the Hub's list, that loads it. ``tags``: beside
    ``fastlora``. ``base_models``, ``relation``: the result is an ``"adapter"`` of a model, or a ``"merge"`` of some.
    ``provenance``: of the record. ``figures``: rows of what and how much. ``notes``: sentences.
    """

    name: str
    kind: str
    library: str
    tags: Sequence[str]
    base_models: Sequence[str]
    relation: str
    provenance: Mapping[str, object]
    figures: Mapping[str, str]
    notes: Sequence[str] = ()


def card_text(facts: CardFacts) -> str:
    """The card in Markdown, with the fields that the Hub reads in front."""
    return _titled(facts.name, *_around_title(facts))


def _titled(name: str, front: str, rest: str) -> str:
    text = f"{front}\n# {plain(name)}\n{rest}"
    return f"{CARD_START}{_digest(text.encode())}\n{text}"


def _around_title(facts: CardFacts) -> tuple[str, str]:
    """What stands before the title of a card, and behind it."""
    tags = [*facts.tags, *(["merge"] if len(_add_leaves(facts.provenance, set())) > 1 else []), "fastlora"]
    known = tuple([m for m in facts.base_models if is_hub_id(m)])
    parts = [
        "",
        _made(facts.kind, known, facts.relation),
        "",
        *_table(tuple(facts.figures.items())),
        *_recipe_lines(facts.provenance),
        *_note_lines(facts.notes),
    ]
    return _front(facts.library, tuple(tags), known, facts.relation), "\n".join(parts).rstrip() + "\n"


@functools.lru_cache(64)
def _front(library: str, tags: Sequence[str], models: Sequence[str], relation: str) -> str:
    """The fields in front of a card: those of the parts of a decomposition are alike."""
    lines = [f"library_name: {library}", "tags:", *(f"- {tag}" for tag in tags)]
    if models:
        quoted = [json.dumps(m) for m in models]
        lines += [f"base_model: {quoted[0]}"] if len(models) == 1 else ["base_model:", *(f"- {m}" for m in quoted)]
        lines += [f"base_model_relation: {relation}"]
    return "\n".join([*lines, "---", ""])


@functools.lru_cache(64)
def _made(kind: str, models: Sequence[str], relation: str) -> str:
    model = ", ".join(f"`{m}`" for m in models) or "a base model without a name on the Hub"
    return f"{kind} {'of' if relation == 'merge' else 'for'} {model}, made by fastlora {__version__}."


def adapter_card(record: ModulesData, *, kind: str, library: str, ranks: Sequence[int], dtype: torch.dtype) -> str:
    """The card of an adapter that is written with these ranks, one a module, in ``dtype``."""
    provenance, model = record.provenance, record.base.model
    if provenance == {"adapter": record.name} and not record.notes:  # of many such, all else is alike
        on_hub = model is not None and is_hub_id(model)
        return _titled(record.name, *_around_plain(kind, library, tuple(ranks), dtype, model, on_hub))
    return card_text(_facts(record.name, kind, library, ranks, dtype, model, provenance, record.notes))


@functools.lru_cache(64)
def _around_plain(
    kind: str, library: str, ranks: Sequence[int], dtype: torch.dtype, model: str | None, on_hub: bool
) -> tuple[str, str]:
    """What stands around the title of an adapter that was made of nothing else. ``on_hub``: see :func:`is_hub_id`,
    whose answer may change."""
    return _around_title(_facts("", kind, library, ranks, dtype, model, {"adapter": ""}, ()))


def _facts(
    name: str,
    kind: str,
    library: str,
    ranks: Sequence[int],
    dtype: torch.dtype,
    model: str | None,
    provenance: Mapping[str, object],
    notes: Sequence[str],
) -> CardFacts:
    figures = {"modules": str(len(ranks))}
    if any(ranks):
        figures["rank"] = str(ranks[0]) if len(set(ranks)) == 1 else f"{min(ranks)} to {max(ranks)}"
    figures |= {"dtype": str(dtype).removeprefix("torch."), **figures_of(provenance)}
    tags = {"LoRA": ["lora"], "DoRA": ["lora", "dora"], "(IA)³": ["ia3"]}[kind]
    base = [] if model is None else [model]
    return CardFacts(name, kind, library, tags, base, "adapter", provenance, figures, notes)


def is_card(content: bytes) -> bool:
    """Whether a file is a card as :func:`card_text` made it, and nobody has edited it."""
    if not content.startswith(CARD_HEADING):
        return False
    digest, _, text = content.removeprefix(CARD_HEADING).partition(b"\n")
    return digest.decode("ascii", "replace") == _digest(text)


def is_hub_id(model: str) -> bool:
    """Whether a base model is named as on the Hub, and not by a place on this machine."""
    return bool(HUB_ID.fullmatch(model)) and not os.path.exists(model)


@functools.lru_cache(4096)
def plain(text: str) -> str:
    """A text from a file as plain text of Markdown, on one line and without paths of this machine."""
    text = LOCAL_PATH.sub(lambda match: re.split(r"[/\\]", match[0].rstrip("/\\"))[-1], text)
    text = "".join(c if c.isprintable() else " " for c in text)
    return MARKUP.sub(r"\\\1", html.escape(text, quote=False))


def recipe_data(provenance: object, depth: int = 0) -> object:
    """A provenance as a recipe: a name, or ``{merge_method, models, parameters}``, or the operation as it was kept."""
    if depth > DEEPEST:
        return "…"
    if type(provenance) in PLAIN:
        return provenance
    if isinstance(provenance, list | tuple):
        return [recipe_data(p, depth + 1) for p in provenance]
    if not isinstance(provenance, Mapping):
        return provenance if isinstance(provenance, str | int | float | bool | None) else str(provenance)
    if provenance.keys() == {"adapter"}:
        return provenance["adapter"]
    if isinstance(provenance.get("recipe"), Mapping):
        return provenance["recipe"]  # what a file said is shorter than what became of it
    if "merge" not in provenance or not isinstance(provenance.get("of"), list):
        return {str(k): recipe_data(v, depth + 1) for k, v in provenance.items()}
    models = [
        {"model": recipe_data(term["of"], depth + 1), "parameters": {"weight": term["weight"]}}
        for term in provenance["of"]
    ]
    data: dict[str, object] = {"merge_method": provenance["merge"], "models": models}
    parameters = provenance.get("parameters")
    return {**data, "parameters": recipe_data(parameters, depth + 1)} if parameters else data


def recipe_yaml(provenance: Mapping[str, object]) -> str:
    """:func:`recipe_data` as text, without paths of this machine; nothing for an adapter as it was read."""
    return "\n".join(_recipe_yaml_lines(recipe_data(provenance)))


def _recipe_yaml_lines(data: object) -> list[str]:
    return _yaml(data) if isinstance(data, dict) and data else []


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:16]


def _add_leaves(provenance: object, found: set[str], depth: int = 0) -> set[str]:
    """Adds the adapters that a result is made of."""
    if type(provenance) in PLAIN or depth > 2 * DEEPEST:
        return found
    if isinstance(provenance, Mapping):
        if provenance.keys() == {"adapter"}:
            found.add(str(provenance["adapter"]))
            return found
        provenance = list(provenance.values())
    if isinstance(provenance, list | tuple):
        for value in provenance:
            _add_leaves(value, found, depth + 1)
    return found


@functools.lru_cache(64)
def _table(rows: Sequence[tuple[str, str]]) -> list[str]:
    return ["| what | how much |", "|---|---|", *(f"| {plain(k)} | {plain(v)} |" for k, v in rows), ""] if rows else []


def _recipe_lines(provenance: Mapping[str, object]) -> list[str]:
    data = recipe_data(provenance)
    lines = _recipe_yaml_lines(data)
    if not isinstance(data, dict) or not lines:
        return []
    more = len(lines) - LONGEST_RECIPE
    if more > 0:
        lines = [*lines[:LONGEST_RECIPE], f"# and {more} lines more, in the metadata of the tensors"]
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", "\n".join(lines))), default=0))
    again = "merge_method" in data and more <= 0
    told = ["`fastlora merge THIS.yaml --out DIR` makes it again:", ""] if again else []
    return ["## Recipe", "", *told, f"{fence}yaml", *lines, fence, ""]


def _yaml(data: object) -> list[str]:
    if isinstance(data, dict) and any(isinstance(value, dict | list) for value in data.values()):
        # Then one field stands below the other, and the parts of a decomposition have nearly all of them in common.
        return [line for key, value in data.items() for line in _field(key, value)]
    return _dumped(_without_paths(data), None)


def _field(key: str, value: object) -> list[str]:
    """The lines of one field."""
    if type(value) in PLAIN:
        return _plain_field(key, value, repr(value), False)
    if type(value) is dict and all([type(v) in PLAIN for v in value.values()]):
        # Of two adapters, a pair of very many that have their names in common.
        items = [_plain_field(k, v, repr(v), True) for k, v in value.items()]
        start = _plain_field(key, "x", "'x'", False)
        line = f"{start[0][:-1]}{{{', '.join([item[0][1:-1] for item in items])}}}"
        if len(line) <= LINE and all([len(lines) == 1 for lines in (start, *items)]):
            return [line]
    return _known_field(json.dumps({key: value}, default=str))


@functools.lru_cache(4096)
def _plain_field(key: str, value: object, _: str, flow: bool) -> list[str]:
    """Those of a field that holds one value, also given as it is spelled: 1, True and 1.0 are equal, and so are 0.0
    and -0.0. ``flow``: in braces."""
    return _dumped(_without_paths(json.loads(json.dumps({key: value}, default=str))), flow)


@functools.lru_cache(4096)
def _known_field(field: str) -> list[str]:
    """Those of a field that is given as a JSON object and holds several values."""
    return _dumped(_without_paths(json.loads(field)), None)


def _dumped(data: object, flow: bool | None) -> list[str]:
    import yaml

    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    text = yaml.dump(data, Dumper=dumper, sort_keys=False, allow_unicode=True, default_flow_style=flow)
    return str(text).splitlines()


def _without_paths(data: object) -> object:
    """Plain data in which paths of this machine have become names."""
    if isinstance(data, str):
        return LOCAL_PATH.sub(lambda match: re.split(r"[/\\]", match[0].rstrip("/\\"))[-1], data)
    if isinstance(data, Mapping):
        return {key: _without_paths(value) for key, value in data.items()}
    return [_without_paths(value) for value in data] if isinstance(data, list) else data


def _note_lines(notes: Sequence[str]) -> list[str]:
    return ["## To know", "", *(f"* {plain(note)}" for note in dict.fromkeys(notes)), ""] if notes else []


def figures_of(provenance: Mapping[str, object]) -> dict[str, str]:
    """What was measured while a result was made, as rows."""
    rows = {}
    kept = provenance.get("retained_energy")
    if isinstance(kept, int | float):
        rows["energy kept"] = f"{100 * min(kept, 1.0):.2f} %"
    each = provenance.get("retained_energy_by_adapter")
    if isinstance(each, Mapping):
        rows |= {f"energy kept of {name}": f"{100 * float(share):.2f} %" for name, share in each.items()}
    scale = provenance.get("scale")
    if isinstance(scale, int | float):
        rows["scale"] = json.dumps(scale)
    coefficients = provenance.get("coefficients")
    if isinstance(coefficients, Mapping):
        rows |= {f"weight of {name}": f"{float(value):.4g}" for name, value in coefficients.items()}
    return rows
