"""Adapters of one training recipe are read by what was understood of the last one: the same as without."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import MODULES, PREFIX, gaussian, make_config, make_factors, peft_tensors, write_peft
from safetensors import safe_open
from safetensors.torch import save_file

from fastlora.adapters.loading import load
from fastlora.adapters.lora import Adapter
from fastlora.core.updates import Update
from fastlora.errors import InputError
from fastlora.files import tensor_files
from fastlora.formats.peft import alike

FIRST = next(iter(MODULES))
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "own alpha": {"alpha_pattern": {FIRST: 3}},
    "base": {"base_model_name_or_path": "org/model", "revision": "abc", "task_type": "CAUSAL_LM"},
}


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    for known in (alike._known, tensor_files._known):
        known.clear()
    yield
    for known in (alike._known, tensor_files._known):
        known.clear()


def written(place: Path, seed: int, dtype: torch.dtype = torch.float32, **fields: Any) -> Path:
    """An adapter whose metadata are its own."""
    tensors = peft_tensors(make_factors(seed=seed, dtype=dtype))
    write_peft(place, tensors, make_config(**fields))
    save_file(tensors, place / "adapter_model.safetensors", {"format": "pt", "seed": str(seed)})
    return place


def described(adapter: object) -> dict[str, object]:
    """All that an adapter is, but for the numbers in its factors."""
    assert isinstance(adapter, Adapter)
    updates = {m: (u.B.shape, u.A.shape, u.scaling, u.layout, u.noise) for m, u in adapter.updates.items()}
    return {
        "name": adapter.name, "updates": updates, "order": list(updates), "base": adapter.base, "dtype": adapter.dtype,
        "notes": adapter.notes, "extras": dict(adapter.extras), "provenance": adapter.provenance,
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", CASES)
def test_same_as_alone(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    first, second = (written(tmp_path / f"a{seed}", seed, dtype, **CASES[kind]) for seed in (1, 2))
    alone = described(load(second))
    nothing = len(alike._known)
    alike._known.clear()
    load(first)
    found = load(second)
    assert nothing == len(alike._known) == 1 and described(found) == alone
    for module, (B, A) in make_factors(seed=2, dtype=dtype).items():
        update = found.updates[module]  # type: ignore[union-attr]
        assert torch.equal(update.B.stored, B) and torch.equal(update.A.stored, A)


@pytest.mark.parametrize("kind", ["bias", "trained module", "DoRA", "training state"])
def test_what_holds_more_is_not_remembered(kind: str, tmp_path: Path) -> None:
    tensors = peft_tensors(make_factors())
    fields: dict[str, Any] = {}
    if kind == "bias":
        fields["lora_bias"] = True
        tensors[f"{PREFIX}{FIRST}.lora_B.bias"] = gaussian(MODULES[FIRST][0], seed=5)
    elif kind == "trained module":
        fields["modules_to_save"] = ["score"]
        tensors[f"{PREFIX}score.weight"] = gaussian(2, 3, seed=5)
    elif kind == "DoRA":
        fields["use_dora"] = True
        for module, (n, _) in MODULES.items():
            tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = gaussian(n, seed=5).abs()
    else:
        tensors[f"{PREFIX}{FIRST}.lora_velora_embed"] = gaussian(3, seed=5)
    write_peft(tmp_path / "a", tensors, make_config(**fields))
    load(tmp_path / "a")
    assert not alike._known


class Unmade:
    """What is made of files meanwhile."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made = 0
        original = alike._updates

        def counted(*arguments: Any) -> dict[str, Update]:
            self.made += 1
            time.sleep(0.05)  # so that threads meet
            return original(*arguments)

        monkeypatch.setattr(alike, "_updates", counted)


def test_updates_are_made_when_they_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(written(tmp_path / "a", 1))
    count = Unmade(monkeypatch)
    adapter = load(written(tmp_path / "b", 2))
    assert isinstance(adapter, Adapter) and adapter.name == "b" and adapter.notes == () and count.made == 0
    (tmp_path / "b" / "adapter_model.safetensors").unlink()  # it was mapped, whatever becomes of its name
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: adapter.updates, range(4)))
    assert all(f is adapter.updates for f in found) and type(adapter.updates) is dict
    made = count.made
    assert repr(adapter) == "Adapter('b', 4 modules, rank 4, float32)" and count.made == made
    assert torch.equal(adapter.updates[FIRST].B.stored, make_factors(seed=2)[FIRST][0])  # type: ignore[arg-type]


LOOKS: dict[str, Callable[[Adapter], Adapter]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda a: pickle.loads(pickle.dumps(a)),
    "replace": lambda a: dataclasses.replace(a, notes=("x",)),
}


@pytest.mark.parametrize("look", LOOKS)
def test_copies_of_what_nobody_has_looked_at(look: str, tmp_path: Path) -> None:
    load(written(tmp_path / "a", 1))
    adapter = load(written(tmp_path / "b", 2))
    assert isinstance(adapter, Adapter) and "updates" not in vars(adapter)
    other = LOOKS[look](adapter)
    assert list(other.updates) == sorted(MODULES)
    for module, (B, A) in make_factors(seed=2).items():
        assert torch.equal(other.updates[module].B.stored, B) and torch.equal(other.updates[module].A.stored, A)  # type: ignore[arg-type]
    assert vars(other).keys() == vars(adapter).keys() == {f.name for f in dataclasses.fields(Adapter)}


def test_a_class_has_no_updates() -> None:
    with pytest.raises(AttributeError, match="'Adapter' has no 'updates'"):
        Adapter.updates  # noqa: B018
    assert "updates" in dir(Adapter("x", {}))


def test_other_tensors_under_the_same_configuration(tmp_path: Path) -> None:
    """Only what was understood of the same names and shapes counts."""
    load(written(tmp_path / "a", 1))
    (module, factors), *others = make_factors(seed=2).items()
    fewer = write_peft(tmp_path / "fewer", peft_tensors(dict(others)), make_config())
    assert sorted(load(fewer).updates) == sorted(m for m, _ in others)  # type: ignore[union-attr]
    narrow = {module: (factors[0][:, :1].contiguous(), factors[1][:1].contiguous()), **dict(others)}
    write_peft(tmp_path / "narrow", peft_tensors(narrow), make_config())
    with pytest.raises(InputError, match="has rank 1 in"):
        load(tmp_path / "narrow")


def test_what_lies_beside_is_told_of_each(tmp_path: Path) -> None:
    load(written(tmp_path / "a", 1))
    torch.save({"x": torch.ones(2)}, written(tmp_path / "b", 2) / "value_head.pt")
    assert "value_head.pt beside it" in load(tmp_path / "b").notes[0]
    written(tmp_path / "old", 3)
    torch.save(peft_tensors(make_factors(seed=4)), tmp_path / "old" / "adapter_model.bin")
    assert "holds other tensors" in load(tmp_path / "old").notes[0]


@pytest.mark.parametrize(("name", "message"), [("a/b", "has a path separator"), ("", "is empty")])
def test_names_are_refused_as_ever(name: str, message: str, tmp_path: Path) -> None:
    for _ in range(2):
        load(written(tmp_path / "a", 1))
        with pytest.raises(InputError, match=message):
            load(tmp_path / "a", name)


def test_links_and_unfinished_outputs(tmp_path: Path) -> None:
    first = written(tmp_path / "a", 1)
    load(first)
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "adapter_config.json").symlink_to(first / "adapter_config.json")
    (linked / "adapter_model.safetensors").symlink_to(first / "adapter_model.safetensors")
    assert described(load(linked, "a")) == described(load(str(first)))
    (linked / "adapter_model.safetensors").unlink()
    (linked / "adapter_model.safetensors").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="does not exist"):
        load(linked)
    with pytest.raises(InputError, match="never finished"):
        load(written(tmp_path / ".out.partial-1" / "b", 2))


def test_zeros_are_told_of_each(tmp_path: Path) -> None:
    load(written(tmp_path / "a", 1))
    zeros = {m: (torch.zeros_like(B), A) for m, (B, A) in make_factors().items()}
    write_peft(tmp_path / "zeros", peft_tensors(zeros), make_config())
    assert "all its lora_B are zero" in load(tmp_path / "zeros").notes[0]


def test_zeros_beside_a_module_that_is_scaled_to_nothing(tmp_path: Path) -> None:
    fields = {"alpha_pattern": {FIRST: 0}}
    load(written(tmp_path / "a", 1, **fields))
    zeros = {m: (B if m == FIRST else torch.zeros_like(B), A) for m, (B, A) in make_factors().items()}
    write_peft(tmp_path / "zeros", peft_tensors(zeros), make_config(**fields))
    assert load(tmp_path / "a").notes == () and "changes nothing" in load(tmp_path / "zeros").notes[0]


def test_metadata_are_those_of_the_file(tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        file = written(tmp_path / f"a{seed}", seed) / "adapter_model.safetensors"
        with safe_open(file, framework="pt") as opened:
            assert tensor_files.read_header(file).metadata == opened.metadata() == {"format": "pt", "seed": str(seed)}
    assert len(tensor_files._known) == 1


@pytest.mark.parametrize(
    "metadata",
    ['{"format":"pt","format":"pt"}', '{"format":1}', '{"format":{"a":"b"}}', '{"format":"pt"', "[]", '{"a":"\\ud800'],
    ids=["twice", "a number", "an object", "open", "a list", "cut"],
)
def test_damaged_metadata_are_refused_behind_a_known_header(metadata: str, tmp_path: Path) -> None:
    place = written(tmp_path / "a", 1)
    file = place / "adapter_model.safetensors"
    save_file(peft_tensors(make_factors(seed=1)), file, {"seed": "1"})
    load(place)
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length].decode()
    own = json.dumps({"seed": "1"}, separators=(",", ":"))
    assert own in header
    damaged = header.replace(own, metadata).encode()
    file.write_bytes(len(damaged).to_bytes(8, "little") + damaged + raw[8 + length :])
    with pytest.raises(InputError, match=r"copy or download|remove one of the two"):
        load(place)
