"""What an operator sets: environment variables of one server, ``FASTLORA_VLLM_…``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastlora.errors import InputError
from fastlora.runtime import memory

COMPOSED = ".composed"
"""The folder of results inside that of the adapters; no adapter can have its name."""
LARGEST_CACHE = "20GiB"
MOST_NAMES = 1000
TRUE, FALSE = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")


@dataclass(frozen=True, slots=True)
class Settings:
    """How expressions are served.

    Args:
        folder: holds the adapters, one PEFT directory each; what it is called is its name in expressions.
        cache: where results are kept. Everything that loads them must see it.
        max_rank: ranks above are cut to it.
        cache_bytes: bound on the size of all results.
        most_names: how many different names are answered, since a server remembers each as long as it runs.
        any_base: compose adapters whatever base model they name.
    """

    folder: Path
    cache: Path
    max_rank: int = 16
    cache_bytes: int = 20 * 2**30
    most_names: int = MOST_NAMES
    any_base: bool = False

    @classmethod
    def read(cls, environment: Mapping[str, str], prefix: str, ranks: tuple[int, ...] = ()) -> Settings | None:
        """The settings in ``<prefix>ADAPTERS``, ``_CACHE``, ``_MAX_RANK``, ``_CACHE_SIZE``, ``_MAX_NAMES`` and
        ``_ANY_BASE``; ``None`` without the first. ``ranks``: those that the server can be started with.

        Raises :class:`InputError` for a value that means nothing.
        """
        text = environment.get(f"{prefix}ADAPTERS", "").strip()
        if not text:
            return None
        folder = Path(text).expanduser().absolute()
        if not folder.is_dir():
            raise InputError(f"{prefix}ADAPTERS: there is no folder {folder}; set it to the folder of the adapters")
        cache = environment.get(f"{prefix}CACHE", "").strip()
        rank = _whole(environment, f"{prefix}MAX_RANK", 16)
        if ranks and rank not in ranks:
            known = ", ".join(map(str, ranks))
            raise InputError(f"{prefix}MAX_RANK={rank}: the server takes {known}; set it to its --max-lora-rank")
        size = environment.get(f"{prefix}CACHE_SIZE", "").strip() or LARGEST_CACHE
        try:
            cache_bytes = memory.parse(size)
        except InputError:
            cache_bytes = None
        if cache_bytes is None:
            raise InputError(f"{prefix}CACHE_SIZE={size!r}: set it to a size such as {LARGEST_CACHE}")
        any_base = environment.get(f"{prefix}ANY_BASE", "").strip().lower()
        if any_base not in (*TRUE, *FALSE):
            raise InputError(f"{prefix}ANY_BASE={any_base!r}: set it to 1 or 0")
        return cls(
            folder,
            Path(cache).expanduser().absolute() if cache else folder / COMPOSED,
            rank,
            cache_bytes,
            _whole(environment, f"{prefix}MAX_NAMES", MOST_NAMES),
            any_base in TRUE,
        )


def _whole(environment: Mapping[str, str], variable: str, default: int) -> int:
    text = environment.get(variable, "").strip() or str(default)
    if not text.isdecimal() or not 1 <= int(text) <= 2**31:
        raise InputError(f"{variable}={text[:80]!r}: set it to a whole number of at least 1")
    return int(text)
