"""What a single file is, beside the numbers of its adapter: format, family, what it adapts, scales, oddities."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from fastlora.core.file_form import FileForm
from fastlora.dialects.families import families
from fastlora.dialects.file_facts import FileFacts, ModuleFacts
from fastlora.dialects.oddities import oddities
from fastlora.views.tables import Data
from fastlora.views.text import print_paragraph

NUMBERED = re.compile(r"(?P<block>[^.]+(?:\.[^.\d][^.]*)*)\.(?P<number>\d+)\..+")
KINDS = (
    ("attention", re.compile(r".*(\battn\d?\b|\battention\b|self_attn|cross_attn|SelfAttention).*")),
    (
        "feed-forward",
        re.compile(r".*\b(ff|ffn|mlp|ff_context|feed_forward|proj_mlp|img_mlp|txt_mlp|DenseReluDense)\b.*"),
    ),
    ("modulation", re.compile(r".*(norm\d?(_context|_out)?\.linear|mod|adaLN_modulation)\b.*")),
    ("resnets", re.compile(r".*\bresnets\b.*|.*samplers\b.*")),
)
MOST = 4
"""Alphas and ranks that are listed."""


def file_data(facts: FileFacts, form: FileForm) -> Data:
    """What ``inspect`` reports about the file of an adapter, as plain data."""
    modules = list(facts.modules.values())
    alphas = Counter(m.alpha for m in modules if m.alpha is not None)
    ranks = Counter(m.rank for m in modules if m.rank)
    return {
        "format": form.format,
        "style": form.style,
        "family": form.family,
        "adapted": {part: _adapted(of_part) for part, of_part in _by_component(modules).items()},
        "alphas": {f"{alpha:g}": count for alpha, count in alphas.most_common()},
        "without_alpha": sum(1 for m in modules if m.rank and m.alpha is None),
        "ranks": {str(rank): count for rank, count in ranks.most_common()},
        "odd": oddities(facts),
    }


def _by_component(modules: Iterable[ModuleFacts]) -> dict[str, list[ModuleFacts]]:
    """The denoiser first."""
    found: dict[str, list[ModuleFacts]] = {"denoiser": []}
    for module in modules:
        found.setdefault(module.named.component or "denoiser", []).append(module)
    return {part: of_part for part, of_part in found.items() if of_part}


def _adapted(modules: list[ModuleFacts]) -> Data:
    """How many modules, of which kinds, in which blocks."""
    kinds: Counter[str] = Counter()
    blocks: dict[str, set[int]] = {}
    for module in modules:
        path = module.named.path
        kinds[next((kind for kind, pattern in KINDS if pattern.fullmatch(path)), "others")] += 1
        numbered = NUMBERED.fullmatch(path)
        if numbered is not None:
            blocks.setdefault(numbered["block"], set()).add(int(numbered["number"]))
    return {
        "modules": len(modules),
        "kinds": dict(kinds.most_common()),
        "blocks": {name: sorted(numbers) for name, numbers in blocks.items()},
    }


def show_file(data: Data) -> None:
    """Prints what :func:`file_data` found."""
    known = families().get(data["family"] or "")
    model = known.title if known is not None else "a family that its names leave open"
    print_paragraph(f": {data['format']} ({data['style']}), for {model}", start="file")
    for part, adapted in data["adapted"].items():
        kinds = ", ".join(f"{count} {kind}" for kind, count in adapted["kinds"].items())
        blocks = "; ".join(f"{name} {_ranges(numbers)}" for name, numbers in adapted["blocks"].items())
        print_paragraph(
            f": {adapted['modules']} modules ({kinds}){'; ' * bool(blocks)}{blocks}", start=f"adapts {part}"
        )
    print_paragraph(f": {_scaling(data)}", start="scaling")
    for odd in data["odd"]:
        print_paragraph(f": {odd}", start="odd")


def _scaling(data: Data) -> str:
    ranks = f"rank {_some(data['ranks'])}" if data["ranks"] else "no plain factors"
    without = data["without_alpha"]
    if not data["alphas"]:
        return f"no alpha, {ranks}"
    lacking = f", none in {without} modules" if without else ""
    return f"alpha {_some(data['alphas'])}{lacking}; {ranks}"


def _some(counts: dict[str, int]) -> str:
    """Numbers, the most frequent first."""
    names = list(counts)
    return ", ".join(names[:MOST]) + (f" and {len(names) - MOST} others" if len(names) > MOST else "")


def _ranges(numbers: list[int]) -> str:
    """``0–3, 5``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)
