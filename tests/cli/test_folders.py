"""A folder of adapters as an argument of the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from builders import make_adapter, shared_pool
from command import DATA, done, places, refused

import fastlora as fl

LEFT_OUT = "note: pool: left out notes.txt: a file that is no adapter"


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """``pool`` with three adapters that share something and a file, ``other`` beside it."""
    shared_pool(tmp_path / "pool", 3)
    (tmp_path / "pool" / "notes.txt").write_text("what these are")
    make_adapter(tmp_path / "other", seed=9)
    return tmp_path


def names_in(folder: Path) -> list[str]:
    return fl.Pool.load(folder).names


@pytest.mark.parametrize("command", [["decompose", "-o", "out"], ["merge", "-o", "out"], ["overlap"]])
def test_a_folder_is_what_is_in_it(command: list[str], here: Path) -> None:
    one = done(command[0], "pool", *command[1:], "--json", cwd=here)
    assert one.err.splitlines() == [LEFT_OUT]
    shutil.rmtree(here / "out", ignore_errors=True)
    names = names_in(here / "pool")
    each = done(command[0], *(f"pool/{n}" for n in names), *command[1:], "--json", cwd=here).json()
    data = one.json()
    data.pop("notices", None), each.pop("notices", None)
    for report in (*data.get("reports", ()), *each.get("reports", ())):
        report["notices"] = []
    assert data == each


def test_a_weight_of_a_folder_is_that_of_each(here: Path) -> None:
    done("merge", "pool:0.5", "other:-1", "--method", "cat", "-o", "out", cwd=here)
    pool, other, merged = fl.Pool.load(here / "pool"), fl.load(here / "other"), fl.load(here / "out")
    for module in merged.modules:
        expected = 0.5 * sum(pool[n].delta(module) for n in pool.names) - other.delta(module)
        assert (merged.delta(module) - expected).norm() <= 1e-6 * expected.norm()  # float32 sums of four terms
    assert "other" not in names_in(here / "pool")


def test_decompose_writes_a_part_for_each(here: Path) -> None:
    done("decompose", "pool", "-o", "out", "-q", cwd=here)
    assert places(here / "out") == {"shared", *(f"unique/{n}" for n in names_in(here / "pool"))}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["overlap", "x=pool"], "x=pool: this folder holds adapters, which are called after their own folders"),
        (["overlap", "pool:0.5"], "weights have no meaning"),
        (["compress", "pool", "--rank", "1", "-o", "out"], "holds 3 adapters"),
        (["modulate", "pool", "--op", "reverse", "-o", "out"], "holds 3 adapters"),
        (["compose", "pool", "pool", "-o", "out"], "holds 3 adapters"),
        (["merge", "pool", "-o", "pool/out"], "one inside the other"),
        (["merge", "pool", "pool", "-o", "out"], "two adapters are called"),
        (["overlap", "empty"], "has no adapter_config.json"),
    ],
)
def test_what_a_folder_cannot_be(arguments: list[str], words: str, here: Path) -> None:
    (here / "empty").mkdir()
    assert words in refused(*arguments, cwd=here)


def test_inspect_lists_a_folder_of_any_kind(here: Path) -> None:
    shutil.copytree(DATA / "movie_ia3_a", here / "pool" / "ia3")
    found = done("inspect", "pool", cwd=here)
    assert found.out.startswith("pool: 4 adapters") and found.err.splitlines() == [LEFT_OUT]
    for name in ("ia3", *names_in(here / "pool")):
        assert name in found.out
    data = done("inspect", "pool", "--json", cwd=here).json()
    assert {n: a["kind"] for n, a in data["adapters"].items()} == {
        "ia3": "IA3", **dict.fromkeys(names_in(here / "pool"), "LoRA"),
    }  # fmt: skip
    alone = done("inspect", "pool/ia3", "--json", cwd=here).json()
    assert data["adapters"]["ia3"] == json.loads(json.dumps(alone))


def test_quiet_tells_nothing(here: Path) -> None:
    found = done("overlap", "pool", "--quiet", cwd=here)
    assert (found.out, found.err) == ("", "")
