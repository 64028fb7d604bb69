"""When two adapters write the names of the same modules differently.

PEFT names modules as the trained model did. One adapter has ``model.layers.0.mlp.up_proj``; another, trained inside a
wrapper, has ``base.model.layers.0.mlp.up_proj``: all its names fit once the prefix ``base.`` is stripped. In the other
order the prefix ``base.`` is put before the names of the second.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set
from dataclasses import replace

from fastlora.adapters.lora import Adapter
from fastlora.errors import InputError


def alignment(
    adapter: str, names: list[str], known: Set[str], earlier: Iterable[str]
) -> tuple[tuple[str, str] | None, str | None]:
    """How the modules ``names`` of an adapter become those that ``earlier`` adapters have (``known``).

    Returns ``(prefix to strip, prefix to put)``, or ``None`` where they fit or have nothing to fit to, and a notice.
    Raises :class:`InputError` for an adapter of another base model.
    """
    if not names or not known or any(n in known for n in names):
        return None, None
    changes = _prefix_changes(names, known)
    if len(changes) == 1:
        strip, put = changes[0]
        what = f"without {strip!r}" if strip else f"with {put!r} before them"
        return changes[0], (
            f"adapter {adapter!r} was saved from a differently wrapped model: its modules are "
            f"taken {what} ({names[0]} as {put + names[0].removeprefix(strip)})"
        )
    if not changes and _blocks(names) & _blocks(known):
        return None, f"adapter {adapter!r} shares no module with the adapters before it"
    several = f" ({len(changes)} prefixes would fit: rename its modules)" if changes else ""
    raise InputError(
        f"adapter {adapter!r} has no module in common with "
        f"{', '.join(map(repr, earlier))}{several}; it is an adapter of another base model: it "
        f"has {', '.join(names[:2])}, they have {', '.join(list(known)[:2])}"
    )


def _prefix_changes(names: list[str], known: Iterable[str]) -> list[tuple[str, str]]:
    """``(prefix to strip, prefix to put)`` for every one prefix after which ``names`` and ``known``
    overlap."""
    own_modules = set(names)
    changes: dict[tuple[str, str], None] = {}
    for module in known:
        for start, suffix in _splits(module):
            if suffix in own_modules:
                changes["", start] = None
    targets = set(known)
    for start, suffix in _splits(names[0]):
        every = all(n.startswith(start) for n in names)
        if every and (suffix in targets or any(n.removeprefix(start) in targets for n in names)):
            changes[start, ""] = None
    return list(changes)


def _splits(module: str) -> Iterator[tuple[str, str]]:
    """``("a.", "b.c")``, ``("a.b.", "c")`` for ``"a.b.c"``."""
    at = module.find(".")
    while at >= 0:
        yield module[: at + 1], module[at + 1 :]
        at = module.find(".", at + 1)


def renamed(adapter: Adapter, strip: str, put: str) -> Adapter:
    """The adapter with the prefix ``strip`` of all module paths replaced by ``put``; extras and containers likewise."""

    def rename(name: str) -> str:
        return put + name.removeprefix(strip)

    updates = {
        rename(module): replace(update, layout=replace(update.layout, container=rename(update.layout.container)))
        if update.layout.container
        else update
        for module, update in adapter.updates.items()
    }
    return replace(adapter, updates=updates, extras={rename(path): extra for path, extra in adapter.extras.items()})


def _blocks(names: Iterable[str]) -> set[str]:
    """The numbered blocks that modules lie in: ``model.layers.0`` for ``model.layers.0.mlp.up_proj``."""
    blocks = set()
    for name in names:
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if number is not None:
            blocks.add(".".join(parts[: number + 1]))
    return blocks
