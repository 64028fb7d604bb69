"""Tries every form of every kernel on a device, each in a process of its own and launch by launch.

``python3 -m fastlora.bench.gpu.smoke --out FILE`` appends one JSON object a form to ``FILE`` as it ends: its error and
what is allowed, or ``failed`` with a sentence. ``--forms NAME…`` tries these alone, ``--tiny`` all with
the smallest matrices that reach them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("CUDA_LAUNCH_BLOCKING", "1")  # before anything starts CUDA: an error is told where it is made

from fastlora.bench.contest import Unavailable
from fastlora.bench.gpu import apart
from fastlora.bench.gpu.forms import Form, all_forms

TOGETHER = max(2, min(8, (os.cpu_count() or 2) // 2))  # processes at once: most of their time is the host's
ENDED = 3  # how a process ends that has told of a failure itself


def tried(form: Form, device: str) -> dict[str, Any]:
    """A row about a form: how far off its answer is, or why there is none."""
    start = time.perf_counter()
    row: dict[str, Any] = {"form": form.name}
    try:
        found = form.check(device)
    except Unavailable as reason:
        return row | {"skipped": str(reason)}
    except Exception as error:
        traceback.print_exc()
        return row | {"failed": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"}
    row |= {"error": found.error, "allowed": found.allowed, "seconds": time.perf_counter() - start}
    if found.kernels:
        row["kernels"] = list(found.kernels)
    if not found.is_right:
        row["failed"] = f"an error of {found.error:.1e}, allowed are {found.allowed:.1e}"
    return row


def _append(out: Path | None, row: dict[str, Any]) -> None:
    text = json.dumps(row)
    print(text, flush=True)
    if out is not None:
        with out.open("a", encoding="utf-8") as file:
            file.write(text + "\n")


def _try_and_append(form: Form, device: str, out: Path | None) -> None:
    row = tried(form, device)
    _append(out, row)
    if "failed" in row:
        os._exit(ENDED)  # without what a device in error makes of an ordinary end


def main() -> int:
    """Tries the forms that the command line names; the exit status is 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--forms", nargs="*")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of all together")
    parser.add_argument("--limit", type=float, default=25.0, help="seconds of one form; a kernel may be compiled")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the smallest matrices that reach a form")
    arguments = parser.parse_args()
    known = all_forms(arguments.tiny)
    chosen = list(known) if arguments.forms is None else arguments.forms
    if strange := [name for name in chosen if name not in known]:
        parser.error(f"there is no form {', '.join(strange)}; there are {', '.join(known)}")
    works = [(name, partial(_try_and_append, known[name], arguments.device, arguments.out)) for name in chosen]
    failed = 0
    apart.preload()
    for ended in apart.run(works, limit=arguments.limit, together=TOGETHER, whole=arguments.seconds):
        if ended.reason is None:
            continue
        failed += 1
        if ended.reason != f"ended with {ENDED}":
            _append(arguments.out, {"form": ended.name, "failed": ended.reason, "seconds": ended.seconds})
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
