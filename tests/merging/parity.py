"""Every merge method beside its definition on dense float64 matrices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mixed
import pools
import test_containers as containers
import test_form_cores
import test_form_tiles
import test_inputs
import test_iso_cts
import test_pico
import test_scaled_sums
import test_slerp
import test_spectral_rules as spectral
import test_spherical_means
import test_tile_rules as owners
import test_tsv
import test_whole_model
import torch
from parity_pools import Given
from torch import Tensor

from fastlora.merging.forms.elementwise import USED
from fastlora.ops.merge_tiles import bound_of, key_of
from fastlora.reference import merge_tiles as formula

SEED = containers.SEED


Definition = Callable[[Given], Mapping[str, Tensor]]
"""The merged ``[n, m]`` by module."""


def by_module(program: Callable[[Given, str], Tensor]) -> Definition:
    return lambda given: {m: program(given, m) for m in given.pool.modules}


def of_weighted(definition: mixed.Definition) -> Definition:
    """Of the ``w_i ΔW_i`` of a module, the weights, and the noise."""
    return by_module(lambda given, m: definition(given.weighted(m), given.column, given.noise[m]))


def of_deltas(definition: Callable[[Tensor, Tensor], Tensor]) -> Definition:
    """Of the ``ΔW_i`` of a module and the weights."""
    return by_module(lambda given, m: definition(given.deltas(m), given.column))


def of_sums(shares: Callable[[Mapping[str, Tensor], Tensor], Tensor]) -> Definition:
    """A sum with one number an adapter."""

    def definition(given: Given) -> dict[str, Tensor]:
        deltas = {m: given.weighted(m) for m in given.pool.modules}
        found = shares(deltas, given.column)
        return {m: (found[:, None, None] * x).sum(0) for m, x in deltas.items()}

    return definition


def of_total(program: Callable[[Tensor, float], Tensor]) -> Definition:
    return by_module(lambda given, m: program(given.weighted(m).sum(0), given.noise[m]))


# ---- Rules on elements: x [k, n, m] and weights w [k, 1, 1] of the adapters whose weight is not 0.

Elements = Callable[[Tensor, Tensor, Sequence[str], str], Tensor]


def of_elements(program: Elements) -> Definition:
    def definition(given: Given, module: str) -> Tensor:
        x = given.deltas(module)
        if not given.chosen:
            return torch.zeros_like(x[0])
        return program(x[given.chosen], given.column[given.chosen][:, None, None], given.names, module)

    return by_module(definition)


def agreed(votes: Tensor, elect: str) -> Tensor:
    """Which votes have the sign of their sum, plus where that is zero."""
    if elect == "none":
        return torch.ones_like(votes)
    sums = votes.sum(0) if elect == "total" else votes.sign().sum(0)
    return (votes.sign() == torch.where(sums >= 0, 1.0, -1.0)).double()


def divided(total: Tensor, divisor: Tensor, least: float = 1e-30, instead: float = 1.0) -> Tensor:
    return total / torch.where(divisor.abs() < least, instead, divisor)


def magnitude(density: float) -> Definition:
    def program(x: Tensor, w: Tensor, names: Sequence[str], module: str) -> Tensor:
        kept = [d * owners.first_of(d.abs(), int(density * d.numel())) for d in x]
        return (w * torch.stack(kept)).sum(0)

    return of_elements(program)


def breadcrumbs(density: float, gamma: float, elect: str) -> Definition:
    def program(x: Tensor, w: Tensor, names: Sequence[str], module: str) -> Tensor:
        size = x[0].numel()
        kept = int(density * size)
        top = min(int(gamma * size), size - kept)
        v = torch.stack([
            d * (owners.first_of(d.abs(), top + kept) & ~owners.first_of(d.abs(), top)) for d in x
        ])  # fmt: skip
        return (w * v * agreed(w * v, elect)).sum(0)

    return of_elements(program)


def dare(density: float, elect: str, convention: str) -> Definition:
    def program(x: Tensor, w: Tensor, names: Sequence[str], module: str) -> Tensor:
        n, m = x.shape[1:]
        masks = [formula.random_mask((n, m), bound_of(density), key_of(SEED, a), key_of(module)) for a in names]
        v = x * torch.stack(masks)
        if convention == "mergekit":
            v = owners.l1_rescaled(x, v)
            return (w * v * agreed(w * v, elect)).sum(0)
        v = v / density
        agree = agreed(v, elect)
        return divided((w * v * agree).sum(0), agree.sum(0) if elect != "none" else torch.ones(()))

    return of_elements(program)


def della(density: float, epsilon: float, elect: str, combine: str) -> Definition:
    def program(x: Tensor, w: Tensor, names: Sequence[str], module: str) -> Tensor:
        n, m = x.shape[1:]
        kept = []
        for d, name in zip(x, names, strict=True):
            share = density - epsilon + 2 * epsilon * d.abs().argsort(dim=1, stable=True).argsort(1) / (m - 1)
            bounds = (share * 2.0**32).floor().long()
            kept.append(d * formula.random_mask((n, m), bounds, key_of(SEED, name), key_of(module)))
        v = owners.l1_rescaled(x, torch.stack(kept))
        agree = agreed(w * v, elect)
        total = (w * v * agree).sum(0)
        return divided(total, (w * agree).sum(0)) if combine == "mean" else total

    return of_elements(program)


def sce(topk: float) -> Definition:
    def program(x: Tensor, w: Tensor, names: Sequence[str], module: str) -> Tensor:
        v = x
        if topk < 1:
            variance = x.var(0, unbiased=False)
            v = x * owners.first_of(variance, int(topk * int((variance != 0).sum())))
        energies = w * v.square().mean((1, 2), keepdim=True)
        shares = torch.full_like(energies, 1 / len(x)) if abs(energies.sum()) < 1e-6 else energies / energies.sum()
        agree = agreed(v, "total")
        return divided((v * shares * agree).sum(0), (shares * agree).sum(0), 1e-6, 1e-6)

    return of_elements(program)


def ties(density: float, combine: str, convention: str, elect: str = "total") -> Definition:
    def program(x: Tensor, w: Tensor, names: Sequence[str], module: str) -> Tensor:
        weights = w.flatten().tolist()
        return test_form_tiles.ties_by_definition(x, weights, density, combine, convention, elect)

    return of_elements(program)


def ties_of_model(density: float, convention: str) -> Definition:
    """Of one long vector of every adapter."""

    def definition(given: Given) -> dict[str, Tensor]:
        modules, values = test_whole_model.flat(given.pool)
        shapes = [given.deltas(m)[0].shape for m in modules]
        weights = given.column[given.chosen].tolist()
        long = test_whole_model.ties(values[given.chosen], density, convention, weights)
        parts = long.split([shape.numel() for shape in shapes])
        return {m: part.view(shape) for m, part, shape in zip(modules, parts, shapes, strict=True)}

    return definition


# ---- Rules in containers


def container(method: str, rule: str, **given_rule: Any) -> Definition:
    make = {"core": containers.core, "knots": containers.knots, "ctm": containers.ctm}[method]

    def definition(given: Given, module: str) -> Tensor:
        made = make(rule=rule, names=given.names, module=module, **given_rule)
        return made(given.weighted(module), given.column, given.noise[module])

    return by_module(definition)


def stored(given: Given, module: str) -> tuple[list[Tensor], list[Tensor]]:
    """``B_i`` and ``A_i`` as they are stored, in float64, of the adapters that have the module and a weight."""
    some = [i for i in given.chosen if i in given.pool.present(module)]
    updates = [given.pool.adapters[i].updates[module] for i in some]
    pairs = pools.materialise(updates, torch.float64)
    return [B for B, _ in pairs], [A for _, A in pairs]


def raw_core(given: Given, module: str) -> Tensor:
    """In the bases of the stored factors."""
    deltas = given.weighted(module)
    B, A = stored(given, module)
    U, V = containers.columns(torch.cat(B, 1)), containers.columns(torch.cat(A).mT)
    return U @ containers.by_elements((U.mT @ deltas @ V)[given.chosen], "ties") @ V.mT


def pico(gauge: str, scale: str) -> Definition:
    def definition(given: Given) -> dict[str, Tensor]:
        found, squares, length = {}, torch.zeros(len(given.pool), dtype=torch.float64), 0.0
        for module in given.pool.modules:
            deltas = given.weighted(module)
            sizes = deltas.flatten(1).square().sum(1)
            n = deltas.shape[1]
            sides = torch.cat([torch.zeros(n, 0, dtype=torch.float64), *stored(given, module)[0]], 1)
            gram = (deltas @ deltas.mT).sum(0) if gauge == "free" else sides @ sides.mT
            found[module] = test_pico.corrected(deltas.sum(0), gram, int((sizes > 0).sum()))
            squares += sizes
            length += float(found[module].square().sum())
        norms = squares.sqrt()
        gamma = float(norms[norms > 0].mean()) / length**0.5 if scale == "matched" else 1.0
        return {m: gamma * x for m, x in found.items()}

    return definition


def of_factors(given: Given, module: str) -> Tensor:
    """PEM: the shares of the factors."""
    shares = given.column / given.column.sum()
    pairs = pools.materialise([a.updates[module] for a in given.pool.adapters], torch.float64)
    B, A = (sum(s * x for s, x in zip(shares, side, strict=True)) for side in zip(*pairs, strict=True))
    return given.pool.adapters[0].updates[module].scaling * (B @ A)  # type: ignore[operator]


def inputs_of(program: Callable[..., Tensor], **parameters: float) -> Definition:
    return by_module(lambda given, m: program(given.pool, m, given.data, weights=given.weights, **parameters))


def iso_c(rank: int | None = None, energy: float | None = None) -> Definition:
    return of_total(lambda total, noise: test_form_cores.iso_by_definition(total, rank, energy, noise))


WHOLE = {"rank": 40}
"""What elementwise rules need so that nothing is cut."""
Case = tuple[dict[str, Any], Definition]


def rules_of(method: str, **more: Any) -> list[Case]:
    """Every rule in a container."""
    rules: list[dict[str, Any]] = [
        {"rule": "ties", "density": 0.2}, {"rule": "ties", "density": 0.6, "combine": "sum"}, {"rule": "sum"},
        {"rule": "magnitude", "density": 0.3}, {"rule": "breadcrumbs", "density": 0.5, "gamma": 0.1},
        {"rule": "breadcrumbs_ties", "density": 0.5, "gamma": 0.1}, {"rule": "dare", "density": 0.5},
        {"rule": "dare_ties", "density": 0.5, "combine": "sum"}, {"rule": "sce", "select_topk": 0.4},
        {"rule": "della", "density": 0.5, "epsilon": 0.3}, {"rule": "della_linear", "density": 0.5, "epsilon": 0.3},
    ]  # fmt: skip
    return [
        (
            {**rule, **more, **({"seed": SEED} if "seed" in USED[rule["rule"]] else {})},
            container(method, **rule, **more),
        )
        for rule in rules
    ]


def by_choices(definition: Callable[..., Definition], *cases: dict[str, Any], **same: Any) -> list[Case]:
    """Cases whose parameters are those of their definition, beside the ``same`` that it does not have."""
    return [({**case, **same}, definition(**case)) for case in cases]


CASES: dict[str, list[Case]] = {
    **{name: [(given, of_sums(shares))] for name, (given, shares) in test_scaled_sums.DEFINITIONS.items()},
    **{name: [({}, of_deltas(definition))] for name, definition in test_spherical_means.DEFINITIONS.items()},
    "cat": [({}, of_total(lambda total, noise: total))],
    "svd": [({"rank": 3}, of_total(lambda total, noise: mixed.truncated(total, 3)))],
    "slerp": [
        ({"t": t}, of_weighted(lambda x, w, noise, t=t: test_slerp.definition(*x, t)))  # type: ignore[misc]
        for t in (0.3, 0.5)
    ],
    "pem": [({}, by_module(of_factors))],
    "core": [*rules_of("core"), ({"gauge": "raw"}, by_module(raw_core))],
    "knots": rules_of("knots"),
    "ctm": [
        ({**given, "tolerance": containers.TIGHT}, definition)
        for given, definition in rules_of("ctm", rank=3, balance=0.25)
    ],
    "tsv": [({"spectrum": s}, of_weighted(test_tsv.definition(s))) for s in ("own", "flat", "rms")],
    "iso_c": [*by_choices(iso_c, {"rank": 3}, {"energy": 0.8})],
    "iso_cts": [({"common": 0.6, "rank": 4}, of_weighted(test_iso_cts.definition(0.6, 4)))],
    "pico": by_choices(pico, *({"gauge": g, "scale": s} for g in ("free", "raw") for s in ("matched", "none"))),
    "star": [({"keep": 0.6}, of_weighted(spectral.star(0.6)))],
    "cart": [({"share": 0.3, "strength": 0.7}, of_weighted(spectral.cart(0.3, 0.7)))],
    "svc": [({}, of_weighted(spectral.svc(0.3, 0.1)))],
    "wudi": [
        ({"ridge": 0.1, "inputs": i, "towards": t}, of_weighted(spectral.wudi(0.1, i, t)))
        for i in ("energy", "projector") for t in ("sum", "zero")
    ],
    "regmean": [
        ({"off_diagonal": g, "ridge": 1e-2}, inputs_of(test_inputs.regmean, gamma=g, ridge=1e-2)) for g in (1.0, 0.9)
    ],
    "ssr": [({"ridge": 1e-3}, inputs_of(test_inputs.ssr, ridge=1e-3))],
    "magnitude": by_choices(magnitude, {"density": 0.3}, **WHOLE),
    "breadcrumbs": by_choices(
        breadcrumbs, *({"density": 0.4, "gamma": 0.05, "elect": e} for e in ("none", "total", "frequency")), **WHOLE
    ),
    "dare": by_choices(
        dare,
        *({"density": 0.4, "elect": e, "convention": c} for e in ("none", "total", "frequency")
          for c in ("peft", "mergekit")),
        seed=SEED, **WHOLE,
    ),
    "della": by_choices(
        della,
        *({"density": 0.4, "epsilon": 0.2, "elect": e, "combine": c} for e in ("none", "total", "frequency")
          for c in ("mean", "sum")),
        seed=SEED, **WHOLE,
    ),
    "sce": [({"select_topk": t, **WHOLE}, sce(t)) for t in (1.0, 0.3)],
    "ties": [
        *by_choices(
            ties,
            *({"density": d, "combine": c, "convention": v, "elect": e} for d, e in ((0.2, "total"), (0.7, "frequency"))
              for v in ("peft", "mergekit", "paper") for c in ("mean", "sum")),
            scope="module", **WHOLE,
        ),
        *by_choices(
            ties_of_model, *({"density": 0.3, "convention": v} for v in ("peft", "mergekit", "paper")),
            scope="model", **WHOLE,
        ),
    ],
}  # fmt: skip
"""``{method: [(parameters, definition)]}``."""
