"""Whether updates and factors belong together: kernels take addresses, and would read beyond what is too short."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastlora.core.factors import Factor, Term
from fastlora.core.updates import Layout, Update
from fastlora.errors import InputError

WAY_OUT = "Updates that are computed together share stored matrices; give each module a group of its own"


def require_one_module(updates: Sequence[Update]) -> None:
    """Refuses updates that cannot be of one module: other shapes or layouts (another kernel, another expert, another
    parameter that holds it)."""
    if not updates:
        return
    n, m, first = updates[0].B.length, updates[0].A.length, updates[0].layout
    for u in updates:
        if u.B.length != n or u.A.length != m or u.layout is not first:
            break
    else:  # as they nearly always are
        return
    require_one_length([u.B for u in updates])
    require_one_length([u.A for u in updates])
    other = next((u.layout for u in updates if u.layout is not first and u.layout != first), None)
    if other is not None:
        found = f"one is {_described(first)} and another {_described(other)}"
        raise InputError(f"these updates are of different modules: {found}. {WAY_OUT}")


def require_together(updates: Sequence[Update]) -> None:
    """Refuses updates that no kernel could read together: of different modules, or on different devices."""
    n, m, first = (updates[0].B.length, updates[0].A.length, updates[0].layout) if updates else (0, 0, None)
    on_host = True
    for u in updates:
        B, A = u.B, u.A
        if B.length != n or A.length != m or u.layout is not first:
            require_one_module(updates)
        for term in B.terms + A.terms:
            on_host &= term.source.is_cpu
    if not on_host:
        _require_one_device(updates)


def _require_one_device(updates: Sequence[Update]) -> None:
    devices = dict.fromkeys(t.source.device for u in updates for f in (u.B, u.A) for t in f.terms)
    if len(devices) > 1:
        raise InputError(
            f"these updates are on different devices ({', '.join(map(str, devices))}); move their adapters to one with "
            "`.to(…)`"
        )


def require_one_length(factors: Sequence[Factor]) -> None:
    """Refuses factors that cannot be of one side of one module."""
    lengths = sorted({f.length for f in factors})
    if len(lengths) > 1:
        found = ", ".join(map(str, lengths))
        raise InputError(f"these updates are of different modules: their factors have the lengths {found}. {WAY_OUT}")


def require_length(factor: Factor, source: Tensor) -> None:
    """Refuses a stored matrix that is not as long as the factor that it is a term of."""
    if source.shape[0 if factor.side == "B" else 1] != factor.length:
        raise InputError(
            f"a factor {factor.side} of length {factor.length} has a term of shape {list(source.shape)}: it is of "
            f"another module. {WAY_OUT}"
        )


def require_room(factor: Factor, term: Term) -> None:
    """Refuses a term that covers more than its factor has, and a coefficient that does not fit its matrix."""
    inner = 1 if factor.side == "B" else 0  # the short dimension of the stored matrix
    width, rank, coefficient = term.source.shape[inner], factor.rank, term.coefficient
    if coefficient is not None:
        if coefficient.shape[1 - inner] != width:
            raise InputError(
                f"a coefficient {list(coefficient.shape)} does not fit its matrix {list(term.source.shape)} in a "
                f"factor {factor.side}"
            )
        width = coefficient.shape[inner]
    if not 0 <= term.at <= rank - width:
        raise InputError(
            f"a term at {term.at} of width {width} does not fit into a factor {factor.side} of rank {rank}"
        )


def _described(layout: Layout) -> str:
    if layout.kind == "expert":
        return f"expert {layout.expert} of {layout.experts} of {layout.container!r}"
    return f"of a convolution {list(layout.kernel)}" if layout.kind == "conv" else f"of the kind {layout.kind!r}"
