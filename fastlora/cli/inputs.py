"""Adapters that a command reads: single ones, and the pools of those that were named, folders among them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastlora.cli.arguments import AdapterSpec, parse
from fastlora.cli.run import Run
from fastlora.core.names import check_names_differ
from fastlora.errors import InputError
from fastlora.runtime.cpython import paused_collector

if TYPE_CHECKING:
    from fastlora.adapters.loading import Element
    from fastlora.adapters.lora import Adapter
    from fastlora.adapters.pool import Pool

Weights = dict[str, float | None]


def parse_one(text: str) -> AdapterSpec:
    """The only adapter of a command, or one that has no weight there."""
    spec = parse(text)
    refuse_weights([spec])
    return spec


def refuse_weights(specs: Iterable[AdapterSpec]) -> None:
    """Raises :class:`InputError` for an adapter that was given with a weight."""
    heavy = next((s for s in specs if s.weight is not None), None)
    if heavy is not None:
        raise InputError(f"{heavy.name}: weights have no meaning for this command; leave out `:{heavy.weight:g}`")


def load_adapter(run: Run, spec: AdapterSpec, command: str) -> Adapter:
    """One LoRA adapter, on the device of the run."""
    return load_adapters(run, [spec], command)[0]


def load_element(run: Run, spec: AdapterSpec) -> Element:
    """One adapter of any kind, under the names of modules that ``--map`` gives it."""
    from fastlora.adapters.loading import load
    from fastlora.adapters.renaming import Renaming

    run.require_backend()
    renaming = Renaming(run.changes)
    element = renaming(load(spec.path, spec.name, family=run.family, rank=run.read_rank))
    renaming.require_used()
    return element


def load_adapters(run: Run, specs: Sequence[AdapterSpec], command: str) -> list[Adapter]:
    """LoRA adapters under the names of modules that ``--map`` gives them, on the device of the run."""
    from fastlora.adapters.loading import load
    from fastlora.adapters.pool import require_updates
    from fastlora.adapters.renaming import Renaming
    from fastlora.runtime.progress import track

    run.require_backend()
    renaming = Renaming(run.changes)
    loaded = (load(s.path, s.name, family=run.family, rank=run.read_rank) for s in track(specs, "loading"))
    adapters = [require_updates(on_base(run, renaming(element)), command) for element in loaded]
    renaming.require_used()
    return adapters


@paused_collector()
def load_pool(
    run: Run, specs: list[AdapterSpec], device: str = "cpu", *, drop_extras: bool = False
) -> tuple[Pool, Weights]:
    """The adapters that were named, those of folders in their place, on a device; and their weights by name.

    ``drop_extras``: without biases and replaced modules."""
    from fastlora.adapters.pool import Pool, require_updates

    elements, weights, notes = load_elements(run, specs)
    adapters = [require_updates(on_base(run, element)) for element in elements]
    pool = Pool([a.without_extras() if drop_extras else a for a in adapters], rename=run.changes)
    pool.notices[:0] = [*notes, *(note for adapter in pool.adapters for note in adapter.notes)]
    return (pool if device in ("auto", "cpu") else pool.to(device)), weights


def load_elements(run: Run, specs: Sequence[AdapterSpec]) -> tuple[list[Element], Weights, list[str]]:
    """The adapters that were named, LoRAs and DoRAs of folders in their place; their weights, and notes on folders."""
    from fastlora.adapters.folders import holds_adapters, load_folder
    from fastlora.adapters.loading import load
    from fastlora.core.data import DoraData, LoraData
    from fastlora.runtime.progress import track

    run.require_backend()
    loaded: list[tuple[Element, Path]] = []
    weights: Weights = {}
    notes: list[str] = []
    for spec in track(specs, "loading"):
        if holds_adapters(spec.path):
            _refuse_name(spec)
            kinds = (LoraData,) if run.dora_base is None else (LoraData, DoraData)
            elements, told = load_folder(spec.path, kinds, family=run.family, rank=run.read_rank)
            loaded += [(element, spec.path / element.name) for element in elements]
            notes += told
        else:
            elements = [load(spec.path, spec.name, family=run.family, rank=run.read_rank)]
            loaded.append((elements[0], spec.path))
        weights |= {element.name: spec.weight for element in elements}
    check_names_differ((element.name, str(path)) for element, path in loaded)
    return [element for element, _ in loaded], weights, notes


def on_base(run: Run, element: Element) -> Element:
    """The adapter; where it is a DoRA and the base model is known, the LoRA that it is there."""
    from fastlora.adapters.dora import DoRA

    if run.dora_base is None or not isinstance(element, DoRA):
        return element
    from fastlora.adapters.to_lora import to_lora

    return to_lora(element, run.dora_base, rank=run.read_rank)


def _refuse_name(spec: AdapterSpec) -> None:
    if spec.is_named:
        raise InputError(
            f"{spec.name}={spec.path}: this folder holds adapters, which are called after their own folders; leave out "
            f"`{spec.name}=`, or name one of them: {spec.name}={spec.path}/…"
        )
