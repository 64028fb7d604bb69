"""Written PEFT directories: exact configuration, exact tensors, equal bytes for equal contents."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import MODULES, gaussian, make_adapter, make_factors, write
from safetensors import safe_open
from torch import Tensor

from fastlora.adapters.loading import load
from fastlora.adapters.lora import Adapter
from fastlora.core.data import BaseInfo, Extra
from fastlora.core.factors import Factor
from fastlora.core.patterns import Patterns
from fastlora.core.updates import Layout, Update
from fastlora.errors import OutputError
from fastlora.files import tensor_writing
from fastlora.files.tensor_writing import TensorFile
from fastlora.formats.peft.names import exact_pattern
from fastlora.formats.peft.selection import exclude_pattern
from fastlora.ops.dispatch import use_backend

pytestmark = pytest.mark.portable

Q = "model.layers.0.self_attn.q_proj"


def adapter_of(
    factors: dict[str, tuple[Tensor, Tensor]],
    *,
    layouts: dict[str, Layout] | None = None,
    extras: dict[str, Extra] | None = None,
    base: BaseInfo | None = None,
) -> Adapter:
    updates = {
        module: Update(Factor.of("B", b), Factor.of("A", a), layout=(layouts or {}).get(module, Layout()))
        for module, (b, a) in factors.items()
    }
    return Adapter("made", updates, extras=extras or {}, base=base or BaseInfo(), provenance={"merge": ["a", "b"]})


def config_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "adapter_config.json").read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_round_trip_is_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    ranks = dict(zip(MODULES, (1, 2, 4, 3), strict=True))
    factors = make_factors(rank=ranks, dtype=dtype)
    write(tmp_path / "a", adapter_of(factors), factors, dtype)
    again = load(tmp_path / "a")
    assert again.dtype == dtype
    for module, (b, a) in factors.items():
        update = again.updates[module]
        assert update.scaling == 1.0 and update.B.stored is not None and update.A.stored is not None
        assert torch.equal(update.B.stored, b) and torch.equal(update.A.stored, a)


def test_scaling_is_one_with_and_without_patterns(tmp_path: Path) -> None:
    factors = make_factors(rank=dict(zip(MODULES, (1, 2, 4, 4), strict=True)))
    write(tmp_path / "a", adapter_of(factors), factors, torch.float32)
    config = config_of(tmp_path / "a")
    assert config["r"] == config["lora_alpha"] == 4
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert sorted(config["rank_pattern"].values()) == [1, 2]
    assert config["use_rslora"] is False and config["inference_mode"] is True


def test_what_the_adapter_says_about_its_base_is_kept(tmp_path: Path) -> None:
    base = BaseInfo("some/model", "v2", "CAUSAL_LM", True, ((0, 2), (1, 3)))
    factors = make_factors()
    write(tmp_path / "a", adapter_of(factors, base=base), factors, torch.float32)
    assert replace(load(tmp_path / "a").base, selection=base.selection) == base


def test_layouts_come_back(tmp_path: Path) -> None:
    factors = {
        "embed": (gaussian(12, 2, seed=1), gaussian(2, 50, seed=2)),
        "conv": (gaussian(10, 3, seed=3), gaussian(3, 6 * 15, seed=4)),
        "point": (gaussian(10, 3, seed=5), gaussian(3, 6, seed=6)),
        "mlp.experts.gate_up_proj[1]": (gaussian(20, 2, seed=7), gaussian(2, 8, seed=8)),
        "mlp.experts.gate_up_proj[3]": (gaussian(20, 4, seed=9), gaussian(4, 8, seed=10)),
        "mlp.experts.down_proj[0]": (gaussian(8, 1, seed=11), gaussian(1, 10, seed=12)),
    }
    layouts = {
        "embed": Layout("embedding"),
        "conv": Layout("conv", kernel=(3, 5)),
        "point": Layout("conv", kernel=(1,)),
        **{m: Layout("expert", container=m[:-3], expert=int(m[-2]), experts=4) for m in factors if m.endswith("]")},
    }
    write(tmp_path / "a", adapter_of(factors, layouts=layouts), factors, torch.float32)
    again = load(tmp_path / "a")
    assert len(again.modules) == 3 + 4 + 4
    for module, (b, a) in factors.items():
        update = again.updates[module]
        assert update.layout == layouts[module]
        assert update.B.stored is not None and update.A.stored is not None
        torch.testing.assert_close(update.B.stored @ update.A.stored, b @ a)
    empty = again.updates["mlp.experts.gate_up_proj[0]"].B.stored
    assert empty is not None and not empty.any()


def test_parameters_whose_nesting_is_unknown_are_refused(tmp_path: Path) -> None:
    factors = {f"mixer.{p}[0]": (torch.ones(4, 1), torch.ones(1, 4)) for p in ("alpha", "beta")}
    layouts = {m: Layout("expert", container=m[:-3]) for m in factors}
    with pytest.raises(OutputError, match="alpha, beta"):
        write(tmp_path / "a", adapter_of(factors, layouts=layouts), factors, torch.float32)


def test_extras_come_back(tmp_path: Path) -> None:
    factors = make_factors()
    extras = {
        f"{Q}.bias": Extra("delta", gaussian(24, seed=1)),
        "model.layers.1.self_attn.q_proj.bias": Extra("value", gaussian(24, seed=2)),
        "model.norm.bias": Extra("value", gaussian(16, seed=3, dtype=torch.float64)),
        "head.dense.weight": Extra("value", gaussian(3, 16, seed=4, dtype=torch.bfloat16)),
        "head.steps": Extra("value", torch.tensor(7)),
        "embed_tokens.weight": Extra("value", gaussian(50, 16, seed=5)),
    }
    base = BaseInfo(bias="all", modules_to_save=("head", "unused"))
    write(tmp_path / "a", adapter_of(factors, extras=extras, base=base), factors, torch.float32)
    config = config_of(tmp_path / "a")
    assert (config["bias"], config["lora_bias"], config["modules_to_save"]) == ("all", True, ["head"])
    again = load(tmp_path / "a").extras
    for path, extra in extras.items():
        assert again[path].kind == extra.kind and torch.equal(again[path].tensor, extra.tensor), path
    others = again.keys() - extras.keys()
    assert others and all(again[p].kind == "delta" and not again[p].tensor.any() for p in others)


def test_a_bias_that_changes_alone_gets_zero_factors(tmp_path: Path) -> None:
    factors = make_factors()
    adapter = adapter_of(factors, extras={f"{Q}.bias": Extra("delta", gaussian(24, seed=1))})
    write(tmp_path / "a", adapter, {m: f for m, f in factors.items() if m != Q}, torch.float32)
    update = load(tmp_path / "a").updates[Q]
    assert update.rank == 1 and update.B.stored is not None and not update.B.stored.any()


def test_biases_beside_embeddings_are_refused(tmp_path: Path) -> None:
    factors = make_factors({"embed": (12, 50), Q: (24, 16)})
    adapter = adapter_of(
        factors, layouts={"embed": Layout("embedding")}, extras={f"{Q}.bias": Extra("delta", torch.ones(24))}
    )
    with pytest.raises(OutputError, match=r"lora_bias.*embedding 'embed'"):
        write(tmp_path / "a", adapter, factors, torch.float32)


@pytest.mark.parametrize("side", [0, 1], ids=["B", "A"])
def test_overflow_is_an_error_that_names_the_way_out(tmp_path: Path, side: int) -> None:
    factors = make_factors()
    factors[Q][side][2, 3] = 1e5
    with pytest.raises(OutputError, match=rf"{Q}' has values up to 1e\+05.*float16.*dtype=float32"):
        write(tmp_path / "a", adapter_of(factors), factors, torch.float16)
    write(tmp_path / "b", adapter_of(factors), factors, torch.bfloat16)


def test_nothing_to_write_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no factors"):
        write(tmp_path / "a", adapter_of(make_factors()), {}, torch.float32)


def test_views_of_one_mapping_and_of_each_other_are_written(tmp_path: Path) -> None:
    adapter = load(make_adapter(tmp_path / "a", odd=True))
    factors = {m: (u.B.stored, u.A.stored) for m, u in adapter.updates.items()}
    first = factors[Q]
    factors["model.layers.9.self_attn.q_proj"] = first
    assert first[0] is not None and first[1] is not None
    factors["model.layers.8.self_attn.q_proj"] = first[0][:, :2], first[1][:2]
    write(tmp_path / "b", adapter, factors, torch.float32)  # type: ignore[arg-type]
    again = load(tmp_path / "b")
    for module, (b, a) in factors.items():
        assert torch.equal(again.updates[module].B.stored, b)  # type: ignore[arg-type]
        assert torch.equal(again.updates[module].A.stored, a)  # type: ignore[arg-type]


def test_metadata_says_where_it_comes_from(tmp_path: Path) -> None:
    factors = make_factors()
    write(tmp_path / "a", adapter_of(factors), factors, torch.float32)
    with safe_open(tmp_path / "a" / "adapter_model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    said = json.loads(metadata["fastlora"])
    assert said["provenance"] == {"merge": ["a", "b"]} and said["version"]


SAME_BYTES = """
import hashlib, sys, torch
from dataclasses import replace
from pathlib import Path
from builders import make_factors, write
from test_peft_write import adapter_of
factors = make_factors()
write(Path(sys.argv[1]), adapter_of(factors), factors, torch.float32)
"""


def test_equal_runs_give_equal_bytes(tmp_path: Path) -> None:
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent), str(Path(__file__).parents[2])]
    script = f"import sys; sys.path[:0] = {paths!r}\n" + SAME_BYTES
    digests = set()
    for seed in "123":  # of the order that sets of text have
        directory = tmp_path / seed
        environment = os.environ | {"PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", script, str(directory)], env=environment, check=True)
        digests.add(tuple(hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(directory.iterdir())))
    assert len(digests) == 1


def test_a_full_disk_is_one_clear_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    factors = make_factors()
    # The compiled writer is met by a disk that is really full in tests/cli; this is the one that can be replaced.
    with use_backend("reference"), pytest.raises(OutputError, match=r"could not be written: the disk is full"):
        write(tmp_path / "a", adapter_of(factors), factors, torch.float32)


def test_the_first_tensor_is_on_a_page_and_the_file_has_its_room(tmp_path: Path) -> None:
    outlines = {"a": torch.empty(1 << 20, dtype=torch.uint8, device="meta")}
    file = TensorFile(tmp_path / "x.safetensors", outlines, {})
    status = (tmp_path / "x.safetensors").stat()
    assert file.offset("a") % 4096 == 0 and status.st_size == file.offset("a") + (1 << 20)
    assert 512 * status.st_blocks >= status.st_size


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOSPC])
def test_a_file_system_that_gives_no_room_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(*args: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    monkeypatch.setattr(tensor_writing, "SMALL_BYTES", 0)
    factors = make_factors()
    if code == errno.ENOSPC:
        with pytest.raises(OutputError, match="the disk is full"):
            write(tmp_path / "a", adapter_of(factors), factors, torch.float32)
        return
    write(tmp_path / "a", adapter_of(factors), factors, torch.float32)
    assert set(load(tmp_path / "a").modules) == set(factors)


MODULE_NAMES = ["layers.1.x", "layers.11.x", "a.layers.1.x", "layers.1.xx", "layersA1.x", "x", "layers.1.x.x"]


@pytest.mark.parametrize("module", MODULE_NAMES)
def test_exact_pattern_matches_one_module(module: str) -> None:
    pattern = exact_pattern(module)
    patterns = Patterns({pattern: 3}, "the test")
    assert [m for m in MODULE_NAMES if patterns.value(m) == 3] == [module]


@pytest.mark.parametrize(
    "targets",
    [["x.query"], ["model.x.q", "model.y.q"], ["query", "a.b"], ["a.x", "b.a.x"], ["a.b", "a.c.a.b"]],
    ids=repr,
)
def test_exclude_pattern_leaves_the_exact_modules(targets: list[str]) -> None:
    pattern = re.compile(exclude_pattern(targets, targets))
    others = [f"{top}.{t}" for top in ("y", "model", "a", "z.w") for t in targets]
    for path in {*others, *targets}:
        suffix = any(path == t or path.endswith("." + t) for t in targets)
        assert (suffix and not pattern.fullmatch(path)) == (path in targets), path
