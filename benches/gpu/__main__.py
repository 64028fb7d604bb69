"""``python3 -m benches.gpu WINDOW``: runs a window on the device of this machine."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from benches.gpu import prebuilt, running
from benches.gpu.processes import ROOT, Shell
from benches.gpu.report import Report
from benches.gpu.windows import WINDOWS


def main() -> int:
    """The exit status is that of the first stage that failed, or 0."""
    parser = argparse.ArgumentParser(prog="python3 -m benches.gpu", description=__doc__)
    parser.add_argument("window", choices=list(WINDOWS))
    parser.add_argument("--out", type=Path, default=ROOT / "benches" / "results", help="folder of the results")
    parser.add_argument("--resume", action="store_true", help="keep what an earlier run of this commit has done")
    parser.add_argument("--tiny", action="store_true", help="inputs that show whether everything runs")
    parser.add_argument("--slower", type=float, default=1.0, help="what limits are multiplied by")
    parser.add_argument("--python", default=sys.executable, help="an interpreter, and what stands before its arguments")
    arguments = parser.parse_args()
    os.environ.setdefault("TRITON_CACHE_DIR", str(prebuilt.CACHE))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what was started ends too
    out = arguments.out.resolve()
    folder = out / arguments.window
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shell = Shell(folder / "gpu.log", tuple(shlex.split(arguments.python)))
    report = Report(arguments.window, out)
    with tempfile.TemporaryDirectory() as temporary:
        visit = running.Visit(report, shell, folder, Path(temporary), arguments.tiny)
        code = running.run(WINDOWS[arguments.window], visit, resume=arguments.resume, slower=arguments.slower)
    if report.facts.get("device"):
        as_json, page = report.files(report.stem)
        print(report.markdown(), f"written: {as_json} and {page.name}", sep="\n", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
