"""Adapters applied to base models of any size: the model is streamed, tile by tile, into a new one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from fastlora._version import __version__
from fastlora.adapters.pool import Pool
from fastlora.checkpoints.base import Base, read_base
from fastlora.checkpoints.beside import beside, card_of
from fastlora.checkpoints.layout import check_dtype, output_files
from fastlora.checkpoints.plan import Plan, planned, planned_merge
from fastlora.checkpoints.streaming import part_of, write_tensors
from fastlora.core.data import AdapterData, ModulesData
from fastlora.core.dtypes import parse_dtype
from fastlora.errors import InputError, OutputError
from fastlora.files.disk_errors import writing
from fastlora.files.earlier import MARK, Overwrite
from fastlora.files.shards import INDEX_SUFFIX
from fastlora.files.unfinished import ResumableOutput
from fastlora.merging.forms.full_rank import full_rank
from fastlora.merging.merge import full_weights, merge
from fastlora.merging.registry import find_method
from fastlora.runtime import memory as bounds
from fastlora.runtime.cpython import paused_collector
from fastlora.runtime.ranks import from_first

Given = AdapterData | Pool | Mapping[str, float]


def apply(
    base: str | os.PathLike[str],
    adapters: Given,
    out: str | os.PathLike[str],
    *,
    pool: Mapping[str, AdapterData] | Pool | None = None,
    method: str | None = None,
    dtype: torch.dtype | str | None = None,
    memory: int | str | None = None,
    overwrite: Overwrite = False,
    resume: bool = False,
    **parameters: object,
) -> list[str]:
    r"""Writes the base model with adapters in its weights: ``W' = W + Σ_i w_i ΔW_i``, rounded once.

    Every kind that is read can be applied. With the weight ``w`` of its adapter a weight ``W [out, in]`` becomes::

        LoRA         W + w·s·B A
        DoRA         W + w·(diag(m / ‖W + s·B A‖) (W + s·B A) − W)     norms of rows, or of input channels
        (IA)³        W + w·(l − 1)·W                                   rows and biases, or columns
        task vector  W + w·τ

    Sums are float32, float64 where ``W`` is float32 or a factor float64, and are rounded to the dtype of ``W`` once, to
    nearest even. Biases of an adapter are added; parameters that it was saved with whole (``modules_to_save``) replace
    those of the model, and a note names them.

    Args:
        base: a folder of transformers (``model.safetensors`` or shards with an index), a pipeline's folder of
            diffusers, or one ``.safetensors`` file.
        adapters: an adapter (also a merge, a part, a sum: whatever is one), a task vector, a :class:`fastlora.Pool`, or
            ``{name: weight}`` of ``pool``.
        out: the folder to make; a file where ``base`` is one.
        pool: adapters by name: a :class:`fastlora.Pool` or a mapping.
        method: a merge method in place of the sum (:func:`fastlora.merge`), for LoRA adapters. What a method on
            elements makes (``"ties"``, ``"dare"``, …) goes onto the weights as it is, of full rank; with ``rank`` or
            ``energy`` in ``parameters`` its best approximation does.
        dtype: of all floating-point tensors of the output; by default each keeps its own.
        memory: bound on the peak resident memory while this computes, as bytes or ``"1GiB"``. The result has the same
            bits.
        overwrite: replace an earlier output of fastlora; ``"force"``: whatever is there.
        resume: continue the run for ``out`` that was interrupted. What it had finished is not computed again.
        **parameters: those of the method.

    Returns:
        Notes: what a user should know.

    Raises:
        InputError: modules or shapes that the base model does not have, by name; quantised models; tied matrices that
            an adapter treats apart; a model that is not whole; weights that are not finite; what :func:`fastlora.merge`
            refuses.
        OutputError: an output that exists or cannot be written, an unfinished run of before (without ``resume``),
            numbers that the dtype of the output does not hold.

    Cost: every byte of the model is read and written once (twice read where norms of columns are needed), and
    ``2·n·m·Σr`` operations for each adapted weight. Memory: the factors, and a few tiles of 2 MB a thread; with a
    method on elements one weight. Output files have the layout of the input's. Until all is done, they lie in
    ``.NAME.unfinished`` under names that nothing loads.
    """
    source, target = Path(base).expanduser(), Path(out).expanduser()
    output = model_output(source, target, overwrite=overwrite, resume=resume)
    kept = None if dtype is None else parse_dtype(dtype, torch.float32)
    with bounds.bounded(bounds.parse(memory)):
        return apply_to(source, adapters, output, pool=pool, method=method, dtype=kept, parameters=parameters)


def model_output(source: Path, target: Path, *, overwrite: Overwrite = False, resume: bool = False) -> ResumableOutput:
    """The place of the output, which is refused before any work where nothing can be written there."""
    as_file = target.suffix == ".safetensors"
    output = ResumableOutput(target, overwrite=overwrite, resume=resume, as_file=as_file)
    output.refuse_inputs([source])
    is_folder = source.is_dir() or source.name.endswith(INDEX_SUFFIX)
    if source.exists() and is_folder == as_file:
        kind, needed = ("folder", "one") if is_folder else ("file", "NAME.safetensors")
        raise OutputError(f"{source} is a {kind}, so the output must be {needed}, not {target}")
    return output


def apply_to(
    source: Path,
    adapters: Given,
    output: ResumableOutput,
    *,
    pool: Mapping[str, AdapterData] | Pool | None = None,
    method: str | None = None,
    dtype: torch.dtype | None = None,
    parameters: Mapping[str, object],
) -> list[str]:
    """:func:`apply` into an output that is checked."""
    with paused_collector():
        model = read_base(source)
        check_dtype(model, dtype)
        plan, elements, provenance = _planned(model, adapters, pool, method, parameters)
    record = {"version": __version__, "apply": {"base": model.root.name, **provenance}}
    notes = [*model.notes(), *plan.notes]
    files = output_files(model, output.path, dtype, {})  # their tensors are on the card
    own = {"base": model.root.name, **provenance}
    card = card_of(output.path.name, model, elements, own, files, len(plan.edits), notes)
    others = beside(model, files, dtype, card)
    told = {**record, "files": others.digests()} if model.is_folder else record
    files = output_files(model, output.path, dtype, {MARK: json.dumps(told, sort_keys=True, default=str)})
    with output as folder:
        write_tensors(model, plan, files, output, folder, {**told, "dtype": str(dtype)})

        def finish() -> None:
            others.write(folder)
            for file in files:
                with writing(output.path):
                    os.replace(part_of(folder, file), folder / file.path)

        from_first("finishing the model", finish)
    return [*notes, *others.notes, *output.notices]


def _planned(
    model: Base,
    adapters: Given,
    pool: Mapping[str, AdapterData] | Pool | None,
    method: str | None,
    parameters: Mapping[str, object],
) -> tuple[Plan, Sequence[ModulesData], dict[str, object]]:
    """The plan, what it is made of, and how, as plain data."""
    weighted = _weighted(adapters, pool)
    elements = [e for e, _ in weighted if isinstance(e, ModulesData)]
    if method is None:
        if parameters:
            raise InputError(f"apply: {', '.join(parameters)}: is a parameter of a method; give method= too")
        of = [{"weight": w, "of": e.provenance} for e, w in weighted]
        return planned(model, weighted), elements, {"of": of}
    together = pool if isinstance(pool, Pool) else Pool([e for e, _ in weighted])  # type: ignore[misc]
    chosen = find_method(method)
    weights, notes = full_weights(together, {e.name: w for e, w in weighted})
    cut = {name: value for name, value in parameters.items() if value is not None and name in ("rank", "energy")}
    whole = None if cut else full_rank(chosen, together, weights, parameters)
    if whole is not None:
        plan, provenance = planned_merge(model, whole), whole.record.provenance
    else:
        merged = merge(together, weights, method=method, **parameters)  # type: ignore[arg-type]
        plan, provenance = planned(model, [(merged, 1.0)]), merged.provenance
        notes = [*together.notices, *notes]
    plan.notes += notes
    return plan, elements, {"of": [{"weight": 1.0, "of": provenance}]}


def _weighted(adapters: Given, pool: Mapping[str, AdapterData] | Pool | None) -> list[tuple[AdapterData, float]]:
    if isinstance(adapters, AdapterData):
        return [(adapters, 1.0)]
    if isinstance(adapters, Pool):
        return [(adapter, 1.0) for adapter in adapters.adapters]
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
