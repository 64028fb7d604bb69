"""Seeded pools with the shapes of real models, for benchmarks: decaying spectra and a planted shared subspace."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

import fastlora
from fastlora.adapters.lora import Adapter
from fastlora.adapters.pool import Pool
from fastlora.bench.contest import Unavailable
from fastlora.core.factors import Factor
from fastlora.core.updates import Update
from fastlora.errors import InputError
from fastlora.files.output import OutputDirectory

ModuleShape = tuple[int, int]

SHARED = 4  # planted common directions, strongest in every adapter
DECAY = 0.85  # ratio of neighbouring singular values
SCALING = 2.0


@dataclass(frozen=True, slots=True)
class Workload:
    """``adapters`` of rank ``rank`` on the modules ``{name: (out, in)}``."""

    modules: Mapping[str, ModuleShape]
    adapters: int
    rank: int
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Of all factors."""
        return sum(n + m for n, m in self.modules.values()) * self.adapters * self.rank * self.dtype.itemsize

    def head(self, count: int) -> Workload:
        """The first modules alone: enough to check an answer on."""
        return replace(self, modules=dict(islice(self.modules.items(), count)))


def repeated(prefix: str, layers: int, modules: Mapping[str, ModuleShape]) -> dict[str, ModuleShape]:
    """The modules of every layer, named ``prefix.<layer>.<module>``."""
    return {f"{prefix}.{i}.{name}": shape for i in range(layers) for name, shape in modules.items()}


def llama(layers: int, hidden: int, kv: int, mlp: int) -> dict[str, ModuleShape]:
    """Every linear module of the layers."""
    layer = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (mlp, hidden),
        "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
    }
    return repeated("model.layers", layers, layer)


def flux(double: int = 19, single: int = 38, hidden: int = 3072, mlp: int = 12288) -> dict[str, ModuleShape]:
    """Every linear module of the transformer's blocks, under the names that diffusers gives them."""
    square = (hidden, hidden)
    of_double = {
        "norm1.linear": (6 * hidden, hidden),
        "norm1_context.linear": (6 * hidden, hidden),
        **{f"attn.{x}": square for x in ("to_q", "to_k", "to_v", "to_out.0")},
        **{f"attn.{x}": square for x in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")},
        "ff.net.0.proj": (mlp, hidden),
        "ff.net.2": (hidden, mlp),
        "ff_context.net.0.proj": (mlp, hidden),
        "ff_context.net.2": (hidden, mlp),
    }
    of_single = {
        "norm.linear": (3 * hidden, hidden),
        **{f"attn.{x}": square for x in ("to_q", "to_k", "to_v")},
        "proj_mlp": (mlp, hidden),
        "proj_out": (hidden, hidden + mlp),
    }
    return {
        **repeated("transformer_blocks", double, of_double),
        **repeated("single_transformer_blocks", single, of_single),
    }


def vit(layers: int = 12, hidden: int = 768, mlp: int = 3072) -> dict[str, ModuleShape]:
    """Every linear module of the image encoder's layers."""
    attention = {f"self_attn.{x}_proj": (hidden, hidden) for x in ("q", "k", "v", "out")}
    layer = {**attention, "mlp.fc1": (mlp, hidden), "mlp.fc2": (hidden, mlp)}
    return repeated("vision_model.encoder.layers", layers, layer)


LLAMA_7B = llama(layers=32, hidden=4096, kv=4096, mlp=11008)

WORKLOADS = {
    "llama2-7b-8x16": Workload(LLAMA_7B, 8, 16, torch.bfloat16),
    "llama2-7b-8x16-fp32": Workload(LLAMA_7B, 8, 16, torch.float32),
    "llama3-70b-8x16": Workload(llama(layers=80, hidden=8192, kv=1024, mlp=28672), 8, 16, torch.bfloat16),
    "llama3-8b-6x16": Workload(llama(layers=32, hidden=4096, kv=1024, mlp=14336), 6, 16, torch.float32),
    "flux-4x32": Workload(flux(), 4, 32, torch.bfloat16),
    "vit-b32-8x16": Workload(vit(), 8, 16, torch.float32),
}
"""Name → what is generated."""

REAL = "minilm"
"""The trained adapters that lie beside the source, in examples/adapters."""

NAMES = (*WORKLOADS, REAL)


def find(name: str) -> Workload:
    """A generated workload by name."""
    if name not in WORKLOADS:
        raise InputError(f"workload {name!r} does not exist: use one of {', '.join(WORKLOADS)}")
    return WORKLOADS[name]


def pool_of(name: str, modules: int | None = None) -> Pool:
    """The pool of a workload by name, in memory; of its first modules alone where a number is given."""
    if name == REAL:
        return Pool.load(real_adapters())
    workload = find(name)
    return make_pool(workload if modules is None else workload.head(modules))


def real_adapters() -> list[Path]:
    """The directories of the trained adapters."""
    folder = Path(fastlora.__file__).parents[1] / "examples" / "adapters"
    folders = sorted(p.parent for p in folder.glob("*/adapter_config.json"))
    if not folders:
        raise Unavailable(
            f"workload {REAL!r} is the adapters in examples/adapters, which are not beside this installation "
            f"({folder}); run from a source checkout installed with `pip install -e .`"
        )
    return folders


def make_pool(workload: Workload, seed: int = 0) -> Pool:
    """The pool of a workload in memory; the same values on every machine."""
    updates: list[dict[str, Update]] = [{} for _ in range(workload.adapters)]
    for module, factors in module_factors(workload, seed):
        for own_updates, (B, A) in zip(updates, factors, strict=True):
            own_updates[module] = _update(B, A)
    return Pool(Adapter(f"adapter{i}", own_updates, dtype=workload.dtype) for i, own_updates in enumerate(updates))


def write_pool(workload: Workload, folder: Path, seed: int = 0) -> list[Path]:
    """Writes the pool of a workload as PEFT directories below ``folder``, module by module, and returns them.

    The values are those of :func:`make_pool`, with the scaling inside ``B`` (a power of two: no rounding); one module
    is in memory at a time.
    """
    from fastlora.formats.peft.writing import AdapterFile

    names = [f"adapter{i}" for i in range(workload.adapters)]
    with OutputDirectory(folder) as staging:
        files = []
        for name in names:
            outlines = {
                m: (torch.empty(n, workload.rank, device="meta"), torch.empty(workload.rank, k, device="meta"))
                for m, (n, k) in workload.modules.items()
            }
            adapter = Adapter(name, {m: _update(B, A) for m, (B, A) in outlines.items()}, dtype=workload.dtype)
            files.append(AdapterFile(staging / name, adapter, outlines, workload.dtype))
        for module, factors in module_factors(workload, seed):
            for file, (B, A) in zip(files, factors, strict=True):
                file.put({module: (SCALING * B, A)})
        for file in files:
            file.close()
    return [folder / name for name in names]


def _update(B: Tensor, A: Tensor) -> Update:
    return Update(Factor.of("B", B), Factor.of("A", A), SCALING)


def module_factors(workload: Workload, seed: int = 0) -> Iterator[tuple[str, list[tuple[Tensor, Tensor]]]]:
    """``(module, [(B [n, r], A [r, m]) of each adapter])``, module by module."""
    generator = torch.Generator().manual_seed(seed)
    for module, (n, m) in workload.modules.items():
        common = torch.randn(n, SHARED, generator=generator) / n**0.5
        drawn = [_factors(n, m, workload.rank, common, generator) for _ in range(workload.adapters)]
        yield module, [(B.to(workload.dtype), A.to(workload.dtype)) for B, A in drawn]


def _factors(n: int, m: int, r: int, common: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``B [n, r]`` whose first columns are near the common ones, ``A [r, m]``; singular values of ``BA`` decay."""
    B = torch.randn(n, r, generator=generator) / n**0.5
    B[:, :SHARED] = common[:, :r] + 0.05 * B[:, :SHARED]
    A = torch.randn(r, m, generator=generator) / m**0.5
    return B * DECAY ** torch.arange(r), A
