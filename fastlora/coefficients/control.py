"""Controls for shared components: as many random or principal directions, with the same rank and norm."""

from __future__ import annotations

import zlib
from dataclasses import replace

import torch
from torch import Tensor

from fastlora import ops
from fastlora.adapters.lora import Adapter
from fastlora.coefficients import input_control
from fastlora.coefficients.pool_gram import PoolGram
from fastlora.core.updates import Update, unscaled
from fastlora.decomposition.components import Components
from fastlora.decomposition.devec import ModuleResult
from fastlora.decomposition.input_parts import InputDecomposition
from fastlora.decomposition.result import Decomposition
from fastlora.engine.blocks import PairBlocks, read_pair_blocks
from fastlora.engine.checks import raise_for_info
from fastlora.engine.schedule import one_adapter
from fastlora.errors import InputError

KINDS = ("random", "top")
# Directions of an adapter below it, relative to its largest, are not taken for its own, unless the decomposition took
# them: what a Gram matrix says about them is rounding to 1e-6 and worse.
RTOL = 1e-5
# Eigenvalues of the Gram matrix of all adapters' directions at or below it: what is left of them is rounding.
SPAN = 1e-12


def control(parts: Decomposition | InputDecomposition, kind: str = "random", *, seed: int = 0) -> dict[str, Adapter]:
    """What shared components are to be compared with: the same construction, MATH (10), with other directions. Of a
    decomposition by inputs: the same filter with inputs that tell nothing of the task.

    In every module where a component shares ``q`` directions, ``Z [n, q]`` is replaced by other orthonormal directions
    of the column space of its adapters (the row space with ``side="right"``), ``Σ_i ω_i Z Zᵀ ΔW_i`` is formed with the
    ``ω_i`` of these directions, and scaled to the Frobenius norm of the shared component. *Our definition.*

    Args:
        parts: a decomposition of ``mode="pool"`` or ``"pairs"``, or one by inputs.
        kind: ``"random"``: a random subspace, uniform among the ``q``-dimensional subspaces of the space that
            ``[ΔW_1 … ΔW_k]`` spans; drawn by ``seed``, the names of the adapters and the module, so that it does not
            depend on what else is computed. ``"top"``: the ``q`` leading left (right) singular vectors of ``[ΔW_1 …
            ΔW_k]``. By inputs, ``"permuted_inputs"``: the coordinates of every input in another order, the same for all
            adapters. ``"shuffled_tasks"``: every adapter gets the rows of another one for its own.
        seed: of ``kind="random"``, and of those by inputs.

    Returns:
        ``{"shared": adapter}``, or ``{"a+b": adapter}`` for every pair; the modules, ranks and norms are those of the
        shared components, also where they are empty. By inputs, ``{name: adapter}``, in every module as long as the
        unique part of that adapter.

    Raises:
        InputError: an unknown kind, ``mode="iterative"``, which has no shared component, or a module whose adapters
            span fewer directions than they share.

    Cost: two passes over the factors and ``O((Σr_i)³)`` operations a module of every component.
    """
    by_inputs = isinstance(parts, InputDecomposition)
    kinds = input_control.KINDS if by_inputs else KINDS
    if kind not in kinds:
        raise InputError(f"control: kind={kind!r} does not exist here: use one of {', '.join(kinds)}")
    if isinstance(parts, InputDecomposition):
        return input_control.input_control(parts, kind, seed)
    if parts.mode == "iterative":
        raise InputError("control: mode='iterative' has no shared component to compare with; use 'pool' or 'pairs'")
    if parts.mode == "pairs":
        components_by_name = {"+".join(names): pair.components for names, pair in parts.pairs.items()}
    else:
        components_by_name = {"shared": parts.components}
    with PoolGram(parts.pool):
        return {name: _control(components, kind, seed, name) for name, components in components_by_name.items()}


def _control(components: Components, kind: str, seed: int, name: str) -> Adapter:
    results: dict[str, ModuleResult] = {}
    for blocks in read_pair_blocks(components.pool, f"control of {name}"):
        for g, module in enumerate(blocks.modules):
            shared = components.results.get(module)
            if shared is not None and shared.count:
                results[module] = _replaced(shared, blocks, g, components.settings.side, kind, seed)
    other = Components(components.pool, components.results | results, components.settings, components.label).shared
    whole = components.shared
    norms, wanted = (_norms(a.name, {m: a.updates[m] for m in results}) for a in (other, whole))
    updates = dict(other.updates)
    for module in results:
        factor = wanted[module] / norms[module] if norms[module] > 0 else 0.0
        updates[module] = replace(updates[module], scaling=factor)
    provenance = {"control": kind, "seed": seed if kind == "random" else None, "of": whole.provenance}
    return replace(other, name=f"{kind}_control({name})", updates=updates, provenance=provenance)


def _replaced(shared: ModuleResult, blocks: PairBlocks, g: int, side: str, kind: str, seed: int) -> ModuleResult:
    """The result of a module with other directions ``Z = Σ_j X_j C_j``."""
    ranks = shared.ranks
    k = len(ranks)
    projected, other = (blocks.left[g], blocks.right[g]) if side == "left" else (blocks.right[g], blocks.left[g])
    gram = torch.cat([torch.cat([projected[i, j, : ranks[i], : ranks[j]] for j in range(k)], 1) for i in range(k)])
    scaling = blocks.scaling[g]
    starts = torch.tensor([0, *ranks]).cumsum(0).tolist()
    bases, sizes = [], []  # of the column space of every ΔW_i = s_i U_i Σ_i V_iᵀ: U_i = X_i T_i, and its |s_i| Σ_i
    for i, update in enumerate(blocks.updates[g]):
        floor = torch.tensor([[unscaled(update.noise.rounding, update)]], dtype=torch.float64)
        own, others = projected[i, i][None, None, None].contiguous(), other[i, i][None, None].contiguous()
        chain = ops.chain(own, others, threshold=0.0, rtol=min(RTOL, shared.rtol), floor=floor)
        raise_for_info([shared.module], chain.info)
        bases.append(chain.basis[0, 0, : ranks[i], : int(chain.kept)])
        sizes.append(scaling[i].abs() * chain.sigma[0, 0, : int(chain.kept)])
    T: Tensor = torch.block_diag(*bases)  # type: ignore[no-untyped-call]
    C = _directions(T, torch.cat(sizes), gram, shared, kind, seed)  # [R, q]
    H = [C.mT @ gram[:, starts[i] : starts[i + 1]] for i in range(k)]
    norms = [
        float(scaling[i].abs() * ((h.mT @ h) * other[i, i, : ranks[i], : ranks[i]]).sum().clamp(min=0).sqrt())
        for i, h in enumerate(H)
    ]
    basis = [C[starts[i] : starts[i + 1]] for i in range(k)]
    before, row = shared.batch, slice(shared.row, shared.row + 1)
    batch = replace(
        before, sigma=before.sigma[row], values=before.values[row], basis=_padded(basis)[None], H=_padded(H)[None]
    )
    return replace(shared, batch=batch, row=0, shared_norms=tuple(norms))


def _padded(blocks: list[Tensor]) -> Tensor:
    """``[k, …]`` of matrices that differ in size, zeros behind the smaller ones."""
    rows, columns = (max(b.shape[d] for b in blocks) for d in (0, 1))
    return torch.stack([torch.nn.functional.pad(b, (0, columns - b.shape[1], 0, rows - b.shape[0])) for b in blocks])


def _directions(T: Tensor, sizes: Tensor, gram: Tensor, shared: ModuleResult, kind: str, seed: int) -> Tensor:
    """``C [R, q]`` with ``X C`` orthonormal, in the span of all ``U = X T [n, Q]``. Their columns have length one,
    whatever the sizes of the updates are. ``X``: the stacked projected factors, ``gram = XᵀX``; ``sizes [Q]``: singular
    values of the updates."""
    values, vectors = ops.eigh((T.mT @ gram @ T).contiguous())
    kept = values > SPAN * values[-1]
    if int(kept.sum()) < shared.count:
        raise InputError(
            f"control: in {shared.module}, {' and '.join(map(repr, shared.names))} span {int(kept.sum())} directions "
            f"and share {shared.count}, so there are no others to compare with; raise the threshold"
        )
    root = values[kept].sqrt()
    whitening = T @ (vectors[:, kept] / root)  # X · whitening is orthonormal
    # [ΔW_1 … ΔW_k] = X · whitening · (sizes · (vectors · root))ᵀ · (orthonormal rows): its left singular vectors are
    # the right ones of what follows.
    _, _, rotation = ops.svd((sizes[:, None] * (vectors[:, kept] * root)).contiguous())
    if kind == "top":
        return whitening @ rotation[: shared.count].mT
    label = "\0".join((shared.module, *shared.names))
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}\0{label}".encode()))
    drawn = torch.randn(len(root), shared.count, generator=generator, dtype=torch.float64)
    Q: Tensor = torch.linalg.qr(drawn).Q
    return whitening @ (rotation.mT @ Q)


def _norms(name: str, updates: dict[str, Update]) -> dict[str, float]:
    """``‖ΔW‖_F`` of the modules of adapter ``name``, from Gram matrices of its factors, read or in the Gram cache."""
    norms: dict[str, float] = {}
    for blocks in read_pair_blocks(one_adapter(name, updates), f"norms of {name}"):
        values = (blocks.left * blocks.right).sum((-1, -2)).flatten().clamp(min=0).sqrt().tolist()
        for module, (update,), value in zip(blocks.modules, blocks.updates, values, strict=True):
            norms[module] = value * abs(update.scaling)
    return norms
