"""What is odd about a single file: what readers stumble over, or what its owner may not know."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

from fastlora.dialects.adapter_metadata import KEY, header_alpha
from fastlora.dialects.file_facts import FileFacts, ModuleFacts

LISTED = 3
CLOSE = 1e-6


def oddities(file: FileFacts) -> list[str]:
    """Each in a sentence, without what the notes of the adapter tell."""
    modules = [m for m in file.modules.values() if "down" in m.keys]
    return [*_on_alphas(file, modules), *_on_metadata(file, modules), *_on_names(file, modules), *_on_tensors(modules)]


def _on_alphas(file: FileFacts, modules: list[ModuleFacts]) -> Iterable[str]:
    stored = [m for m in modules if m.alpha is not None]
    ranks = {m.rank for m in modules}
    if not stored and len(ranks) > 1 and KEY not in file.metadata:
        yield "ranks differ, and neither alphas nor metadata say the scales: diffusers up to 0.39 scales them otherwise"
    beside = [m for m in stored if m.suffix.startswith(".lora_A")]
    if beside:
        yield f"{_count(beside)} alpha beside lora_A and lora_B, which some readers do not expect or do not look at"
    odd_alphas = {
        "an alpha of 0, a scale of 0 to some readers and of 1 to others": [m for m in stored if m.alpha == 0.0],
        "a negative alpha, over which converters of diffusers never end": [m for m in stored if (m.alpha or 0.0) < 0],
        "a whole number for alpha, which diffusers refuses": [m for m in beside if "int" in m.dtypes["alpha"]],
    }
    yield from (f"{_count(odd)} {what}" for what, odd in odd_alphas.items() if odd)


def _on_metadata(file: FileFacts, modules: list[ModuleFacts]) -> Iterable[str]:
    stored = {m.alpha for m in modules if m.alpha is not None}
    if stored and KEY in file.metadata:
        yield f"{KEY} stand beside alphas, so diffusers refuses the file or scales it twice"
    if not stored and any(not math.isclose(m.meant, 1.0, rel_tol=CLOSE) for m in modules):
        yield f"scales stand in {KEY} alone, which only diffusers reads"
    said = header_alpha(file.metadata)
    if stored and said is not None and float(said[1]) not in stored:
        found = ", ".join(f"{alpha:g}" for alpha in sorted(stored)[:LISTED])
        yield f"the header says {said[0]} = {said[1]}, but alphas are {found}{', …' if len(stored) > LISTED else ''}"


def _on_names(file: FileFacts, modules: list[ModuleFacts]) -> Iterable[str]:
    prefixes = Counter(m.prefix for m in file.modules.values() if not m.named.component)
    if len(prefixes) > 1:
        counts = ", ".join(f"{count} begin with {prefix or 'none'}" for prefix, count in prefixes.most_common())
        yield f"names of the denoiser have several prefixes, of which some readers take one: {counts}"
    spelled = {m.in_diffusers_names for m in file.of("") if m.original is not None and m.named.path != m.original}
    if file.family is not None and len(spelled) > 1:
        yield "some names are those of diffusers and some those of the original code"
    text = [m for m in file.modules.values() if m.named.path.startswith("text_model.") and "text_model" not in m.rest]
    if text:
        yield f"{_count(text)} no text_model in the name, which older readers need"
    infixed = [m for m in modules if m.suffix.startswith(".lora_A.") and m.suffix != ".lora_A.weight"]
    if infixed:
        yield f"{_count(infixed)} the name of an adapter inside the tensors' names ({infixed[0].suffix[1:]})"


def _on_tensors(modules: list[ModuleFacts]) -> Iterable[str]:
    small = [m for m in modules if any("float8" in dtype for dtype in m.dtypes.values())]
    if small:
        yield f"{_count(small)} factors of 8 bits: digits are lost, and diffusers cannot convert them"
    dora = [m for m in modules if {"dora_scale", "magnitude"} & m.keys.keys()]
    if dora:
        yield f"{_count(dora)} magnitudes (DoRA), which few readers apply right"


def _count(modules: list[ModuleFacts]) -> str:
    return f"{len(modules)} modules have" if len(modules) > 1 else f"module {modules[0].stem} has"
