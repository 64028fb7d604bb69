"""Several processes that do one work: who they are, and what they tell each other.

Every rank runs the same calls. Where something is shared, each does a part and tells the others (:func:`gathered`), or
the first does it for all (:func:`from_first`). There is one kind of exchange, so that a rank that fails can tell it
wherever the others wait: they raise the same error.
"""

from __future__ import annotations

import contextlib
import contextvars
import hashlib
import heapq
import pickle
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from fastlora.errors import FastloraError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
R = TypeVar("R")

BULK = 2**20
"""From so many bytes on, what travels goes by the group for much, where there is one."""


class RankError(FastloraError, RuntimeError):
    """Ranks that cannot work together: one is gone, or does or reads something else than the others."""


class Failure(NamedTuple):
    """An error on its way to other ranks."""

    kind: type[BaseException]
    message: str
    host: str
    alone: bool  # whether its rank did something that others do as well, so that it matters which one it was

    @staticmethod
    def of(error: BaseException, alone: bool) -> Failure:
        """``error`` as it is told."""
        kind = type(error)
        if isinstance(error, FastloraError | MemoryError):
            return Failure(kind, str(error), socket.gethostname(), alone)
        return Failure(RankError, f"{kind.__name__}: {error}", socket.gethostname(), True)

    def error(self, rank: int) -> BaseException:
        """It as an error of this process."""
        return self.kind(f"on rank {rank} ({self.host}): {self.message}" if self.alone else self.message)


@dataclass(eq=False)
class Ranks:
    """The processes that work together, as one of them sees it.

    ``places``, of outputs that are not finished: where this rank writes them, and where the first does, if this one
    sees that. ``lasting``: those that stay for another run. ``apart``: the ranks that do not see them
    (:mod:`fastlora.runtime.joint_outputs`). ``much``: a group for payloads
    that are not small, and the device from which it sends.
    """

    rank: int
    count: int
    group: Any = field(repr=False)
    places: dict[Path, Path | None] = field(default_factory=dict)
    apart: list[int] = field(default_factory=list)
    lasting: set[Path] = field(default_factory=set)
    much: tuple[Any, torch.device] | None = field(default=None, repr=False)
    told: BaseException | None = None
    """The error that all ranks know of."""
    is_broken: bool = False
    """Whether the connection to another rank broke: what that one would have done, it may not do any more."""

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes what is written once."""
        return self.rank == 0

    def knows(self, error: BaseException | None) -> bool:
        """Whether the other ranks know of an error, or of what it was made from."""
        while error is not None:
            if error is self.told:
                return True
            error = error.__cause__ or error.__context__
        return False

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The tensors of all ranks, which have one dtype and shape."""
        import torch
        import torch.distributed as dist

        group = self.group
        if self.much is not None and tensor.nbytes >= BULK:
            group, device = self.much
            tensor = tensor.to(device)
        tensors = [torch.empty_like(tensor) for _ in range(self.count)]
        dist.all_gather(tensors, tensor, group=group)
        return [t.cpu() for t in tensors]

    def exchange(self, what: str, payload: bytes, failed: bool = False) -> list[bytes]:
        """The payloads of all ranks, which have to be at the same ``what``; raises what a rank tells as ``failed``."""
        import torch

        digest = int.from_bytes(hashlib.blake2b(what.encode(), digest_size=7).digest(), "little")
        head = torch.tensor([digest, len(payload), failed], dtype=torch.int64)
        try:
            digests, sizes, failures = zip(*(h.tolist() for h in self.all_gather(head)), strict=True)
            own = torch.zeros(max(1, *sizes), dtype=torch.uint8)
            own.numpy()[: len(payload)] = memoryview(payload)
            others = self.all_gather(own)
        except RuntimeError as error:
            raise self._lost(error) from error
        received = enumerate(zip(others, sizes, strict=True))
        payloads = [payload if r == self.rank else o[:size].numpy().tobytes() for r, (o, size) in received]
        for rank, has_failed in enumerate(failures):
            if has_failed:
                # One's own error is raised by who has it, with its place in the program.
                self.told = self.told if rank == self.rank else pickle.loads(payloads[rank]).error(rank)
                assert self.told is not None
                raise self.told
        if len(set(digests)) > 1:
            rank = next(r for r, d in enumerate(digests) if d != digests[0])
            self.told = RankError(
                f"rank {rank} does or reads something else than rank 0 ({what[:80]}): all ranks have to make the same "
                "calls with the same arguments, on the same files. Start them by one `torchrun`, with paths that mean "
                "the same everywhere"
            )
            raise self.told
        return payloads

    def passed(self, data: bytearray, source: int) -> bytearray:
        """Passes bytes from the rank ``source`` to the first, which knows how many; both call it."""
        import torch
        import torch.distributed as dist

        tensor = torch.frombuffer(data, dtype=torch.uint8)
        try:
            if self.rank == source:
                dist.send(tensor, 0, group=self.group)
            else:
                dist.recv(tensor, source, group=self.group)
        except RuntimeError as error:
            raise self._lost(error) from error
        return data

    def fail(self, what: str, error: BaseException, *, alone: bool) -> None:
        """Tells the others of an error, which raises it: this one, or that of a rank before."""
        self.told = error
        self.exchange(what, pickle.dumps(Failure.of(error, alone)), failed=True)

    def _lost(self, error: RuntimeError) -> RankError:
        self.is_broken = True
        self.told = RankError(
            f"the connection of rank {self.rank} to another rank broke: that process ended, or its machine or the "
            f"network did ({str(error).partition(chr(10))[0][:200]}). Run the same command again"
        )
        return self.told


_current: contextvars.ContextVar[Ranks | None] = contextvars.ContextVar("fastlora_ranks", default=None)

_one_file: contextvars.ContextVar[bool] = contextvars.ContextVar("fastlora_one_file", default=False)


def current() -> Ranks | None:
    """The ranks that share work here; ``None`` where one process does all."""
    return _current.get()


@contextlib.contextmanager
def among(members: Ranks) -> Iterator[None]:
    """Inside the block, these processes work together."""
    token = _current.set(members)
    try:
        yield
    finally:
        _current.reset(token)


def is_first() -> bool:
    """Whether this process writes what is written once: always, where it is alone."""
    ranks = current()
    return ranks is None or ranks.is_first


def own(items: Sequence[T], sizes: Sequence[int]) -> list[T]:
    """The items that are this rank's, in their order; all of them without ranks.

    Balanced by ``sizes``, the largest first, each to the rank that has least. Every rank has to know all of them.
    """
    ranks = current()
    if ranks is None:
        return list(items)
    loads = [(0, rank) for rank in range(ranks.count)]
    mine: list[int] = []
    for i in sorted(range(len(items)), key=lambda i: -sizes[i]):
        load, rank = heapq.heappop(loads)
        heapq.heappush(loads, (load + max(1, sizes[i]), rank))
        if rank == ranks.rank:
            mine.append(i)
    return [items[i] for i in sorted(mine)]


def gathered(what: str, work: Callable[[], R], known: Iterable[torch.Tensor] = (), alike: str = "") -> list[R]:
    """What ``work`` gives on every rank, in their order; ``[work()]`` without ranks.

    An error of one rank is raised on all. Results travel as bytes, but for ``known`` tensors, which all ranks have in
    the same order: those become the receiver's own. ``what``, ``alike``: have to be the same on all ranks.
    """
    ranks = current()
    if ranks is None:
        return [work()]
    from fastlora.runtime.parcels import packed, unpacked

    vocabulary = list(known)
    try:
        result = work()
        payload = packed(result, vocabulary)
    except Exception as error:
        if not ranks.knows(error):
            ranks.fail(what, error, alone=False)
        raise
    payloads = ranks.exchange(f"{what}\0{alike}", payload)
    return [result if r == ranks.rank else unpacked(data, vocabulary) for r, data in enumerate(payloads)]


def from_first(what: str, work: Callable[[], R]) -> R:
    """What ``work`` gives on the first rank, which alone does it; its error is raised on all."""
    ranks = current()
    if ranks is None:
        return work()
    results = gathered(what, lambda: work() if ranks.is_first else None)
    return results[0]  # type: ignore[return-value]


def together(what: str, error: BaseException | None = None) -> None:
    """Waits for all ranks; where one comes with an ``error``, all raise it. An interruption is no error."""
    ranks = current()
    if ranks is None or ranks.knows(error):
        return
    if error is None:
        ranks.exchange(what, b"")
    elif isinstance(error, Exception):
        ranks.fail(what, error, alone=True)


@contextlib.contextmanager
def one_file() -> Iterator[None]:
    """Inside the block, a tensor file that every rank opens is one file of all, which they write together."""
    token = _one_file.set(current() is not None)
    try:
        yield
    finally:
        _one_file.reset(token)


def is_one_file() -> bool:
    """Whether ranks open files to write them together."""
    return _one_file.get()
