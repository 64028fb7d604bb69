"""``config.json`` beside a model's weights: which architecture they are of, what is tied, how they are quantised."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastlora.errors import InputError
from fastlora.files.json_files import parse_object, require_file

MODEL_CONFIG = "config.json"
LARGEST_CONFIG = 64 << 20


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What a model's configuration says about its tensors; fields of an unexpected type say nothing."""

    values: Mapping[str, Any] = field(default_factory=dict)

    @property
    def model_types(self) -> tuple[str, ...]:
        """The model type, and those of the models inside (``text_config``, ``decoder``)."""
        found = [v["model_type"] for v in self._levels() if isinstance(v.get("model_type"), str)]
        return tuple(dict.fromkeys(found))

    @property
    def architectures(self) -> tuple[str, ...]:
        """The classes that the model was saved from."""
        names = self.values.get("architectures")
        return tuple(n for n in names if isinstance(n, str)) if isinstance(names, list) else ()

    @property
    def encoder_decoder(self) -> bool:
        """Whether the model has an encoder and a decoder."""
        return self.values.get("is_encoder_decoder") is True

    @property
    def ties(self) -> bool | None:
        """Whether the output head is the input embedding; ``None`` where nothing is said. Composed models say it at
        the top, or inside ``text_config``."""
        said = [v["tie_word_embeddings"] for v in self._levels() if isinstance(v.get("tie_word_embeddings"), bool)]
        return any(said) if said else None

    @property
    def quantisation(self) -> str | None:
        """The name of the method that the weights were quantised with."""
        found = self._quantisation()
        method = found.get("quant_method", found.get("quant_algo"))
        return None if not found else str(method or "unnamed")[:40]

    @property
    def block_sizes(self) -> tuple[int, int] | None:
        """Rows and columns of the blocks of a weight that share a scale."""
        sizes = self._quantisation().get("weight_block_size")
        if isinstance(sizes, list) and len(sizes) == 2 and all(type(n) is int and n > 0 for n in sizes):
            return sizes[0], sizes[1]
        return None

    def _quantisation(self) -> Mapping[str, Any]:
        levels = (v.get(key) for v in self._levels() for key in ("quantization_config", "compression_config"))
        return next((found for found in levels if isinstance(found, dict)), {})

    def _levels(self) -> Iterator[Mapping[str, Any]]:
        """The configuration, and those of the models inside, which are one level down."""
        yield self.values
        yield from (v for v in self.values.values() if isinstance(v, dict))


def read_model_config(directory: Path) -> ModelConfig | None:
    """The configuration in a model's directory; ``None`` where there is none."""
    path = directory / MODEL_CONFIG
    if not path.exists():
        return None
    require_file(path, LARGEST_CONFIG)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check the permissions") from None
    return ModelConfig(parse_object(raw, str(path)))
