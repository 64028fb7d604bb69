"""Adapters in the weights of a model, from files to files: against a copy of its folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

import fastlora as fl
from fastlora.bench.contest import OURS, Contest, Task, Unavailable, require
from fastlora.bench.files import clear, size_of
from fastlora.bench.timing import Contender, thread_counts

COPY = "cp -r of the folder"
BOUND = "1GiB"
ALLOWED = 2**30
"""Resident bytes of the command: the bound, Python and torch included."""
RANK = 16
SHARDS = 5


@dataclass(frozen=True, slots=True)
class Sizes:
    """A model with the layers of Llama, in bfloat16."""

    layers: int = 22
    hidden: int = 2048
    inner: int = 5632
    keys: int = 256
    words: int = 32000

    def linear(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Names and shapes ``[out, in]`` of the modules that the adapter changes: all in the layers."""
        for i in range(self.layers):
            for module, out, of in (
                ("self_attn.q_proj", self.hidden, self.hidden), ("self_attn.k_proj", self.keys, self.hidden),
                ("self_attn.v_proj", self.keys, self.hidden), ("self_attn.o_proj", self.hidden, self.hidden),
                ("mlp.gate_proj", self.inner, self.hidden), ("mlp.up_proj", self.inner, self.hidden),
                ("mlp.down_proj", self.hidden, self.inner),
            ):  # fmt: skip
                yield f"model.layers.{i}.{module}", (out, of)


def small() -> list[Contest]:
    """A model of 2.2 GB."""
    return apply("2.2 GB", Sizes())


def large() -> list[Contest]:
    """A model of 5.3 GB."""
    return apply("5.3 GB", Sizes(layers=24, hidden=3072, inner=8192, keys=1024))


def apply(size: str, sizes: Sizes) -> list[Contest]:
    """``fl.apply`` of an adapter of all linear modules, and the command, whose start and imports count."""
    what = f"apply r{RANK} to a model of {size}, warm cache"
    return [
        Contest(what, (COPY,), partial(_prepare, sizes, whole=False)),
        Contest(f"{what}, the whole command", (COPY,), partial(_prepare, sizes, whole=True)),
    ]


def write_model(sizes: Sizes, folder: Path) -> None:
    """Random weights in shards, with an index and a configuration."""
    shapes = {"model.embed_tokens.weight": (sizes.words, sizes.hidden), "lm_head.weight": (sizes.words, sizes.hidden)}
    shapes |= {f"{name}.weight": shape for name, shape in sizes.linear()}
    folder.mkdir()
    places: dict[str, str] = {}
    names = list(shapes)
    step = -(-len(names) // SHARDS)
    for shard in range(-(-len(names) // step)):
        file = f"model-{shard + 1:05d}-of-{-(-len(names) // step):05d}.safetensors"
        tensors = {
            n: _random(shapes[n], len(places) + i) for i, n in enumerate(names[shard * step : (shard + 1) * step])
        }
        save_file(tensors, folder / file, {"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": False}))


def make_adapter(sizes: Sizes) -> fl.Adapter:
    """Random factors in bfloat16 for all linear modules."""
    pairs = {}
    for i, (name, (n, m)) in enumerate(sizes.linear()):
        pairs[name] = _random((n, RANK), 2 * i + 1), _random((RANK, m), 2 * i), 2.0
    return fl.Adapter.from_tensors(pairs, name="bench")


def _random(shape: tuple[int, int], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (0.02 * torch.randn(shape, generator=generator)).to(torch.bfloat16)


def _prepare(sizes: Sizes, *, whole: bool) -> Task:
    if os.name != "posix":
        raise Unavailable("there is no cp to compare with")
    folder = tempfile.TemporaryDirectory()
    root = Path(folder.name)
    write_model(sizes, root / "base")
    adapter = make_adapter(sizes)
    adapter.save(root / "adapter")
    ours = partial(command, root) if whole else partial(fl.apply, root / "base", adapter, root / "out")
    peak = int(command(root, "-c", CHILD))
    if peak > ALLOWED:
        raise AssertionError(f"memory={BOUND}: {peak} bytes were resident")
    _require_output(root, adapter)
    contenders = {
        OURS: Contender(ours, thread_counts(), reset=partial(clear, root / "out")),
        COPY: Contender(
            lambda: subprocess.run(["cp", "-r", "base", "copy"], cwd=root, check=True),
            reset=partial(clear, root / "copy"),
        ),
    }
    size, weights = size_of([root / "base"]), sum(n * m for _, (n, m) in sizes.linear())
    note = f"apply: {size / 1e9:.2f} GB read and written; at most {peak / 2**20:.0f} MiB resident with memory={BOUND}"
    return Task(contenders, 2 * size, {torch.float32: 2.0 * RANK * weights}, note=note, close=folder.cleanup)


CHILD = """
from fastlora.bench.files import peak_memory
from fastlora.cli.app import main
try:
    main()
finally:
    print(peak_memory())
"""


def command(root: Path, *how: str) -> str:
    """Runs the command in a process of its own, and returns what it prints."""
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    arguments = ["apply", "base", "adapter", "--out", "out", "--memory", BOUND, "--quiet"]
    run = [sys.executable, *(how or ("-m", "fastlora")), *arguments]
    return subprocess.run(run, cwd=root, env=environment, stdout=subprocess.PIPE, check=True, text=True).stdout


def _require_output(root: Path, adapter: fl.Adapter) -> None:
    """The first changed weight of every file, against the definition."""
    for file in sorted((root / "base").glob("*.safetensors")):
        with safe_open(file, framework="pt") as before, safe_open(root / "out" / file.name, framework="pt") as after:
            name = next((n for n in before.keys() if n.removesuffix(".weight") in adapter), None)
            if name is None:
                continue
            wanted = before.get_tensor(name).double() + adapter.delta(name.removesuffix(".weight")).double()
            require(name, after.get_tensor(name), wanted, 2.0**-8)
