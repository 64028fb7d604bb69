"""Every merge method against its own definition on dense float64 matrices, on pools of every kind.

A method that is new fails here until ``parity.py`` has its definition.
"""

from __future__ import annotations

import parity
import parity_pools
import pools
import pytest
from tolerances import FLOAT32

import fastlora as fl


def test_every_method_has_a_definition() -> None:
    assert sorted(parity.CASES) == list(fl.methods())


@pytest.mark.parametrize("method", parity.CASES)
def test_every_choice_of_a_method_has_one(method: str) -> None:
    for parameter in fl.methods()[method].parameters.values():
        tried = {case.get(parameter.name, parameter.default) for case, _ in parity.CASES[method]}
        assert set(parameter.choices or ()) <= tried, parameter.name


@pytest.mark.parametrize("kind", parity_pools.KINDS)
@pytest.mark.parametrize("method", fl.methods())
def test_it_is_its_definition(method: str, kind: str) -> None:
    given = parity_pools.given_of(method, kind)
    for parameters, definition in parity.CASES[method]:
        if (method, kind) in parity_pools.REFUSED:
            with pytest.raises(fl.InputError):
                fl.merge(given.pool, given.weights, method=method, data=given.data, **parameters)
            continue
        merged = fl.merge(given.pool, given.weights, method=method, data=given.data, **parameters)
        expected = definition(given)
        assert merged.modules == given.pool.modules
        for module in merged.modules:
            error = float((pools.exact(merged.updates[module]) - expected[module]).norm())
            # Updates may cancel: relative to the longest of them, and of the result.
            size = max(float(x.norm()) for x in (expected[module], *given.weighted(module)))
            assert error <= FLOAT32 * size, f"{parameters}, {module}: {error / size:.1e}"
