"""What torchrun tells the processes that it starts. Imports nothing heavy."""

from __future__ import annotations

import os

from fastlora.errors import InputError

LAUNCHED = "TORCHELASTIC_RUN_ID"
"""The variable by which torchrun is known: others set RANK and WORLD_SIZE too, for programs that share nothing."""


def launched() -> bool:
    """Whether torchrun started this process, as one of several."""
    return LAUNCHED in os.environ and _environment()[1] > 1


def launched_rank() -> int:
    """The rank that torchrun gave this process; 0 without, or with nonsense that is told elsewhere."""
    rank = os.environ.get("RANK", "") if LAUNCHED in os.environ else ""
    return int(rank) if rank.isascii() and rank.isdigit() else 0


def local_rank() -> int | None:
    """The number of this process among those of its machine, as torchrun gave it; ``None`` without."""
    return _small("LOCAL_RANK")


def ranks_here() -> int:
    """How many processes torchrun started on this machine."""
    return _small("LOCAL_WORLD_SIZE") or 1


def _small(name: str) -> int | None:
    text = os.environ.get(name, "") if LAUNCHED in os.environ else ""
    return int(text) if text.isascii() and text.isdigit() else None


def _environment() -> tuple[int, int]:
    """``(rank, count)`` of torchrun's variables."""
    rank, count = (_number(name) for name in ("RANK", "WORLD_SIZE"))
    if count < 1 or rank >= count:
        raise InputError(f"RANK={rank} and WORLD_SIZE={count} in the environment: needed is 0 ≤ RANK < WORLD_SIZE")
    if count > 1:
        _number("MASTER_PORT")
        if not os.environ.get("MASTER_ADDR"):
            raise InputError("MASTER_ADDR is not in the environment; start all ranks by one `torchrun`")
    return rank, count


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise InputError(
            f"{name}={text!r} in the environment: needed is a number as torchrun sets it. Start all ranks by one "
            f"`torchrun`, or unset {LAUNCHED} to run as one process"
        )
    return int(text)


def address() -> str:
    """Where rank 0 is, as a host and a port."""
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
