"""Names of adapters: what may be a file name, and which two cannot stand side by side."""

from __future__ import annotations

from collections.abc import Iterable

from fastlora.errors import InputError

CONFIG_NAME = "adapter_config.json"
"""Beside the tensors of a PEFT directory; other files are no adapter where it stands."""

CARD_NAME = "README.md"
"""The model card beside a result."""

EMBEDDINGS = frozenset("embed_tokens lm_head wte wpe word_embeddings embed_in embed_out shared tok_embeddings".split())
"""Usual names of embeddings and of heads tied to them. PEFT saves such modules whole, unasked, when they are adapted or
the vocabulary was resized."""

WRAPPERS = frozenset("_orig_mod _fsdp_wrapped_module _fpw_module _checkpoint_wrapped_module _forward_module".split())
"""Private attributes in which torch.compile, FSDP, activation checkpointing and Lightning Fabric keep a module. As
segments of names they are no part of a model."""

PLAIN_WRAPPER = "module"
"""Where DataParallel and DeepSpeed keep it. A model may have a part of that name, so it is taken for a wrapper's only
where that is certain."""

LONGEST_NAME = 200
"""Bytes: file systems stop at 255 and the unfinished output needs room for its own suffix."""


def check_name(name: str) -> None:
    """Refuses names that cannot be a folder of their own inside an output."""
    problem = None
    if not name or name.isspace():
        problem = "is empty"
    elif "/" in name or "\\" in name:
        problem = "has a path separator"
    elif name.startswith("."):
        problem = "starts with a dot"
    elif any(ord(c) < 32 or ord(c) == 127 for c in name):
        problem = "has control characters"
    elif len(name.encode("utf-8", "surrogatepass")) > LONGEST_NAME:
        problem = f"is longer than {LONGEST_NAME} bytes"
    if problem is not None:
        raise InputError(
            f"the adapter name {name[:60]!r} {problem}, but names become folders of the output; give "
            "another one: NAME=PATH"
        )


def check_names_differ(named: Iterable[tuple[str, object]]) -> None:
    """Refuses two adapters of one name, given ``(name, where it comes from)``: a text, or what becomes one. Case does
    not tell names apart."""
    seen: dict[str, object] = {}
    for name, where in named:
        other = seen.get(name.casefold())
        if other is not None:
            raise InputError(
                f"two adapters are called {name!r} ({other} and {where}); name them apart, for example "
                f"{name}={other} {name}-2={where}"
            )
        seen[name.casefold()] = where
