"""Every form of every op on a device, each with its answer in float64, in the order in which to try them."""

from __future__ import annotations

from fastlora.bench.gpu.forms import models, passes, plain, solvers
from fastlora.bench.gpu.forms.form import Form, Found


def all_forms(tiny: bool = False) -> dict[str, Form]:
    """By name. What others rest on comes first, what has the most parts last. ``tiny``: the smallest matrices that
    reach each, for where threads of a kernel take turns."""
    return {form.name: form for form in (*solvers.forms(tiny), *passes.forms(), *plain.forms(), *models.forms(tiny))}


__all__ = ["Form", "Found", "all_forms"]
