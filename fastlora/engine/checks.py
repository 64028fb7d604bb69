"""Refusals that need a look at the numbers: NaN, Inf, and what overflows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fastlora.core.data import LoraData, ModulesData
from fastlora.core.updates import sources
from fastlora.errors import InputError, NonFiniteError
from fastlora.ops.eigh import NOT_FINITE
from fastlora.ops.finite import is_finite
from fastlora.runtime import ranks
from fastlora.runtime.memory import release
from fastlora.runtime.progress import track


def require_finite(adapters: Iterable[LoraData]) -> None:
    """Raises for the first stored matrix that holds NaN or Inf. Costs one read, which ranks share; gram passes find the
    same for free."""
    for adapter in adapters:
        sizes = [sum(s.nbytes for s in sources([adapter.updates[m]])) for m in adapter.modules]

        def first_bad(adapter: LoraData = adapter, sizes: Sequence[int] = sizes) -> tuple[int, str] | None:
            places = {m: i for i, m in enumerate(adapter.modules)}
            for module in track(ranks.own(adapter.modules, sizes), f"checking {adapter.name}"):
                for factor in (adapter.updates[module].B, adapter.updates[module].A):
                    if not all(is_finite(term.source) for term in factor.terms):
                        return places[module], factor.side
                release(sources([adapter.updates[module]]))
            return None

        found = [bad for bad in ranks.gathered(f"checking {adapter.name}", first_bad) if bad is not None]
        if found:
            place, side = min(found)
            raise not_finite(adapter.name, adapter.modules[place], side)


def require_finite_extras(adapters: Iterable[ModulesData]) -> None:
    """Raises for the first bias or replaced module that holds NaN or Inf: like a factor, it would spoil a result.

    Costs one read of what the adapters hold beside their updates.
    """
    for adapter in adapters:
        for name, extra in adapter.extras.items():
            tensor = extra.tensor
            if tensor.is_floating_point() and not is_finite(tensor.detach().reshape(1, -1)):
                raise NonFiniteError(
                    f"adapter {adapter.name!r}: {name}, which it holds beside its updates (modules_to_save or a "
                    "trained bias), holds NaN or Inf. Leave such parameters out with `adapter.without_extras()` "
                    "(`fastlora compose x x=PATH --drop-extras --out CLEAN`), or save the adapter again from a "
                    "training step that did not diverge"
                )
            release([tensor])


def not_finite(adapter: str, module: str, side: str) -> NonFiniteError:
    """The error for a factor that holds NaN or Inf, with the way out."""
    return NonFiniteError(
        f"adapter {adapter!r}: lora_{side} of {module} holds NaN or Inf, so nothing computed from it would mean "
        "anything. Leave this adapter out, or save it again from a training step that did not diverge"
    )


def check_diagonal(names: Sequence[str], modules: Sequence[str], gram: Tensor, side: str) -> None:
    """Raises when a factor holds NaN or Inf, as its diagonal Gram block shows: ``gram [len(modules), k, k, r, r]`` or
    its diagonal blocks ``[len(modules), k, r, r]``."""
    if gram.is_cpu:  # small steps take NumPy a third of torch's time
        traces = "gkkrr->" if gram.dim() == 5 else "gkrr->"
        with np.errstate(all="ignore"):
            total = float(np.einsum(traces, gram.numpy()))
        if math.isfinite(total):  # a sum may overflow where no square does
            return
    # [g, r, r, k] of the first, [g, k, r] of the second
    squares = (
        gram.diagonal(dim1=1, dim2=2).diagonal(dim1=1, dim2=2) if gram.dim() == 5 else gram.diagonal(dim1=2, dim2=3)
    )
    if not gram.is_cpu and math.isfinite(float(squares.sum())):
        return
    bad = (~squares.isfinite()).any(-1).nonzero().tolist()
    if bad:
        module, adapter = bad[0]
        raise not_finite(names[adapter], modules[module], side)


LARGEST = 1e150
"""Of singular values: sums of a few squares stay finite."""


def check_size(names: Sequence[Sequence[str]], modules: Sequence[str], sigma: npt.NDArray[np.float64]) -> None:
    """Raises for singular values whose squares overflow: ``sigma [len(modules), k, r]``, scaling included, of the
    adapters ``names[module]``."""
    if not sigma.size or sigma.max() <= LARGEST:  # not so with NaN, either
        return
    bad = np.argwhere((~(sigma <= LARGEST)).any(-1)).tolist()
    if bad:
        module, adapter = bad[0]
        size = float(sigma[module, adapter].max())
        raise NonFiniteError(
            f"adapter {names[module][adapter]!r}: its update of {modules[module]} has a singular value of {size:.3g}, "
            "whose square overflows. No weight is that large: correct 'lora_alpha', 'alpha_pattern' or 'r' in its "
            "configuration, or the weight that it is multiplied by"
        )


def raise_for_info(modules: Sequence[str], info: Tensor) -> None:
    """A decomposition that did not converge is an error with the module's name, never a wrong result."""
    codes = info.tolist()
    bad = [i for i, code in enumerate(codes) if code]
    if bad:
        what = (
            "its Gram matrix is not finite"
            if codes[bad[0]] == NOT_FINITE
            else "the eigenvalue iteration did not converge"
        )
        raise InputError(
            f"{modules[bad[0]]}: {what}; check the adapters with `fastlora inspect`, or leave the module out"
        )
