"""From two checkpoints of any size to a LoRA adapter of what changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from fastlora.adapters.comparison import Comparison
from fastlora.adapters.cutting import ModelChange, check_cut, cut_change
from fastlora.adapters.lora import Adapter
from fastlora.adapters.selection import Selection
from fastlora.adapters.task_vector import name_of, patterns
from fastlora.errors import InputError
from fastlora.files.checkpoint import ModelSource, read_checkpoint
from fastlora.runtime.memory import bounded, parse

EMBEDDINGS, NORMS = ("keep", "factor", "skip"), ("keep", "skip")


def extract(
    base: ModelSource,
    tuned: ModelSource,
    *,
    rank: int | None = None,
    energy: float | None = None,
    exact: bool = False,
    seed: int = 0,
    embeddings: Literal["keep", "factor", "skip"] | None = "keep",
    norms: Literal["keep", "skip"] | None = "keep",
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    whole: Sequence[str] = (),
    memory: int | str | None = None,
    name: str | None = None,
    common_only: bool = False,
    tied: bool | None = None,
    fan_in_fan_out: bool | None = None,
    biases: bool = False,
    base_model: str | None = None,
) -> Adapter:
    """A LoRA adapter of what a fine-tune changed: ``B A ≈ θ − θ₀`` for every weight, from checkpoints of any size.

    Files are mapped, and differences are taken tile by tile: in float32 of half-precision weights, else in float64. A
    weight ``ΔW [n, m]`` is cut by a randomized range finder (E1), ``Y = ΔW Ω``, ``Q = qr(ΔW qr(ΔWᵀ Q))`` twice, and the
    singular values of ``QᵀΔW``; exactly where a side has 1024 or less. What is lost is known exactly:
    ``‖ΔW − B A‖² = ‖ΔW‖² − Σσ²`` (E2). Weights that are equal are compared, and cost no rank.

    Args:
        base: ``θ₀``: a model's directory, its index, a file of tensors or a state dict.
        tuned: ``θ``, in the same ways.
        rank: the largest rank of a module, at least 1.
        energy: instead of ``rank``: the share of ``Σσ²`` that every module keeps, in ``(0, 1]``.
        exact: decompose large weights exactly, too. By default their error is within 1 % of the least possible.
        seed: of the random numbers, which depend on it and the parameter's name alone.
        embeddings: ``"keep"`` those that changed whole (``modules_to_save``), ``"factor"`` or ``"skip"`` them. With
            other numbers of rows, the change of the common rows is factored, and a note says so. ``None`` factors
            them too, and refuses other numbers of rows without ``common_only``, as the command does.
        norms: ``"keep"`` those that changed whole, or ``"skip"`` them; ``None`` skips them, and a note says how much
            that is of ``‖τ‖²``.
        include, exclude, whole, common_only, tied, name: as :func:`fastlora.task_vector` takes them.
        fan_in_fan_out, biases, base_model: as :meth:`TaskVector.extract` takes them.
        memory: a bound on resident memory (``"1GiB"``): pages of the files are given back after use. It holds for all
            but the result, two weights at a time, and the Gram matrix where a weight is cut exactly.

    Returns:
        :class:`Adapter` in float32. Its ``notes`` say what was left out, ``provenance["retained_energy"]`` what share
        of ``‖τ‖²`` is kept; what is kept whole counts as neither.

    Raises:
        InputError: a cut or choice that is none, models that cannot be read or compared, as for
            :func:`fastlora.task_vector`; models without a changed weight.
        NonFiniteError: NaN or Inf in a parameter of either.

    Cost: a weight is read four times, with ``12·n·m·(r + 10)`` operations; ``2·n·m·min(n, m)`` where exact. Memory for
    the result, and ``8·(n + m)·(r + 10)`` bytes.
    """
    check_cut(rank, energy)
    for option, value, choices in (("embeddings", embeddings, EMBEDDINGS), ("norms", norms, NORMS)):
        if value not in (*choices, None):
            raise InputError(f"extract: {option}={value!r} is unknown; there are {', '.join(choices)}")
    with bounded(parse(memory)):
        first, second = read_checkpoint(base), read_checkpoint(tuned)
        if name is None:
            name = "task" if isinstance(tuned, Mapping) else name_of(Path(tuned).expanduser().absolute())
        selection = Selection(
            patterns("include", include or ()),
            patterns("exclude", exclude or ()),
            patterns("whole", whole),
            embeddings or "factor",
            norms or "factor",
        )
        found = Comparison(
            first,
            second,
            name,
            common_only=common_only,
            selection=selection,
            tied=tied,
            common_rows=embeddings is not None,
        ).change()
        change = ModelChange(name, found.deltas, found.values, found.facts, found.notes, {"task_vector": name})
        return cut_change(
            change,
            rank,
            energy=energy,
            embeddings=None,
            fan_in_fan_out=fan_in_fan_out,
            biases=biases,
            base_model=base_model,
            exact=exact,
            seed=seed,
        )
