"""Every merge method beside its definition on dense float64 matrices, and the pools that both are tried on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from builders import gaussian
from torch import Tensor

import fastlora as fl
from fastlora.merging.forms.elementwise import USED
from fastlora.merging.input_rows import Statistics
from fastlora.ops.merge_tiles import bound_of, key_of
from fastlora.reference import merge_tiles as formula

SEED = containers.SEED


@dataclass(frozen=True, slots=True, eq=False)
class Given:
    """A pool with weights, as dense matrices. ``deltas``: the ``ΔW_i [k, n, m]`` by module, without weights.
    ``noise``: by module, the relative size of singular values that are not significant."""

    pool: fl.Pool
    weights: dict[str, float]
    data: Statistics | None
    noise: dict[str, float]

    @property
    def column(self) -> Tensor:
        return torch.tensor([self.weights[n] for n in self.pool.names], dtype=torch.float64)

    def deltas(self, module: str) -> Tensor:
        return mixed.dense(self.pool, module)

    def weighted(self, module: str) -> Tensor:
        return mixed.dense(self.pool, module, self.weights)

    @property
    def chosen(self) -> list[int]:
        """The adapters whose weight is not 0."""
        return self.column.nonzero().flatten().tolist()

    @property
    def names(self) -> list[str]:
        """Those of :attr:`chosen`."""
        return [self.pool.names[i] for i in self.chosen]


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
    "ctm": rules_of("ctm", rank=3, balance=0.25),
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


# ---- Pools

SHAPES = {"q": (14, 11), "up": (9, 17)}
NEGATIVE = (0.5, -1.0, 2.0)
Parts = dict[str, pools.Part]


def random_parts(alike: bool, dtype: torch.dtype = torch.float64) -> list[Parts]:
    """Three adapters of two modules, of ragged ranks and scalings, or ``alike``."""
    ranks, scalings = ((3, 3, 3), (0.5,) * 3) if alike else ((2, 4, 3), (1.0, 0.5, -2.0))
    return [
        {
            module: (
                gaussian(n, ranks[i], seed=40 + 10 * i + j, dtype=dtype),
                gaussian(ranks[i], m, seed=70 + 10 * i + j, dtype=dtype) + 0.2,
                scalings[i],
            )
            for j, (module, (n, m)) in enumerate(SHAPES.items())
        }
        for i in range(3)
    ]


def deficient(alike: bool) -> list[Parts]:
    """Repeated columns of ``B`` in one adapter, repeated rows of ``A`` in another, exact in any dtype."""
    parts = random_parts(alike, torch.float32)
    for B, _, _ in parts[0].values():
        B[:, -1] = -2 * B[:, 0]
    for _, A, _ in parts[1].values():
        A[-1] = A[0]
    return parts


def zero(alike: bool) -> list[Parts]:
    """The second adapter as PEFT initialises it."""
    parts = random_parts(alike, torch.float32)
    parts[1] = {m: (torch.zeros_like(B), A, s) for m, (B, A, s) in parts[1].items()}
    return parts


def duplicate(alike: bool) -> list[Parts]:
    parts = random_parts(alike, torch.float32)
    return [parts[0], parts[0], parts[2]]


def missing(alike: bool) -> list[Parts]:
    """Modules that one of three lacks."""
    parts = random_parts(alike, torch.float32)
    return [parts[0], {"q": parts[1]["q"]}, {"up": parts[2]["up"]}]


def planted(alike: bool) -> list[Parts]:
    return [{pools.MODULE: part} for part in pools.cast(pools.planted(3), torch.float32)]


def pool_of(parts: Sequence[Parts]) -> fl.Pool:
    return fl.Pool(pools.make_adapter(f"a{i}", own) for i, own in enumerate(parts))


Kind = Callable[[bool], tuple[fl.Pool, Sequence[float]]]
KINDS: dict[str, Kind] = {
    "random float64": lambda alike: (pool_of(random_parts(alike)), (1.0, 1.0, 1.0)),
    "random float32, negative weights": lambda alike: (pool_of(random_parts(alike, torch.float32)), NEGATIVE),
    "random bfloat16": lambda alike: (pool_of(random_parts(alike, torch.bfloat16)), NEGATIVE),
    "planted float32": lambda alike: (pool_of(planted(alike)), (1.0, 0.5, 0.8)),
    "rank-deficient": lambda alike: (pool_of(deficient(alike)), NEGATIVE),
    "zero": lambda alike: (pool_of(zero(alike)), NEGATIVE),
    "duplicate": lambda alike: (pool_of(duplicate(alike)), NEGATIVE),
    "missing modules": lambda alike: (pool_of(missing(alike)), NEGATIVE),
    "everything": lambda alike: (mixed.mixed_pool(), list(mixed.WEIGHTS.values())),
    "everything bfloat16": lambda alike: (mixed.mixed_pool(dtype=torch.bfloat16), list(mixed.WEIGHTS.values())),
}
"""Pools and weights. With ``alike`` all ranks and scalings are the same, where that can be."""

ALIKE = ("pem",)
OF_TWO = ("slerp",)
REFUSED: dict[tuple[str, str], str] = {
    ("pem", "missing modules"): "the paper adds stored factors, one by one",
    ("pem", "everything"): "the paper adds stored factors of one rank",
    ("pem", "everything bfloat16"): "the paper adds stored factors of one rank",
    ("slerp", "everything"): "there is a way between two adapters alone",
    ("slerp", "everything bfloat16"): "there is a way between two adapters alone",
}
"""Methods that refuse a kind of pool, and why."""


def given_of(method: str, kind: str) -> Given:
    pool, weights = KINDS[kind](method in ALIKE)
    if method in OF_TWO and (method, kind) not in REFUSED:
        pool, weights = pool.subset(pool.names[:2]), weights[:2]
    noise = {}
    for module in pool.modules:
        present = [d for a in pool.adapters if module in a for d in a.updates[module].dtypes()]
        noise[module] = mixed.noise(present)
    data = test_inputs.statistics(pool) if fl.methods()[method].takes_data else None
    return Given(pool, dict(zip(pool.names, weights, strict=True)), data, noise)
