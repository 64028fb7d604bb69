"""How ranks end: one that is killed, at any moment of any command, ends all with one message and leaves nothing; and
ranks without a common file system make one output."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from builders import gaussian, make_adapter, shared_pool
from forked_ranks import LAST, Ended, ForkedRanks
from safetensors.torch import save_file

import fastlora as fl
from fastlora.core.data import Magnitude

SECONDS = 10.0  # in which a rank that is gone ends the run
LATE = 0.2  # seconds by which a rank that is gone is noticed after a broken exchange: they happen at once
FIRST = 3  # of the exchanges at which each knows of the others: those before are about finding each other
COMMANDS = {
    "decompose": "decompose a b c --out new/out",
    "pairs": "decompose a b c --mode pairs --out new/out",
    "cores": "merge a b c --method tsv --out new/out",
    "tiles": "merge a b --method ties --rank 3 --min-energy 0 --out new/out",
    "modulate": "modulate a --op reverse:0.5 --out new/out",
    "compose": "compose (a-0.5*unique(b|c)) a=a b=b c=c --out new/out",
    "compress": "compress a --rank 2 --out new/out",
    "convert": "convert a --to mlx --out new/out",
    "extract": "extract base tuned --rank 3 --out new/out",
    "vector": "extract base tuned --out out.safetensors",
    "overlap": "overlap a b c --csv out.csv",
    "apply": "apply base lora --out new/out",
    "report": "report a b c --out out.html",
    "recombine": "merge dora:2 lora --base base --dora recombine --out new/out",
}


@pytest.fixture(scope="module")
def ranks() -> Iterator[ForkedRanks]:
    forked = ForkedRanks()
    yield forked
    forked.close()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters ``a``, ``b``, ``c``; a model, and a fine-tune of it."""
    folder = tmp_path_factory.mktemp("inputs")
    for path, name in zip(shared_pool(folder), "abc", strict=True):
        path.rename(folder / name)
    make_adapter(folder / "lora", {f"layers.{i}.q": (40, 30) for i in range(5)})
    lora = fl.load(folder / "lora")
    assert isinstance(lora, fl.Adapter)
    magnitudes = {m: Magnitude(1.0 + 0.1 * gaussian(1, 40, seed=i)[0], "out") for i, m in enumerate(lora.modules)}
    fl.DoRA("dora", lora.updates, magnitudes).save(folder / "dora")
    base = {f"layers.{i}.q.weight": gaussian(40, 30, seed=i) for i in range(5)}
    tuned = {n: w + 0.1 * gaussian(40, 30, seed=50 + i) for i, (n, w) in enumerate(base.items())}
    for name, tensors in (("base", base), ("tuned", tuned)):
        (folder / name).mkdir()
        save_file(tensors, folder / name / "model.safetensors")
        (folder / name / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


def place(folder: Path, inputs: Path) -> Path:
    """A folder with links to the inputs."""
    folder.mkdir()
    for path in inputs.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def errors(ended: Ended) -> list[str]:
    return [line for line in ended.messages if not line.startswith("note:")]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_rank_that_is_killed_ends_the_command(name: str, ranks: ForkedRanks, inputs: Path, tmp_path: Path) -> None:
    arguments = COMMANDS[name].split()
    whole = place(tmp_path / "whole", inputs)
    all_done = ranks.run(*arguments, cwd=[whole, whole])
    assert (all_done.codes, errors(all_done)) == ([0, 0], [])
    last = all_done.exchanges[0]
    moments = [(0, FIRST, 0.0), (1, last // 2, 0.0), (0, 2 * last // 3, LATE)]
    if name in ("vector", "overlap", "report"):  # files
        moments += [(0, last - 3, LATE)]
    if name == "decompose":
        moments += [(1, last - 1, 0.0), (0, LAST, 0.0), (1, LAST, 0.0)]
    for number, (victim, at, late) in enumerate(moments):
        folder = place(tmp_path / str(number), inputs)
        before = sorted(folder.rglob("*"))
        ended = ranks.run(*arguments, cwd=[folder, folder], kill=(victim, at), late=late)
        (message,) = errors(ended)
        assert message.startswith(f"error: rank {victim} ended without a word"), (at, ended)
        assert ended.codes[1 - victim] == 2 and ended.seconds < SECONDS, (at, ended)
        if "--resume" in message:
            assert ranks.run(*arguments, "--resume", cwd=[folder]).codes == [0]
            assert files(folder) == files(whole)
            continue
        left = [p for p in folder.rglob("*") if p not in before]
        if left:  # all of it: the output was in its place
            assert files(folder) == files(whole), (victim, at)
            assert at == LAST or at > last // 2


@pytest.mark.parametrize("name", ["decompose", "cores", "tiles", "extract", "apply", "recombine"])
def test_two_ranks_write_the_bits_of_one(name: str, ranks: ForkedRanks, inputs: Path, tmp_path: Path) -> None:
    alone, two = place(tmp_path / "alone", inputs), place(tmp_path / "two", inputs)
    assert ranks.run(*COMMANDS[name].split(), cwd=[alone]).codes == [0]
    assert ranks.run(*COMMANDS[name].split(), cwd=[two, two]).codes == [0, 0]
    assert files(alone) == files(two)


def test_ranks_that_do_not_see_one_folder(ranks: ForkedRanks, inputs: Path, tmp_path: Path) -> None:
    alone = place(tmp_path / "alone", inputs)
    for name in ("decompose", "tiles", "extract", "vector"):
        arguments = [*COMMANDS[name].split()[:-1], f"new/{name}{'.safetensors' if name == 'vector' else ''}"]
        apart = [tmp_path / f"{name} 0", tmp_path / f"{name} 1", tmp_path / f"{name} 2"]
        before = {folder: len(list(place(folder, inputs).rglob("*"))) for folder in apart}
        ended = ranks.run(*arguments, cwd=apart, apart=True)
        assert ended.codes == [0, 0, 0], ended
        assert ranks.run(*arguments, cwd=[alone]).codes == [0]
        found, expected = (files(folder / "new") for folder in (apart[0], alone))
        assert {n: b for n, b in expected.items() if name in n} == found, name
        assert [len(list(folder.rglob("*"))) for folder in apart[1:]] == [before[folder] for folder in apart[1:]]
    apart = [place(tmp_path / f"apply {rank}", inputs) for rank in range(2)]
    ended = ranks.run(*COMMANDS["apply"].split(), cwd=apart, apart=True)
    (message,) = errors(ended)
    assert message.startswith("error: apply: rank 1 does not see the output of rank 0") and ended.codes == [2, 2]
    assert not (apart[0] / "new").exists()
