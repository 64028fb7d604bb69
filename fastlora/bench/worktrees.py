"""A revision in a worktree that is thrown away, with kernels that are built as those of this checkout are."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from fastlora.bench import children
from fastlora.errors import InputError
from fastlora.runtime import signals

OPTIONS = re.compile(r"(FASTLORA_(?!CUDA)\w+|CMAKE_CXX_(?:COMPILER|FLAGS|FLAGS_RELEASE)):(?!INTERNAL)\w+=(.+)")
"""Lines of CMake's cache that say how the kernels of the processor were compiled; those of CUDA are left out."""

OPTIONS_FILE = "options.cmake"

_WRONG = 3
_KERNELS = f"""
import sys
from pathlib import Path
from fastlora.backends import cpu
core = sys.modules.get("fastlora._core")
if core is not None and not Path(core.__file__).resolve().is_relative_to(Path.cwd()):  # of an editable install
    print(
        f"{{Path.cwd()}} has no kernels and would compute with those of another fastlora, {{core.__file__}}; run this "
        "by a Python in which none is installed", file=sys.stderr
    )
    sys.exit({_WRONG})
try:
    print(cpu.isa() if cpu.unavailable() is None else "plain torch")
except RuntimeError as error:  # of FASTLORA_ISA
    print(error, file=sys.stderr)
    sys.exit({_WRONG})
"""


@dataclass(frozen=True, slots=True)
class Revision:
    """One side: what it is called, and the tree that it is run from."""

    name: str
    tree: Path

    def python(
        self, *arguments: str, more: Mapping[str, str] | None = None, steps: children.Steps | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Runs this Python on the tree, whatever is installed."""
        paths = [str(self.tree), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **(more or {})}
        return children.run([sys.executable, *arguments], folder=self.tree, environment=environment, steps=steps)

    def kernels(self) -> str | None:
        """The instruction set that it computes with, or ``plain torch``; ``None`` where it does not say."""
        ended = self.python("-c", _KERNELS)
        if ended.returncode == _WRONG:
            raise InputError(children.last_words(ended))
        return ended.stdout.strip() if ended.returncode == 0 else None


def checkout(start: Path) -> Path:
    """The root of the checkout that a file of this package lies in. Raises :class:`InputError` for an installed one."""
    root = start.resolve().parents[1]
    if not (root / ".git").exists() or not (root / "setup.py").is_file():
        raise InputError(
            f"--base compares revisions of a checkout, and this fastlora is installed in {root}; run "
            "`python -m fastlora bench --base REV` in a clone of the repository"
        )
    return root


def commit_of(root: Path, revision: str) -> str:
    """The commit that a revision names."""
    found = git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    if found.returncode != 0:
        raise InputError(f"--base {revision!r} is no revision of {root}; `git log --oneline` lists some")
    return found.stdout.strip()


def here(root: Path) -> Revision:
    """The checkout as it is. Raises :class:`InputError` where its kernels are older than their source or missing."""
    sources = [p.stat().st_mtime for p in ((root / "csrc").rglob("*")) if p.is_file()]
    kernels = built_kernels(root)
    if sources and not kernels and os.environ.get("FASTLORA_CORE", "ON").upper() != "OFF":
        raise InputError(
            f"{root} has no kernels, and a base would have some; build them first: pip install -e ., or compare plain "
            "torch: FASTLORA_CORE=OFF"
        )
    if sources and kernels and max(sources) > max(kernels):
        raise InputError("csrc/ was changed after the kernels were built; build them first: pip install -e .")
    changed = " with changes" if git(root, "status", "--porcelain").stdout.strip() else ""
    return Revision(f"{git(root, 'rev-parse', '--short', 'HEAD').stdout.strip()}{changed}", root)


def state(root: Path) -> tuple[object, ...]:
    """What is another one once tracked files or kernels were changed."""
    asked = (("rev-parse", "HEAD"), ("status", "--porcelain"), ("diff", "HEAD"))
    return (*(git(root, *arguments).stdout for arguments in asked), built_kernels(root))


def built_kernels(root: Path) -> list[float]:
    """When the compiled modules of a tree were made."""
    return sorted(p.stat().st_mtime for p in (root / "fastlora").glob("_core*.so"))


@contextlib.contextmanager
def worktree(root: Path, revision: str) -> Iterator[Revision]:
    """The other revision in a worktree of its own, which is gone afterwards."""
    commit = commit_of(root, revision)
    with tempfile.TemporaryDirectory(prefix="fastlora-base-", ignore_cleanup_errors=True) as folder:
        tree = Path(folder).resolve() / "tree"
        try:
            added = git(root, "worktree", "add", "--detach", "--quiet", str(tree), commit)
            if added.returncode != 0:
                raise InputError(f"git could not make a worktree of {revision}: {children.last_words(added)}")
            yield Revision(revision if commit.startswith(revision) else f"{revision} ({commit[:7]})", tree)
        finally:
            signals.hold()  # a second Ctrl-C comes after this
            try:
                if git(root, "worktree", "remove", "--force", str(tree)).returncode != 0:
                    shutil.rmtree(tree, ignore_errors=True)
                    git(root, "worktree", "remove", "--force", str(tree))
            finally:
                signals.release()


def build(root: Path, other: Revision, steps: children.Steps | None = None) -> None:
    """Compiles the kernels of the other revision with the options of those here, without those for CUDA."""
    more = {"FASTLORA_CUDA": "OFF"}
    if options := build_options(root):
        # As a file: of CMAKE_ARGS, setup.py makes words at each blank.
        lines = [f'set({name} [==[{value}]==] CACHE STRING "")\n' for name, value in options.items()]
        (other.tree.parent / OPTIONS_FILE).write_text("".join(lines), encoding="utf-8")
        more["CMAKE_ARGS"] = f"-C ../{OPTIONS_FILE}"
    made = other.python("setup.py", "-q", "build_ext", "--inplace", more=more, steps=steps)
    if made.returncode != 0:
        raise InputError(f"{other.name} could not be built, and nothing was timed: {children.last_words(made)}")


def build_options(root: Path) -> dict[str, str]:
    """How the kernels here were compiled, of CMake's cache; nothing where that is gone or of another build."""
    build, made = root / "build", max(built_kernels(root), default=0.0)
    caches = [*build.glob("editable/fastlora._core/CMakeCache.txt"), *build.glob("temp*/fastlora._core/CMakeCache.txt")]
    # The kernels are linked after their cache is written: a later cache is of a build that failed, or of another one.
    fitting = [(p.stat().st_mtime, p) for p in caches if p.stat().st_mtime <= made]
    if not fitting:
        return {}
    found = map(OPTIONS.fullmatch, max(fitting)[1].read_text(encoding="utf-8").splitlines())
    return {line[1]: line[2] for line in found if line}


def described(options: Mapping[str, str]) -> str:
    """The options in words."""
    if not options:
        return "with the options of CMAKE_ARGS, since how the kernels here were built is not known"
    used = [f"{name}={value}" for name, value in options.items() if value != "OFF"]
    return f"as the kernels here were: {', '.join(used)}"


def git(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """What git says about a checkout."""
    try:
        return children.run(["git", "-C", str(root), *arguments])
    except FileNotFoundError:
        raise InputError("--base needs git, which is not installed") from None
