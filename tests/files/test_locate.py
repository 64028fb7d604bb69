"""What an adapter argument of the command line means."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fastlora.cli.arguments import parse, parse_all
from fastlora.core.names import check_name, check_names_differ
from fastlora.errors import InputError
from fastlora.files.locate import find


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("legal", "med", "odd:0.5", "a=b", "x=y:2", "runs/checkpoint-500", "other/checkpoint-500"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


@pytest.mark.parametrize(
    "text, name, path, weight",
    [
        ("legal", "legal", "legal", None),
        ("legal/", "legal", "legal", None),
        ("./legal:0.7", "legal", "legal", 0.7),
        ("legal:-1e-2", "legal", "legal", -0.01),
        ("law=legal", "law", "legal", None),
        ("law=legal:2", "law", "legal", 2.0),
        ("runs/checkpoint-500", "checkpoint-500", "runs/checkpoint-500", None),
        ("odd:0.5", "odd:0.5", "odd:0.5", None),
        ("odd:0.5:2", "odd:0.5", "odd:0.5", 2.0),
        ("a=b", "a=b", "a=b", None),
        ("a=b:3", "a=b", "a=b", 3.0),
        ("x=y:2", "x=y:2", "x=y:2", None),
        ("n=a=b:3", "n", "a=b", 3.0),
        ("n=odd:0.5", "n", "odd:0.5", None),
        ("legal:0", "legal", "legal", 0.0),
    ],
)
def test_readings(here: Path, text: str, name: str, path: str, weight: float | None) -> None:
    spec = parse(text)
    assert (spec.name, spec.path.resolve(), spec.weight) == (name, here / path, weight)


def test_the_current_directory_has_a_name(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(here / "legal")
    assert parse(".").name == "legal" and parse("../med").name == "med"


@pytest.mark.parametrize(
    "text, words",
    [
        ("nowhere", "there is no file or directory nowhere"),
        ("nowhere:0.5", "there is no file or directory nowhere"),
        ("n=nowhere:0.5", "there is no file or directory nowhere"),
        ("no/such/place", r"no does not exist"),
        ("legal:high", "'high' is no finite number"),
        ("legal:nan", "'nan' is no finite number"),
        ("legal:inf", "no finite number"),
        ("legal:", "no finite number"),
        ("", "empty"),
        ("=legal", "is empty"),
        ("..=legal", "starts with a dot"),
        (f"{'n' * 201}=legal", "longer than 200 bytes"),
        ("a\x07=legal", "control characters"),
        ("a\\b=legal", "path separator"),
    ],
)
def test_mistakes(here: Path, text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        parse(text)


@pytest.mark.parametrize("name", ["", " ", ".", "..", ".hidden", "a/b", "a\\b", "a\nb", "a\x7f", "é" * 101])
def test_names_that_are_no_folder(name: str) -> None:
    with pytest.raises(InputError, match="NAME=PATH"):
        check_name(name)


@pytest.mark.parametrize("name", ["legal", "checkpoint-500", "a b", "é" * 100, "x=y:2", "-v"])
def test_names_that_are(name: str) -> None:
    check_name(name)


def test_two_adapters_of_one_name(here: Path) -> None:
    with pytest.raises(InputError, match=r"'checkpoint-500'.*checkpoint-500-2=other/checkpoint-500"):
        parse_all(["runs/checkpoint-500", "other/checkpoint-500:0.5"])
    assert [s.name for s in parse_all(["a=runs/checkpoint-500", "other/checkpoint-500"])] == [
        "a",
        "checkpoint-500",
    ]
    with pytest.raises(InputError, match="two adapters"):
        parse_all(["legal", "legal"])
    with pytest.raises(InputError, match="two adapters"):
        check_names_differ([("Med", "x"), ("med", "y")])


def test_the_local_hub_cache_is_used_without_network(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants", reason="huggingface_hub is not installed")
    # The client reads the environment when it is imported, which another test may have done.
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(here / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder = here / "hub" / "models--org--lawyer"
    snapshot = folder / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc123")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (snapshot / name).write_text("x")
    assert find("org/lawyer").path == snapshot and find("org/lawyer").name == "lawyer"
    spec = parse("law=org/lawyer:0.5")
    assert (spec.name, spec.path, spec.weight) == ("law", snapshot, 0.5)
    (here / "org" / "lawyer").mkdir(parents=True)
    assert parse("org/lawyer").path == Path("org/lawyer"), "an existing path wins"


def cache(root: Path, repo: str, commit: str, *, refs: tuple[str, ...] = (), folders: tuple[str, ...] = ("",)) -> Path:
    """A snapshot of a repository as the Hub's client keeps it, with adapters in some folders."""
    home = root / "hub" / f"models--{repo.replace('/', '--')}"
    for ref in refs:
        (home / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (home / "refs" / ref).write_text(commit)
    for folder in folders:
        (home / "snapshots" / commit / folder).mkdir(parents=True, exist_ok=True)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (home / "snapshots" / commit / folder / name).write_text("x")
    return home / "snapshots" / commit


@pytest.fixture
def offline(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    constants = pytest.importorskip("huggingface_hub.constants", reason="huggingface_hub is not installed")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(here / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return here


def test_revisions_and_folders_of_the_local_hub_cache(offline: Path) -> None:
    commits = "a" * 40, "b" * 40
    main = cache(offline, "org/lawyer", commits[0], refs=("main",), folders=("", "step-5", "a/b"))
    other = cache(offline, "org/lawyer", commits[1], refs=("v2", "refs/pr/1", "feature/x"), folders=("", "step-5"))
    expected = {
        "org/lawyer": (main, "lawyer"),
        "org/lawyer/step-5": (main / "step-5", "step-5"),
        "org/lawyer/a/b": (main / "a" / "b", "b"),
        "org/lawyer@main": (main, "lawyer"),
        f"org/lawyer@{commits[1]}": (other, "lawyer"),
        "org/lawyer@v2": (other, "lawyer"),
        "org/lawyer@v2/step-5": (other / "step-5", "step-5"),
        "org/lawyer/step-5@v2": (other / "step-5", "step-5"),
        "org/lawyer@refs/pr/1": (other, "lawyer"),
        "org/lawyer@feature/x": (other, "lawyer"),
        "org/lawyer@feature/x/step-5": (other / "step-5", "step-5"),
    }
    for text, (path, name) in expected.items():
        found = find(text)
        assert (found.path, found.name) == (path, name), text
    spec = parse("law=org/lawyer@v2/step-5:0.5")
    assert (spec.name, spec.path, spec.weight) == ("law", other / "step-5", 0.5)
    for text in ("org/lawyer@v3", "org/lawyer@v2/step-6", "org/nobody@main"):
        with pytest.raises(InputError, match=f"{text} is no path here and could not be fetched from the Hub"):
            find(text)
    with pytest.raises(InputError, match=r"there is no file or directory org/lawyer/step-6.*@revision"):
        find("org/lawyer/step-6")
    for text in ("org/lawyer@../x", "org/lawyer@v2/../x", "org/../lawyer", "org/lawyer@"):
        with pytest.raises(InputError, match="there is no file or directory"):
            find(text)


def test_files_of_the_hub(offline: Path) -> None:
    """Single files, under a revision too; a path with a slip in a folder that exists is none."""
    commits = "d" * 40, "e" * 40
    main = cache(offline, "org/styles", commits[0], refs=("main",), folders=())
    other = cache(offline, "org/styles", commits[1], refs=("v2",), folders=())
    for snapshot in (main, other):
        (snapshot / "sub").mkdir(parents=True)
        for name in ("ink.safetensors", "sub/old.pt"):
            (snapshot / name).write_text("x")
    expected = {
        "org/styles/ink.safetensors": (main / "ink.safetensors", "ink.safetensors"),
        "org/styles/sub/old.pt": (main / "sub" / "old.pt", "old.pt"),
        "org/styles@v2/ink.safetensors": (other / "ink.safetensors", "ink.safetensors"),
        "org/styles/ink.safetensors@v2": (other / "ink.safetensors", "ink.safetensors"),
    }
    for text, (path, name) in expected.items():
        found = find(text)
        assert (found.path, found.name) == (path, name), text
    spec = parse("org/styles/ink.safetensors:0.5")
    assert (spec.path, spec.weight) == (main / "ink.safetensors", 0.5)
    with pytest.raises(InputError, match=r"org/styles/no\.safetensors is no path here and could not be fetched"):
        find("org/styles/no.safetensors")
    (offline / "org").mkdir()
    with pytest.raises(InputError, match=r"there is no file or directory org/styles/no\.safetensors"):
        find("org/styles/no.safetensors")
    assert find("org/styles/ink.safetensors").path == main / "ink.safetensors", "what is in the cache is taken"


def test_a_repository_of_one_file_under_its_own_name(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    (here / "snapshot").mkdir()
    files = ["README.md", "style.safetensors"]

    def download(repo: str, *, allow_patterns: list[str], local_files_only: bool) -> str:
        if "style.safetensors" in allow_patterns:
            (here / "snapshot" / "style.safetensors").write_text("x")
        return str(here / "snapshot")

    monkeypatch.setattr(hub, "snapshot_download", download)
    monkeypatch.setattr(hub, "list_repo_files", lambda repo, revision: files)
    found = find("org/one")
    assert (found.path, found.name) == (here / "snapshot" / "style.safetensors", "style.safetensors")
    (here / "snapshot" / "style.safetensors").unlink()
    files.append("second.safetensors")
    with pytest.raises(InputError, match=r"holds 2 files of tensors .* give one of them: org/one/style\.safetensors"):
        find("org/one")


def test_a_repository_of_several_adapters(offline: Path) -> None:
    """Its root is none: who reads it says which folders are."""
    main = cache(offline, "org/pool", "c" * 40, refs=("main",), folders=("legal", "med"))
    assert find("org/pool").path == main and find("org/pool/med").path == main / "med"


def test_links_to_nowhere(here: Path) -> None:
    (here / "gone").symlink_to(here / "deleted")
    (here / "there").symlink_to(here / "legal")
    for text in ("gone", "gone:0.5", "gone/inside", "n=gone"):
        with pytest.raises(InputError, match=r"gone is a link to .*deleted, which does not exist"):
            parse(text)
    assert parse("there:0.5").path.resolve() == here / "legal" and parse("there").name == "there"


def test_half_an_adapter_in_the_cache_is_downloaded(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    asked: list[bool] = []

    def download(repo: str, *, allow_patterns: list[str], local_files_only: bool) -> str:
        asked.append(local_files_only)
        return str(here / "legal")

    monkeypatch.setattr(hub, "snapshot_download", download)
    (here / "legal" / "adapter_config.json").write_text("x")
    assert find("org/lawyer").path == here / "legal" and asked == [True, False]
    (here / "legal" / "adapter_model.bin").write_text("x")
    assert find("org/lawyer").path == here / "legal" and asked == [True, False, True]


def test_a_hub_id_that_is_nowhere(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"org/nobody is neither a path nor can .*fastlora\[hub\]"):
        parse("org/nobody")


def test_a_failed_download_is_one_message(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")

    def fail(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(InputError, match=r"org/nobody is no path here and could not be fetched.*no route$"):
        parse("org/nobody")


def test_torch_is_not_imported() -> None:
    code = "import sys, fastlora.files.locate, fastlora.errors, fastlora.files.output; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
