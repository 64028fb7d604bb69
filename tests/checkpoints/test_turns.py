"""The order in which threads take what there is to write."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fastlora.checkpoints.layout import OutputFile, Unit
from fastlora.checkpoints.turns import Turns


def units(**counts: int) -> list[Unit]:
    """So many units of 10 bytes in files of these names."""
    files = {name: OutputFile(Path(name), Path(name), b"", 0, ()) for name in counts}
    return [Unit(f"{n} {i}", files[n], 0, 10, 0, size=10) for n, count in counts.items() for i in range(count)]


def test_threads_are_at_different_files() -> None:
    turns = Turns(units(a=2, b=4, c=3))
    first, second, third, fourth = (turns.taken() for _ in range(4))
    assert [next(taken).key for taken in (first, second, third)] == ["b 0", "c 0", "a 0"]
    assert next(fourth).key == "b 1"  # all are at work: of the fullest
    assert next(second).key == "c 1"  # its own is free again, and has more left than that of the third
    third.close()
    assert [unit.key for unit in second] == ["a 1", "c 2", "b 2", "b 3"]  # at b are two
    assert next(first, None) is None


def test_each_is_taken_once() -> None:
    given = units(a=40, b=1, c=25)
    turns = Turns(given)
    with ThreadPoolExecutor(4) as pool:
        taken = [unit.key for part in pool.map(lambda _: list(turns.taken()), range(4)) for unit in part]
    assert Counter(taken) == Counter(unit.key for unit in given)


def test_no_more_are_taken_after_a_stop() -> None:
    turns = Turns(units(a=3, b=3))
    taken = turns.taken()
    next(taken)
    turns.stop()
    assert list(taken) == [] and list(turns.taken()) == []
