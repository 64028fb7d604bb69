"""The cache of composed adapters: bounded, and nothing goes that a living process has given out."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastlora.errors import OutputError
from fastlora.integrations.serving import cache as caching
from fastlora.integrations.serving.cache import Cache

BYTES = 4096
ENTRY = BYTES + 200
"""More than an entry has, with its header and configuration."""


def staged(cache: Cache, key: str, size: int = BYTES) -> Path:
    path = cache.staging(key)
    path.mkdir()
    (path / "adapter_config.json").write_text("{}")
    save_file({"a": torch.zeros(size, dtype=torch.uint8)}, path / "adapter_model.safetensors")
    return path


def put(cache: Cache, key: str, size: int = BYTES) -> Path:
    return cache.put(key, staged(cache, key, size))


def kept(path: Path) -> set[str]:
    return {p.name for p in path.iterdir() if p.name[0] != "."}


OTHER = """
import sys
from pathlib import Path
from fastlora.integrations.serving.cache import Cache
cache = Cache(Path(sys.argv[1]), 1 << 30)
print(cache.find(sys.argv[2]), flush=True)
sys.stdin.read()
"""


def other_process(path: Path, key: str) -> subprocess.Popen[str]:
    """Another server that gives a key out, and runs until its input ends."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", OTHER, str(path), key], **pipes)  # type: ignore[call-overload]
    assert process.stdout is not None and process.stdout.readline().strip() == str(path / key)
    return process  # type: ignore[no-any-return]


def test_what_was_not_used_for_longest_goes_first_and_only_what_nobody_uses(tmp_path: Path) -> None:
    for key in ("a", "b", "c"):
        put(Cache(tmp_path, 1 << 30), key)  # by processes that ended: their objects and locks are gone
        os.utime(tmp_path / key, (0, {"a": 3, "b": 1, "c": 2}[key]))
    server = other_process(tmp_path, "b")
    try:
        os.utime(tmp_path / "b", (0, 1))  # the oldest, and in use
        mine = Cache(tmp_path, 3 * ENTRY)
        put(mine, "d")
        assert kept(tmp_path) == {"a", "b", "d"}
        put(mine, "e")
        assert kept(tmp_path) == {"b", "d", "e"}
        with pytest.raises(OutputError, match=r"3 results are in use by servers"):
            put(mine, "f")
        with pytest.raises(OutputError, match="is full"):
            Cache(tmp_path, 3 * BYTES).require_room()
        assert kept(tmp_path) == {"b", "d", "e"}
    finally:
        server.communicate()
    put(mine, "f")
    assert kept(tmp_path) == {"d", "e", "f"}
    assert not list((tmp_path / ".unfinished").iterdir()) and len(list((tmp_path / ".leases").iterdir())) == 1


def test_a_killed_server_holds_nothing(tmp_path: Path) -> None:
    put(Cache(tmp_path, 1 << 30), "a")
    server = other_process(tmp_path, "a")
    server.kill()
    server.communicate()
    put(Cache(tmp_path, ENTRY), "b")
    assert kept(tmp_path) == {"b"}


def test_the_second_of_two_results_for_a_key_is_dropped(tmp_path: Path) -> None:
    first, second = Cache(tmp_path, 1 << 30), Cache(tmp_path, 1 << 30)
    mine = staged(second, "a")
    assert put(first, "a") == second.put("a", mine) == tmp_path / "a"
    assert not mine.exists() and kept(tmp_path) == {"a"}


def test_a_result_that_is_larger_than_the_cache_is_refused_and_nothing_goes_for_it(tmp_path: Path) -> None:
    put(Cache(tmp_path, 1 << 30), "a")
    with pytest.raises(OutputError, match="is full"):
        put(Cache(tmp_path, 2 * ENTRY), "b", 3 * BYTES)
    assert kept(tmp_path) == {"a"} and not list((tmp_path / ".unfinished").iterdir())


@pytest.mark.parametrize("damage", ["short", "empty", "gone"])
def test_a_damaged_result_is_no_result(tmp_path: Path, damage: str) -> None:
    put(Cache(tmp_path, 1 << 30), "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1] if damage == "short" else b"")
    cache = Cache(tmp_path, 1 << 30)
    assert cache.find("a") is None and not kept(tmp_path)
    assert put(cache, "a") == cache.find("a")


def test_a_cache_that_was_deleted_begins_again_with_all_that_is_in_use(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    cache = Cache(path, 1 << 30)
    put(cache, "a")
    path.rename(tmp_path / "gone")
    put(cache, "a")
    put(cache, "b")
    (lease,) = (path / ".leases").iterdir()
    assert set(lease.read_text().split()) >= {"a", "b"}
    with pytest.raises(OutputError, match="2 results are in use"):
        put(Cache(path, 2 * ENTRY), "c")


def test_what_was_left_unfinished_goes_after_a_day(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 1 << 30)
    old, new = staged(cache, "x"), staged(cache, "y")
    os.utime(old, (0, time.time() - 2 * 86_400))
    put(cache, "a")
    assert not old.exists() and new.exists()


def test_a_lock_that_never_comes_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path, 1 << 30)
    put(cache, "a")
    monkeypatch.setattr(caching, "PATIENCE", 0.05)
    started, ended = threading.Event(), threading.Event()

    def hold() -> None:
        with cache._locked():
            started.set()
            ended.wait(600)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert started.wait(600)
        with pytest.raises(OutputError, match="is held by another process"):
            cache.find("a")
    finally:
        ended.set()
        thread.join()
    assert cache.find("a") is not None


def test_a_fork_has_a_lease_of_its_own(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 1 << 30)
    put(cache, "a")
    put(cache, "b")
    child = os.fork()
    if not child:
        ok = cache.find("b") is not None and cache._given == {"b"} and len(list((tmp_path / ".leases").iterdir())) == 2
        os._exit(0 if ok else 1)
    assert os.waitpid(child, 0)[1] == 0
