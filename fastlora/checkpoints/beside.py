"""What lies in a model's folder beside its tensors: configurations, tokenizers, code, and the model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch

from fastlora.checkpoints.base import PIPELINE, Base
from fastlora.checkpoints.layout import OutputFile
from fastlora.core.card import CardFacts, card_text
from fastlora.core.data import ModulesData
from fastlora.core.names import CARD_NAME
from fastlora.files.disk_errors import writing
from fastlora.files.earlier import digest_of
from fastlora.files.json_files import parse_object
from fastlora.files.model_config import MODEL_CONFIG
from fastlora.files.shards import INDEX_SUFFIX, listed

WEIGHTS = frozenset(
    (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".onnx_data", ".h5", ".msgpack", ".ot")
)
"""Files of weights. Those of the model are written anew; others would have it as it was."""

DTYPE_FIELDS = ("torch_dtype", "dtype")


@dataclass(frozen=True, slots=True)
class Beside:
    """``copied``: files of the output, by path, and those that they are copies of. ``made``: files and their contents.
    ``notes``: what is not there any more."""

    copied: Mapping[Path, Path]
    made: Mapping[Path, bytes]
    notes: Sequence[str]

    def digests(self) -> dict[str, str]:
        """What the files hold, in short: by this an output knows later that they are its own."""
        found = {path.as_posix(): digest_of(source) for path, source in self.copied.items()}
        return found | {path.as_posix(): digest_of(content) for path, content in self.made.items()}

    def write(self, folder: Path) -> None:
        """Puts all files into a folder."""
        for path in (*self.copied, *self.made):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
        for path, source in self.copied.items():
            with writing(folder / path):
                shutil.copyfile(source, folder / path)
        for path, content in self.made.items():
            with writing(folder / path):
                (folder / path).write_bytes(content)


def beside(base: Base, files: Sequence[OutputFile], dtype: torch.dtype | None, card: str) -> Beside:
    """What is put beside the tensors of a model whose folder is ``base``; nothing where it is one file.

    Hidden files are left out, and other files of weights: they have the model as it was. A ``README.md`` is kept as
    ``README.base.md``.
    """
    copied: dict[Path, Path] = {}
    made: dict[Path, bytes] = {}
    if not base.is_folder:
        return Beside(copied, made, ())
    notes: list[str] = []
    ours, indices = set(base.files()), set(_indices(base))
    left: list[str] = []
    for path in sorted(base.root.rglob("*")):
        inside = path.relative_to(base.root)
        if path in ours or any(part.startswith(".") for part in inside.parts) or not path.is_file():
            continue
        if path.suffix in WEIGHTS or (path.name.endswith(INDEX_SUFFIX) and path not in indices):
            left.append(inside.as_posix())
            continue
        content = None if dtype is None else _in_dtype(path, dtype, files, path in indices)
        if content is None:
            copied[inside] = path
        else:
            made[inside] = content
    if left:
        notes.append(f"{listed(left)} of {base.root} was left out: it has the weights without the adapters")
    own = Path(CARD_NAME)
    if own in copied:
        name = next(n for n in _card_names() if n not in copied)
        copied[name] = copied.pop(own)
        notes.append(f"the {CARD_NAME} of {base.root} is now {name}")
    made[own] = card.encode()
    return Beside(copied, made, notes)


def card_of(
    name: str, base: Base, elements: Sequence[ModulesData], provenance: Mapping[str, object],
    files: Sequence[OutputFile], changed: int, notes: Sequence[str],
) -> str:  # fmt: skip
    """The model card of a model that adapters are in."""
    stored = [place for file in files for place in file.places]
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in stored if p.dtype is not None})
    figures = {"tensors": str(len(stored)), "changed": str(changed), "dtype": ", ".join(dtypes)}
    is_pipeline = (base.root / PIPELINE).exists() or any("diffusion" in file.source.name for file in files)
    models = list(dict.fromkeys(e.base.model for e in elements if e.base.model is not None))
    return card_text(
        CardFacts(
            name=name,
            kind="Adapters in the weights",
            library="diffusers" if is_pipeline else "transformers",
            tags=[],
            base_models=models,
            relation="merge",
            provenance=provenance,
            figures=figures,
            notes=notes,
        )
    )


def _indices(base: Base) -> Iterator[Path]:
    """The indices that name the files of the model."""
    for model in base.components.values():
        if model.names is not None and model.directory is not None:
            for path in model.directory.glob(f"*{INDEX_SUFFIX}"):
                if path.name.endswith(f".safetensors{INDEX_SUFFIX}"):
                    yield path


def _card_names() -> Iterator[Path]:
    yield Path("README.base.md")
    yield from (Path(f"README.base.{number}.md") for number in count(2))


def _in_dtype(path: Path, dtype: torch.dtype, files: Sequence[OutputFile], is_index: bool) -> bytes | None:
    """A configuration that says ``dtype``, or an index that counts the bytes; ``None`` for what says nothing of it."""
    if path.name != MODEL_CONFIG and not is_index:
        return None
    values = parse_object(path.read_bytes(), str(path))
    metadata = values.get("metadata")
    if is_index and isinstance(metadata, dict) and "total_size" in metadata:
        metadata["total_size"] = sum(f.size - len(f.header) for f in files if f.source.parent == path.parent)
    named = is_index or _name(values, str(dtype).removeprefix("torch."))
    return (json.dumps(values, indent=2) + "\n").encode() if named else None


def _name(values: dict[str, Any], dtype: str) -> bool:
    """Puts a dtype into the fields that have one, also of the models inside; whether there were some."""
    found = False
    for key, value in values.items():
        if key in DTYPE_FIELDS and isinstance(value, str):
            values[key] = dtype
            found = True
        elif isinstance(value, dict):
            found |= _name(value, dtype)
    return found
