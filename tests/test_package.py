"""The sdist, a wheel made from it, and the wheel in an environment of its own.

What is compiled for every instruction set and for CUDA is looked at where it lies already, in the editable install that
runs the tests: the wheel is of the same sources for any processor alone, which takes a fifth of the compiler's time.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.package
pytest.importorskip("build", reason="the build frontend is not installed (pip install 'fastlora[dev]')")

ROOT = Path(__file__).parents[1]
EDITABLE = ROOT / "build" / "editable" / "fastlora._core"
PACKAGES = ("fastlora", "tritonkernels")
ISAS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")
LIBRARIES = {"libgomp.so.1", "libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6"}
LOADER = re.compile(r"ld-linux-.*")
CUDA_LIBRARIES = {"libdl.so.2", "librt.so.1", "libpthread.so.0"}  # of the C library, for the static CUDA runtime
CUDA_SETTINGS = ("CUDACXX", "CUDAHOSTCXX", "CUDA_PATH", "CUDA_BIN_PATH", "CUDA_HOME", "CUDAToolkit_ROOT")

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc on PATH to compile CUDA with")


def execute(
    *command: str | Path, cwd: Path, env: dict[str, str] | None = None, code: int = 0
) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("FASTLORA_", "PYTHON", "CMAKE_"))}
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=kept | (env or {}), capture_output=True, text=True, timeout=600
    )
    assert (done.returncode == 0) == (code == 0), done.stdout[-4000:] + done.stderr[-4000:]
    return done


@dataclass(frozen=True)
class Built:
    """A wheel, and the folder that it was built in with everything that the compiler made."""

    wheel: Path
    source: Path

    def names(self) -> list[str]:
        with zipfile.ZipFile(self.wheel) as archive:
            return archive.namelist()

    def library(self) -> Path:
        """The compiled module, as it is in the wheel."""
        (name,) = [n for n in self.names() if n.endswith(".so")]
        with zipfile.ZipFile(self.wheel) as archive:
            return Path(archive.extract(name, self.source / "unpacked"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy that has only what belongs to the project."""
    copy = tmp_path_factory.mktemp("checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip(f"the files of the project are known only in a git checkout: {listed.stderr.strip()}")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    execute(sys.executable, "-m", "build", "--sdist", "--outdir", copy / "dist", cwd=copy)
    (made,) = (copy / "dist").iterdir()
    return made


def unpacked(sdist: Path, directory: Path) -> Path:
    with tarfile.open(sdist) as archive:
        archive.extractall(directory, filter="data")
    (source,) = directory.iterdir()
    return source


@pytest.fixture(scope="module")
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Made here, or the wheel that ``make wheel`` made."""
    if given := os.environ.get("FASTLORA_WHEEL"):
        return Built(Path(given), tmp_path_factory.mktemp("given"))
    sdist: Path = request.getfixturevalue("sdist")
    source = unpacked(sdist, tmp_path_factory.mktemp("plain"))
    env = {"FASTLORA_CUDA": "OFF", "CMAKE_ARGS": "-DFASTLORA_CPU=BASELINE", "MAX_JOBS": "2"}
    execute(sys.executable, "-m", "build", "--wheel", "--outdir", source / "dist", cwd=source, env=env)
    (made,) = (source / "dist").iterdir()
    return Built(made, source)


@pytest.fixture(scope="module")
def editable() -> Path:
    """The folder of what an editable install compiled, for every instruction set and whatever CUDA there is."""
    if not (EDITABLE / "build.ninja").is_file():
        pytest.skip("the tests do not run in an editable install of this checkout (pip install -e .)")
    return EDITABLE


def install(built: Built, directory: Path) -> Path:
    """The python of a new environment with the wheel alone, which sees the packages of this one."""
    execute(sys.executable, "-m", "venv", "--without-pip", directory / "venv", cwd=directory)
    python = directory / "venv" / "bin" / "python"
    execute(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", built.wheel, cwd=directory)
    paths = dict.fromkeys(sysconfig.get_paths()[p] for p in ("purelib", "platlib"))
    # A folder named in a .pth file is searched after the environment's own, and its own .pth files, such as the one
    # of an editable install, are not read.
    (site,) = (directory / "venv" / "lib").glob("python*/site-packages")
    (site / "parent.pth").write_text("".join(f"{path}\n" for path in paths))
    return python


@pytest.fixture(scope="module")
def installed(plain: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(plain, tmp_path_factory.mktemp("installed"))


def test_the_sdist_holds_what_a_build_needs(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for needed in ("CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "README.md", "csrc/cpu/dispatch.cpp"):
        assert needed in names
    assert {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file()} <= names
    sources = [p for package in PACKAGES for p in (ROOT / package).rglob("*.py*")]
    assert {str(p.relative_to(ROOT)) for p in sources if "__pycache__" not in p.parts} <= names
    assert not [n for n in names if n.endswith(".so") or n.startswith(("tests", "examples", "build"))]


def test_the_wheel_holds_the_package_alone(plain: Built) -> None:
    names = plain.names()
    assert {n.partition("/")[0] for n in names} == {
        "fastlora",
        "tritonkernels",
        plain.wheel.name.rpartition("-cp")[0][:-6] + ".dist-info",
    }
    assert "fastlora/py.typed" in names and "fastlora/_core.pyi" in names
    assert any(n.endswith("/licenses/LICENSE") for n in names)
    assert sum(n.endswith(".so") for n in names) == 1
    sources = [p for package in PACKAGES for p in (ROOT / package).rglob("*.py")]
    modules = {str(p.relative_to(ROOT)) for p in sources if "__pycache__" not in p.parts}
    assert modules == {n for n in names if n.endswith(".py")}
    assets = {str(p.relative_to(ROOT)) for p in (ROOT / "fastlora" / "pages" / "assets").iterdir()}
    assert assets == {n for n in names if n.endswith((".html", ".css", ".js"))} and len(assets) > 5


def libraries(library: Path) -> set[str]:
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not installed (binutils)")
    found = execute("readelf", "--dynamic", "--wide", library, cwd=ROOT).stdout
    assert "RPATH" not in found and "RUNPATH" not in found
    names = set(re.findall(r"\(NEEDED\).*\[(.+)\]", found))
    return {n for n in names if not LOADER.fullmatch(n)}


def test_the_extension_links_to_the_compiler_runtime_alone(plain: Built) -> None:
    assert libraries(plain.library()) <= LIBRARIES


@pytest.mark.parametrize("isa", ISAS)
def test_code_for_one_instruction_set_stays_its_own(editable: Path, isa: str) -> None:
    """A weak function of two objects exists once in the result. One that is not in the namespace of its instruction
    set, such as of ``std``, could thus be the AVX-512 one on a processor without it."""
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed (binutils)")
    objects = sorted(editable.glob(f"**/fastlora_cpu_{isa}.dir/**/*.o"))
    if not objects and isa != "baseline":
        pytest.skip(f"{isa} is not built for this processor architecture")
    assert len(objects) == len(list((ROOT / "csrc" / "cpu").glob("*.cpp"))) - 1  # all but dispatch.cpp
    namespace = f"8fastlora{len(isa)}{isa}"  # as it is in mangled names
    for file in objects:
        symbols = [line.split() for line in execute("nm", "--defined-only", file, cwd=ROOT).stdout.splitlines()]
        shared = [name for _, kind, name in symbols if kind in "WTu" and namespace not in name]
        assert not shared, f"{file.name} ({isa})"


def imported(python: Path, cwd: Path) -> tuple[Path, bool]:
    """The compiled module of an environment, and whether it has CUDA's kernels."""
    code = "import fastlora._core as c; print(c.__file__, c.has_cuda)"
    file, cuda = execute(python, "-c", code, cwd=cwd).stdout.split()
    return Path(file), cuda == "True"


def test_the_installed_wheel_is_what_is_imported(installed: Path, tmp_path: Path) -> None:
    file, has_cuda = imported(installed, tmp_path)
    assert file.is_relative_to(installed.parents[1]) and not has_cuda


def command(python: Path, *words: str, cwd: Path) -> str:
    """What the installed command prints, with nothing on PATH but the environment: no compiler above all."""
    env = {"PATH": str(python.parent), "CUDA_VISIBLE_DEVICES": ""}
    return execute(python.parent / "fastlora", *words, cwd=cwd, env=env).stdout


def information(python: Path, cwd: Path) -> dict[str, str]:
    data: dict[str, str] = json.loads(command(python, "info", "--json", cwd=cwd))
    return data


def test_the_installed_command_tells_what_it_has(installed: Path, tmp_path: Path) -> None:
    data = information(installed, tmp_path)
    assert data["instruction set"] in ISAS
    assert data["CUDA build"].startswith("no ")


def test_the_installed_command_decomposes(installed: Path, tmp_path: Path) -> None:
    for name in ("trec_r16", "trec_rslora"):
        shutil.copytree(ROOT / "examples" / "adapters" / name, tmp_path / name)
    words = "decompose trec_r16 trec_rslora --threshold 0.3 --out out --backend cpu --json".split()
    (report,) = json.loads(command(installed, *words, cwd=tmp_path))["reports"]
    assert report["totals"]["shared_directions"] > 0
    made = {str(p.parent.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("adapter_config.json")}
    assert made == {"shared", "unique/trec_r16", "unique/trec_rslora"}


def test_the_installed_command_writes_a_page(installed: Path, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "examples" / "adapters", tmp_path / "adapters")
    command(installed, "report", "adapters", "--out", "page.html", cwd=tmp_path)
    assert "<h1>5 adapters</h1>" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_without_a_compiler_plain_torch_computes(sdist: Path, tmp_path: Path) -> None:
    """The pure-Python wheel, in an environment of its own, passes the tests that are marked as portable."""
    source = unpacked(sdist, tmp_path / "source")
    build = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", source / "dist"]
    execute(*build, cwd=source, env={"FASTLORA_CORE": "OFF"})
    (wheel,) = (source / "dist").iterdir()
    built = Built(wheel, source)
    assert wheel.name.endswith("-py3-none-any.whl") and not [n for n in built.names() if n.endswith(".so")]
    python = install(built, tmp_path)
    says = "import fastlora; from fastlora.backends import cpu; print(fastlora.__file__, cpu.unavailable())"
    told = execute(python, "-c", says, cwd=tmp_path).stdout
    assert told.startswith(str(tmp_path / "venv")) and "built without it" in told
    marked = [
        p for p in (ROOT / "tests").rglob("test_*.py") if "\npytestmark = pytest.mark.portable\n" in p.read_text()
    ]
    options = ["-q", "-n", "2", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml", "--rootdir", ROOT]
    done = execute(python, "-m", "pytest", *options, "-m", "portable", *sorted(marked), cwd=tmp_path)
    assert int(re.findall(r"(\d+) passed", done.stdout)[-1]) > 500


def test_the_editable_module_links_to_no_more(editable: Path, tmp_path: Path) -> None:
    file, has_cuda = imported(Path(sys.executable), tmp_path)
    assert file.parent == ROOT / "fastlora"
    assert libraries(file) <= LIBRARIES | (CUDA_LIBRARIES if has_cuda else set())


@needs_nvcc
def test_cuda_is_taken_for_every_architecture_where_nvcc_is(tmp_path: Path) -> None:
    """What is to be compiled; all of it is by tests/emulated/test_resources.py, and linked by the editable install."""
    import pybind11

    path = {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    python = [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    configured = execute("cmake", "-GNinja", f"-S{ROOT}", f"-B{tmp_path}", *python, cwd=tmp_path, env=path).stdout
    assert "fastlora: CUDA kernels ON" in configured
    commands = (tmp_path / "build.ninja").read_text()
    for code in ("sm_80", "sm_90", "compute_90"):
        assert re.search(rf"code=\[?{code}\]?", commands), code


@needs_nvcc
def test_cuda_is_built_where_nvcc_is_and_runs_without_a_gpu(editable: Path, tmp_path: Path) -> None:
    if re.search(r"^FASTLORA_CUDA:\w+=OFF$", (editable / "CMakeCache.txt").read_text(), re.MULTILINE):
        pytest.skip("the environment was installed with FASTLORA_CUDA=OFF")
    assert imported(Path(sys.executable), tmp_path)[1]
    data = information(Path(sys.executable), tmp_path)
    assert re.search(r"90.*; 0 devices \(.+\)", data["CUDA build"])


def path_without_nvcc(directory: Path) -> str:
    """PATH with every folder that has nvcc replaced by links to the rest of it."""
    entries = []
    for i, entry in enumerate(os.environ["PATH"].split(os.pathsep)):
        if not Path(entry, "nvcc").exists():
            entries.append(entry)
            continue
        links = directory / f"bin{i}"
        links.mkdir()
        for tool in Path(entry).iterdir():
            if tool.name != "nvcc":
                (links / tool.name).symlink_to(tool)
        entries.append(str(links))
    return os.pathsep.join(entries)


def test_cuda_that_is_required_but_missing_is_one_clear_message(
    sdist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in CUDA_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    env = {"FASTLORA_CUDA": "ON", "PATH": path_without_nvcc(tmp_path)}
    source = unpacked(sdist, tmp_path / "source")
    done = execute(sys.executable, "setup.py", "build_ext", cwd=source, env=env, code=1)
    printed = " ".join((done.stdout + done.stderr).split())
    assert "FASTLORA_CUDA=ON but nvcc was not found: put it on PATH, set CUDACXX, or use FASTLORA_CUDA=OFF" in printed


def test_an_unknown_cuda_setting_is_one_clear_message(sdist: Path, tmp_path: Path) -> None:
    source = unpacked(sdist, tmp_path / "source")
    command = [sys.executable, "setup.py", "build_ext"]
    done = execute(*command, cwd=source, env={"FASTLORA_CUDA": "MAYBE"}, code=1)
    assert "FASTLORA_CUDA=MAYBE: use one of AUTO, ON, OFF" in done.stdout + done.stderr
