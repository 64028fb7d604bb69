"""Forms of the passes over tall factors: gram and combine, on both sides, in every arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastlora as fl
from fastlora.bench.contest import Unavailable
from fastlora.bench.gpu.forms.form import Check, Form, Found, gaussian, largest, worst
from fastlora.bench.workloads import Workload, make_pool
from fastlora.ops.dispatch import prepared
from fastlora.ops.passes import CombineJob, CombineOutput, GramJob

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
EXACT = {"fp32": torch.float32, "fp64": torch.float64}
SIDES = {"B": False, "A": True}
# Of ‖x‖‖y‖: what tensor cores leave of an inner product whose columns are split (docs/gpu.md).
TENSOR_CORES = 2.0**-29
# The same of sums in float64 of some thousand terms.
SUMS = 1e-12
TALL = 1100  # rows: enough for tensor cores, and no multiple of a tile


def launched(plan: Any) -> tuple[str, ...]:
    """The kernels of a prepared pass, where it lists its launches."""
    return tuple(str(launch.kernel.__name__) for launch in getattr(plan, "launches", ()))


def _factor(n: int, r: int, rows: bool, seed: int, dtype: torch.dtype, device: str, shift: int = 0) -> Tensor:
    """``[n, r]``, or ``[r, n]`` with ``rows``; ``shift``: elements behind an address that vectors are loaded from."""
    x = gaussian(*((r, n) if rows else (n, r)), seed=seed, dtype=dtype)
    memory = torch.zeros(x.numel() + 32, dtype=dtype, device=device)
    return memory[shift : shift + x.numel()].view(x.shape).copy_(x)


def gram(
    n: int, ranks: Sequence[int], dtype: torch.dtype, rows: bool, device: str, *,
    shift: int = 0, scale: float = 1.0, allowed: float = SUMS,
) -> Found:  # fmt: skip
    """Every block ``X_iᵀX_j``, relative to ``‖x‖‖y‖`` of its columns."""
    r = max(ranks)
    x = [_factor(n, own, rows, i, dtype, device, shift) for i, own in enumerate(ranks)]
    for f in x:
        f.mul_(scale)
    pairs = [(i, j) for i in range(len(x)) for j in range(i, len(x))]
    blocks = [(i, j, (i * len(x) + j) * r * r) for i, j in pairs]
    out = torch.full((len(x) ** 2 * r * r,), torch.nan, dtype=torch.float64, device=device)
    job = GramJob(x, blocks, rows, out, r)
    plan = prepared("gram_pass", [job])
    plan.run()
    columns = [(f.mT if rows else f).cpu().double() for f in x]
    errors = []
    for i, j, at in blocks:
        wanted = columns[i].mT @ columns[j]
        size = columns[i].norm(dim=0)[:, None] * columns[j].norm(dim=0)
        errors.append(largest(job.block((i, j, at)).cpu() - wanted, size))
    return worst(*(Found(error, allowed, launched(plan)) for error in errors))


def combine(
    width: int, terms: int, dtype: torch.dtype, rows: bool, device: str, *,
    scale: float = 1.0, out_dtype: torch.dtype | None = None, shift: int = 0,
) -> Found:  # fmt: skip
    """``X_0 + Σ scale·X_i C_i`` and a sum without the identity: a half unit in the last place of what is stored, and
    the rounding of float32 sums."""
    out_dtype = dtype if out_dtype is None else out_dtype
    r, n = 16, TALL
    x = [_factor(n, width if i == 0 else r, rows, i, dtype, device, shift) for i in range(terms + 1)]
    c = [gaussian(*((width, r) if rows else (r, width)), seed=9 + i) / scale for i in range(terms)]
    there = [t.to(device) for t in c]
    products = [(i + 1, m, 0, 0.5 * scale) for i, m in enumerate(there)]
    shape = (width, n) if rows else (n, width)
    outs = [torch.full(shape, torch.nan, dtype=out_dtype, device=device) for _ in range(2)]
    outputs = [CombineOutput.into(outs[0], [(0, None, 0, 1.0), *products]), CombineOutput.into(outs[1], products)]
    plan = prepared("combine_pass", [CombineJob(x, outputs, rows)])
    plan.run()
    host = [f.cpu().double() for f in x]
    made = [0.5 * scale * (m @ f if rows else f @ m) for f, m in zip(host[1:], c, strict=True)]
    sizes = [0.5 * scale * (m.abs() @ f.abs() if rows else f.abs() @ m.abs()) for f, m in zip(host[1:], c, strict=True)]
    eps = torch.finfo(out_dtype).eps / 2
    sums = 2.0**-20 if {dtype, out_dtype} <= set(HALVES.values()) else 2.0**-48
    found = []
    for out, start in zip(outs, (host[0], torch.zeros(shape, dtype=torch.float64)), strict=True):
        wanted, size = start + sum(made, torch.zeros(())), start.abs() + sum(sizes, torch.zeros(()))
        # In units of what rounding once may leave, and of float32 sums of the terms where there are such.
        least = torch.finfo(out_dtype).smallest_normal
        unit = eps * wanted.abs().clamp(min=least) * (1 + 2.0**-6) + sums * size
        found.append(Found(largest(out.cpu().double() - wanted, unit), 1.0, launched(plan)))
    return worst(*found)


def copies(dtype: torch.dtype, rows: bool, device: str) -> Found:
    """An identity term alone keeps its bits, also of -0, denormals and Inf."""
    x = _factor(TALL, 24, rows, 1, dtype, device)
    x.view(-1)[:4] = torch.tensor([-0.0, 0.0, torch.inf, torch.finfo(dtype).tiny / 4], dtype=dtype)
    out = torch.full_like(x, torch.nan)
    plan = prepared("combine_pass", [CombineJob([x], [CombineOutput.into(out, [(0, None, 0, 1.0)])], rows)])
    plan.run()
    different = (out.view(torch.uint8) != x.view(torch.uint8)).sum()
    return Found(float(different), 0.0, launched(plan))


def decomposition(dtype: torch.dtype, side: str, graph: bool, device: str) -> Found:
    """A plan on modules that take every kind of launch, in its own dtype, against the same on the host: ``ΔW`` of every
    result, by the size of what was decomposed."""
    modules = {"short": (64, 48), "wide": (33, 290)}
    if dtype in HALVES.values():
        modules |= {"long": (TALL, 1040), "longer": (33, 2052)}  # for tensor cores, on both sides
    pool = make_pool(Workload(modules, 3, 16, dtype))
    plan = fl.DecompositionPlan(pool.to(device), 0.5, side=side)
    if graph:
        if plan.device.type != "cuda":
            raise Unavailable("graphs are of CUDA devices")
        replayed = plan.capture()
        for memory in [t for own in plan.unique_parts.values() for t in own.values()]:
            memory.fill_(torch.nan)
        replayed.replay()
    else:
        plan.run()
    made, wanted = plan.adapters(), fl.decompose(pool, 0.5, side=side).adapters()
    errors = []
    for place, adapter in wanted.items():
        own = made[place].to("cpu")
        for module in adapter.modules:
            size = max(float(a.delta(module).double().norm()) for a in pool.adapters)
            errors.append(float((own.delta(module).double() - adapter.delta(module).double()).norm()) / size)
    # Results are rounded to the pool's dtype, and there are two factors.
    names = tuple(dict.fromkeys(launched(plan.gram) + launched(plan.combine)))
    return worst(*(Found(error, 4 * torch.finfo(dtype).eps, names) for error in errors))


def _gram_forms() -> list[Form]:
    found = []
    for side, rows in SIDES.items():
        for name, dtype in EXACT.items():
            found.append(Form(f"gram {side} {name}", partial(gram, 200, (5, 20, 16), dtype, rows)))
        found.append(Form(f"gram {side} short bf16", partial(gram, 200, (5, 16), torch.bfloat16, rows)))
        found.append(Form(f"gram {side} shifted", partial(gram, 300, (5, 16), torch.float32, rows, shift=1)))
        for name, dtype in HALVES.items():

            def half(
                n: int, ranks: Sequence[int], shift: int = 0, dtype: torch.dtype = dtype, rows: bool = rows
            ) -> Check:
                return partial(gram, n, ranks, dtype, rows, shift=shift, allowed=TENSOR_CORES)

            for ranks in ((16, 16), (12, 12), (5, 5), (16, 24, 8, 40, 32, 16)):
                shape = "+".join(map(str, ranks))
                found.append(Form(f"gram {side} {name} r={shape}", half(TALL, ranks)))
            found.append(Form(f"gram {side} {name} two units", half(4096 + 1032, (16, 8))))
            found.append(Form(f"gram {side} {name} shifted", half(TALL, (16, 8), 1)))
        huge, tiny = partial(gram, TALL, (16, 8), torch.bfloat16, rows, scale=2.0**90), 2.0**-90
        found.append(Form(f"gram {side} repaired, large", huge))
        found.append(
            Form(f"gram {side} repaired, small", partial(gram, TALL, (16, 8), torch.bfloat16, rows, scale=tiny))
        )
    return found


def _combine_forms() -> list[Form]:
    found = []
    for side, rows in SIDES.items():
        for name, dtype in EXACT.items():
            found.append(Form(f"combine {side} {name}", partial(combine, 20, 2, dtype, rows)))
        for name, dtype in HALVES.items():
            found.append(Form(f"copies {side} {name}", partial(copies, dtype, rows)))
            found.append(
                Form(f"combine {side} {name} to fp32", partial(combine, 16, 2, dtype, rows, out_dtype=torch.float32))
            )
            for width in (16, 32, 64):
                for terms in (1, 2, 8):
                    name_of = f"combine {side} {name} {width} columns, {terms} terms"
                    found.append(Form(name_of, partial(combine, width, terms, dtype, rows)))
            found.append(Form(f"combine {side} {name} shifted", partial(combine, 12, 2, dtype, rows, shift=1)))
            found.append(Form(f"combine {side} {name} extreme", partial(combine, 16, 2, dtype, rows, scale=1e-30)))
    return found


def forms() -> list[Form]:
    """Passes alone, then whole decompositions, eager and as graphs."""
    whole = [
        Form(f"decompose {name} {side}{' graph' if graph else ''}", partial(decomposition, dtype, side, graph))
        for name, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16}.items()
        for side in ("left", "right")
        for graph in (False, True)
    ]
    return [*_gram_forms(), *_combine_forms(), *whole]
