"""What commands print fits the terminal, and ``--csv`` has what does not."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from builders import make_adapter
from command import ADAPTERS, done, refused
from rich.cells import cell_len

import fastlora as fl

NAMES = [f"model-{i}" for i in range(10)]
MODULES = {f"model.layers.{i}.self_attn.q_proj": (24, 16) for i in range(2)}
QUERY = "encoder.layer.0.attention.self.query"


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pool")
    for i, name in enumerate(NAMES):
        make_adapter(root / name, MODULES, seed=i)
    return root


def rows(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


@pytest.mark.parametrize("width", [80, 100, 140])
@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["overlap"], [*NAMES, "adapter", "nearest", "cosine", "subspace", "overlap"]),
        (["decompose", "-o", "out"], ["0.self_attn.q_proj", "1.self_attn.q_proj", "chance", "eigenvalues", "mean"]),
        (["inspect"], [*NAMES, "modules", "float32"]),
    ],
)
def test_no_line_is_wider_and_no_word_is_broken(
    command: list[str], words: list[str], width: int, pool: Path, tmp_path: Path
) -> None:
    printed = done(command[0], pool, *command[1:], cwd=tmp_path, env={"COLUMNS": str(width)}).out
    assert max(map(cell_len, printed.replace(str(pool), "").splitlines())) <= width
    assert set(words) <= set(printed.split())


@pytest.mark.parametrize("width", [80, 100, 140])
@pytest.mark.parametrize(
    "command", [["inspect", ADAPTERS / "spam"], ["bench", "--list"], ["info"], ["overlap", ADAPTERS]]
)
def test_other_tables_fit(command: list[object], width: int, tmp_path: Path) -> None:
    printed = done(*command, cwd=tmp_path, env={"COLUMNS": str(width)}).out
    # A reason why a backend is not usable may hold a path, which is not broken.
    lines = [line for line in printed.splitlines() if max(map(len, line.split()), default=0) < 41]
    assert max(map(cell_len, lines)) <= width and len(lines) > 5


def test_where_there_is_no_terminal_lines_have_80_columns(pool: Path, tmp_path: Path) -> None:
    found = [done("overlap", pool, cwd=tmp_path, env=env).out for env in (None, {"COLUMNS": "80"})]
    assert found[0] == found[1]


def test_overlap_writes_both_matrices(pool: Path, tmp_path: Path) -> None:
    printed = done("overlap", pool, "--csv", "x.csv", cwd=tmp_path)
    assert "full matrices: x.csv" in printed.out
    heading, *table = rows(tmp_path / "x.csv")
    assert heading == ["similarity", "adapter", *NAMES]
    assert [row[:2] for row in table] == [[s, n] for s in ("cosine", "subspace") for n in NAMES]
    found = fl.overlap(fl.Pool.load(pool))
    values = [[float(v) for v in row[2:]] for row in table]
    assert values == [*found.cosine.tolist(), *found.subspace.tolist()]


def test_inspect_writes_every_module(tmp_path: Path) -> None:
    done("inspect", ADAPTERS / "spam", "--csv", "x.csv", cwd=tmp_path)
    heading, *table = rows(tmp_path / "x.csv")
    data = done("inspect", ADAPTERS / "spam", "--json", cwd=tmp_path).json()
    assert [row[1] for row in table] == list(data["modules"])
    row = dict(zip(heading, table[0], strict=True))
    assert (row["adapter"], row["module"], row["shape"], row["rank"]) == ("spam", QUERY, "384 384", "8")
    assert float(row["norm"]) == data["modules"][QUERY]["norm"]
    assert [float(v) for v in row["sigma"].split()] == data["modules"][QUERY]["sigma"]


def test_decompose_writes_every_module_of_every_report(pool: Path, tmp_path: Path) -> None:
    adapters = [pool / name for name in NAMES[:3]]
    data = done("decompose", *adapters, "--mode", "pairs", "-o", "out", "--csv", "x.csv", "--json", cwd=tmp_path).json()
    heading, *table = rows(tmp_path / "x.csv")
    assert len(table) == 3 * len(MODULES)
    assert heading[:2] == ["report", "module"] and heading[-3:] == [f"energy_shared of {n}" for n in NAMES[:3]]
    first = dict(zip(heading, table[0], strict=True))
    report = data["reports"][0]
    assert first["report"] == report["title"] and first["energy_shared of model-2"] == ""
    assert float(first["energy_shared of model-0"]) == report["rows"][0]["energy_shared"]["model-0"]


def test_bench_writes_seconds(tmp_path: Path) -> None:
    found = done("bench", "decompose", "minilm", "--json", "--csv", "x.csv", cwd=tmp_path).json()
    heading, row = rows(tmp_path / "x.csv")
    cells = dict(zip(heading, row, strict=True))
    assert cells["what"] == "decompose in memory, minilm"
    assert float(cells["theirs"]) == found["rows"][0]["theirs"]
    assert {n: float(cells[f"ours_{n}"]) for n in found["rows"][0]["ours"]} == found["rows"][0]["ours"]


def test_a_table_that_exists_is_kept(pool: Path, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("mine")
    assert "x.csv exists" in refused("overlap", pool, "--csv", "x.csv", cwd=tmp_path)
    assert "there is no directory" in refused("overlap", pool, "--csv", "no/x.csv", cwd=tmp_path)
    assert "--force" in refused("overlap", pool, "--csv", "x.csv", "--overwrite", cwd=tmp_path)
    done("overlap", pool, "--csv", "x.csv", "--force", "-q", cwd=tmp_path)
    done("overlap", pool, "--csv", "x.csv", "--overwrite", "-q", cwd=tmp_path)
    assert rows(tmp_path / "x.csv")[0][0] == "similarity"


def test_text_from_files_is_quoted_and_escaped(tmp_path: Path) -> None:
    """Files and folders may be called anything; modules and base models are what a file says."""
    module, base = "layers.0.x\u202ey", "backwards\u202e"
    pool = tmp_path / "pool"
    for i, name in enumerate(('a,"b"', "c")):
        make_adapter(pool / name, {module: (8, 6)}, seed=i, base_model_name_or_path=base + name)
    (pool / "\x1b]0;title\x07").write_text("")
    done("inspect", pool / 'a,"b"', "--csv", "x.csv", cwd=tmp_path)
    assert rows(tmp_path / "x.csv")[1][:2] == ['a,"b"', r"layers.0.x\u202ey"]
    commands = (["inspect", "pool/c"], ["inspect", "pool", "--json"], ["decompose", "pool", "-o", "out"])
    for command, shown in zip(commands, (r"x\u202ey", r"\u202e", r"left out \x1b]0;title\x07: a file"), strict=True):
        found = done(*command, cwd=tmp_path)
        printed = found.out + found.err
        assert all(c.isprintable() for c in printed.replace("\n", "")) and shown in printed
