"""The compiled kernels: those that were prepared if they can be imported here, else built in place."""

from __future__ import annotations

import os
import shutil
import sys
from typing import TYPE_CHECKING

from benches.gpu import prebuilt
from benches.gpu.facts import NEEDED, TO_BUILD
from benches.gpu.processes import ROOT, Clock, Command, Failed, TookTooLong, last_line
from fastlora.bench.gpu import rows

if TYPE_CHECKING:
    from benches.gpu.running import Visit

FIRST_IMPORT = 100.0  # seconds, from a cold disk
CHECK = "benches.gpu.check_build"
TRY = "benches.gpu.try_module"


def run(visit: Visit, limit: float) -> str:
    """Takes prepared kernels or compiles them, while the imports run that were started before; tries both backends."""
    clock = Clock(limit)
    facts = visit.report.facts
    facts["kernels prepared"] = prebuilt.unpack()
    said = [] if facts.get("device") else _imports(visit, clock)  # nvidia-smi named none: is there one?
    said = [_core(visit, clock), *said, *_imports(visit, clock)]
    check = visit.shell.python_command("-m", CHECK)
    try:
        visit.shell.run(check, max(clock.left, 20.0))
    except Failed as failure:
        if visit.has_built:
            raise
        said.append(f"which did not work: {failure}; built here")
        build(visit, clock.left)
        visit.shell.run(check, max(clock.left, 20.0))
    return "; ".join(said)


def _core(visit: Visit, clock: Clock) -> str:
    """Puts the compiled module into the source folder; says where it came from."""
    prepared, reason = prebuilt.core()
    if prepared is not None:
        target = ROOT / "fastlora" / prepared.name
        shutil.copyfile(prepared, target)
        try:
            visit.shell.run(visit.shell.python_command("-m", TRY), max(30.0, 0.1 * clock.left))
            return "prepared beforehand"
        except Failed as failure:
            target.unlink()
            reason = f"the prepared one cannot be used ({last_line(failure.output)})"
    build(visit, clock.left)
    return f"built here: {reason}"


def _imports(visit: Visit, clock: Clock) -> list[str]:
    """Waits for what the stage before started, and takes what torch says of the device; what is missing is told."""
    said = []
    for package in list(visit.background):
        running = visit.background.pop(package)
        try:
            running.result(min(clock.left, FIRST_IMPORT))
            for found in rows.read(running.log):  # among what else it says
                if "device" in found and found["device"] is None:
                    raise Failed("torch finds no CUDA device, so nothing can be measured")
                visit.report.facts |= found
        except Failed as failure:
            if package in NEEDED:
                raise
            said.append(f"{package}: {failure}")
        finally:
            running.move_to(visit.shell.log)
    return said


def build(visit: Visit, limit: float) -> None:
    """Compiles for the device that is here, or for FASTLORA_CUDA_ARCHS."""
    visit.has_built = True
    facts = visit.report.facts
    if absent := [p for p in TO_BUILD if p in facts["missing"]]:
        raise Failed(f"the CUDA kernels cannot be built: {sys.executable} has no {', '.join(absent)}")
    if not facts.get("nvcc"):
        raise Failed("nvcc was not found: the CUDA kernels cannot be built")
    archs = f"{str(facts.get('capability', '9.0')).replace('.', '')}-real"
    command = Command((sys.executable, "setup.py", "-q", "build_ext", "--inplace"))
    try:
        visit.shell.run(
            command.under(FASTLORA_CUDA="ON", FASTLORA_CUDA_ARCHS=os.environ.get("FASTLORA_CUDA_ARCHS", archs)), limit
        )
    except TookTooLong:
        (ROOT / "fastlora" / f"_core{prebuilt.suffix()}").unlink(missing_ok=True)  # may be half of a file
        raise
