"""``fl.distributed``: the processes of ``torch.distributed`` as ranks that share work."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from fastlora._version import __version__
from fastlora.errors import InputError
from fastlora.runtime import devices
from fastlora.runtime.launch import address, launched, local_rank, ranks_here
from fastlora.runtime.ranks import Ranks, among, current, gathered, together

if TYPE_CHECKING:
    import torch

JOINING = timedelta(minutes=10)
# Of an exchange: some ranks wait for the one with the most to do. One that is gone is noticed by its closed connection.
WAITING = timedelta(days=1)


@contextlib.contextmanager
def distributed(device: str | None = None) -> Iterator[None]:
    """Inside the block, the processes of ``torch.distributed`` share the work of what is called. Results have the same
    bits as those of one process.

    Every rank makes the same calls in the block, on the same files, and gets the same results; nothing may stand in an
    ``if rank == 0``. Modules are shared out by their bytes. Each rank reads the factors of its own, the small results
    travel, and each writes its own tensors to their places in the same files, or sends them to rank 0 where it does not
    see those. Reports and configurations are written by rank 0. Outside the block, and in a process that is alone,
    nothing changes, whether ``torch.distributed`` is initialised or not.

        with fl.distributed():
            fl.decompose(fl.Pool.load(paths)).save("out")

    The ranks are those of the default process group, of any backend, or where there is none, of ``torchrun``'s
    environment: a group of gloo is made for the time of the block.

    Args:
        device: ``"cuda"``: inside the block the current device is the GPU of the number ``LOCAL_RANK``, which
            ``torchrun`` gives, and what travels goes by NCCL where every rank of a machine has a GPU of its own. By
            default, and where that is not so, it goes through the host by gloo.

    Raises:
        InputError: an environment that names no rank, processes that do not find each other.
        RankError: a rank that is gone, or that does or reads something else than the others. An error of one rank
            inside the block is raised on all.

    Cost: a few exchanges for a call, of the coefficients of its result: docs/scale.md.
    """
    if current() is not None:
        yield
        return
    import torch.distributed as dist

    begun = False
    if not (dist.is_available() and dist.is_initialized()):
        if not launched():
            yield
            return
        _begin(dist)
        begun = True
    if dist.get_world_size() == 1:
        yield
        return
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo", timeout=WAITING))
    try:
        with among(ranks), own_gpu(device) as gpu:
            together(f"joining with fastlora {__version__}")
            everybodys = gathered("choosing how results travel", lambda: gpu is not None)
            if gpu is not None and all(everybodys):
                ranks.much = dist.new_group(backend="nccl", timeout=WAITING), gpu
            try:
                yield
            except BaseException as error:
                together("leaving", error)
                raise
            together("leaving")
    finally:
        with contextlib.suppress(RuntimeError):  # of a rank that is gone
            if begun:
                dist.destroy_process_group()
            else:
                for group in (ranks.group, *(ranks.much or ())[:1]):
                    dist.destroy_process_group(group)


def _begin(dist: Any) -> None:
    import torch

    if not dist.is_available():
        raise InputError(f"torch {torch.__version__} was built without torch.distributed; start one process")
    try:
        dist.init_process_group("gloo", timeout=JOINING)
    except (RuntimeError, ValueError) as error:
        where = address()
        raise InputError(
            f"the ranks did not find each other at {where} ({str(error).splitlines()[0][:200]}); see that all are "
            "started, that the port is free and reachable, and name the network with GLOO_SOCKET_IFNAME"
        ) from error


@contextlib.contextmanager
def own_gpu(device: str | None) -> Iterator[torch.device | None]:
    """Inside the block, the current GPU is that of this process; gives it where NCCL can use it."""
    import torch
    import torch.distributed as dist

    local = local_rank()
    if device != "cuda" or local is None or devices.unavailable() is not None:
        yield None
        return
    count, before = torch.cuda.device_count(), torch.cuda.current_device()
    own = torch.device("cuda", local % count)
    torch.cuda.set_device(own)
    try:
        yield own if dist.is_nccl_available() and ranks_here() <= count else None
    finally:
        torch.cuda.set_device(before)
