"""Which parameters of two models are the same: names of different classes and versions, and tied parameters."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from fastlora.core.architectures import (
    EMBEDDING_BY_TYPE,
    HEAD_BY_TYPE,
    INPUT_EMBEDDINGS,
    LANGUAGE_HEADS,
    WEIGHT,
    is_head,
)
from fastlora.files.model_config import ModelConfig

CONTAINERS = frozenset("model language_model base_model transformer text_model module backbone".split())
"""Segments at the start of a path that depend on the class that a model was saved from."""
OTHER_SENSES = ("vision", "visual", "audio", "image", "speech")

Rule = tuple[str, str]
"""What the names of the first and of the second model start with, before what they have in common."""


def matched_names(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor]
) -> tuple[dict[str, str], dict[str, str], list[Rule]]:
    """``{name: common name}`` of both models, and what was done: a model that was saved without its head lacks the
    first part of all names (``layers.0`` for ``model.layers.0``), and versions differ in it.

    Names that both have stay. Others are matched by their common ends, most frequent beginnings first, where exactly
    one name fits and the shapes differ in the rows at most. The longer name counts, or the first model's.
    """
    alone = [n for n in first if n not in second]
    others = {n for n in second if n not in first}
    by_end: dict[str, list[str]] = defaultdict(list)
    for name in others:
        for end, _ in _ends(name):
            by_end[end].append(name)
    matches: dict[Rule, list[tuple[str, str]]] = defaultdict(list)
    for name in alone:
        for end, start in _ends(name):
            for other in by_end.get(end, ()):
                rule = start, other.removesuffix(end)
                if _is_plausible(rule) and _fit(first[name], second[other]):
                    matches[rule].append((name, other))
    ours, theirs, used = {n: n for n in first}, {n: n for n in second}, []
    votes = Counter({rule: len(pairs) for rule, pairs in matches.items()})
    done: set[str] = set()
    for rule, count in votes.most_common():
        pairs = [(a, b) for a, b in matches[rule] if a not in done and b not in done]
        rivals = {b for r, n in votes.items() if r != rule and n == count and r[0] == rule[0] for _, b in matches[r]}
        if not pairs or rivals - done:
            continue
        used.append(rule)
        for a, b in pairs:
            done |= {a, b}
            ours[a] = theirs[b] = a if rule[0] else b
    return ours, theirs, used


def _ends(name: str) -> list[tuple[str, str]]:
    """Every ``(end, start)`` of a name, whose start holds no number: a layer is not moved."""
    found = [(name, "")]
    parts = name.split(".")
    for n in range(1, len(parts) - 1):
        if parts[n - 1].isdecimal():
            break
        found.append((".".join(parts[n:]), ".".join(parts[:n]) + "."))
    return found


def _is_plausible(rule: Rule) -> bool:
    """Whether one start is empty, or both are containers that differ by version."""
    start, other = (side.split(".")[:-1] for side in rule)
    if rule[0] == rule[1] or (start and other and start[-1] == other[-1]):
        return False
    return not start or not other or (set(start) | set(other)) <= CONTAINERS


def _fit(first: Tensor, second: Tensor) -> bool:
    return first.dim() == second.dim() and first.shape[1:] == second.shape[1:]


def tie_group(names: Collection[str], configs: Sequence[ModelConfig], tied: bool | None) -> list[str]:
    """The parameters of a language model that are one matrix, its embedding first; empty where nothing is tied.

    ``names``: those of both models. ``configs``: what is known of them. ``tied``: what the caller says, if anything.
    """
    said = [c.ties for c in configs if c.ties is not None]
    architectures = [a for c in configs for a in c.architectures]
    types = [t for c in configs for t in c.model_types]
    shared = any(shares_embedding(c) for c in configs)
    if tied is False or (tied is None and not shared and (not configs or (said and not any(said)))):
        return []
    has_head = any(LANGUAGE_HEADS.fullmatch(a) for a in architectures) if architectures else tied or any(said)
    weights = [n.removesuffix(WEIGHT) for n in names if n.endswith(WEIGHT) and not any(s in n for s in OTHER_SENSES)]
    heads = [m for m in weights if is_head(m)]
    sources = [m for m in weights if m.rpartition(".")[2] in INPUT_EMBEDDINGS and not is_head(m)]
    source = next((m for m in sources if m.rpartition(".")[2] == "shared"), min(sources, key=_depth, default=None))
    if source is None:
        if not heads:
            return []
        source = next((EMBEDDING_BY_TYPE[t] for t in types if t in EMBEDDING_BY_TYPE), "model.embed_tokens")
    group = [source]
    start = source.removesuffix("shared")
    if source.rpartition(".")[2] == "shared":
        parts = [part for part in ("encoder", "decoder") if any(n.startswith(f"{start}{part}.") for n in names)]
        group += [f"{start}{part}.embed_tokens" for part in parts]
    head = min(heads, key=_depth, default=None)
    if head is None and has_head:
        own = next((HEAD_BY_TYPE[t] for t in types if t in HEAD_BY_TYPE), "lm_head")
        known = [*(EMBEDDING_BY_TYPE[t] for t in types if t in EMBEDDING_BY_TYPE), "model.embed_tokens"]
        # A model inside another one has its head inside, too: ``decoder.transformer.wte``, ``decoder.lm_head``.
        inner = next((source.removesuffix(e) for e in known if source == e or source.endswith(f".{e}")), "")
        head = inner + own
    group += [head] if head is not None else []
    return [m + WEIGHT for m in group] if len(group) > 1 else []


def body_prefix(names: Collection[str], configs: Sequence[ModelConfig]) -> str:
    """What the names of a language model's body lack in front where its files were saved from the body alone, or long
    ago, and the configuration says that it has a head: ``transformer.`` for ``wte``."""
    architectures = [a for c in configs for a in c.architectures]
    if not any(LANGUAGE_HEADS.fullmatch(a) for a in architectures):
        return ""
    types = [t for c in configs for t in c.model_types[:1]]
    known = [EMBEDDING_BY_TYPE[t] for t in types if t in EMBEDDING_BY_TYPE] or ["model.embed_tokens"]
    found = {n.removesuffix(WEIGHT) for n in names}
    if any(path in found for path in known):
        return ""
    ends = ((path, m) for path in known for m in found if path.endswith(f".{m}"))
    return next((path.removesuffix(m) for path, m in ends), "")


def shares_embedding(config: ModelConfig) -> bool:
    """Whether the model's encoder and decoder have one embedding, whatever its configuration says of the head."""
    return any(EMBEDDING_BY_TYPE.get(t, "").endswith("shared") for t in config.model_types)


def _depth(module: str) -> tuple[int, str]:
    return module.count("."), module
