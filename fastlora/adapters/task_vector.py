"""Full fine-tunes as task vectors: the change of every parameter, ``τ = θ − θ₀`` (arXiv 2212.04089). For small models:
everything here is dense."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastlora import formats
from fastlora.core.data import DeltaData
from fastlora.core.model_facts import ModelFacts
from fastlora.core.vector_space import VectorSpace, expression
from fastlora.errors import InputError, OutputError
from fastlora.files.earlier import Overwrite
from fastlora.files.shards import listed
from fastlora.files.tensor_files import SAFETENSORS

# Comparing and extracting models is imported where it is done: every command imports this file.
if TYPE_CHECKING:
    from fastlora.adapters.differences import Difference
    from fastlora.adapters.lora import Adapter
    from fastlora.files.checkpoint import ModelSource


class TaskVector(DeltaData, VectorSpace):
    """The change of every parameter by a full fine-tune, ``τ = θ − θ₀`` (arXiv 2212.04089).

    :func:`fastlora.task_vector` makes one from two models. Arithmetic is that of the changes: ``0.5 * a - b`` is
    ``0.5 τ_a − τ_b``, parameter by parameter. The operators raise :class:`InputError` for different kinds or shapes
    and for weights that are not finite. Everything here is dense and meant for small models.

    Args:
        name: what messages and expressions call it.
        deltas: ``{parameter: change}``, in the shape of the parameter; float32, or float64 where the model is. A
            parameter that is left out did not change and counts as zero.
        provenance: how the task vector came about, as plain data; it is saved with it.
        notes: what a user should know about it, in sentences.
        details: what was measured while it was made, by name; it is not saved.
        values: ``{parameter: tensor}`` of parameters that are kept whole, as the fine-tune has them; no arithmetic
            takes them, and they are not saved but in an adapter.
        facts: what the models say about their parameters (which are tied, which lie as ``[in, out]``); it is saved.
    """

    kind = "a task vector"

    def __repr__(self) -> str:
        return f"TaskVector({self.name!r}, {len(self.deltas)} parameters)"

    @classmethod
    def weighted_sum(cls, terms: Sequence[tuple[float, TaskVector]], name: str | None = None) -> TaskVector:
        """``Σ_i w_i τ_i``, parameter by parameter: summed in float64, kept in the widest dtype of the terms.

        Names of parameters are aligned as those of modules in a :class:`Pool`, and the notes of the sum say how.

        Args:
            terms: ``(w_i, task vector)``, one pair at the least; the weights are finite.
            name: of the sum; by default its expression, such as ``0.7*a - b``.

        Raises:
            InputError: a parameter whose shapes differ.

        Cost: one read of all changes.
        """
        from fastlora.adapters.alignment import aligned

        vectors, told = aligned([v for _, v in terms])
        whole = next((v for v in vectors if v.values), None)
        if whole is not None:
            raise InputError(
                f"task vector {whole.name!r} keeps {listed(list(whole.values))} whole, which cannot be added or "
                "scaled; make it without whole="
            )
        vectors, facts = _with_common_ties(vectors)
        weights = [w for w, _ in terms]
        deltas: dict[str, Tensor] = {}
        for parameter in dict.fromkeys(p for v in vectors for p in v):
            changes = [(w, v.deltas[parameter]) for w, v in zip(weights, vectors, strict=True) if parameter in v]
            shapes = {tuple(d.shape) for _, d in changes}
            if len(shapes) > 1:
                found = " and ".join(str(list(s)) for s in sorted(shapes))
                raise InputError(
                    f"{parameter}: cannot add changes of shapes {found}: these are of different base models"
                )
            total = sum(w * d.double() for w, d in changes)
            assert isinstance(total, Tensor)
            deltas[parameter] = total.to(_widest(d for _, d in changes))
        return cls(
            name or expression([(w, v.name) for w, v in terms]),
            deltas,
            provenance={"sum": [{"weight": w, "of": v.provenance} for w, v in terms], "semantics": "exact"},
            notes=tuple(dict.fromkeys([*(n for v in vectors for n in v.notes), *told])),
            facts=facts,
        )

    def apply(self, base: ModelSource) -> dict[str, Tensor]:
        """``θ₀ + τ`` as a state dict ``{parameter: tensor}``, in the shapes and dtypes of the base model.

        Args:
            base: a state dict, a file of tensors or a model's directory, as for :func:`fastlora.task_vector`. It is
                left as it is. A parameter that it ties to another is added where it changes in another way.

        Raises:
            InputError: a file that cannot be read, a parameter that the base model lacks, has in another shape, or
                stores quantised.

        Cost: one copy of the model.
        """
        from fastlora.adapters.model_names import matched_names, tie_group
        from fastlora.files.checkpoint import read_checkpoint
        from fastlora.files.quantised import quantised_error

        stored = read_checkpoint(base)
        state = stored.tensors
        own, common, _ = matched_names(state, {**self.deltas, **self.values})
        names = {new: old for old, new in own.items()}  # the base model's name of a common one

        def name(parameter: str) -> str:
            return names.get(common.get(parameter, parameter), parameter)

        group = tie_group(state, [stored.config], None) if stored.config is not None else []
        changes = {name(p): d for p, d in self.deltas.items()}
        changes |= {name(p): self.deltas[s] for p, s in self.facts.ties.items() if name(p) in state and s in self}
        sources = {p: p if p in state else next((g for g in group if p in group and g in state), None) for p in changes}
        lacking = [p for p, source in sources.items() if source is None]
        if lacking:
            raise InputError(
                f"task vector {self.name!r} changes {listed(lacking)}, which the base model does not have; it belongs "
                "to another model"
            )
        result = {p: value.clone() for p, value in state.items()}
        for parameter, delta in changes.items():
            source = sources[parameter] or parameter
            if source in stored.coding.scales or stored.coding.refusal(source) is not None:
                raise quantised_error(stored.where, [(source, "its values cannot be written back")])
            _check_shapes(parameter, state[source], delta)
            result[parameter] = (state[source].to(delta.dtype) + delta).to(state[source].dtype)
        return result | {name(p): v.clone() for p, v in self.values.items()}

    def extract(
        self,
        rank: int | None = None,
        *,
        energy: float | None = None,
        embeddings: Sequence[str] | None = None,
        fan_in_fan_out: bool | None = None,
        biases: bool = False,
        base_model: str | None = None,
        exact: bool = False,
        seed: int = 0,
    ) -> Adapter:
        """A LoRA adapter ``ΔW = B A`` that approximates the change of every weight matrix best (Eckart–Young).

        With the singular value decomposition ``θ − θ₀ = U Σ Vᵀ`` of a weight, ``B = U √Σ`` ``[n, r]`` and ``A = √Σ Vᵀ``
        ``[r, m]``, cut to the ``r`` largest singular values. Only ``<module>.weight`` of two dimensions or more (with
        convolutions) and fused experts can be approximated. A head that is tied to the embedding gets the embedding's
        change; parameters that are kept whole become replaced modules (``modules_to_save``).

        Args:
            rank: the largest ``r`` of a module, at least 1.
            energy: instead of ``rank``: the smallest ``r`` that keeps this share of ``Σσ²``, in ``(0, 1]``.
            embeddings: ends of the paths of embeddings, whose weight is ``[vocabulary, dim]``; by default the usual
                names and what ends in ``embeddings``.
            fan_in_fan_out: whether weights of linear modules are stored as ``[in, out]`` (the class ``Conv1D`` of
                GPT-2). By default that is told by the model's configuration and by the lengths of biases, module by
                module; without either it is ``[out, in]``, and a note says so.
            biases: keep the changes of the biases of these modules (``lora_bias`` of PEFT).
            base_model: what the adapter names as its base model.
            exact: decompose large weights exactly, too. Weights with a side of 1024 or less always are. By default
                others are approximated by a randomized range finder (10 more directions, 2 power rounds), whose error
                is within 1 % of the least possible; what it keeps is measured exactly.
            seed: of its random numbers, which depend on it and the parameter's name alone.

        Returns:
            :class:`Adapter` in float32. Its ``notes`` say what was left out, ``provenance["retained_energy"]`` what
            share of ``‖τ‖²`` is kept.

        Raises:
            InputError: no cut, both cuts or one out of range, a task vector that changes no weight matrix.

        Cost: ``12·n·m·(r + 10)`` operations a weight; ``2·n·m·min(n, m)`` where it is decomposed exactly.
        """
        from fastlora.adapters.cutting import ModelChange, cut_change

        return cut_change(
            ModelChange.of(self),
            rank,
            energy=energy,
            embeddings=embeddings,
            fan_in_fan_out=fan_in_fan_out,
            biases=biases,
            base_model=base_model,
            exact=exact,
            seed=seed,
        )

    def save(self, path: str | Path, *, dtype: torch.dtype | str | None = None, overwrite: Overwrite = False) -> Path:
        """Writes one ``.safetensors`` file, which is complete or not there; :func:`fastlora.load` reads it.

        Args:
            path: the file to make; its name ends in ``.safetensors``.
            dtype: ``"float32"`` (the default), ``"bfloat16"``, ``"float16"`` or a torch dtype.
            overwrite: replace a file that fastlora wrote; ``"force"`` replaces whatever file is there.

        Returns:
            ``path``.

        Raises:
            InputError: an unknown dtype.
            OutputError: another ending, a task vector without changes, a path that exists or cannot be written, a
                change that overflows ``dtype``.

        Cost: one write of all changes.
        """
        if Path(path).suffix != SAFETENSORS:
            raise OutputError(f"{path}: a task vector is one file; give a name that ends in {SAFETENSORS}")
        if self.values:
            raise OutputError(
                f"{path} was not written: task vector {self.name!r} keeps {listed(list(self.values))} whole, which is "
                "no change; make an adapter of it (.extract), or make it without whole="
            )
        if not self.deltas:
            raise OutputError(f"{path} was not written: task vector {self.name!r} changes nothing")
        return formats.save(self, Path(path), dtype=dtype, overwrite=overwrite)


def task_vector(
    base: ModelSource,
    finetuned: ModelSource,
    name: str | None = None,
    *,
    common_only: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    whole: Sequence[str] = (),
    tied: bool | None = None,
) -> TaskVector:
    """Subtracts two models: ``τ = θ − θ₀``, the change of every parameter by a fine-tune (arXiv 2212.04089).

    ``config.json`` beside the files says which parameters are tied and how the weights lie; an index says which files
    are the model. Weights in scaled float8 are multiplied out. A model that was saved without its head, and with
    shorter names, is matched with the other.

    Args:
        base: ``θ₀``: a state dict, a ``.safetensors`` or ``.bin``/``.pt`` file, or a model's directory.
        finetuned: ``θ``, in the same ways.
        name: of the result; by default that of the fine-tune's file or folder.
        common_only: leave out parameters that only one of the two has (a new head), and rows that were added to an
            embedding or a head or removed from it, instead of refusing them. The result's ``notes`` name them.
        include: patterns of the parameters that take part; all by default. A pattern is the end of a module's path
            (``q_proj``), may have ``*`` and ``?``, or is a regular expression; it takes all that is inside.
        exclude: patterns of parameters that are left out.
        whole: patterns of parameters that are kept whole, as the fine-tune has them: a new head, an embedding with
            more rows. :meth:`TaskVector.extract` makes replaced modules (``modules_to_save``) of them.
        tied: whether the output head is the input embedding, where no configuration says it.

    Returns:
        :class:`TaskVector`. Differences are taken in float64 and kept in float32, or in float64 where the model is.
        Parameters that are equal are left out. Whole numbers and flags (buffers) take part in nothing; a note names
        those that differ.

    Raises:
        InputError: a file that cannot be read, a model that is not complete, a parameter that only one of them has or
            whose shapes differ, weights that are quantised in another way than scaled float8, a pattern that matches
            nothing.
        NonFiniteError: NaN or Inf in a parameter of either.

    Cost: one read of both models, and memory for every parameter that changed.
    """
    from fastlora.adapters.comparison import Comparison
    from fastlora.adapters.selection import Selection
    from fastlora.files.checkpoint import read_checkpoint

    first, second = read_checkpoint(base), read_checkpoint(finetuned)
    if name is None:
        name = "task" if isinstance(finetuned, Mapping) else name_of(Path(finetuned).expanduser().absolute())
    selection = Selection(patterns("include", include), patterns("exclude", exclude), patterns("whole", whole))
    found = Comparison(first, second, name, common_only=common_only, selection=selection, tied=tied).change()
    deltas = {p: _kept(p, d) for p, d in found.deltas.items()}
    return TaskVector(name, deltas, values=found.values, facts=found.facts, notes=found.notes)


def _kept(parameter: str, change: Difference) -> Tensor:
    """A change in float32, or in float64 where a model is. Raises :class:`NonFiniteError`."""
    from fastlora.adapters.comparison import not_finite

    delta = change.dense()
    if not bool(delta.isfinite().all()):
        raise not_finite(parameter)
    return delta if change.is_wide else delta.float()


def patterns(option: str, given: Sequence[str]) -> tuple[str, ...]:
    if isinstance(given, str) or not all(isinstance(p, str) for p in given):
        raise InputError(f"{option} must be a list of patterns, such as {option}=['lm_head']")
    return tuple(given)


def name_of(path: Path) -> str:
    return path.name if path.is_dir() else path.stem


def _with_common_ties(vectors: Sequence[TaskVector]) -> tuple[list[TaskVector], ModelFacts]:
    """The vectors with the ties that all of them have, others written out; and what is known of their model."""
    tie_sets = [set(v.facts.ties.items()) for v in vectors]
    common = {p: s for p, s in set.intersection(*tie_sets)} if tie_sets else {}
    # A vector that changes one of the two alone has no tie.
    common = {p: s for p, s in common.items() if not any(p in v for v in vectors)}
    found = []
    for vector in vectors:
        own = {p: vector.deltas[s] for p, s in vector.facts.ties.items() if p not in common and s in vector}
        found.append(replace(vector, deltas={**vector.deltas, **own}) if own else vector)
    facts = [v.facts for v in vectors]
    return found, ModelFacts(
        configured=any(f.configured for f in facts),
        in_out=tuple(dict.fromkeys(m for f in facts for m in f.in_out)),
        assumed=tuple(dict.fromkeys(m for f in facts for m in f.assumed)),
        ties=common,
        in_out_experts=any(f.in_out_experts for f in facts),
        by_parameter=tuple(dict.fromkeys(m for f in facts for m in f.by_parameter)),
        unsuited=tuple(dict.fromkeys(m for f in facts for m in f.unsuited)),
        fused_later=any(f.fused_later for f in facts),
        task_type=next((f.task_type for f in facts if f.task_type is not None), None),
        unknown=tuple(dict.fromkeys(m for f in facts for m in f.unknown)),
        still={m: s for f in facts for m, s in f.still.items()},
    )


def _widest(tensors: Iterable[Tensor]) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _check_shapes(parameter: str, first: Tensor, second: Tensor) -> None:
    if first.shape != second.shape:
        raise InputError(
            f"{parameter} is {list(first.shape)} in one and {list(second.shape)} in the other; these are different "
            "models"
        )
