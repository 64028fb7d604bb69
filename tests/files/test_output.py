"""Output directories exist whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from builders import make_adapter
from safetensors import SafetensorError
from safetensors.torch import save_file

from fastlora.adapters.loading import load
from fastlora.errors import InputError, OutputError
from fastlora.files.disk_errors import errno_of, partial_of
from fastlora.files.output import OutputDirectory


def left_in(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


EARLIER = '{"mode": "pool", "reports": []}'


def earlier(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "report.json").write_text(EARLIER)
    (path / "unique" / "med").mkdir(parents=True)
    (path / "unique" / "med" / "adapter_config.json").write_text("{}")
    marked(path / "unique" / "med" / "adapter_model.safetensors")
    return path


def marked(file: Path) -> None:
    """A file of tensors that says that fastlora wrote it."""
    save_file({"a": torch.zeros(1)}, file, {"fastlora": "{}"})


def test_appears_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "new" / "deep" / "out"
    with OutputDirectory(target) as staging:
        (staging / "report.json").write_text("x")
        (staging / "shared").mkdir()
        assert not target.exists() and staging.parent == target.parent
    assert (target / "report.json").read_text() == "x" and (target / "shared").is_dir()
    assert left_in(target.parent) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, InputError])
def test_nothing_is_left_when_the_block_fails(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), OutputDirectory(tmp_path / "out") as staging:
        (staging / "report.json").write_text("x")
        raise error("stop")
    assert left_in(tmp_path) == []


def test_an_existing_target_is_refused_before_any_work(tmp_path: Path) -> None:
    earlier(tmp_path / "out")
    with pytest.raises(OutputError, match=r"--overwrite \(overwrite=True\)"):
        OutputDirectory(tmp_path / "out")
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file"):
        OutputDirectory(tmp_path / "file", overwrite=True)
    with pytest.raises(OutputError, match="is a file"):
        OutputDirectory(tmp_path / "file" / "out")
    with pytest.raises(OutputError, match="no name"):
        OutputDirectory("/")


def test_overwriting_replaces_all_of_an_earlier_output(tmp_path: Path) -> None:
    target = earlier(tmp_path / "out")
    with OutputDirectory(target, overwrite=True) as staging:
        (staging / "adapter_config.json").write_text("new")
        assert (target / "report.json").read_text() == EARLIER
    assert left_in(target) == ["adapter_config.json"] and left_in(tmp_path) == ["out"]


def test_a_failed_overwrite_keeps_the_earlier_output(tmp_path: Path) -> None:
    target = earlier(tmp_path / "out")
    with pytest.raises(ValueError), OutputDirectory(target, overwrite=True) as staging:
        (staging / "report.json").write_text("new")
        raise ValueError
    assert (target / "report.json").read_text() == EARLIER and left_in(tmp_path) == ["out"]


@pytest.mark.parametrize("failing", [1, 2], ids=["moving aside", "putting in place"])
def test_an_interrupted_exchange_keeps_the_earlier_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    target = earlier(tmp_path / "out")
    real, calls = os.rename, []

    def rename(source: Path, destination: Path) -> None:
        calls.append(source)
        if len(calls) == failing:
            raise KeyboardInterrupt
        real(source, destination)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(KeyboardInterrupt), OutputDirectory(target, overwrite=True) as staging:
        (staging / "report.json").write_text("new")
    assert (target / "report.json").read_text() == EARLIER and left_in(tmp_path) == ["out"]


@pytest.mark.parametrize("foreign", ["thesis.tex", "unique/photo.jpg", ".bashrc", "model.safetensors"])
def test_overwriting_never_deletes_what_is_no_output(tmp_path: Path, foreign: str) -> None:
    target = earlier(tmp_path / "out")
    (target / foreign).write_text("precious")
    with pytest.raises(OutputError, match=f"holds {foreign}"):
        OutputDirectory(target, overwrite=True)
    assert (target / foreign).read_text() == "precious"


@pytest.mark.parametrize("foreign", ["adapter_model.safetensors", "unique/med/report.json", "README.md", "x.png"])
def test_overwriting_looks_at_what_files_say(tmp_path: Path, foreign: str) -> None:
    """A file of a usual name that somebody else wrote is nobody's earlier output."""
    target = earlier(tmp_path / "out")
    save_file({"a": torch.zeros(1)}, target / foreign)
    with pytest.raises(OutputError, match=f"holds {foreign}.*--force"):
        OutputDirectory(target, overwrite=True, files=["*.png"])


def test_force_replaces_what_is_there(tmp_path: Path) -> None:
    target = earlier(tmp_path / "out")
    (target / "thesis.tex").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for name in ("out", "file"):
        with OutputDirectory(tmp_path / name, overwrite="force") as staging:
            (staging / "report.json").write_text("new")
        assert left_in(tmp_path / name) == ["report.json"]
    assert left_in(tmp_path) == ["file", "out"]


def test_a_failed_force_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("precious")
    real = os.rename

    def rename(source: Path, destination: Path) -> None:
        if ".partial-" in str(source):
            raise KeyboardInterrupt
        real(source, destination)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(KeyboardInterrupt), OutputDirectory(tmp_path / "file", overwrite="force"):
        pass
    assert (tmp_path / "file").read_text() == "precious" and left_in(tmp_path) == ["file"]


def test_force_spares_the_places_that_the_user_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")
    for place in (".", "..", tmp_path, Path.home()):
        with pytest.raises(OutputError, match="directory"):
            OutputDirectory(place, overwrite="force")


def test_overwriting_checks_again_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(OutputError, match="exists"), OutputDirectory(target) as staging:
        (staging / "report.json").write_text("late")
        earlier(target)
    assert (target / "report.json").read_text() == EARLIER and left_in(tmp_path) == ["out"]


def test_outputs_may_name_further_files(tmp_path: Path) -> None:
    target = earlier(tmp_path / "out")
    marked(target / "model-00001-of-00002.safetensors")
    OutputDirectory(target, overwrite=True, files=["model-*.safetensors"])


@pytest.mark.parametrize(
    "output, given",
    [("pool/a", "pool/a"), ("pool", "pool/a"), ("pool/a/out", "pool/a"), ("pool/../pool/a", "pool/a")],
)
def test_inputs_are_not_written_over(tmp_path: Path, output: str, given: str) -> None:
    with pytest.raises(OutputError, match="one place or one inside the other"):
        OutputDirectory(tmp_path / output).refuse_inputs([tmp_path / given])
    OutputDirectory(tmp_path / "elsewhere").refuse_inputs([tmp_path / given])


@pytest.mark.parametrize(
    "error, words",
    [
        (OSError(errno.ENOSPC, "No space left on device"), "disk is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "quota"),
        (OSError(errno.EROFS, "Read-only file system"), "read-only"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "disk is full"),
        (SafetensorError("I/O error: Permission denied (os error 13)"), "permission denied"),
    ],
    ids=str,
)
def test_what_goes_wrong_is_one_clear_message(tmp_path: Path, error: Exception, words: str) -> None:
    with (
        pytest.raises(OutputError, match=f"out could not be written: .*{words}"),
        OutputDirectory(tmp_path / "out"),
    ):
        raise error
    assert left_in(tmp_path) == []


def test_errors_about_other_files_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), OutputDirectory(tmp_path / "out"):
        raise PermissionError(errno.EACCES, "Permission denied", "/somewhere/else")


def test_a_directory_that_cannot_be_written_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OutputError, match="not writable"):
        OutputDirectory(tmp_path / "out")


def test_leftovers_of_dead_runs_are_told_and_kept(tmp_path: Path) -> None:
    dead = tmp_path / f".out.partial-{2**22 + 5}"
    dead.mkdir()
    (tmp_path / ".other.partial-4194309").mkdir()
    output = OutputDirectory(tmp_path / "out")
    with output:
        pass
    assert [str(dead) in notice for notice in output.notices] == [True] and dead.exists()


def test_two_runs_do_not_share_a_staging_directory(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="exists"), OutputDirectory(tmp_path / "out") as first:
        (first / "report.json").write_text("first")
        with OutputDirectory(tmp_path / "out") as second:
            assert first != second
            (second / "report.json").write_text("second")
    assert left_in(tmp_path) == ["out"]
    assert (tmp_path / "out" / "report.json").read_text() == "second"


def test_nothing_unfinished_loads(tmp_path: Path) -> None:
    with OutputDirectory(tmp_path / "out") as staging:
        inside = make_adapter(staging / "shared")
        assert partial_of(inside) == staging
        with pytest.raises(InputError, match="never finished"):
            load(inside)
    assert load(tmp_path / "out" / "shared").modules and partial_of(tmp_path / "out") is None


def test_safetensors_still_says_the_errors_number(tmp_path: Path) -> None:
    """Its errors have no number but in their text, from which the sentences about full disks and the like are made."""
    with pytest.raises((SafetensorError, OSError)) as refused:
        save_file({"a": torch.zeros(1)}, tmp_path / "missing" / "a.safetensors")
    assert errno_of(refused.value) == errno.ENOENT
