"""Python's garbage collector while adapters are made."""

from __future__ import annotations

import gc

import pytest

from fastlora.runtime.cpython import paused_collector


def test_it_is_paused_and_comes_back() -> None:
    assert gc.isenabled()
    with pytest.raises(KeyError), paused_collector():
        assert not gc.isenabled()
        raise KeyError
    assert gc.isenabled()


def test_a_program_that_has_it_off_keeps_it_off() -> None:
    gc.disable()
    try:
        with paused_collector():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_what_was_made_is_old_and_still_collected() -> None:
    before = gc.get_freeze_count()
    with paused_collector():
        made = [[i] for i in range(1000)]
        made.append(made)
    assert any(x is made for x in gc.get_objects(generation=2))
    assert gc.get_freeze_count() <= before
    del made
    assert gc.collect() > 0


def test_what_a_program_froze_stays_frozen() -> None:
    gc.freeze()
    try:
        before = gc.get_freeze_count()
        with paused_collector():
            pass
        assert gc.get_freeze_count() >= before - 10 > 0  # a few may die meanwhile
    finally:
        gc.unfreeze()
