"""Writing PEFT directories that every reader takes for the same numbers.

All scaling is inside the factors, so ``r = lora_alpha`` gives the scaling 1 also to readers that ignore
``rank_pattern`` and ``alpha_pattern``, which list the modules of a smaller rank.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlora._version import __version__
from fastlora.core.card import adapter_card
from fastlora.core.data import BaseInfo, LoraData
from fastlora.core.factors import Factor, Side
from fastlora.core.names import CONFIG_NAME, EMBEDDINGS
from fastlora.core.updates import Layout
from fastlora.errors import OutputError
from fastlora.files.card import write_card
from fastlora.files.small_files import make_folder, write_text
from fastlora.files.tensor_writing import InOneFile, TensorFile, cast_tensor
from fastlora.formats.peft.experts import VERSIONS
from fastlora.formats.peft.names import (
    HEADS,
    PREFIX,
    REGISTRATION_ORDER,
    WEIGHTS_NAME,
    WRAPPED,
    saved_module,
)
from fastlora.formats.peft.selection import module_fields, rank_patterns, selected_parameters

NAMES: Mapping[Side, str] = {"A": "lora_A.weight", "B": "lora_B.weight"}
LIBRARY = "peft"
"""What loads these directories, by its name on the Hub."""

AS_JSON = json.JSONEncoder(default=str).encode

EMBEDDING_NAMES: Mapping[Side, str] = {"A": "lora_embedding_A", "B": "lora_embedding_B"}


@dataclass(slots=True)
class FileContents:
    """What the two files will say."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)
    modules_to_save: list[str] = field(default_factory=list)
    bias: str = "none"
    lora_bias: bool = False


class AdapterFile(InOneFile):
    """A PEFT directory that is written piece by piece, each tensor where its place in the file will be.

    The shapes of all factors must be known at the start (``outlines``: factors, best on the meta device), since the
    header of a safetensors file comes first; the factors themselves are given to :meth:`put`, some modules at a time
    and in any order (the experts of one parameter together), and :meth:`close` writes the configuration. Nothing of a
    tensor is kept here but ``magnitudes``, ``{name: tensor}``, which make a DoRA of it.

    Raises :class:`OutputError` for contents that no PEFT directory can express and when writing fails.
    """

    def __init__(
        self,
        directory: Path,
        adapter: LoraData,
        outlines: Mapping[str, tuple[Tensor, Tensor]],
        dtype: torch.dtype,
        magnitudes: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.directory = directory
        self._magnitudes = dict(magnitudes or {})
        self.adapter = adapter
        self.dtype = dtype
        self._shifts = {p.removesuffix(".bias"): e.tensor for p, e in adapter.extras.items() if e.kind == "delta"}
        self._values = {p: e.tensor for p, e in adapter.extras.items() if e.kind == "value"}
        self._zeros = _zeros_for(self._shifts.keys() - outlines.keys(), adapter, dtype)
        every = {**outlines, **self._zeros}.items()
        self._outlines = {
            m: (b if b.is_meta else b.to("meta"), a if a.is_meta else a.to("meta")) for m, (b, a) in every
        }
        self._contents = FileContents()
        add_factors(self._contents, adapter, self._outlines, dtype)
        _add_shifts(self._contents, self._shifts, adapter, self._outlines, dtype)
        place_values(self._contents, self._values, adapter.base)
        self._contents.tensors |= self._magnitudes
        if not self._contents.ranks:
            raise OutputError(
                f"{directory} was not written: adapter {adapter.name!r} has no factors, and PEFT needs one "
                "module of rank 1 at least; write one module with zeros"
            )
        self._texts: dict[str, str] = {}  # of the configuration, once it was written
        make_folder(directory)
        self._file = TensorFile(directory / WEIGHTS_NAME, self._contents.tensors, metadata_of(adapter))

    def again(self, directory: Path, adapter: LoraData) -> AdapterFile:
        """Another directory for an adapter of the same modules, ranks, extras and base model, with nothing in it. It
        takes a tenth of the time: what both files say alike is not made again."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)  # copy.copy asks more, and takes five times as long
        other.directory, other.adapter = directory, adapter
        make_folder(directory)
        other._file = TensorFile(directory / WEIGHTS_NAME, self._file.tensors, metadata_of(adapter))
        return other

    def is_packed(self, module: str) -> bool:
        """Whether a module's factors lie in tensors that hold more than them, so that they go through :meth:`put`."""
        return self.adapter.updates[module].layout.kind == "expert"

    def place(self, module: str, side: Side) -> tuple[str, int]:
        """The name of a factor of a module that is not packed, and where in the file it starts."""
        parts = EMBEDDING_NAMES if self.adapter.updates[module].layout.kind == "embedding" else NAMES
        name = f"{PREFIX}{module}.{parts[side]}"
        return name, self._file.offset(name)

    def lay(self, module: str, side: Side, factor: Factor) -> Factor:
        """The factor itself: its tensor holds nothing else."""
        return factor

    def put(self, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Writes some modules: ``{module: (B [out, r], A [r, in])}`` with the scaling inside."""
        contents = FileContents()
        add_factors(contents, self.adapter, factors, self.dtype)
        self._file.write(contents.tensors, check=True)

    def finish(self) -> None:
        """Writes what belongs to no module."""
        if not (self._zeros or self._values or self._shifts or self._magnitudes):
            return
        self.put(self._zeros)
        others = FileContents(modules=self._contents.modules)
        place_values(others, self._values, self.adapter.base)
        _add_shifts(others, self._shifts, self.adapter, self._outlines, self.dtype)
        self._file.write({**others.tensors, **self._magnitudes})

    def close(self) -> None:
        """Checks that everything was written, then writes the card, and the configuration: without it, nothing takes
        this for an adapter."""
        self._file.close()
        kind, ranks = "DoRA" if self._magnitudes else "LoRA", list(self._contents.ranks.values())
        card = adapter_card(self.adapter, kind=kind, library=LIBRARY, ranks=ranks, dtype=self.dtype)
        write_card(self.directory, card)
        if CONFIG_NAME not in self._texts:
            self._texts[CONFIG_NAME] = config_text(self._contents, self.adapter, with_magnitudes=bool(self._magnitudes))
        write_text(self.directory, CONFIG_NAME, self._texts[CONFIG_NAME])


def metadata_of(adapter: LoraData) -> dict[str, str]:
    """What the file of tensors says of itself."""
    data = {"version": __version__, "provenance": adapter.provenance}
    return {"format": "pt", "fastlora": AS_JSON(data)}


def _zeros_for(modules: Iterable[str], adapter: LoraData, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    """Rank-1 zeros for modules whose bias alone changes: PEFT stores that change beside ``lora_B``."""
    zeros = {}
    for module in sorted(modules):
        if module not in adapter:
            raise OutputError(
                f"the change of {module}.bias cannot be written: PEFT stores it beside factors of "
                f"{module!r}, which adapter {adapter.name!r} does not have"
            )
        n, m = adapter.updates[module].shape
        zeros[module] = torch.zeros(n, 1, dtype=dtype), torch.zeros(1, m, dtype=dtype)
    return zeros


def add_factors(
    contents: FileContents, adapter: LoraData, factors: Mapping[str, tuple[Tensor, Tensor]], dtype: torch.dtype
) -> None:
    """Puts factors, ``{module: (B, A)}``, into ``contents`` as PEFT lays them; of each module ``A`` comes first."""
    containers: dict[str, dict[str, Layout]] = {}
    for module, (left, right) in factors.items():
        layout = adapter.updates[module].layout if module in adapter else Layout()
        if layout.kind == "expert":
            containers.setdefault(layout.container, {})[module] = layout
            continue
        b, a = cast_tensor(left, dtype, module), cast_tensor(right, dtype, module)
        rank = a.shape[0]
        names = EMBEDDING_NAMES if layout.kind == "embedding" else NAMES
        if layout.kind == "conv":
            a = a.reshape(rank, a.shape[1] // math.prod(layout.kernel), *layout.kernel)
            b = b.reshape(*b.shape, *(1 for _ in layout.kernel))
        contents.modules.append(module)
        contents.ranks[module] = rank
        contents.tensors[f"{PREFIX}{module}.{names['A']}"] = a
        contents.tensors[f"{PREFIX}{module}.{names['B']}"] = b
    for container, experts in containers.items():
        packed_b, packed_a, rank = _pack_experts(container, experts, factors, dtype)
        key = PREFIX + _wrapper(container, containers)
        contents.parameters.append(container)
        contents.ranks[container] = rank
        contents.tensors[f"{key}.lora_A.weight"] = packed_a
        contents.tensors[f"{key}.lora_B.weight"] = packed_b


def _pack_experts(
    container: str,
    experts: Mapping[str, Layout],
    factors: Mapping[str, tuple[Tensor, Tensor]],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, int]:
    """``B [out, r·experts]`` (expert fastest), ``A [experts·r, in]`` and ``r``; zeros fill smaller ranks."""
    count = next(iter(experts.values())).experts
    rank = max(factors[m][1].shape[0] for m in experts)
    n, m = next((factors[x][0].shape[0], factors[x][1].shape[1]) for x in experts)
    device = next(factors[x][0].device for x in experts)
    packed_b = torch.zeros(n, rank, count, dtype=dtype, device=device)
    packed_a = torch.zeros(count, rank, m, dtype=dtype, device=device)
    for module, layout in experts.items():
        left, right = factors[module]
        packed_b[:, : left.shape[1], layout.expert] = cast_tensor(left, dtype, module)
        packed_a[layout.expert, : right.shape[0]] = cast_tensor(right, dtype, module)
    return packed_b.reshape(n, rank * count), packed_a.reshape(count * rank, m), rank


def _wrapper(container: str, containers: Iterable[str]) -> str:
    """The path of a parameter's wrapper: the parameter that its module created last is the outermost."""
    module, _, parameter = container.rpartition(".")
    siblings = [p for owner, _, p in (c.rpartition(".") for c in containers) if owner == module]
    if len(siblings) == 1:
        return module
    unknown = [p for p in siblings if p not in REGISTRATION_ORDER]
    if unknown:
        raise OutputError(
            f"module {module!r} has updates of several parameters ({', '.join(siblings)}), and in which "
            f"order PEFT nests {', '.join(unknown)} is unknown; write them as separate adapters"
        )
    inward = sorted(siblings, key=lambda p: -REGISTRATION_ORDER.index(p))
    return module + WRAPPED * inward.index(parameter)


def _add_shifts(
    contents: FileContents,
    shifts: Mapping[str, Tensor],
    adapter: LoraData,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    dtype: torch.dtype,
) -> None:
    """``lora_B.bias`` of every module: PEFT has all of them or none."""
    if not shifts:
        return
    for module, (left, _) in factors.items():
        kind = adapter.updates[module].layout.kind if module in adapter else "linear"
        if kind in ("embedding", "expert"):
            raise OutputError(
                f"adapter {adapter.name!r} changes biases (lora_bias) and the {kind} {module!r}, and PEFT "
                "has no adapter with both; write them as separate adapters"
            )
        shift = shifts.get(module, torch.zeros(left.shape[0]))
        contents.tensors[f"{PREFIX}{module}.lora_B.bias"] = cast_tensor(shift, dtype, f"{module}.bias")
    contents.lora_bias = True


def place_values(contents: FileContents, values: Mapping[str, Tensor], base: BaseInfo) -> None:
    """Puts parameters that replace those of the base model beside the modules of ``contents``."""
    wrapped = set(contents.modules)
    free_biases = adapted_biases = False
    for path, tensor in values.items():
        module, _, parameter = path.rpartition(".")
        inside = module in wrapped
        key = f"{module}{WRAPPED}.{parameter}" if inside else path
        contents.tensors[PREFIX + key] = tensor.detach().cpu().contiguous()
        owner = saved_module(path, (*base.modules_to_save, *HEADS.get(base.task_type or "", ())))
        if inside:
            adapted_biases |= parameter == "bias"
        elif owner is not None:
            contents.modules_to_save.append(owner)
        elif parameter == "bias":
            free_biases = True
        elif module.rpartition(".")[2] not in EMBEDDINGS:
            contents.modules_to_save.append(module)
    contents.modules_to_save = list(dict.fromkeys(contents.modules_to_save))
    if free_biases:
        contents.bias = "all"
    elif adapted_biases:
        contents.bias = base.bias if base.bias != "none" else "lora_only"


def config_text(contents: FileContents, adapter: LoraData, *, with_magnitudes: bool = False) -> str:
    """The configuration as it is written; ``with_magnitudes``: of a DoRA."""
    return json.dumps(_config(contents, adapter) | {"use_dora": with_magnitudes}, indent=2) + "\n"


def _config(contents: FileContents, adapter: LoraData) -> dict[str, Any]:
    base, rank = adapter.base, max(contents.ranks.values())
    smaller = {m: r for m, r in contents.ranks.items() if r != rank}
    patterns = dict(zip(rank_patterns(smaller, contents.ranks), smaller.values(), strict=True))
    heads = HEADS.get(base.task_type or "", ())
    # For these tasks PEFT insists on a trained head in the file; without one, the adapter loads for any task.
    task = base.task_type if not heads or set(heads) & set(contents.modules_to_save) else None
    config: dict[str, Any] = {
        "alpha_pattern": patterns,
        "auto_mapping": None,
        "base_model_name_or_path": base.model,
        "bias": contents.bias,
        "fan_in_fan_out": base.fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "layer_replication": base.layer_replication,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "modules_to_save": contents.modules_to_save or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": patterns,
        "revision": base.revision,
        "task_type": task,
        "use_dora": False,
        "use_rslora": False,
    }
    known = [m for m, u in adapter.updates.items() if u.layout.kind != "expert"]
    config |= module_fields(base.selection, known, contents.modules)
    # Older readers refuse fields that they do not know, so these are there only when they say something.
    if contents.parameters:
        containers = dict.fromkeys(u.layout.container for u in adapter.updates.values() if u.layout.container)
        config["target_parameters"] = selected_parameters(base.selection, containers, contents.parameters)
        version = _layout_version(adapter)
        if version is not None:
            config["peft_version"] = version
    if contents.lora_bias:
        config["lora_bias"] = True
    return dict(sorted(config.items()))


def _layout_version(adapter: LoraData) -> str | None:
    """The version of PEFT whose layout the experts of an adapter have; ``None`` where that is not known."""
    orders = {u.layout.order for u in adapter.updates.values() if u.layout.kind == "expert"}
    if len(orders) > 1:
        raise OutputError(
            f"adapter {adapter.name!r} has experts that different versions of peft laid out, and PEFT has no adapter "
            "with both; write them as separate adapters"
        )
    return VERSIONS[next(iter(orders))]
