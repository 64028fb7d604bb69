"""Work in the order of the streams of the stand-in runtime, and CUDA graphs of it."""

from __future__ import annotations

import ctypes
import os
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Work = Callable[[], object]

_runtime = ctypes.CDLL("libcudart.so.13")
_JOB = ctypes.CFUNCTYPE(None, ctypes.c_long)
_runtime.rehearsal_enqueue.argtypes = [ctypes.c_void_p, _JOB, ctypes.c_long]
_runtime.rehearsal_wait.argtypes = [ctypes.c_void_p]
_runtime.rehearsal_pinned.argtypes = [ctypes.c_void_p]
_runtime.rehearsal_capturing.restype = _runtime.rehearsal_pinned.restype = ctypes.c_bool

_jobs: dict[int, Work] = {}
_pinned: dict[int, Tensor] = {}  # memory of the host that jobs read or write, as torch's copies keep it by events
_count = 0
_captured: list[tuple[Work, object]] | None = None


@_JOB
def _run(job: int) -> None:
    try:
        _jobs.pop(job)()
    except BaseException:  # there is nobody to raise it to
        traceback.print_exc()
        os._exit(1)


def _current() -> int:
    stream: int = torch.cuda.current_stream().cuda_stream
    return stream


def is_capturing() -> bool:
    return bool(_runtime.rehearsal_capturing())


def is_pinned(tensor: Tensor) -> bool:
    return bool(_runtime.rehearsal_pinned(tensor.data_ptr()))


def enqueue(work: Work, *, stream: int | None = None, captured: object = None, pinned: Tensor | None = None) -> None:
    """Puts work on a stream, by default the current one, or into the graph that is captured.

    ``captured`` is kept as long as the graph: its memory is the graph's. Otherwise work must own no tensor, as work on
    a device owns none.
    """
    global _count
    if _captured is not None and is_capturing():
        _captured.append((work, captured))
        return
    _count += 1
    job = _count
    _jobs[job] = work
    if pinned is not None:
        _pinned[job] = pinned
    _runtime.rehearsal_enqueue(_current() if stream is None else stream, _run, job)
    for done in _pinned.keys() - _jobs.keys():
        _pinned.pop(done, None)


def wait() -> None:
    """Waits for the current stream."""
    if is_capturing():
        raise RuntimeError("rehearsal: the host waits for a stream that is captured")
    _runtime.rehearsal_wait(_current())


def install() -> None:
    """CUDA graphs of torch hold and replay work of this module."""
    graph: Any = torch.cuda.CUDAGraph
    begin, end, replay = graph.capture_begin, graph.capture_end, graph.replay

    def capture_begin(self: Any, *arguments: Any, **options: Any) -> None:
        global _captured
        begin(self, *arguments, **options)
        _captured = []

    def capture_end(self: Any) -> None:
        global _captured
        self.work, _captured = _captured, None
        end(self)

    def replay_work(self: Any) -> None:
        replay(self)
        work = self.work
        enqueue(lambda: [run() for run, _ in work])

    graph.capture_begin, graph.capture_end, graph.replay = capture_begin, capture_end, replay_work
