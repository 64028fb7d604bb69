"""``make gpu``: builds in place, tests on the device, times, and writes benches/results/gpu-<device>.{json,md}.

Needs a CUDA device, nvcc, and an environment with torch, Triton, pybind11, CMake, ninja and pytest; uses the standard
library alone itself, installs nothing and needs no network. Every stage has a limit, to which comes what stages before
it left of theirs, and the whole has one of eight minutes; what the stages before a failure found is written. The exit
code names the first stage that failed:
10 environment, 11 build, 12 tests, 13 sanitizer, 14 benches.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fastlora.bench.gpu import table  # noqa: E402  (imports nothing but the standard library)

RESULTS = ROOT / "benches" / "results"
CUDA = sorted(Path("/usr/local").glob("cuda*/bin"))  # where nvcc is when it is not on the PATH
WHOLE = 465.0  # seconds
OPS = ("eigh", "svd", "chain", "gram", "combine")
PACKAGES = (
    "torch",
    "triton",
    "cupy",
    "numpy",
    "safetensors",
    "pybind11",
    "pytest",
    "xdist",
    "hypothesis",
    "typer",
    "lark",
)
NEEDED = ("torch", "triton", "numpy", "safetensors", "pybind11", "pytest")

FACTS = """
import json, torch
found = {"torch": torch.__version__, "cuda": torch.version.cuda, "device": None}
if torch.cuda.is_available():
    p = torch.cuda.get_device_properties(0)
    found |= {"device": p.name, "arch": f"{p.major}{p.minor}", "multiprocessors": p.multi_processor_count,
              "memory": p.total_memory, "l2": getattr(p, "L2_cache_size", None)}
print(json.dumps(found))
"""


@dataclass
class Report:
    """Everything that was found, written after each stage."""

    facts: dict[str, Any] = field(default_factory=dict)
    stages: list[dict[str, Any]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def stem(self) -> str:
        name = str(self.facts.get("device") or "none").lower()
        return "gpu-" + re.sub(r"[^a-z0-9]+", "-", name).strip("-")

    def write(self) -> None:
        RESULTS.mkdir(parents=True, exist_ok=True)
        data = {"facts": self.facts, "stages": self.stages, "rows": self.rows}
        (RESULTS / f"{self.stem}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        (RESULTS / f"{self.stem}.md").write_text(self.markdown(), encoding="utf-8")

    def markdown(self) -> str:
        lines = ["# On a GPU", "", table.facts_line(self.facts), ""]
        lines += ["| stage | result | seconds | |", "|---|---|---|---|"]
        for s in self.stages:
            lines.append(f"| {s['stage']} | {s['result']} | {s['seconds']:.0f} | {s['detail']} |")
        lines += ["", *table.target_table(self.rows), "", *row_table(self.rows)]
        return "\n".join(lines) + "\n"


def row_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Every measurement as it came."""
    lines = ["| case | ours | floor | opponent | note |", "|---|---|---|---|---|"]
    for r in rows:
        if r["key"] == "copy" and "bytes_per_second" in r:
            lines.append(f"| copy on the device | {r['bytes_per_second'] / 1e12:.2f} TB/s, read + written | – | – | |")
            continue
        note = r.get("note") or r.get("skipped") or r.get("failed") or ""
        cells = (table.seconds(r.get(k)) for k in ("seconds", "floor", "opponent"))
        lines.append(f"| {r['key']} | {' | '.join(cells)} | {note} |")
    return lines


class Failed(Exception):
    """A stage that failed, in a sentence; ``output`` is what its command printed."""

    def __init__(self, sentence: str, output: str = "") -> None:
        super().__init__(sentence)
        self.output = output


class TookTooLong(Failed):
    """A command that was stopped at its limit."""


class Skipped(Exception):
    """A stage, or a part of one, that cannot run here, in a sentence."""


def run(command: list[str], limit: float, **environment: str) -> str:
    """Runs a command in the source folder; its output is shown, kept in gpu.log and returned."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **environment}
    process = subprocess.Popen(
        command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=max(limit, 1.0))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        output, _ = process.communicate()
        _log(command, output)
        raise TookTooLong(f"{' '.join(command[:4])} … took more than {limit:.0f} s", output) from None
    _log(command, output)
    if process.returncode:
        raise Failed(f"{' '.join(command[:4])} … ended with {process.returncode}: {_last(output)}", output)
    return output


def _log(command: list[str], output: str) -> None:
    text = f"$ {' '.join(command)}\n{output}\n"
    print(text, flush=True)
    with (RESULTS / "gpu.log").open("a", encoding="utf-8") as file:
        file.write(text)


def _last(output: str) -> str:
    return next((line.strip()[:200] for line in reversed(output.splitlines()) if line.strip()), "no output")


def environment(report: Report, limit: float) -> str:
    missing = [p for p in PACKAGES if importlib.util.find_spec(p) is None]
    absent = [p for p in NEEDED if p in missing]
    if absent:
        raise Failed(f"{sys.executable} has no {', '.join(absent)}")
    report.facts = json.loads(run([sys.executable, "-c", FACTS], limit).splitlines()[-1])
    report.facts |= {"python": sys.version.split()[0], "missing": missing, "commit": _commit()}
    report.facts["time"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    for name, command in (("driver", ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
                          ("nvcc", ["nvcc", "--version"])):  # fmt: skip
        report.facts[name] = _output(command)
    from importlib import metadata

    for package in ("triton", "cupy-cuda13x", "cupy-cuda12x", "safetensors"):
        try:
            report.facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if report.facts["device"] is None:
        raise Failed("torch finds no CUDA device, so nothing can be measured")
    if not report.facts["nvcc"]:
        raise Failed("nvcc is not on the PATH: the CUDA kernels cannot be built")
    return f"without {', '.join(missing)}" if missing else ""


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return _last(done.stdout) if done.returncode == 0 else ""


def _commit() -> str:
    """Of the checkout, from the environment where there is none, such as in a copy of the files."""
    return os.environ.get("FASTLORA_COMMIT") or _output(["git", "-C", str(ROOT), "rev-parse", "HEAD"]) or "not known"


def build(report: Report, limit: float) -> str:
    arch = report.facts["arch"]
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    run(command, limit, FASTLORA_CUDA="ON", FASTLORA_CUDA_ARCHS=os.environ.get("FASTLORA_CUDA_ARCHS", f"{arch}-real"))
    check = (
        "from fastlora.ops.dispatch import kernels; "
        "[print(n, k) for n in ('cuda', 'triton') if isinstance(k := kernels(n), str)]"
    )
    if output := run([sys.executable, "-c", check], 60).strip():
        raise Failed(output)
    return ""


def tests(report: Report, limit: float) -> str:
    """Those that are for a device, then the ops' own tests with every tensor on the device."""
    ends = time.monotonic() + limit
    base = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--maxfail=20"]
    if "xdist" not in report.facts["missing"]:
        base += ["-n", str(max(2, min(8, (os.cpu_count() or 2) // 2)))]
    folders = [f"tests/{f}" for f in ("on_gpu", "emulated", "triton") if (ROOT / "tests" / f).is_dir()]
    ops = [f"tests/ops/test_{op}.py" for op in OPS]
    counts, failures = [], []
    for what, command, variables in (
        ("device", [*base, "-m", "gpu", *folders], {}),
        ("ops", [*base, "-k", "not instruction_set", *ops], {"FASTLORA_TEST_DEVICE": "cuda"}),
    ):
        try:
            counts.append(f"{what}: {_counts(run(command, ends - time.monotonic(), **variables))}")
        except Failed as failure:
            failures.append(f"{what}: {failure}")
    if failures:
        raise Failed("; ".join(failures + counts))
    return "; ".join(counts)


def _counts(output: str) -> str:
    found = re.findall(r"\d+ (?:passed|failed|skipped|errors?|deselected)", _last(output))
    return ", ".join(found)


def sanitizer(report: Report, limit: float) -> str:
    """Tiny inputs under memcheck and racecheck; every tensor in memory of its own, so that its ends are guarded."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        raise Skipped("compute-sanitizer was not found")
    ends = time.monotonic() + limit
    script = [sys.executable, "tests/on_gpu/sanitized.py"]
    said = []
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9", "--print-limit", "20", *script]
        try:
            run(command, ends - time.monotonic(), PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        except TookTooLong as late:
            raise Skipped("; ".join([*said, f"{check}: {late}"])) from None
        except Failed as failure:
            if "Device not supported" in failure.output:
                raise Skipped(f"{check}: this device cannot be instrumented here") from None
            raise
        said.append(f"{check}: no errors")
    return "; ".join(said)


def benches(report: Report, limit: float) -> str:
    out = RESULTS / "rows.jsonl"
    out.unlink(missing_ok=True)
    try:
        run([sys.executable, "-m", "fastlora.bench.gpu.cases", str(out)], limit, OMP_WAIT_POLICY="passive")
    finally:
        if out.exists():
            report.rows = [json.loads(line) for line in out.read_text().splitlines()]
            out.unlink()
    wrong = [f"{r['key']} ({r['failed']})" for r in report.rows if "failed" in r]
    if wrong:
        raise Failed("; ".join(wrong))
    return f"{len(report.rows)} rows"


Stage = Callable[[Report, float], str]

# Name, exit code, seconds beside those that stages before it left, what it needs of them.
STAGES: Mapping[str, tuple[Stage, int, float, tuple[str, ...]]] = {
    "environment": (environment, 10, 40, ()),
    "build": (build, 11, 150, ("environment",)),
    "tests": (tests, 12, 130, ("build",)),
    "benches": (benches, 14, 150, ("build",)),
    "sanitizer": (sanitizer, 13, 120, ("build",)),  # last: it takes what time is left
}


def main() -> int:
    report, code, good = Report(), 0, set()
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), *map(str, CUDA)])
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "gpu.log").unlink(missing_ok=True)
    due = time.monotonic()
    ends = due + WHOLE
    for name, (stage, failure, limit, needs) in STAGES.items():
        start = time.monotonic()
        due += limit
        try:
            if not set(needs) <= good:
                raise Skipped(f"needs {', '.join(needs)}")
            detail, result = stage(report, min(due, ends) - start), "done"
            good.add(name)
        except Skipped as reason:
            detail, result = str(reason), "skipped"
        except Exception as error:
            detail, result = f"{error}" if isinstance(error, Failed) else f"{type(error).__name__}: {error}", "failed"
            code = code or failure
        report.stages.append(
            {"stage": name, "result": result, "seconds": time.monotonic() - start, "detail": detail.replace("|", "/")}
        )
        print(f"== {name}: {result} {detail}", flush=True)
        if report.facts.get("device"):
            report.write()
    if report.facts.get("device"):
        print(report.markdown(), f"written: {RESULTS / report.stem}.json and .md", sep="\n", flush=True)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
