"""Every form of every kernel for a device, each with its answer in float64, in the order in which to try them."""

from __future__ import annotations

from fastlora.bench.gpu.forms import models, passes, solvers
from fastlora.bench.gpu.forms.form import Form, Found


def all_forms(batch: int = solvers.BATCH) -> dict[str, Form]:
    """By name. What others rest on comes first, what has the most parts last. ``batch``: small matrices of a call, at
    least three."""
    return {form.name: form for form in (*solvers.forms(batch), *passes.forms(), *models.forms())}


__all__ = ["Form", "Found", "all_forms"]
