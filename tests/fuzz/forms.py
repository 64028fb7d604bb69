"""Runs made-up adapters with weights in several forms against fastlora. See :mod:`forms_cases`.

    python tests/fuzz/forms.py --count 10000 --seed 1 --json tests/fuzz/forms.json

What comes out is held against dense sums of the fused weights. A case is

* *right*: every weight is there once, in one form, with the right update;
* *kept*: the same, where all experts are in an older layout that nothing tells, and are written in it;
* *refused*: with a message that names an adapter and what is in two forms;
* wrong, which never happens.
"""

from __future__ import annotations

import re
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import forms_cases
import torch
from command_line import Outcome, main
from forms_cases import Case, Sizes
from torch import Tensor

import fastlora as fl
from fastlora.errors import FastloraError

TOLERANCE = 1e-4
"""Relative to the largest entry: factors are float32, a few are added, and projections are beside them."""
NAMED = ("fused", "single experts", "peft", "no module in common", "layout")


class Wrong(Exception):
    """Numbers or forms that nobody was told of."""


def attempt(case: Case, root: Path) -> str:
    """The outcome of one case. Raises :class:`Wrong`."""
    paths = [root / a.label for a in case.adapters]
    for adapter, path in zip(case.adapters, paths, strict=True):
        adapter.write(path)
    expected: dict[str, Tensor] = {}
    for weight, adapter in zip(case.weights, case.adapters, strict=True):
        for name, delta in adapter.deltas().items():
            expected[name] = expected.get(name, torch.zeros_like(delta)) + weight * delta
    try:
        if case.verb == "overlap":
            return judge_cosine(case, fl.overlap(fl.Pool.load(paths)).cosine)
        results = RESULTS[case.verb](case, paths)
        return judge(case.adapters[0].sizes, expected, results)
    except FastloraError as error:
        said = str(error)
        if not any(a.label in said for a in case.adapters) or not any(word in said for word in NAMED):
            raise Wrong(f"refused without a reason: {said}") from None
        return "refused"
    finally:
        for path in (*paths, root / "out"):
            shutil.rmtree(path, ignore_errors=True)


def merge(case: Case, paths: list[Path]) -> list[fl.Adapter]:
    pool = fl.Pool.load(paths)
    return [fl.merge(pool, dict(zip(pool.names, case.weights, strict=True)), method="cat")]


def saved(case: Case, paths: list[Path]) -> list[fl.Adapter]:
    uniform = bool(case.seed % 2)
    merged = merge(case, paths)[0].save(paths[0].parent / "out", uniform_rank=uniform)
    found = fl.load(merged)
    assert isinstance(found, fl.Adapter)
    if uniform and len({u.rank for u in found.updates.values()}) > 1:
        raise Wrong("ranks differ")
    return [found]


def total(case: Case, paths: list[Path]) -> list[fl.Adapter]:
    first, *others = (w * fl.load(p) for w, p in zip(case.weights, paths, strict=True))  # type: ignore[operator]
    for other in others:
        first = first + other
    return [first]


def compose(case: Case, paths: list[Path]) -> list[fl.Adapter]:
    text = " + ".join(f"{w}*{p.name}" for w, p in zip(case.weights, paths, strict=True)).replace("+ -", "- ")
    return [fl.compose(text, {p.name: p for p in paths})]  # type: ignore[list-item]


def decompose(case: Case, paths: list[Path]) -> list[fl.Adapter]:
    parts = fl.decompose(fl.Pool.load(paths), threshold=0.2)
    return [part for p in paths for part in (parts.shared_of(p.name), parts.unique_of(p.name))]


RESULTS: dict[str, Callable[[Case, list[Path]], list[fl.Adapter]]] = {
    "merge": merge, "merge and save": saved, "sum": total, "compose": compose, "decompose": decompose,
}  # fmt: skip


def weights_of(sizes: Sizes, adapter: fl.Adapter) -> dict[str, Tensor]:
    """``{layer.weight: ΔW}`` of the fused weights that an adapter says. Raises :class:`Wrong` for two forms of one."""
    found: dict[str, Tensor] = {}
    forms: dict[str, set[bool]] = {}
    starts = {}
    for weight, parts in sizes.parts().items():
        ends = [sum(n for _, n in parts[: i + 1]) for i in range(len(parts))]
        starts |= {(weight, p): (stop - n, ends[-1]) for (p, n), stop in zip(parts, ends, strict=True)}
    for module, (left, right) in adapter.tensors("float32").items():
        layer, rest = re.fullmatch(r".*?layers\.(\d+)\.(.*)", module).groups()  # type: ignore[union-attr]
        delta = left.double() @ right.double()
        expert = re.fullmatch(r".*\.experts\.(?:(\d+)\.(\w+)|(\w+)_proj\[(\d+)\])", "." + rest)
        if expert is None:
            end = rest.rpartition(".")[2]
            weight = {"qkv_proj": "qkv", "W_pack": "qkv", "gate_up_proj": "gate_up"}.get(end)
            part = None if weight else end
            weight = weight or next(w for w, p in starts if p == end)
        elif expert[1] is None:
            weight, part = f"experts.{expert[4]}.{expert[3]}", None
            delta = delta if adapter.updates[module].layout.order == "out-in" else delta.mT
        else:
            part = {"w1": "gate", "gate_proj": "gate", "w3": "up", "up_proj": "up"}.get(expert[2], "down")
            weight = f"experts.{expert[1]}.{'down' if part == 'down' else 'gate_up'}"
        start, length = (0, delta.shape[0]) if part is None else starts[weight, part]
        name = f"{layer}.{weight}"
        forms.setdefault(re.sub(r"experts\.\d+", "experts", name), set()).add(part is None)
        whole = found.setdefault(name, torch.zeros(length, delta.shape[1], dtype=torch.float64))
        if whole.shape[1] != delta.shape[1] or start + delta.shape[0] > whole.shape[0]:
            raise Wrong(f"{module} is {list(delta.shape)}")
        whole[start : start + delta.shape[0]] += delta
    twice = [name for name, own in forms.items() if len(own) > 1 and not name.endswith(".down")]
    if twice:
        raise Wrong(f"{twice[0]} is there in two forms")
    return found


def judge(sizes: Sizes, expected: Mapping[str, Tensor], results: list[fl.Adapter]) -> str:
    found: dict[str, Tensor] = {}
    kept = False
    for result in results:
        kept |= any(u.layout.order != "out-in" for u in result.updates.values())
        for name, delta in weights_of(sizes, result).items():
            found[name] = found[name] + delta if name in found else delta
    for name in expected.keys() | found.keys():
        want = expected.get(name, torch.zeros_like(found.get(name, torch.zeros(1))))
        have = found.get(name, torch.zeros_like(want))
        turned = kept and "experts" in name and have.shape == want.mT.shape and _close(have.mT, want)
        if not turned and not _close(have, want):
            raise Wrong(f"{name} is not the sum")
    return "kept" if kept else "right"


def _close(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    return float((found - expected).abs().max()) <= TOLERANCE * max(float(expected.abs().max()), 1e-2)


def judge_cosine(case: Case, cosine: Tensor) -> str:
    one, two = (a.deltas() for a in case.adapters)
    inner = sum(float((one[m] * two[m]).sum()) for m in one.keys() & two.keys())
    norms = [sum(float(d.square().sum()) for d in x.values()) ** 0.5 for x in (one, two)]
    if abs(float(cosine[0, 1]) - inner / (norms[0] * norms[1])) > TOLERANCE:
        raise Wrong(f"cosine {float(cosine[0, 1]):.4f} instead of {inner / (norms[0] * norms[1]):.4f}")
    return "right"


def one(seed: int, root: Path) -> tuple[str, str, str]:
    """``(what the case is about, outcome, what is wrong or "")``."""
    case = forms_cases.make(seed)
    try:
        return case.about(), attempt(case, root), ""
    except Wrong as error:
        return case.about(), "wrong", str(error)
    except Exception as error:
        where = " < ".join(
            f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)[:-4:-1]
        )
        return case.about(), "wrong", f"{type(error).__name__}: {str(error)[:300]} ({where})"


def run(seeds: Iterable[int], root: Path) -> Iterator[Outcome]:
    """Every case, in this process."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for seed in seeds:
        yield seed, *one(seed, root)


if __name__ == "__main__":
    sys.exit(main(__doc__, run, noun="cases", kind_ends=" (", kind="case"))
