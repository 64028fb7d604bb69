"""Shared and unique parts of a live model's adapters, as adapters of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from fastlora.decomposition.decompose import decompose
from fastlora.decomposition.result import Decomposition
from fastlora.errors import InputError
from fastlora.integrations.peft.live import host_of, require_new
from fastlora.integrations.peft.reading import pool
from fastlora.integrations.peft.writing import put, ready, refuse_experts


def decompose_adapters(
    model: nn.Module, adapters: Sequence[str] | None = None, prefix: str = "", **options: Any
) -> Decomposition:
    """Adds ``shared`` and ``unique_<name>`` of the adapters to a live model: ``ΔW_i = shared_i + unique_i``.

    Args:
        model: a ``PeftModel``, its tuner, or a module with a ``peft_config``.
        adapters: two names or more; all by default.
        prefix: put before the new names.
        **options: of :func:`fastlora.decompose`, such as ``threshold``; ``mode`` is ``"pool"``.

    Returns:
        :class:`fastlora.Decomposition`, for its report and for other parts of it. A part that is zero is a module of
        zeros in the model.

    Raises:
        InputError: what :func:`fastlora.decompose` and :func:`write` refuse. The model is as it was: it gets all parts
            or none.
        UnsupportedAdapter: what :func:`pool` refuses.

    Cost: that of the decomposition, and one write of all parts.
    """
    if options.get("mode", "pool") != "pool":
        raise InputError(
            f"mode={options['mode']!r}: a model takes the parts of one decomposition (mode='pool'); use "
            "`fastlora.decompose(pool(model), …)` and `write` the parts that are wanted"
        )
    if options.get("inputs") is not None:
        raise InputError(
            "inputs: a model takes the parts of a decomposition by column spaces; use `fastlora.decompose(pool(model), "
            "inputs=…)` and `write` the parts that are wanted"
        )
    host = host_of(model)
    chosen = pool(model, adapters)
    names = [f"{prefix}shared", *(f"{prefix}unique_{name}" for name in chosen.names)]
    require_new(host, names)
    refuse_experts(chosen.adapters)
    parts: Decomposition = decompose(chosen, **options)
    made = zip(names, [parts.shared, *map(parts.unique_of, chosen.names)], strict=True)
    put(host, {name: ready(adapter, None) for name, adapter in made})
    return parts
