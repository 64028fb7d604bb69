"""Right values of reported statistics: similarity with itself, entropy, variables of sweeps, singular values."""

from __future__ import annotations

import math

import pools
import pytest
import torch
from builders import gaussian
from compiled import COMPILED
from pools import MODULE
from tolerances import FLOAT32, ROUNDOFF64

import fastlora as fl
from fastlora.coefficients.learned import entropy


def adapter(name: str, *modules: str, scale: float = 1.0) -> fl.Adapter:
    seeds = {m: sum(map(ord, m)) + 100 * sum(map(ord, name)) for m in modules}
    return pools.make_adapter(
        name, {m: (scale * gaussian(20, 2, seed=s), gaussian(2, 16, seed=s + 1), 1.0) for m, s in seeds.items()}
    )


def overlap(*adapters: fl.Adapter) -> fl.analysis.overlap.Overlap:
    return fl.overlap(fl.Pool(adapters, align=False), modules=True)


def test_an_adapter_is_like_itself() -> None:
    """Also where none of its modules is in another adapter, and where its shared modules are zero."""
    both, alone = adapter("both", "layers.0.q", "layers.1.q"), adapter("alone", "layers.1.k")
    partly = fl.Adapter("partly", adapter("x", "layers.0.q", scale=0.0).updates | adapter("x", "layers.2.q").updates)
    zero = adapter("zero", "layers.0.q", "layers.3.q", scale=0.0)
    found = overlap(both, alone, partly, zero)
    for matrix in (found.cosine, found.subspace):
        assert matrix.diagonal().nan_to_num(-1.0).tolist() == [1.0, 1.0, 1.0, -1.0]
        assert matrix[0, 1].isnan() and matrix[0, 2].isnan() and matrix[3].isnan().all()
    assert list(found.modules) == ["layers.0.q"]
    assert fl.overlap(fl.Pool([alone])).cosine.tolist() == [[1.0]]
    assert fl.PoolGram(fl.Pool([both, alone], align=False)).overlap().cosine.diagonal().tolist() == [1.0, 1.0]


@pytest.mark.parametrize("size", [1e-60, 1e60])
def test_cosines_do_not_depend_on_sizes(size: float) -> None:
    parts = pools.cast(pools.planted(3), torch.float64)
    scaled = [(size * b, a, s) for b, a, s in parts]
    found, wanted = overlap(*pools.make_pool(scaled).adapters), overlap(*pools.make_pool(parts).adapters)
    torch.testing.assert_close(found.cosine, wanted.cosine, rtol=0, atol=ROUNDOFF64)


def test_a_module_with_nan_that_one_adapter_has_alone_is_told() -> None:
    broken = adapter("broken", "layers.1.k")
    broken.updates["layers.1.k"].A.terms[0].source[0, 0] = torch.nan
    with pytest.raises(fl.InputError, match=r"'broken': lora_A of layers.1.k holds NaN"):
        overlap(adapter("both", "layers.0.q"), broken)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mask", ["-inf", "least"])
def test_entropy_of_masked_logits(mask: str, dtype: torch.dtype) -> None:
    """Classes that do not exist have the probability 0 and add nothing; they have no gradient either."""
    logits = gaussian(4, 6, seed=2).to(dtype)
    logits[:, 4:] = -math.inf if mask == "-inf" else torch.finfo(dtype).min
    logits[0, 1] = logits[0, 4]
    given = logits.clone().requires_grad_()
    found = entropy(given)
    rows = [row[row > logits[0, 4]].double() for row in logits]
    wanted = torch.stack([-(r.softmax(0) * r.log_softmax(0)).sum() for r in rows]).mean()
    assert float(found.detach()) == pytest.approx(float(wanted), rel=FLOAT32)
    found.backward()
    assert given.grad is not None and bool(given.grad.isfinite().all())
    assert float(given.grad[logits == logits[0, 4]].abs().max()) == 0.0


def test_coefficients_are_learned_beside_masked_classes() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(16, 20))
    part = (gaussian(20, 2, seed=1), gaussian(2, 16, seed=2), 1.0)

    class Masked(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits = self.inner(x).clone()
            logits[:, 5:] = -math.inf
            return logits

    with fl.LearnedMerge(Masked(), {"a": pools.make_adapter("a", {"inner.0": part})}) as merge:
        losses = merge.fit([gaussian(8, 16, seed=3)], steps=5, lr=0.01)
    assert all(math.isfinite(loss) for loss in losses) and losses[-1] < losses[0]


@pytest.mark.parametrize(("expression", "names"), [
    ("w*'w-a' + b", ("w-a", "b")), ('w*"w" + b', None), ("w*w.v2 + b", ("w.v2", "b")), ("b + w_2*w", None),
    ("w*aw + b*w", ("aw", "b")), ("'a w'/w + b", ("a w", "b")),
])  # fmt: skip
def test_a_variable_is_a_name_of_its_own(expression: str, names: tuple[str, str] | None) -> None:
    """Not what stands inside another name, quoted or before a dot."""
    one, two = adapter("one", MODULE), adapter("two", MODULE)
    if names is None:  # a name that is the variable's is no adapter's
        with pytest.raises(fl.InputError):
            fl.sweep(expression, {"w": [0.5]}, adapters={"w": one, "b": two}, score=lambda x: 0.0)
        return
    found = fl.sweep(
        expression, {"w": [0.5]}, adapters=dict(zip(names, (one, two), strict=True)),
        score=lambda x: float(x.delta(MODULE).double().norm()),
    )  # fmt: skip
    factors = {"w*aw + b*w": (0.5, 0.5), "'a w'/w + b": (2.0, 1.0)}.get(expression, (0.5, 1.0))
    wanted = sum(f * a.delta(MODULE).double() for f, a in zip(factors, (one, two), strict=True))
    assert found.rows[0].scores["score"] == pytest.approx(float(wanted.norm()), rel=FLOAT32)  # type: ignore[union-attr]


@pytest.mark.parametrize(("dtype", "n", "smallest", "tolerance"), [
    (torch.float32, 12, 1e-14, 1e-4), (torch.float64, 12, 1e-40, 1e-10), (torch.float64, 40, 1e-12, 1e-9),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("order", ["descending", "ascending", "rows"])
def test_small_singular_values_within_the_limits_of_the_docstring(
    order: str, dtype: torch.dtype, n: int, smallest: float, tolerance: float
) -> None:
    """Of ``M·diag(d)`` with a well-conditioned ``M``: relative perturbations move them by as much. Plain torch has all
    digits of float32; its errors in float64 are relative to the largest."""
    d = torch.logspace(0, math.log10(smallest), n, dtype=torch.float64)
    M = torch.eye(n, dtype=torch.float64) + 0.1 * gaussian(n, n, seed=1, dtype=torch.float64) / n**0.5
    graded = M * (d.flip(0) if order == "ascending" else d)
    given = (graded.mT if order == "rows" else graded).contiguous()
    found = fl.ops.svd(given.to(dtype))[1].double()
    exact = _singular_values(given.to(dtype).double())
    if dtype == torch.float64 and not COMPILED:
        assert float((found - exact).abs().max()) < ROUNDOFF64 * float(exact.max())
    else:
        assert float((found / exact - 1).abs().max()) < tolerance


def _singular_values(a: torch.Tensor) -> torch.Tensor:
    """By one-sided Jacobi in long sums: columns are turned until all are orthogonal."""
    columns = [[float(x) for x in column] for column in a.mT]
    order = sorted(range(len(columns)), key=lambda j: -math.fsum(x * x for x in columns[j]))
    columns = [columns[j] for j in order]
    for _ in range(30):
        largest = 0.0
        for i in range(len(columns)):
            for j in range(i + 1, len(columns)):
                p, q = columns[i], columns[j]
                pp, qq, pq = (math.fsum(x * y for x, y in zip(u, v, strict=True)) for u, v in ((p, p), (q, q), (p, q)))
                if pq == 0.0 or pp == 0.0 or qq == 0.0:
                    continue
                largest = max(largest, abs(pq) / math.sqrt(pp) / math.sqrt(qq))
                zeta = (qq - pp) / (2 * pq)
                t = math.copysign(1.0, zeta) / (abs(zeta) + math.hypot(1.0, zeta))
                c = 1 / math.hypot(1.0, t)
                columns[i] = [c * (x - t * y) for x, y in zip(p, q, strict=True)]
                columns[j] = [c * (t * x + y) for x, y in zip(p, q, strict=True)]
        if largest < 1e-15:
            break
    sizes = sorted((math.sqrt(math.fsum(x * x for x in c)) for c in columns), reverse=True)
    return torch.tensor(sizes, dtype=torch.float64)
