"""Full fine-tunes as task vectors: the change of every parameter, ``τ = θ − θ₀`` (arXiv 2212.04089). For small models:
everything here is dense."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastlora import formats
from fastlora.adapters.alignment import aligned
from fastlora.adapters.extract import extract
from fastlora.adapters.lora import Adapter
from fastlora.core.data import DeltaData
from fastlora.core.vector_space import VectorSpace, expression
from fastlora.errors import InputError, NonFiniteError, OutputError
from fastlora.files.earlier import Overwrite
from fastlora.files.shards import read_model
from fastlora.files.tensor_files import SAFETENSORS

StateDict = Mapping[str, Tensor]
ModelSource = StateDict | str | os.PathLike[str]

LISTED = 4
"""Names in a message."""


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
        vectors, told = aligned([v for _, v in terms])
        terms = [(w, v) for (w, _), v in zip(terms, vectors, strict=True)]
        deltas: dict[str, Tensor] = {}
        for parameter in dict.fromkeys(p for v in vectors for p in v):
            changes = [(w, v.deltas[parameter]) for w, v in terms if parameter in v]
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
        )

    def apply(self, base: ModelSource) -> dict[str, Tensor]:
        """``θ₀ + τ`` as a state dict ``{parameter: tensor}``, in the shapes and dtypes of the base model.

        Args:
            base: a state dict, a file of tensors or a model's directory, as for :func:`fastlora.task_vector`. It is
                left as it is.

        Raises:
            InputError: a file that cannot be read, a parameter that the base model lacks or has in another shape.

        Cost: one copy of the model.
        """
        state = read_state(base)
        lacking = [p for p in self.deltas if p not in state]
        if lacking:
            raise InputError(
                f"task vector {self.name!r} changes {_listed(lacking)}, which the base model does not have; it belongs "
                "to another model"
            )
        for parameter, delta in self.deltas.items():
            _check_shapes(parameter, state[parameter], delta)
        changed = {p: (state[p].to(d.dtype) + d).to(state[p].dtype) for p, d in self.deltas.items()}
        return {p: changed[p] if p in changed else value.clone() for p, value in state.items()}

    def extract(
        self,
        rank: int | None = None,
        *,
        energy: float | None = None,
        embeddings: Sequence[str] | None = None,
        fan_in_fan_out: bool = False,
        biases: bool = False,
        base_model: str | None = None,
    ) -> Adapter:
        """A LoRA adapter ``ΔW = B A`` that approximates the change of every weight matrix best (Eckart–Young).

        With the singular value decomposition ``θ − θ₀ = U Σ Vᵀ`` of a weight, ``B = U √Σ`` ``[n, r]`` and ``A = √Σ Vᵀ``
        ``[r, m]``, cut to the ``r`` largest singular values. Only ``<module>.weight`` of two dimensions or more (with
        convolutions) can be approximated.

        Args:
            rank: the largest ``r`` of a module, at least 1.
            energy: instead of ``rank``: the smallest ``r`` that keeps this share of ``Σσ²``, in ``(0, 1]``.
            embeddings: ends of the paths of embeddings, whose weight is ``[vocabulary, dim]``; by default the usual
                names and what ends in ``embeddings``.
            fan_in_fan_out: weights are stored as ``[in, out]`` (GPT-2).
            biases: keep the changes of the biases of these modules (``lora_bias`` of PEFT).
            base_model: what the adapter names as its base model.

        Returns:
            :class:`Adapter` in float32. Its ``notes`` say what was left out, ``provenance["retained_energy"]`` what
            share of ``‖τ‖²`` is kept.

        Raises:
            InputError: no cut, both cuts or one out of range, a task vector that changes no weight matrix.

        Cost: a dense singular value decomposition of every weight, ``O(n·m·min(n, m))``.
        """
        return extract(
            self,
            rank,
            energy=energy,
            embeddings=embeddings,
            fan_in_fan_out=fan_in_fan_out,
            biases=biases,
            base_model=base_model,
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
        if not self.deltas:
            raise OutputError(f"{path} was not written: task vector {self.name!r} changes nothing")
        return formats.save(self, Path(path), dtype=dtype, overwrite=overwrite)


def task_vector(
    base: ModelSource, finetuned: ModelSource, name: str | None = None, *, common_only: bool = False
) -> TaskVector:
    """Subtracts two models: ``τ = θ − θ₀``, the change of every parameter by a fine-tune (arXiv 2212.04089).

    Args:
        base: ``θ₀``: a state dict, a ``.safetensors`` or ``.bin``/``.pt`` file, or a model's directory.
        finetuned: ``θ``, in the same ways.
        name: of the result; by default that of the fine-tune's file or folder.
        common_only: leave out parameters that only one of the two has (a new head) instead of refusing them. The
            result's ``notes`` name them.

    Returns:
        :class:`TaskVector`. Differences are taken in float64 and kept in float32, or in float64 where the model is.
        Parameters that are equal are left out. Whole numbers and flags (buffers) take part in nothing; a note names
        those that differ.

    Raises:
        InputError: a file that cannot be read, a parameter that only one of them has or whose shapes differ.
        NonFiniteError: NaN or Inf in a parameter of either.

    Cost: one read of both models, and memory for every parameter that changed.
    """
    first, second = read_state(base), read_state(finetuned)
    if name is None:
        name = "task" if isinstance(finetuned, Mapping) else _name(Path(finetuned).expanduser().absolute())
    notes = []
    alone = [p for p in (*first, *second) if (p in first) != (p in second)]
    if alone and not common_only:
        raise InputError(
            f"only one of the two models has {_listed(alone)}, whose change is unknown; leave such parameters out with "
            "common_only=True"
        )
    if alone:
        notes.append(f"task vector {name!r}: only one of the models has {_listed(alone)}, left out")
    deltas: dict[str, Tensor] = {}
    counted = []
    for parameter in (p for p in first if p in second):
        old, new = first[parameter], second[parameter]
        _check_shapes(parameter, old, new)
        if not (old.is_floating_point() and new.is_floating_point()):
            if not torch.equal(old, new):
                counted.append(parameter)
            continue
        delta = new.double() - old.double()
        if not bool(delta.isfinite().all()):
            raise NonFiniteError(
                f"{parameter} holds NaN or Inf in the base model or in the fine-tune, so its change would mean "
                "nothing; save the models again"
            )
        if bool(delta.any()):
            deltas[parameter] = delta.to(_widest((old, new)))
    if not deltas:
        notes.append(f"task vector {name!r} changes nothing: the two models have equal parameters")
    if counted:
        notes.append(f"task vector {name!r}: {_listed(counted)} differ and are no parameters, left out")
    return TaskVector(name, deltas, notes=tuple(notes))


def read_state(source: ModelSource) -> dict[str, Tensor]:
    """A state dict from a mapping, a file of tensors or a model's directory; files are mapped."""
    if isinstance(source, Mapping):
        wrong = next((k for k, v in source.items() if not isinstance(v, Tensor)), None)
        if wrong is not None:
            raise InputError(f"the state dict holds {wrong!r}, which is no tensor; pass `model.state_dict()`")
        return {k: v.detach() for k, v in source.items()}
    return read_model(Path(source))


def _name(path: Path) -> str:
    return path.name if path.is_dir() else path.stem


def _widest(tensors: Iterable[Tensor]) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _check_shapes(parameter: str, first: Tensor, second: Tensor) -> None:
    if first.shape != second.shape:
        raise InputError(
            f"{parameter} is {list(first.shape)} in one and {list(second.shape)} in the other; these are different "
            "models"
        )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
