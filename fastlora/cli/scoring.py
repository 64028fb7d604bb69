"""``fastlora merge … --score CMD``: candidates are written and a command says how good each is."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlora.cli.arguments import AdapterSpec
from fastlora.cli.run import Run
from fastlora.errors import InputError, OutputError
from fastlora.runtime.launch import launched
from fastlora.views.text import escaped

if TYPE_CHECKING:
    from fastlora.adapters.lora import Adapter
    from fastlora.adapters.pool import Pool
    from fastlora.coefficients.comparison import Comparison
    from fastlora.merging.input_rows import Statistics

PLACE = "{}"
"""In the command, where the candidate stands; else it is the last argument."""

LONGEST = 200
"""Characters of what a command printed that a message shows."""


@dataclass(frozen=True, slots=True)
class Scoring:
    """``--score`` and the options that go with it."""

    command: str | None
    budget: int | None
    file: Path | None
    plot: Path | None

    def check(self, run: Run, method: str | None, settings: Sequence[str] | None) -> None:
        """Refuses, before any work, what does not go together or cannot be run or written."""
        if self.command is None:
            others = {"--budget": self.budget, "--scores": self.file, "--plot": self.plot}
            given = next((name for name, value in others.items() if value is not None), None)
            if given is not None:
                raise InputError(f"{given}: goes with --score CMD, which says how good a merge is")
            if method is not None and "," in method:
                raise InputError(f"--method {method}: several methods are tried with --score CMD alone; give one")
            return
        if settings:
            raise InputError(f"--set {settings[0]}: --score tries methods with their defaults; leave it out")
        if launched():
            raise InputError("--score: every rank would run the command; run it as one process, without torchrun")
        program = _words(self.command)[0]
        if shutil.which(program) is None:
            raise InputError(f"--score: there is no program {program!r} that can be run; correct the command")
        if self.budget is not None and self.budget < 1:
            raise InputError(f"--budget {self.budget}: give 1 or more, how often the command may run")
        if self.file is not None and not self.file.absolute().parent.is_dir():
            raise OutputError(f"{self.file} cannot be written: there is no directory {self.file.absolute().parent}")
        if self.plot is not None:
            from fastlora.files.pictures import check_picture

            check_picture(self.plot, run.replace)

    def choose(
        self,
        run: Run,
        pool: Pool,
        specs: Sequence[AdapterSpec],
        weights: Mapping[str, float],
        out: Path,
        methods: str | None,
        **settings: Any,
    ) -> Comparison:
        """The best of the candidates by the command. Those that an earlier run scored in ``--scores`` are not run
        again, if the command, the adapters' files and all settings are the same."""
        from fastlora.coefficients.choose import choose

        assert self.command is not None
        names = None if methods is None else [name.strip() for name in methods.split(",")]
        key = _key(self.command, specs, weights, names, settings)
        with tempfile.TemporaryDirectory(prefix="fastlora-") as folder:
            place = Path(folder) / ("candidate.safetensors" if out.suffix == ".safetensors" else "candidate")
            found = choose(
                pool,
                _scorer(run, self.command, place),
                weights=weights,
                methods=names,
                budget=self.budget,
                save=self.file,
                key=key,
                **settings,
            )
        if self.plot is not None:
            found.plot(self.plot, overwrite=run.replace)
        return found


def _words(command: str) -> list[str]:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise InputError(f"--score {command!r}: {error}; write it as in a shell") from None
    if not words:
        raise InputError("--score: the command is empty; give a program, such as --score 'python score.py'")
    return words


def _scorer(run: Run, command: str, place: Path) -> Callable[[Adapter], Any]:
    words = _words(command)
    there = any(PLACE in word for word in words)
    arguments = [word.replace(PLACE, str(place)) for word in words] if there else [*words, str(place)]

    def score(adapter: Adapter) -> Any:
        adapter.save(
            place, dtype=run.dtype, format=run.format, uniform_rank=run.uniform_rank or None, overwrite="force"
        )
        try:
            done = subprocess.run(arguments, stdin=subprocess.DEVNULL, capture_output=True)
        except OSError as error:
            raise InputError(f"--score: {arguments[0]} could not be run: {error.strerror or error}") from None
        said = done.stderr.decode(errors="replace")
        if done.returncode:
            ended = (
                f"ended with {done.returncode}" if done.returncode > 0 else f"was ended by signal {-done.returncode}"
            )
            last = _cut(next((line for line in reversed(said.splitlines()) if line.strip()), ""))
            raise InputError(f"--score: the command {ended}{f': {last}' if last else ' and said nothing'}")
        return parse_scores(done.stdout.decode(errors="replace"))

    return score


def parse_scores(text: str) -> Any:
    """What a command printed: one number, numbers for the examples (one a line, or a JSON list), or a JSON object with
    ``select`` and ``report``, each of them either."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise InputError(f"--score: the command printed nothing on standard output; {_WANTED}")
    values = [_value(line) for line in lines]
    if len(values) == 1:
        return values[0]
    wrong = next((line for line, value in zip(lines, values, strict=True) if not isinstance(value, float)), None)
    if wrong is not None:
        raise InputError(f"--score: the command printed {_cut(wrong)!r} among {len(lines)} lines; {_WANTED}")
    return values


_WANTED = (
    'print a number, numbers one an example and a line, or {"select": …, "report": …} on one line, and anything else '
    "on standard error"
)


def _value(line: str) -> Any:
    """A number, a list of numbers or an object of them."""
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    parts = found.values() if isinstance(found, dict) and found else [found]
    if not all(_is_number(p) or (isinstance(p, list) and p and all(map(_is_number, p))) for p in parts):
        raise InputError(f"--score: the command printed {_cut(line)!r}; {_WANTED}")
    if isinstance(found, dict):
        return {name: _floats(part) for name, part in found.items()}
    return _floats(found)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _floats(value: Any) -> Any:
    return [float(v) for v in value] if isinstance(value, list) else float(value)


def _cut(text: str) -> str:
    text = escaped(text.strip())
    return text if len(text) <= LONGEST else text[:LONGEST] + "…"


def _key(
    command: str,
    specs: Sequence[AdapterSpec],
    weights: Mapping[str, float],
    methods: Sequence[str] | None,
    settings: Mapping[str, Any],
) -> str:
    """A name for a command on these files with these settings."""
    files = [sorted(_stamps(spec.path)) for spec in specs]
    data: Statistics | None = settings.get("data")
    told = {name: value for name, value in settings.items() if name != "data"}
    inputs = (
        None if data is None else {n: sorted((s, list(x.shape)) for s, x in r.rows.items()) for n, r in data.of.items()}
    )
    text = json.dumps([command, files, dict(weights), methods, told, inputs], default=str)
    return f"{command} ({hashlib.sha256(text.encode()).hexdigest()[:16]})"


def _stamps(path: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of the files of an adapter."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    found = [(str(f.relative_to(path.parent)), os.stat(f)) for f in files]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]
