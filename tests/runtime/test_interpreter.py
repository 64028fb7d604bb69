"""Python's garbage collector while adapters are made, and the turns of its threads while they are written."""

from __future__ import annotations

import gc
import sys

import pytest

from fastlora.runtime.cpython import HANDOVER_SECONDS, paused_collector, quick_handover


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


def test_turns_are_short_inside_and_come_back_after_the_last_block() -> None:
    before = sys.getswitchinterval()
    first, second = quick_handover(), quick_handover()
    with first:
        assert sys.getswitchinterval() == pytest.approx(HANDOVER_SECONDS)
        second.__enter__()
    assert sys.getswitchinterval() == pytest.approx(HANDOVER_SECONDS)
    second.__exit__(None, None, None)
    assert sys.getswitchinterval() == before


def test_shorter_turns_are_left_alone() -> None:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with quick_handover():
            assert sys.getswitchinterval() == pytest.approx(1e-5)
    finally:
        sys.setswitchinterval(before)
