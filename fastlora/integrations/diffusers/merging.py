"""One LoRA from those that are loaded, in every component of a pipeline."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from fastlora.adapters.lora import Adapter
from fastlora.core.vector_space import linear
from fastlora.decomposition.decompose import decompose
from fastlora.decomposition.result import Decomposition
from fastlora.errors import FastloraError, InputError
from fastlora.integrations.diffusers.components import Weight, adapted, weights_by_component
from fastlora.integrations.diffusers.reading import numbers, pool_of
from fastlora.integrations.peft.injection import Snapshot
from fastlora.integrations.peft.live import host_of, require_new
from fastlora.integrations.peft.writing import put, ready
from fastlora.merging.merge import merge


def merge_loaded(
    pipe: Any,
    weights: Mapping[str, Weight],
    name: str = "merged",
    *,
    method: str = "svd",
    rank: int | None = None,
    delete: bool = False,
    dtype: torch.dtype | str | None = None,
    **parameters: Any,
) -> None:
    """Makes one LoRA of some that are loaded, ``Σ w ΔW`` in every component, and the only active one.

    Weights that ``set_adapters`` gave before do not count, so that nothing is weighted twice. With ``method="cat"`` the
    pipeline gives what it gives under ``set_adapters`` with these weights, in one layer instead of many.

    Args:
        pipe: a pipeline of diffusers with LoRAs.
        weights: ``{adapter: weight}``, each a number or ``{component: weight}``, where a weight may be by block, all as
            ``set_adapters`` takes them: ``{"pixel": 0.7, "toy": {"unet": {"down": 0.5}, "text_encoder": 0.0}}``.
        name: of the new adapter.
        method: one of :func:`fastlora.methods`. Weights by block scale an adapter before the method sees it.
        rank: of methods that cut; by default of each component the largest rank of the adapters.
        delete: delete the adapters that were merged.
        dtype: of the factors; by default the widest of the adapters.
        **parameters: of the method.

    Raises:
        InputError: an adapter, component, method or parameter that is not there, a name that is, LoRAs that are fused
            or offloaded. The pipeline is as it was.
        UnsupportedAdapter: adapters that are not ``s·B·A``, such as DoRA.

    Cost: that of :func:`fastlora.merge` for every component, and one write of the result.
    """
    wanted = weights_by_component(pipe, weights)
    _check(pipe, wanted, name)
    made: dict[str, Adapter] = {}
    for component, given in wanted.items():
        pool = pool_of(adapted(pipe)[component], given)
        made[component] = merge(pool, numbers(given), method=method, rank=rank, **parameters)
    _place(pipe, made, name, dtype)
    if delete:
        pipe.delete_adapters(list(weights))


def mix_unique(
    pipe: Any,
    weights: Mapping[str, Weight],
    name: str = "styles",
    *,
    shared: float = 1.0,
    threshold: float = 0.85,
    rank: int | None = None,
    delete: bool = False,
    dtype: torch.dtype | str | None = None,
    **options: Any,
) -> dict[str, Decomposition]:
    """Mixes styles by what is their own: ``Σ w · unique(style) + shared · (what all share, once)``, as the only active
    adapter.

    What styles have in common (contrast, the look of a training set) adds up when they are mixed as wholes. Here it
    counts once (DeVec, arXiv 2512.22511).

    Args:
        pipe: a pipeline of diffusers with LoRAs.
        weights: as :func:`merge_loaded` takes them.
        name: of the new adapter.
        shared: the weight of what all share; 0 leaves it out.
        threshold: eigenvalues above it are shared. LoRAs that were trained apart share little: 0.3 is a start.
        rank: cut the mix to this rank; by default it has all, the sum of their ranks and of the shared directions.
        delete: delete the adapters that were mixed.
        dtype: of the factors; by default the widest of the adapters.
        **options: of :func:`fastlora.decompose`, such as ``chain`` and ``side``.

    Returns:
        ``{component: decomposition}``, with a ``report`` of what is shared beside what chance would give. A component
        that only one of the adapters has is not in it: there the adapter counts as a whole.

    Raises:
        InputError: as :func:`merge_loaded`, and what :func:`fastlora.decompose` refuses. The pipeline is as it was.
        UnsupportedAdapter: adapters that are not ``s·B·A``, such as DoRA.

    Cost: that of a decomposition for every component, and one write of the result.
    """
    if options.get("mode", "pool") != "pool":
        raise InputError(f"mode={options['mode']!r}: a mix has the parts of one decomposition (mode='pool')")
    wanted = weights_by_component(pipe, weights)
    _check(pipe, wanted, name)
    made: dict[str, Adapter] = {}
    found: dict[str, Decomposition] = {}
    for component, given in wanted.items():
        pool = pool_of(adapted(pipe)[component], given)
        weighted = numbers(given)
        if len(pool) == 1:
            terms = [(weighted[n], pool[n]) for n in pool.names]
        else:
            found[component] = parts = decompose(pool, threshold, **options)
            terms = [*((weighted[n], parts.unique_of(n)) for n in pool.names), (shared, parts.shared)]
        mix = linear(terms)
        assert isinstance(mix, Adapter)
        made[component] = mix if rank is None else mix.compress(rank)
    _place(pipe, made, name, dtype)
    if delete:
        pipe.delete_adapters(list(weights))
    return found


def _check(pipe: object, components: Iterable[str], name: str) -> None:
    """Refuses, before any work, what the pipeline would not take."""
    for model in adapted(pipe).values():
        require_new(host_of(model), [name])
    for component in components:
        fused = next((p for p, layer in host_of(adapted(pipe)[component]).tuner_layers() if layer.merged), None)
        if fused is not None:
            raise InputError(
                f"LoRAs are fused into {component} ({fused!r}), so that another would not be applied; take them out "
                "first: pipe.unfuse_lora()"
            )


def _place(pipe: Any, made: Mapping[str, Adapter], name: str, dtype: torch.dtype | str | None) -> None:
    """Adds the new adapters to all components, and makes them the active ones; or leaves everything as it was."""
    parts = adapted(pipe)
    tensors = {component: ready(adapter, dtype) for component, adapter in made.items()}
    snapshots = [Snapshot(host_of(model)) for model in parts.values()]
    try:
        for component, factors in tensors.items():
            put(host_of(parts[component]), {name: factors})
        pipe.set_adapters([name])
        for component in tensors:
            _freeze(parts[component], name)
    except BaseException as error:
        for snapshot in snapshots:
            snapshot.undo()
        if isinstance(error, FastloraError) or not isinstance(error, Exception):
            raise
        raise InputError(
            f"diffusers could not add {name!r} to the pipeline, which is as it was: {type(error).__name__}: {error}"
        ) from error


def _freeze(model: nn.Module, name: str) -> None:
    """What is made active is made trainable too."""
    for path, parameter in model.named_parameters():
        if ".lora_" in path and f".{name}." in f"{path}.":
            parameter.requires_grad_(False)
