"""(IA)³ adapters in PEFT directories: one tensor ``base_model.model.<module path>.ia3_l`` a module.

A vector that scales inputs (PEFT's *feed-forward* modules) is ``[1, in]``, one that scales outputs ``[out, 1]``. Both
are ``[1, channels, 1, …]`` for convolutions, where only the configuration says which it is.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlora._version import __version__
from fastlora.core.card import adapter_card
from fastlora.core.data import BaseInfo, Extra, Ia3Data, Scaling, Selection
from fastlora.core.dtypes import parse_dtype
from fastlora.core.inert import PROBABLY
from fastlora.core.names import CONFIG_NAME
from fastlora.core.patterns import Unsupported, compiled_whole
from fastlora.errors import InputError, NonFiniteError, OutputError
from fastlora.files.card import write_card
from fastlora.files.disk_errors import writing
from fastlora.files.tensor_writing import TensorFile, cast_tensor
from fastlora.formats.peft.config import Fields, refuse_unknown
from fastlora.formats.peft.keys import read_keys, without_base
from fastlora.formats.peft.names import HEADS, PREFIX, WEIGHTS_NAME
from fastlora.formats.peft.reading import add_values, check_tensor
from fastlora.formats.peft.selection import module_fields, read_selection
from fastlora.formats.peft.weights import read_tensors
from fastlora.formats.peft.writing import LIBRARY, FileContents, place_values
from fastlora.ops.finite import is_finite

PART = ".ia3_l"

KNOWN = frozenset(
    "auto_mapping base_model_name_or_path exclude_modules fan_in_fan_out feedforward_modules inference_mode"
    " init_ia3_weights modules_to_save peft_type peft_version revision runtime_config target_modules task_type".split()
)


def read(directory: Path, name: str, fields: Fields) -> Ia3Data:
    """The (IA)³ adapter in a PEFT directory.

    Raises :class:`InputError` for missing or damaged files and tensors, vectors that hold NaN or Inf, and vectors that
    are not what the configuration says, each with the way out.
    """
    base, is_feedforward = _read_config(fields, name)
    file, tensors = read_tensors(directory)
    vectors: dict[str, Scaling] = {}
    others: dict[str, Tensor] = {}
    found = read_keys(tensors, file, name, fields.values)
    for plain, key in found.names.items():
        tensor = tensors[key]
        if not plain.endswith(PART):
            others[plain] = tensor
            continue
        module = plain.removesuffix(PART)
        check_tensor(key, tensor, file)
        if not is_finite(tensor.reshape(1, -1)):
            raise NonFiniteError(
                f"{file}: tensor {key!r} holds NaN or Inf, so nothing computed from it would mean anything; leave this "
                "adapter out, or save it again from a training step that did not diverge"
            )
        vectors[module] = Scaling(tensor, _feedforward(key, module, tensor, is_feedforward, fields, file))
    if not vectors:
        raise InputError(
            f"{file} has no ia3_l tensors, so adapter {name!r} is empty; "
            "it was saved before it was trained, or from a model that is no PEFT model"
        )
    extras: dict[str, Extra] = {}
    others, left_out = without_base(others, vectors, found, base, name)
    add_values(extras, others, vectors, base, file)
    dtype = functools.reduce(torch.promote_types, (s.vector.dtype for s in vectors.values()))
    notes = (*found.notes, *left_out)
    return Ia3Data(name, vectors, extras=extras, base=base, dtype=dtype, notes=notes)


def note_on_ones(adapter: Ia3Data) -> list[str]:
    """A sentence on an adapter all of whose vectors are one; none for any other. Reads one vector of a trained one."""
    if not all(bool((s.vector == 1).all()) for s in adapter.vectors.values()):
        return []
    what = "changes nothing but the modules that it replaces" if adapter.extras else "changes nothing"
    return [f"(IA)³ adapter {adapter.name!r} {what}: all its vectors are one, {PROBABLY}"]


def _read_config(fields: Fields, name: str) -> tuple[BaseInfo, Callable[[str], bool] | None]:
    """What the adapter says about its base model, and which modules it calls feed-forward, if it says so."""
    refuse_unknown(fields, name, KNOWN)
    base = BaseInfo(
        model=fields.text("base_model_name_or_path"),
        revision=fields.text("revision"),
        task_type=fields.text("task_type"),
        fan_in_fan_out=fields.flag("fan_in_fan_out"),
        modules_to_save=tuple(dict.fromkeys(fields.texts("modules_to_save"))),
        selection=read_selection(fields.values),
    )
    pattern = fields.values.get("feedforward_modules")
    if pattern is None:
        return base, None
    if not isinstance(pattern, str):
        ends = tuple(fields.texts("feedforward_modules"))
        return base, lambda module: module.endswith(ends)
    try:
        return base, compiled_whole(pattern)
    except (re.error, Unsupported, RecursionError, OverflowError) as error:
        raise _refused_pattern(fields, error) from None


def _refused_pattern(fields: Fields, error: Exception) -> InputError:
    return InputError(
        f"{fields.path}: field 'feedforward_modules' is a pattern that cannot be used ({error}); list the modules"
    )


def _feedforward(
    key: str, module: str, tensor: Tensor, says: Callable[[str], bool] | None, fields: Fields, file: Path
) -> bool:
    """Whether a vector scales inputs: by its shape, and by the configuration, which must agree."""
    shape = list(tensor.shape)
    if tensor.dim() not in (2, 4, 5) or max(shape) != tensor.numel() or (tensor.dim() > 2 and shape[1] != max(shape)):
        raise InputError(
            f"{file}: tensor {key!r} is {shape}; needed is [1, in] or [out, 1], or [1, channels, 1, …] for a "
            "convolution; save or download the adapter again"
        )
    by_shape = None if tensor.dim() > 2 or tensor.numel() == 1 else shape[0] == 1
    try:
        by_config = None if says is None else says(module)
    except Unsupported as error:
        raise _refused_pattern(fields, error) from None
    if by_shape is None and by_config is None:
        raise InputError(
            f"{fields.path}: field 'feedforward_modules' is missing, and the shape {shape} of {key!r} does not say "
            "whether it scales inputs or outputs; restore that field"
        )
    if by_shape is not None and by_config is not None and by_shape != by_config:
        raise InputError(
            f"{file}: tensor {key!r} is {shape}, as for a module that scales its {'inputs' if by_shape else 'outputs'},"
            f" but 'feedforward_modules' in {fields.path} says the opposite; restore the configuration it was saved "
            "with"
        )
    return bool(by_config if by_shape is None else by_shape)


def write(directory: Path, adapter: Ia3Data, dtype: torch.dtype | str | None = None) -> None:
    """Writes ``adapter_config.json`` and ``adapter_model.safetensors`` into a directory that is being staged.

    Raises :class:`OutputError` for values that overflow ``dtype`` and when writing fails.
    """
    target = parse_dtype(dtype, adapter.dtype)
    if not adapter.vectors:
        raise OutputError(f"{directory} was not written: (IA)³ adapter {adapter.name!r} has no modules")
    vectors = {f"{PREFIX}{m}{PART}": cast_tensor(s.vector, target, m) for m, s in adapter.vectors.items()}
    values = FileContents(modules=adapter.modules)
    place_values(values, {p: e.tensor for p, e in adapter.extras.items()}, adapter.base)
    directory.mkdir(parents=True, exist_ok=True)
    data = {"version": __version__, "provenance": adapter.provenance}
    file = TensorFile(
        directory / WEIGHTS_NAME,
        vectors | values.tensors,
        {"format": "pt", "fastlora": json.dumps(data, default=str)},
    )
    file.write(vectors, check=True)
    file.write(values.tensors)
    file.close()
    write_card(directory, adapter_card(adapter, kind="(IA)³", library=LIBRARY, ranks=[0] * len(vectors), dtype=target))
    config = json.dumps(_config(adapter, values.modules_to_save), indent=2) + "\n"
    with writing(directory / CONFIG_NAME):
        (directory / CONFIG_NAME).write_text(config, encoding="utf-8")


def _config(adapter: Ia3Data, modules_to_save: list[str]) -> Mapping[str, Any]:
    base = adapter.base
    heads = HEADS.get(base.task_type or "", ())
    # For these tasks PEFT insists on a trained head in the file; without one, the adapter loads for any task.
    task = base.task_type if not heads or set(heads) & set(modules_to_save) else None
    config: dict[str, Any] = {
        "auto_mapping": None,
        "base_model_name_or_path": base.model,
        "fan_in_fan_out": base.fan_in_fan_out,
        "inference_mode": True,
        "init_ia3_weights": True,
        "modules_to_save": modules_to_save or None,
        "peft_type": "IA3",
        "revision": base.revision,
        "task_type": task,
    }
    return dict(sorted((config | _module_fields(adapter)).items()))


def _module_fields(adapter: Ia3Data) -> dict[str, Any]:
    """The fields that select the modules, and those among them whose inputs are scaled: PEFT wants a subset."""
    fields = module_fields(adapter.base.selection, adapter.modules, adapter.modules)
    targets = fields["target_modules"]
    if isinstance(targets, list):
        inputs = [m for m, s in adapter.vectors.items() if s.feedforward]
        ends = [t for t in targets if any(m.endswith(t) for m in inputs)]
        if [m for m in adapter.vectors if m.endswith(tuple(ends))] == inputs:
            return {**fields, "feedforward_modules": ends}
        fields = module_fields(Selection(), adapter.modules, adapter.modules)
    return {**fields, "feedforward_modules": _feedforward_modules(adapter.vectors)}


def _feedforward_modules(vectors: Mapping[str, Scaling]) -> list[str] | str:
    """Paths of the modules whose inputs are scaled.

    PEFT takes a module for one of them whose path *ends* with a listed one. Where that would take another module along,
    a pattern lists them, which PEFT matches whole.
    """
    inputs = [m for m, s in vectors.items() if s.feedforward]
    others = [m for m, s in vectors.items() if not s.feedforward]
    if any(m.endswith(tuple(inputs)) for m in others):
        return "|".join(map(re.escape, inputs))
    return inputs
