"""The LoRAs of a component as a pool, on the tensors of the pipeline."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from fastlora.adapters.pool import Pool, require_updates
from fastlora.analysis.overlap import overlap as overlap_of_pool
from fastlora.analysis.similar import Overlap
from fastlora.errors import InputError
from fastlora.integrations.diffusers.components import Blocks, ComponentWeight, adapted, names_in
from fastlora.integrations.peft.injection import Snapshot, place_of
from fastlora.integrations.peft.live import Host, host_of, lora_layers
from fastlora.integrations.peft.reading import read_from


def overlap(pipe: object, adapters: list[str] | None = None) -> dict[str, Overlap]:
    """How similar the LoRAs of a pipeline are: :func:`fastlora.overlap` of every component that has two or more.

    Args:
        pipe: a pipeline of diffusers with LoRAs.
        adapters: their names; all by default.

    Returns:
        ``{component: overlap}``, each with ``names``, ``cosine`` and ``subspace``. Weights that ``set_adapters`` gave
        do not count.

    Raises:
        InputError: an adapter that is not loaded, or fewer than two in every component.
        UnsupportedAdapter: adapters that are not ``s·B·A``, such as DoRA.

    Cost: one read of all factors.
    """
    parts = adapted(pipe)
    loaded = {name for model in parts.values() for name in names_in(model)}
    unknown = next((name for name in adapters or () if name not in loaded), None)
    if unknown is not None:
        raise InputError(f"the pipeline has no adapter {unknown!r}; it has {', '.join(sorted(loaded))}")
    found = {}
    for component, model in parts.items():
        names = [name for name in names_in(model) if adapters is None or name in adapters]
        if len(names) > 1:
            found[component] = overlap_of_pool(pool_of(model, dict.fromkeys(names, 1.0)))
    if not found:
        raise InputError("no component has two of these adapters; load another, they are compared by pairs")
    return found


def pool_of(model: nn.Module, weights: Mapping[str, ComponentWeight]) -> Pool:
    """The adapters of a component where its weights are, each with its own scaling alone.

    Weights by block become a part of the scalings, since they differ between modules; numbers do not. Adapters that
    ``set_lora_device`` put elsewhere are copied to where the component is.
    """
    host = host_of(model)
    adapters = []
    for name, weight in weights.items():
        if isinstance(weight, Mapping):
            with _weighed(host, name, weight):
                adapter = read_from(host, name, "live")
        else:
            adapter = read_from(host, name, "config")
        adapters.append(require_updates(adapter, "a pipeline").to(_place(host, name)))
    return Pool(adapters, align=False)


def numbers(weights: Mapping[str, ComponentWeight]) -> dict[str, float]:
    """The weights that are numbers; those by block are in the pool."""
    return {name: 1.0 if isinstance(weight, Mapping) else float(weight) for name, weight in weights.items()}


def _place(host: Host, name: str) -> torch.device:
    return place_of(next(iter(lora_layers(host, name)))[1])


@contextlib.contextmanager
def _weighed(host: Host, name: str, blocks: Blocks) -> Iterator[None]:
    """Inside the block, the adapter has these weights in the model, by diffusers' own rules; then all is as before."""
    snapshot = Snapshot(host)
    scalings = {path: layer.scaling[name] for path, layer in lora_layers(host, name)}
    try:
        _weigh(host, name, blocks)
        yield
    finally:
        for path, layer in lora_layers(host, name):
            layer.scaling[name] = scalings[path]
        snapshot.settle()


def _weigh(host: Host, name: str, blocks: Blocks) -> None:
    unused = _unused(host, name, blocks)
    if unused is not None:
        raise InputError(
            f"weights of {name!r} by block: no adapted module is in {unused!r}, so that it would change nothing; give "
            "what pipe.set_adapters takes, or one number"
        )
    from diffusers.loaders import lora_base

    model: Any = host.root
    set_on_encoder: Any = lora_base.set_adapters_for_text_encoder
    try:
        if hasattr(model, "set_adapters"):
            model.set_adapters([name], [dict(blocks)])
        else:
            set_on_encoder([name], model, [dict(blocks)])
    except Exception as error:  # whatever its walk over the blocks stumbles on
        raise InputError(
            f"diffusers does not take {dict(blocks)!r} as weights of {name!r} by block here ({error}); give what "
            "pipe.set_adapters takes, or one number"
        ) from error


def _unused(host: Host, name: str, blocks: Blocks) -> str | None:
    """A block that diffusers would pass over without a word."""
    if not hasattr(host.root, "down_blocks"):
        paths = [path for path, _ in lora_layers(host, name)]
        return next((key for key in blocks if not any(key in path for path in paths)), None)
    for side in ("down", "up"):
        inner = blocks.get(side)
        attended = [
            f"block_{i}" for i, b in enumerate(getattr(host.root, f"{side}_blocks")) if hasattr(b, "attentions")
        ]
        unused = next((key for key in inner if key not in attended), None) if isinstance(inner, Mapping) else None
        if unused is not None:
            return f"{side}.{unused}"
    return None
