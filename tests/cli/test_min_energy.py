"""``--min-energy``: how much of a merge of elements an adapter must keep."""

from __future__ import annotations

from pathlib import Path

from builders import make_adapter
from command import done, refused


def test_losses_are_refused_until_they_are_accepted(tmp_path: Path) -> None:
    for i, name in enumerate("ab"):
        make_adapter(tmp_path / name, seed=i)
    merge = "merge", "a", "b", "--method", "ties"
    message = refused(*merge, "--rank", "2", "-o", "out", cwd=tmp_path)
    assert "rank 2 keeps 0." in message and "below min_energy=0.9" in message
    assert not (tmp_path / "out").exists()
    accepted = message.split("(`--min-energy ")[1].split("`")[0]
    done(*merge, "--rank", "2", "--min-energy", accepted, "-o", "out", cwd=tmp_path)
    found = done(*merge, "--energy", "0.9", "-o", "wide", "--json", cwd=tmp_path).json()
    assert found["retained_energy"] >= 0.9
    assert "use the option --min-energy" in refused(
        *merge, "--rank", "2", "--set", "min_energy=0.1", "-o", "x", cwd=tmp_path
    )
    assert "does not take min_energy" in refused(
        "merge", "a", "b", "--method", "svd", "--rank", "2", "--min-energy", "0.1", "-o", "x", cwd=tmp_path
    )
    assert "min_energy" in refused("merge", "a", "b", "--min-energy", "0.1", "-o", "x", cwd=tmp_path)
    assert "--min-energy NUMBER (0.9 by default)" in done("methods", "ties", cwd=tmp_path).out
