"""The base model that adapters are applied to: one model, or the components of a pipeline of diffusers."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastlora.adapters.model_names import tie_group
from fastlora.core.architectures import WEIGHT
from fastlora.errors import InputError
from fastlora.files.model_config import ModelConfig
from fastlora.files.shards import INDEX_SUFFIX, find_model, listed
from fastlora.files.stored_model import StoredModel, read_stored_model
from fastlora.files.tensor_files import SAFETENSORS, StoredTensor

PIPELINE = "model_index.json"


@dataclass(frozen=True, slots=True, eq=False)
class Base:
    """The plan of a base model.

    root: its folder, or its file. ``components``: ``{name: model}`` of a pipeline's folders, such as ``unet``; ``""``
    for a model by itself. ``tensors``: all of them, with the component before their names (``unet.conv_in.weight``).
    """

    root: Path
    components: Mapping[str, StoredModel]
    tensors: Mapping[str, StoredTensor]

    @property
    def is_folder(self) -> bool:
        """Whether the model is a folder, with other files beside its tensors."""
        return self.root.is_dir()

    def files(self) -> list[Path]:
        """The files of tensors."""
        return [file for model in self.components.values() for file in model.files]

    def notes(self) -> list[str]:
        """What was left out."""
        return [note for model in self.components.values() for note in model.notes]

    def component_of(self, tensor: str) -> tuple[StoredModel, str]:
        """The model that holds a tensor, and its name there."""
        for prefix, model in self.components.items():
            if not prefix:
                return model, tensor
            if tensor.startswith(f"{prefix}."):
                return model, tensor.removeprefix(f"{prefix}.")
        raise KeyError(tensor)

    def config_of(self, tensor: str) -> ModelConfig | None:
        """The configuration of the model that holds a tensor."""
        return self.component_of(tensor)[0].config

    def refusal(self, tensor: str) -> str | None:
        """How a tensor is quantised, where nothing can be added to it."""
        try:
            model, name = self.component_of(tensor)
        except KeyError:
            return None
        if name in model.coding.scales:
            return "float8 with a scale"
        return model.coding.refusal(name)

    def ties(self) -> list[list[str]]:
        """Groups of parameters that are one matrix; one member at the least is stored."""
        groups = []
        for prefix, model in self.components.items():
            configs = [model.config] if model.config is not None else []
            group = tie_group(list(model.tensors), configs, None)
            missing = [name for name in group if name not in model.tensors]
            said = any(config.ties for config in configs)
            if len(missing) < len(group) and (missing or said):
                groups.append([f"{prefix}.{name}" if prefix else name for name in group])
        return groups


def matrix_shape(tensor: StoredTensor) -> tuple[int, int]:
    """Rows and columns of a tensor as a matrix: its rows are those of the file, experts one after another."""
    shape = tensor.shape
    if len(shape) < 2:
        return math.prod(shape), 1
    return shape[0], math.prod(shape[1:])


def module_of(tensor: str) -> str:
    """The module that a weight belongs to; other parameters stand for themselves."""
    return tensor.removesuffix(WEIGHT)


def read_base(source: str | os.PathLike[str]) -> Base:
    """The plan of a model's folder, its file, or a pipeline's folder. Raises :class:`InputError` for what is none, and
    for pickles, whose tensors have no place of their own."""
    root = Path(os.path.abspath(Path(source).expanduser()))  # links stay: caches have files without endings
    if root.is_dir() and (root / PIPELINE).exists():
        components = {folder.name: read_stored_model(folder) for folder in sorted(root.iterdir()) if _is_model(folder)}
        if not components:
            raise InputError(f"{root} is a pipeline ({PIPELINE}) without a folder of a model; download it again")
    else:
        components = {"": read_stored_model(root)}
        model = components[""]
        if root.name.endswith(INDEX_SUFFIX) and model.directory is not None:
            root = model.directory  # an index stands for its folder
    tensors = {
        f"{prefix}.{name}" if prefix else name: tensor
        for prefix, model in components.items()
        for name, tensor in model.tensors.items()
    }
    if not tensors:
        raise InputError(f"{root} holds no tensors; pass a model's directory or file")
    pickled = [tensor.name for tensor in tensors.values() if tensor.view is not None]
    if pickled:
        raise InputError(
            f"{root} is stored in files of torch (.bin, .pt): {listed(pickled)}; load it and save it again as "
            "safetensors (`save_pretrained` of transformers and diffusers does so)"
        )
    return Base(root, components, tensors)


def _is_model(folder: Path) -> bool:
    """Whether a folder of a pipeline holds tensors: tokenizers and schedulers do not."""
    if not folder.is_dir() or not any(p.suffix in (SAFETENSORS, ".bin") for p in folder.iterdir()):
        return False
    find_model(folder)
    return True
