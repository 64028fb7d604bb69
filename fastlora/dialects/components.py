"""The modules of diffusers' models: what PEFT adapts, each model on its own."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from fastlora.core.data import LoraData
from fastlora.core.updates import Update
from fastlora.dialects.laying import laid
from fastlora.dialects.shapes import with_kernels
from fastlora.dialects.spelling import component_of, denoiser, style_named
from fastlora.dialects.writing import families_of
from fastlora.errors import InputError

Lora = TypeVar("Lora", bound=LoraData)


def by_component(adapter: Lora, family: str | None = None) -> dict[str, Lora]:
    """The adapter of a single file as adapters of the models of diffusers, nothing fused, by what the pipeline calls
    them: ``unet`` or ``transformer``, ``text_encoder``, …; one of a single model by ``""``.

    Raises :class:`InputError` where the names of its modules are not known.
    """
    base = replace(adapter.base, form=None)
    form = adapter.base.form
    if form is None or form.format == "mlx":
        return {"": replace(adapter, base=base)}
    families = families_of(adapter, form if family is None else replace(form, family=family))
    if not families:
        raise InputError(
            f"adapter {adapter.name!r} has the names of its file, and which modules of a model these are is not known; "
            "say which family it is of (family=, --family)"
        )
    shaped = with_kernels(adapter, families[0])
    updates: dict[str, dict[str, Update]] = {}
    for module, update in laid(shaped, style_named("component"), families[0], None).updates.items():
        component, path = component_of(module)
        updates.setdefault(component or denoiser(families[0]), {})[path] = update
    extras = {
        component: {
            p.removeprefix(f"{component}."): e
            for p, e in adapter.extras.items()
            if (component_of(p)[0] or denoiser(families[0])) == component
        }
        for component in updates
    }
    if len(updates) < 2:
        return {
            "": replace(
                adapter, updates=next(iter(updates.values()), {}), extras=next(iter(extras.values()), {}), base=base
            )
        }
    told = (
        f"adapter {adapter.name!r}: PEFT adapts one model, so each has a directory of its own: {', '.join(updates)}; "
        "load each into its part of the pipeline"
    )
    notes = (*adapter.notes, told)
    return {c: replace(adapter, updates=u, extras=extras[c], base=base, notes=notes) for c, u in updates.items()}
