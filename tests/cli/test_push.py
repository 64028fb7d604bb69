"""``--push``: what goes to the Hub, on a stand-in for its client."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from builders import make_adapter
from command import done, refused, run
from written_files import adapter_of

from fastlora.errors import InputError, OutputError
from fastlora.files import hub_upload

huggingface_hub = pytest.importorskip("huggingface_hub")


class Hub:
    """Repositories, ``{name: {path: bytes}}``, and which of them are private."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.commits: list[str] = []
        self.failure: Exception | None = None

    def create_repo(self, repo: str, *, private: bool, exist_ok: bool) -> str:
        assert exist_ok
        if self.failure is not None:
            raise self.failure
        self.repositories.setdefault(repo, {})
        self.private.setdefault(repo, private)
        return f"https://hub.example/{repo}"

    def list_repo_files(self, repo: str) -> list[str]:
        return list(self.repositories[repo])

    def create_commit(self, repo: str, operations: Any, *, commit_message: str) -> None:
        self.commits.append(commit_message)
        for operation in operations:
            content = operation.path_or_fileobj
            self.repositories[repo][operation.path_in_repo] = (
                content if isinstance(content, bytes) else Path(content).read_bytes()
            )


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a token")
    return hub


@pytest.fixture
def here(tmp_path: Path) -> Path:
    make_adapter(tmp_path / "a", seed=1)
    make_adapter(tmp_path / "b", seed=2)
    return tmp_path


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def not_pushed(*command: str, cwd: Path) -> str:
    """The message of a command whose result is written and was not pushed."""
    told = run(*command, cwd=cwd)
    assert told.code == 2 and told.out.startswith("out: ") and told.err.startswith("error: ")
    assert (cwd / "out" / "adapter_config.json").exists()
    return told.err


MERGE = ("merge", "a:0.7", "b:0.3", "-o", "out", "--push", "org/mix")


def test_a_result_is_pushed_as_it_was_written(hub: Hub, here: Path) -> None:
    told = done(*MERGE, cwd=here)
    assert "https://hub.example/org/mix" in told.out
    assert hub.repositories == {"org/mix": files(here / "out")} and hub.private == {"org/mix": True}
    assert "adapter_config.json" in hub.repositories["org/mix"] and hub.commits == ["Upload with fastlora"]


def test_a_repository_is_public_where_that_is_said(hub: Hub, here: Path) -> None:
    done("decompose", "a", "b", "-o", "out", "--push", "org/parts", "--push-public", cwd=here)
    assert hub.private == {"org/parts": False} and "unique/a/adapter_config.json" in hub.repositories["org/parts"]


@pytest.mark.parametrize(
    "command",
    [
        ("compress", "a", "--rank", "2"),
        ("compose", "a - b", "a=a", "b=b"),
        ("modulate", "a", "--op", "reverse:0.5"),
        ("convert", "a", "--to", "peft"),
    ],
    ids=lambda command: command[0],
)
def test_every_command_that_writes_adapters_pushes(hub: Hub, here: Path, command: tuple[str, ...]) -> None:
    done(*command, "-o", "out", "--push", "org/x", cwd=here)
    assert hub.repositories["org/x"] == files(here / "out")


def test_a_dry_run_needs_neither_a_login_nor_the_network(hub: Hub, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    hub.failure = AssertionError("the network was used")
    told = done(*MERGE, "--push-dry-run", cwd=here)
    assert "would push " in told.out and "to org/mix (made private where it is new): " in told.out
    assert "adapter_model.safetensors" in told.out and not hub.repositories and (here / "out").is_dir()
    printed = done(*MERGE, "--push-dry-run", "--overwrite", "--json", cwd=here)
    assert printed.json()["out"] == "out" and "would push " in printed.err


def test_what_is_there_is_replaced_only_by_overwrite(hub: Hub, here: Path) -> None:
    hub.repositories["org/mix"] = {"notes.md": b"mine", "README.md": b"mine too"}
    message = not_pushed(*MERGE, cwd=here)
    assert "org/mix holds README.md already" in message and hub.commits == []
    done(*MERGE, "--overwrite", cwd=here)
    assert files(here / "out") | {"notes.md": b"mine"} == hub.repositories["org/mix"]


def test_one_file_goes_with_a_card(hub: Hub, tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        made = adapter_of({"transformer_blocks.0.attn.to_q": (16, 16)}, "flux", format="kohya", seed=seed)
        made.save(tmp_path / f"{name}.safetensors")
    merge = ("merge", "a.safetensors:0.7", "b.safetensors:0.3", "--method", "cat", "-o", "out.safetensors")
    told = done(*merge, "--push", "org/mix", "--push-dry-run", cwd=tmp_path)
    assert "would push 2 files" in told.out and "out.safetensors, README.md" in told.out
    done(*merge, "--push", "org/mix", "--overwrite", cwd=tmp_path)
    pushed = hub.repositories["org/mix"]
    assert {*pushed} == {"out.safetensors", "README.md"}
    assert pushed["out.safetensors"] == (tmp_path / "out.safetensors").read_bytes()
    card = pushed["README.md"].decode()
    assert "# out" in card and "- model: a\n  parameters: {weight: 0.7}" in card and "library_name: diffusers" in card


@pytest.mark.parametrize("repo", ["mix", "a/b/c", "../x", "org/mix@v2", "https://hub/org/mix", "org/a--b", ""])
def test_names_that_are_none_are_refused_before_any_work(hub: Hub, here: Path, repo: str) -> None:
    assert "give one as org/name" in refused(*MERGE[:-1], repo, cwd=here)
    assert not (here / "out").exists()


def test_what_is_missing_is_told_before_any_work(hub: Hub, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "give --push ORG/NAME" in refused(*MERGE[:-2], "--push-public", cwd=here)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert "hf auth login" in refused(*MERGE, cwd=here)
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    assert "pip install 'fastlora[hub]'" in refused(*MERGE, cwd=here)
    assert not (here / "out").exists()


def test_what_the_hub_refuses_is_told_and_the_result_stays(hub: Hub, here: Path) -> None:
    hub.failure = RuntimeError("403 Forbidden: no rights\nand more")
    message = not_pushed(*MERGE, cwd=here)
    assert "the result is written, and was not pushed to org/mix: 403 Forbidden: no rights; try `hf upload" in message


def test_paths_of_this_machine_are_not_pushed(hub: Hub, here: Path) -> None:
    for name in "ab":
        config = here / name / "adapter_config.json"
        fields = json.loads(config.read_text()) | {"base_model_name_or_path": "/home/somebody/llama"}
        config.write_text(json.dumps(fields))
    message = not_pushed(*MERGE, cwd=here)
    assert "adapter_config.json names '/home/somebody/llama', a path of this machine; nothing was pushed" in message
    assert not hub.repositories


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("base_model: /home/me/llama", "/home/me/llama"),
        ("merged from `~/adapters/a`", "~/adapters/a"),
        ("of ./adapters/a and b", "./adapters/a"),
        ("../a", "../a"),
        (r"C:\Users\me\a", r"C:\Users\me\a"),
        ("see https://huggingface.co/org/name and org/name, 0.7*a /2 + b/c, and/or 1 / 2", None),
        ("datasets.load('x'), v1.2/3, ... and so on. /", None),
    ],
)
def test_paths_in_a_card(tmp_path: Path, text: str, found: str | None) -> None:
    (tmp_path / "README.md").write_text(text)
    if found is None:
        assert hub_upload.upload_of(tmp_path, "org/x").files
        return
    with pytest.raises(InputError) as told:
        hub_upload.upload_of(tmp_path, "org/x")
    assert f"README.md names {found!r}" in str(told.value)


def test_one_file_is_pushed_under_its_name(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "lora.bin").write_bytes(b"x")
    (tmp_path / "other.bin").write_bytes(b"y")
    upload = hub_upload.upload_of(tmp_path / "lora.bin", "org/x")
    assert hub_upload.send(hub, upload, public=False, replace=False) == "https://hub.example/org/x"
    assert hub.repositories["org/x"] == {"lora.bin": b"x"} and upload.size == 1
    with pytest.raises(OutputError, match=r"holds lora\.bin already"):
        hub_upload.send(hub, upload, public=False, replace=False)
