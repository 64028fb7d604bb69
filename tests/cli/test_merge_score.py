"""``fastlora merge … --score CMD``: what a command is given, what may be read of it, and what is written."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest
import torch
from builders import make_adapter
from command import done, refused
from tolerances import SUMS32

import fastlora as fl
from fastlora.cli.scoring import parse_scores
from fastlora.errors import InputError

# Counts its runs, and scores how near the candidate's norm is to 3: without importing torch, so that it is quick.
SCORER = """
import json, math, struct, sys
from pathlib import Path
place = Path(sys.argv[-1])
file = place if place.is_file() else place / "adapter_model.safetensors"
with file.open("rb") as opened:
    size, = struct.unpack("<Q", opened.read(8))
    header, body = json.loads(opened.read(size)), opened.read()
total = 0.0
for name, entry in header.items():
    if name != "__metadata__":
        a, b = entry["data_offsets"]
        total += sum(x * x for x in struct.unpack(f"<{(b - a) // 4}f", body[a:b]))
with open("runs.txt", "a") as runs:
    runs.write(f"{place.name}\\n")
print("a line of a log", file=sys.stderr)
"""
ENDS = {
    "number": "print(-abs(math.sqrt(total) - 12))",
    "examples": "for i in range(8): print(-abs(math.sqrt(total) - 12 - 0.01 * (i % 3)))",
    "apart": "print(json.dumps({'select': -abs(math.sqrt(total) - 12), 'report': [1, 2.5]}))",
}
RULES = ("--method", "iso_c,pico")


def scorer(root: Path, end: str) -> str:
    (root / "score.py").write_text(SCORER + ENDS.get(end, end))
    return shlex.join([sys.executable, "score.py"])


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for i, name in enumerate("ab"):
        make_adapter(tmp_path / name, {"q": (6, 5), "v": (6, 4)}, rank=2, seed=i)
    return tmp_path


def test_the_best_is_written_with_a_table_and_a_recipe(place: Path) -> None:
    command = scorer(place, "examples")
    options = ("--score", command, *RULES, "--scores", "scores.json", "--save-recipe", "did.yaml")
    found = done("merge", "a", "b", *options, "-o", "out", cwd=place)
    text = " ".join(found.out.split())
    assert "merges that were tried" in text and text.count(" *") == 1
    assert "The winner of 14: " in text and "than two errors." in text and "same data" not in text
    runs = (place / "runs.txt").read_text().splitlines()
    assert runs == ["candidate"] * len(json.loads((place / "scores.json").read_text())["rows"]) and len(runs) == 14
    again = done("merge", "a", "b", *options[:-2], "-o", "again", "--json", cwd=place).json()
    assert len((place / "runs.txt").read_text().splitlines()) == 14, "nothing is scored twice"
    assert again["chosen"]["selected_and_reported_on_different_data"] is True
    done("merge", "did.yaml", "-o", "replayed", cwd=place)
    merged, replayed, kept = (fl.load(place / name) for name in ("out", "replayed", "again"))
    for module in merged.modules:
        torch.testing.assert_close(replayed.delta(module), merged.delta(module), rtol=1e-5, atol=SUMS32)
        assert torch.equal(kept.delta(module), merged.delta(module))
    other = refused("merge", "a:0.5", "b", *options[:-2], "-o", "third", cwd=place)
    assert "have the key" in other and "choose another file" in other


def test_one_number_is_one_data_set_and_a_budget_holds(place: Path) -> None:
    found = done("merge", "a", "b", "--score", scorer(place, "number"), "--budget", "3", "-o", "out", cwd=place)
    text = " ".join(found.out.split())
    assert "Selection and report are on the same data" in text and "The budget left out 15" in text
    assert len((place / "runs.txt").read_text().splitlines()) == 3


def test_the_candidate_stands_where_the_command_says(place: Path) -> None:
    command = scorer(place, "apart").replace("score.py", "score.py --adapter={} --fast x")
    (place / "score.py").write_text(SCORER.replace("sys.argv[-1]", "sys.argv[1].partition('=')[2]") + ENDS["apart"])
    found = done("merge", "a", "b", "--score", command, "--budget", "2", "-o", "out", "--json", cwd=place).json()
    assert found["chosen"]["winner"]["score"] == 1.75 and found["chosen"]["winner"]["error"] == pytest.approx(0.75)
    assert (place / "runs.txt").read_text().splitlines() == ["candidate"] * 2


@pytest.mark.parametrize(("end", "said"), [
    ("sys.exit('no such model')", "ended with 1: no such model"), ("", "printed nothing"),
    ("print('accuracy: 0.5')", "printed 'accuracy: 0.5'"), ("print('NaN')", "must be finite"),
    ("print(1); print('[2]')", "printed '[2]' among 2 lines"), ("print('true')", "printed 'true'"),
    ("import os; os.kill(os.getpid(), 9)", "was ended by signal 9"), ("print('\\x1b[2J')", r"printed '\\x1b[2J'"),
], ids=["fails", "nothing", "words", "nan", "mixed", "bool", "killed", "steering"])  # fmt: skip
def test_what_a_command_may_do_wrong_is_one_message(place: Path, end: str, said: str) -> None:
    make_it = scorer(place, end)
    (place / "score.py").write_text((place / "score.py").read_text().replace('"runs.txt"', '"/dev/null"'))
    assert said in refused("merge", "a", "b", "--score", make_it, "-o", "out", cwd=place)


@pytest.mark.parametrize(("options", "said"), [
    (("--budget", "3"), "--budget: goes with --score CMD"), (("--scores", "x.json"), "--scores: goes with --score"),
    (("--method", "iso_c,pico"), "several methods are tried with --score CMD"),
    (("--score", "nosuchprogram"), "there is no program 'nosuchprogram'"), (("--score", "' "), "write it as in a shel"),
    (("--score", ""), "the command is empty"), (("--score", "true", "--budget", "0"), "--budget 0"),
    (("--score", "true", "--method", "iso_c", "--set", "rank=3"), "leave it out"),
    (("--score", "true", "--scores", "no/x.json"), "there is no directory"),
    (("--score", "true", "--min-energy", "0.5"), "--min-energy"),
    (("--score", "true", "--method", "x"), "'x' does not"),
], ids=lambda value: "-".join(value) if isinstance(value, tuple) else "")  # fmt: skip
def test_what_does_not_go_together_is_refused(place: Path, options: tuple[str, ...], said: str) -> None:
    assert said in refused("merge", "a", "b", *options, "-o", "out", cwd=place)


def test_ranks_do_not_score(place: Path) -> None:
    env = {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
        from fastlora.cli.run import Run
        from fastlora.cli.scoring import Scoring

        with pytest.raises(InputError, match="every rank would run the command"):
            Scoring("true", None, None, None).check(Run(), None, None)


@pytest.mark.parametrize(("text", "found"), [
    ("0.5\n", 0.5), ("\n1\n0\n\n1\n", [1.0, 0.0, 1.0]), ("[1, 0]", [1.0, 0.0]), ("-1e-3", -0.001),
    ('{"select": 1, "report": [0, 1]}', {"select": 1.0, "report": [0.0, 1.0]}),
], ids=["number", "lines", "list", "small", "apart"])  # fmt: skip
def test_what_is_read_of_a_command(text: str, found: object) -> None:
    assert parse_scores(text) == found
