"""Adapters applied to base models of any size: the model is streamed, tile by tile, into a new one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from fastlora._version import __version__
from fastlora.checkpoints.base import read_base
from fastlora.checkpoints.plan import planned
from fastlora.checkpoints.streaming import write
from fastlora.core.data import ModulesData
from fastlora.errors import InputError, OutputError
from fastlora.runtime.cpython import paused_collector


def apply(
    base: str | os.PathLike[str],
    adapters: ModulesData | Mapping[str, float],
    out: str | os.PathLike[str],
    *,
    pool: Mapping[str, ModulesData] | None = None,
    resume: bool = False,
) -> list[str]:
    r"""Writes the base model with adapters in its weights: ``W' = W + Σ_i w_i ΔW_i``, rounded once.

    Every kind that is read can be applied. With the weight ``w`` of its adapter a weight ``W [out, in]`` becomes::

        LoRA    W + w·s·B A
        DoRA    W + w·(diag(m / ‖W + s·B A‖) (W + s·B A) − W)     norms of rows, or of input channels
        (IA)³   W + w·(l − 1)·W                                   rows and biases, or columns

    Sums are float32, float64 where ``W`` is float32 or a factor float64, and are rounded to the dtype of ``W`` once, to
    nearest even. Biases of an adapter are added; parameters that it was saved with whole (``modules_to_save``) replace
    those of the model, and a note names them.

    Args:
        base: a folder of transformers (``model.safetensors`` or shards with an index), a pipeline's folder of
            diffusers, or one ``.safetensors`` file.
        adapters: an adapter (also a merge, a part, a sum: whatever is one), or ``{name: weight}`` of ``pool``.
        out: the folder to make; a file where ``base`` is one.
        pool: adapters by name: a :class:`fastlora.Pool` or a mapping.
        resume: continue the run for ``out`` that was interrupted. What it had finished is not computed again.

    Returns:
        Notes: what a user should know.

    Raises:
        InputError: modules or shapes that the base model does not have, by name; quantised or tied matrices; a model
            that is not whole; weights that are not finite.
        OutputError: an output that exists or cannot be written, an unfinished run of before (without ``resume``).

    Cost: every byte of the model is read and written once (twice read where norms of columns are needed), and
    ``2·n·m·Σr`` operations for each adapted weight. Memory: the factors, and a few tiles of 2 MB a thread. Output files
    have the layout of the input's. Until all is done, they lie in ``.NAME.unfinished`` under names that nothing loads.
    """
    source, target = Path(base).expanduser().resolve(), Path(os.path.abspath(Path(out).expanduser()))
    weighted = _weighted(adapters, pool)
    _check_target(source, target)
    with paused_collector():
        model = read_base(source)
        plan = planned(model, weighted)
    if model.is_folder == (target.suffix == ".safetensors"):
        kind, needed = ("folder", "one") if model.is_folder else ("file", "NAME.safetensors")
        raise OutputError(f"{source} is a {kind}, so the output must be {needed}, not {out}")
    record = {
        "version": __version__,
        "apply": {"base": model.root.name, "adapters": {e.name: w for e, w in weighted}},
    }
    return [*model.notes(), *plan.notes, *write(model, plan, target, resume=resume, record=record)]


def _weighted(
    adapters: ModulesData | Mapping[str, float], pool: Mapping[str, ModulesData] | None
) -> list[tuple[ModulesData, float]]:
    if isinstance(adapters, ModulesData):
        return [(adapters, 1.0)]
    if pool is None:
        raise InputError("apply: weights by name need the adapters: pass pool=")
    if not adapters:
        raise InputError("apply: no adapter was given")
    missing = next((name for name in adapters if name not in pool), None)
    if missing is not None:
        raise InputError(f"apply: the pool has no adapter {missing!r}")
    weights = {name: float(weight) for name, weight in adapters.items()}
    wrong = next((name for name, weight in weights.items() if not abs(weight) < float("inf")), None)
    if wrong is not None:
        raise InputError(f"apply: the weight of {wrong!r} is not finite")
    return [(pool[name], weight) for name, weight in weights.items()]


def _check_target(source: Path, target: Path) -> None:
    if os.path.lexists(target):
        raise OutputError(f"the output {target} exists; choose another name, or delete it")
    inside = source.resolve()
    if target == inside or inside in target.parents or target in inside.parents:
        raise OutputError(f"the output {target} and the base model {source} are one inside the other; write elsewhere")
    parent = next(p for p in target.parents if os.path.lexists(p))
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"the output {target} cannot be made: {parent} is not writable; write elsewhere")
