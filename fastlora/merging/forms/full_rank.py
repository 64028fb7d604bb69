"""What methods on elements make before any cut: matrices of full rank, for those who have a place for them."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastlora.adapters.lora import Adapter
from fastlora.adapters.pool import Pool
from fastlora.core.updates import with_rank_zero
from fastlora.engine.checks import require_finite
from fastlora.merging.forms import tiles
from fastlora.merging.forms.result import merged_adapter
from fastlora.merging.registry import Method
from fastlora.ops import merge_tiles
from fastlora.ops.merge_tiles import TileOutputs

CUTS = ("rank", "energy", "min_energy")
"""Parameters of a result of low rank."""


@dataclass(frozen=True, slots=True, eq=False)
class FullRank:
    """The merged matrices of a pool, one module ``[n, m]`` at a time.

    ``record``: the result without them: shapes, layouts, extras, provenance. ``pool``: what it is made of.
    """

    pool: Pool
    record: Adapter
    _add: Callable[[str, Tensor], bool]
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add_to(self, module: str, out: Tensor) -> bool:
        """``out [n, m] += M`` in place, of any floating dtype, rounded once; whether every element of ``M`` is finite.

        Cost: the passes of the method over the module, by all threads. Calls wait for one another.
        """
        with self._lock:
            return self._add(module, out)


def full_rank(
    method: Method, pool: Pool, weights: Mapping[str, float], parameters: Mapping[str, object]
) -> FullRank | None:
    """What a method makes of a pool without a cut; ``None`` for methods whose results are of low rank.

    Raises :class:`InputError` as the method does, :class:`NonFiniteError` for a factor that holds NaN or Inf.
    """
    run = method.run
    if method.form != "tiles" or not isinstance(run, functools.partial):
        return None
    values = method.checked(parameters)
    own = {name: value for name, value in values.items() if name not in CUTS}
    program, *measure = run.args
    given = [weights[name] for name in pool.names]
    require_finite(pool.adapters)
    if run.func is tiles.merge_by_rule:
        ruled = tiles.Ruled(program(**own), pool, weights)
        prepare = functools.cache(ruled.prepare)

        def add(module: str, out: Tensor) -> bool:
            prepare()
            task, rule = ruled.of(module)
            return merge_tiles.merge(task, rule, TileOutputs(dense=out, add=True)).finite

    else:

        def add(module: str, out: Tensor) -> bool:
            M = tiles.merged_matrix(program, measure[0], module, tiles.tiles_of(pool, module, given), own)
            out.copy_(out.to(torch.float64) + M)
            return True  # it is looked at where it is made

    first = {m: pool.adapters[pool.present(m)[0]].updates[m] for m in pool.modules}
    updates = {module: with_rank_zero(update) for module, update in first.items()}
    return FullRank(pool, merged_adapter(method.name, pool, given, updates, own), add)
