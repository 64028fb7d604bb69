"""A command that torchrun started on several ranks: only rank 0 speaks, and a rank that dies ends all. Imports nothing
heavy, since every command begins here."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from fastlora.runtime.launch import launched, launched_rank

if TYPE_CHECKING:
    from fastlora.cli.watch import Watch
    from fastlora.runtime.ranks import Ranks

PATIENCE = 30.0  # seconds that a rank which failed waits for rank 0 to say why: torchrun stops all when one has ended


def quiet() -> None:
    """Lets ranks other than 0 say nothing."""
    if launched_rank():
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")


_joined: tuple[Ranks, Watch] | None = None


@contextlib.contextmanager
def joined(lost: Callable[[int], None], device: str) -> Iterator[None]:
    """Inside the block, the ranks of torchrun share the work; from here on they watch each other, until they
    :func:`leave`. Nothing without torchrun."""
    global _joined
    if not launched():
        yield
        return
    from fastlora.cli.watch import Watch, connected
    from fastlora.runtime import ranks
    from fastlora.runtime.distributed import distributed

    with distributed(device):
        members = ranks.current()
        assert members is not None
        _joined = members, Watch(connected(members), lost)
        yield
        ranks.together("the end of the command")


def leave(*, failed: bool) -> None:
    """Ends this rank's part, when all is said: nobody misses it from here on. Then, or if it ``failed``, others than
    rank 0 wait until that has said all; and rank 0 waits for them, to say if one is gone."""
    if _joined is None:
        return
    members, watch = _joined
    if members.is_first:
        if not failed:
            watch.others_have_left.wait()
        watch.end()
    elif failed:
        watch.first_has_left.wait(PATIENCE)
    else:
        watch.end()
        watch.first_has_left.wait()


def remove_unfinished() -> None:
    """Removes what the ranks write together: one of them is gone, and its output too."""
    if _joined is not None:
        from fastlora.runtime.joint_outputs import remove_all

        remove_all(_joined[0])
