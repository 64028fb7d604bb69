"""From the names of tensors in a file to paths in the model.

``base_model.model.<module>.<part>`` is what PEFT writes. Names taken from a running model hold more: segments of the
wrappers that it was trained in, and the adapter's own name (``lora_A.default.weight``). Neither belongs to a path.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fastlora.core.data import BaseInfo
from fastlora.core.names import PLAIN_WRAPPER, WRAPPERS
from fastlora.errors import InputError
from fastlora.formats.peft.names import PREFIX, WRAPPED

PEFT = tuple(PREFIX.rstrip(".").split("."))

OWN_NAME = re.compile(
    r"(?P<path>.*\.(?:lora_A|lora_B|lora_embedding_A|lora_embedding_B|ia3_l))"
    r"(?:\.(?P<name>(?!(?:weight|bias)$)[^.]+))?(?P<tail>\.weight|\.bias)?"
)
"""The end of a factor's name, with the adapter's name after the factor, or without."""
SAVED = re.compile(r"(?P<path>.*)\.modules_to_save\.(?P<name>[^.]+)\.(?P<tail>.+)")
ORIGINAL = ".original_module."


@dataclass(frozen=True, slots=True)
class Key:
    """What a tensor's name says. ``path``: its name in the model, without ``taken`` segments and the adapter's name
    ``own``. ``trained``: ``path`` is all that is left of ``…modules_to_save.NAME.…``."""

    path: str
    taken: tuple[str, ...] = ()
    own: str | None = None
    trained: bool = False


@dataclass(slots=True)
class Keys:
    """The tensors of one file by path: ``{path: name in the file}``.

    ``named``: they carry an adapter's name, as those of a running model do, and not those that PEFT saves. ``trained``:
    paths of replaced modules. ``notes``: what was taken off.
    """

    names: dict[str, str] = field(default_factory=dict)
    named: bool = False
    trained: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    def as_trained(self, path: str) -> str:
        """The path of a module as the trained model had it, with the segments of wrappers: patterns may name it so."""
        for tail in (".lora_A.weight", ".lora_embedding_A", ".ia3_l"):
            if path + tail in self.names:
                return _without_factor(self.names[path + tail].removeprefix(PREFIX))
        return path


def read_keys(names: Iterable[str], file: Path, adapter: str, config: Mapping[str, Any]) -> Keys:
    """The paths of all tensors of a ``file``.

    Raises :class:`InputError` for two tensors that become one, and for tensors of two adapters.
    """
    parsed = {name: parse_key(name) for name in names}
    if all(k.own is None or k.trained for k in parsed.values()):
        # Where factors carry no name, what follows `modules_to_save` is none either.
        parsed = {n: Key(_unwrapped(n)[0], k.taken) if k.trained else k for n, k in parsed.items()}
    _check_owners(parsed, file)
    depth = 0 if _names_a_module(config) else _common_depth(k.path for k in parsed.values())
    keys = Keys(named=any(k.own is not None for k in parsed.values()))
    start = f"{PLAIN_WRAPPER}." * depth
    for name, key in parsed.items():
        path = key.path[len(start) :]
        other = keys.names.setdefault(path, name)
        if other != name:
            what = "vector" if path.endswith(".ia3_l") else "factor" if OWN_NAME.fullmatch(path) else "parameter"
            raise InputError(
                f"{file}: tensors {other!r} and {name!r} are the same {what}, {path!r}, without prefixes and what "
                "wrappers have put into their names; remove one"
            )
        if key.trained:
            keys.trained.add(path)
    taken = dict.fromkeys(t for k in parsed.values() for t in k.taken)
    if depth:
        taken[PLAIN_WRAPPER] = None
    if taken:
        keys.notes.append(
            f"adapter {adapter!r}: {', '.join(map(repr, taken))} in the names of its tensors was left there by a "
            "wrapper of the trained model and is taken off"
        )
    inner = next((p for p in keys.names if f".{PLAIN_WRAPPER}." in f".{p}"), None)
    if inner is not None and not _names_a_module(config):
        keys.notes.append(
            f"adapter {adapter!r}: {PLAIN_WRAPPER!r} in {inner!r} may be a part of the model or be left by a "
            "wrapper; it is kept, unless other adapters have the same names without it"
        )
    return keys


@functools.lru_cache(maxsize=2**15)
def parse_key(name: str) -> Key:
    """What one tensor's name says; adapters of one model have the same names."""
    path, taken = _unwrapped(name)
    saved = SAVED.fullmatch(path)
    if saved is not None:
        return Key(f"{saved['path']}.{saved['tail']}", taken, saved["name"], trained=True)
    own = OWN_NAME.fullmatch(path)
    if own is not None and own["name"] is not None:
        return Key(f"{own['path']}{own['tail'] or ''}", taken, own["name"])
    return Key(path, taken)


def _unwrapped(name: str) -> tuple[str, tuple[str, ...]]:
    """A name without PEFT's prefix and without the segments of wrappers, and which these were."""
    segments = name.split(".")
    left = [s for s in segments if s not in WRAPPERS]
    taken = dict.fromkeys(s for s in segments if s in WRAPPERS)
    at = 0
    while left[at : at + 1] == [PLAIN_WRAPPER]:
        at += 1
    if at and tuple(left[at : at + 2]) == PEFT:  # before PEFT's prefix, it can only be a wrapper
        left, taken[PLAIN_WRAPPER] = left[at:], None
    if tuple(left[:2]) == PEFT:
        left = left[2:]
    i = 0
    while i < len(left) - 2:
        if tuple(left[i : i + 2]) == PEFT:
            del left[i : i + 2]
            taken[PREFIX.rstrip(".")] = None
        else:
            i += 1
    return ".".join(left), tuple(taken)


def _common_depth(paths: Iterable[str]) -> int:
    """How often every path begins with ``module.``"""
    depth = -1
    for path in paths:
        own = 0
        while path.startswith(f"{PLAIN_WRAPPER}.", own * (len(PLAIN_WRAPPER) + 1)):
            own += 1
        depth = own if depth < 0 else min(depth, own)
        if depth == 0:
            break
    return max(depth, 0)


def _names_a_module(config: Mapping[str, Any]) -> bool:
    """Whether the configuration itself speaks of a part called ``module``: then the model has one."""
    fields = ("target_modules", "modules_to_save", "rank_pattern", "alpha_pattern", "feedforward_modules")
    texts: list[object] = []
    for value in (config.get(f) for f in fields):
        texts += list(value) if isinstance(value, list | dict) else [value]
    return any(isinstance(t, str) and re.search(rf"(?<!\w){PLAIN_WRAPPER}\\?\.", t) for t in texts)


def _check_owners(parsed: Mapping[str, Key], file: Path) -> None:
    """Refuses tensors of two adapters in one file."""
    owners = list(dict.fromkeys(k.own for k in parsed.values() if k.own is not None))
    if len(owners) > 1:
        raise InputError(
            f"{file} holds the tensors of {len(owners)} adapters ({', '.join(map(repr, owners[:8]))}), as the state of "
            "a model does that has several; save each in a directory of its own: `model.save_pretrained(path, "
            f"selected_adapters=[{owners[0]!r}])`"
        )
    if not owners:
        return
    bare = {_without_factor(k.path) for k in parsed.values() if k.own is None and OWN_NAME.fullmatch(k.path)}
    for name, key in parsed.items():
        if key.own is not None and not key.trained and _without_factor(key.path) in bare:
            raise InputError(
                f"{file}: tensor {name!r} carries the name of an adapter, {key.own!r}, and other factors of that "
                "module carry none: they may be of two adapters; save the adapter again with `save_pretrained`"
            )


def _without_factor(path: str) -> str:
    """The module of a factor's name, which may still carry the adapter's name."""
    return re.sub(r"\.(?:lora_A|lora_B|lora_embedding_A|lora_embedding_B|ia3_l)(?:\..*)?$", "", path)


def without_base(
    others: Mapping[str, Tensor], modules: Container[str], keys: Keys, base: BaseInfo, adapter: str
) -> tuple[dict[str, Tensor], list[str]]:
    """What of ``others`` was trained, and a note on the rest.

    The state of a whole model holds its own weights beside the factors. It is known by the weights inside the wrappers
    of *all* adapted modules; then what was trained is what the configuration says. A file without them was picked by
    somebody, who may have picked what else was trained: there nothing is left out.
    """
    if not keys.named:
        return dict(others), []
    wrapped = {p.partition(WRAPPED + ".")[0] for p in others if WRAPPED + "." in p}
    factors = (_without_factor(p) for p in keys.names if OWN_NAME.fullmatch(p))
    adapted = {m.partition(WRAPPED)[0] if m.endswith(WRAPPED) else m for m in factors}
    whole = bool(adapted) and adapted <= wrapped
    kept = {}
    for path, tensor in others.items():
        if ORIGINAL in path:
            continue
        module, _, parameter = path.replace(WRAPPED + ".", ".").rpartition(".")
        biased = parameter == "bias" and (base.bias == "all" or (base.bias == "lora_only" and module in modules))
        if not whole or path in keys.trained or biased:
            kept[path] = tensor
    left = len(others) - len(kept)
    if not left:
        return kept, []
    note = (
        f"adapter {adapter!r}: {left} tensors beside it are weights of the base model, and no part of it; what was "
        "trained among them must be named by 'modules_to_save' or 'bias' in the configuration"
    )
    return kept, [note]
