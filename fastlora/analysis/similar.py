"""What the similarities of a pool say: nearest neighbours, families, duplicates, outliers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastlora.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

DUPLICATE = 0.999  # a cosine
UNUSUAL = 5.0  # of the median deviation of the logarithms of norms, which for a normal law is 3.4 standard deviations
LEAST_DEVIATION = 0.05  # of those logarithms: norms that differ by less are alike


class Neighbour(NamedTuple):
    """Another adapter: the cosine of the updates and the overlap of the column spaces."""

    name: str
    cosine: float
    subspace: float


class Pair(NamedTuple):
    """Two adapters that are alike: the cosine of their updates, and ``‖ΔW_second‖ / ‖ΔW_first‖``."""

    first: str
    second: str
    cosine: float
    ratio: float


class Cluster(NamedTuple):
    """Adapters that belong together: ``center`` has the largest mean cosine with the others, ``within`` is the mean
    cosine of its pairs (NaN of a single adapter), ``least`` the smallest."""

    names: list[str]
    center: str
    within: float
    least: float


class Outlier(NamedTuple):
    """An adapter that stands out, and why: ``norm`` is its ``‖ΔW‖``, ``median`` that of the pool."""

    name: str
    reason: str
    norm: float
    median: float


@dataclass(frozen=True, slots=True, eq=False)
class Overlap:
    """Similarity matrices in the order of ``names``; NaN where a pair has no module in common or a zero update.

    ``cosine [k, k]``: ``⟨ΔW_i, ΔW_j⟩ / (‖ΔW_i‖·‖ΔW_j‖)`` over the modules that both have. ``subspace [k, k]``: mean
    over those modules of ``‖U_iᵀU_j‖_F² / min(q_i, q_j)``. ``norms [k]``: ``‖ΔW_i‖``. ``modules``: the same two
    matrices for every module, if they were asked for. ``notices``: what a user should know about the pool and its
    adapters. ``bases``: the base model that each adapter names.
    """

    names: list[str]
    cosine: Tensor
    subspace: Tensor
    norms: Tensor
    modules: dict[str, tuple[Tensor, Tensor]]
    notices: tuple[str, ...] = ()
    bases: Mapping[str, str] = field(default_factory=dict)

    def nearest(self, name: str, n: int = 5) -> list[Neighbour]:
        """The ``n`` adapters whose updates have the largest cosine with that of ``name``, largest first; adapters
        without a common module are left out. Raises :class:`InputError` for a name that is not in the pool."""
        if name not in self.names:
            raise InputError(f"nearest: the pool has no adapter {name!r} (`.names` lists all {len(self.names)})")
        row = self.names.index(name)
        cosines = self.cosine[row].clone()
        cosines[row] = torch.nan
        values, order = torch.nan_to_num(cosines, nan=-torch.inf).sort(descending=True, stable=True)
        chosen = order[values.isfinite()][: max(n, 0)].tolist()
        return [Neighbour(self.names[j], float(cosines[j]), float(self.subspace[row, j])) for j in chosen]

    def duplicates(self, above: float = DUPLICATE) -> list[Pair]:
        """Pairs whose cosine is ``above`` or more, most alike first. With a cosine of 1 one is the other times
        ``ratio``. Raises :class:`InputError` for a bound outside ``(0, 1]``."""
        if not 0 < above <= 1:
            raise InputError(f"duplicates: above={above}, needed is more than 0 and at most 1")
        # A float32 cosine of two equal updates may round below 1.
        alike = (self.cosine.triu(1) >= above - 1e-6).nonzero().tolist()
        norms = self.norms.tolist()
        pairs = [
            Pair(self.names[i], self.names[j], float(self.cosine[i, j]), norms[j] / norms[i] if norms[i] else 0.0)
            for i, j in alike
        ]
        return sorted(pairs, key=lambda pair: -pair.cosine)

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Names and matrices as NumPy arrays: ``names``, ``cosine``, ``subspace``, ``norms``, and if modules were asked
        for ``modules`` (their names) with ``cosine_by_module`` and ``subspace_by_module`` ``[modules, k, k]``."""
        import numpy as np

        arrays: dict[str, npt.NDArray[Any]] = {
            "names": np.array(self.names),
            "cosine": self.cosine.numpy(),
            "subspace": self.subspace.numpy(),
            "norms": self.norms.numpy(),
        }
        if self.modules:
            cosines, subspaces = zip(*self.modules.values(), strict=True)
            arrays |= {
                "modules": np.array(list(self.modules)),
                "cosine_by_module": torch.stack(cosines).numpy(),
                "subspace_by_module": torch.stack(subspaces).numpy(),
            }
        return arrays

    def order(self) -> list[int]:
        """The adapters in the order of the leaves of the tree of :meth:`clusters`: neighbours are alike."""
        from scipy.cluster.hierarchy import leaves_list

        return [0] if len(self.names) == 1 else [int(i) for i in leaves_list(self.joints())]

    def clusters(self, n: int | None = None) -> list[Cluster]:
        """Families of adapters, largest first: average linkage of the distances ``1 − cosine`` (pairs that cannot be
        compared count as orthogonal).

        ``n``: how many; by default the tree is cut at the widest gap between the heights of its joints, below
        ``1 − cosine = 1``, and adapters that join no other below it stand alone. Raises :class:`InputError` for a
        number outside ``1 … k``, and where scipy is not installed.
        """
        k = len(self.names)
        if n is not None and not 1 <= n <= k:
            raise InputError(f"clusters: n={n}, needed is 1 to {k}, the number of adapters")
        if k == 1:
            return [self._cluster([0])]
        tree = self.joints()
        from scipy.cluster.hierarchy import cut_tree, fcluster

        labels = fcluster(tree, _gap(tree[:, 2]), "distance") if n is None else cut_tree(tree, n)[:, 0]
        members: dict[int, list[int]] = {}
        for i, label in enumerate(labels.tolist()):
            members.setdefault(label, []).append(i)
        return sorted((self._cluster(of) for of in members.values()), key=lambda c: (-len(c.names), c.names[0]))

    def outliers(self) -> list[Outlier]:
        """Adapters that change nothing, whose norm is far from the others' (by the median deviation of ``log ‖ΔW‖``),
        or that name another base model than most."""
        norms = self.norms
        some = norms[norms > 0]
        median = float(some.median()) if len(some) else 0.0
        found = [Outlier(name, "changes nothing", 0.0, median) for name, x in self._named_norms() if x == 0]
        if len(some) >= 4:
            logs = some.log()
            deviation = max(LEAST_DEVIATION, float((logs - logs.median()).abs().median()))
            for name, x in self._named_norms():
                off = abs(float(torch.tensor(x).log()) - float(logs.median())) / deviation if x > 0 else 0.0
                if off > UNUSUAL:
                    word = "larger" if x > median else "smaller"
                    ratio = x / median if x > median else median / x
                    found.append(Outlier(name, f"norm {ratio:.3g} times {word} than the median", x, median))
        return [*found, *self._foreign(median)]

    def _foreign(self, median: float) -> list[Outlier]:
        counts: dict[str, int] = {}
        for base in self.bases.values():
            counts[base] = counts.get(base, 0) + 1
        if len(counts) < 2:
            return []
        usual = max(counts, key=lambda base: counts[base])
        if counts[usual] * 2 <= len(self.names):
            return []
        return [
            Outlier(name, f"names the base model {self.bases[name]!r}, most name {usual!r}", x, median)
            for name, x in self._named_norms()
            if self.bases.get(name, usual) != usual
        ]

    def _named_norms(self) -> Sequence[tuple[str, float]]:
        return list(zip(self.names, self.norms.tolist(), strict=True))

    def _cluster(self, of: list[int]) -> Cluster:
        names = [self.names[i] for i in of]
        if len(of) == 1:
            return Cluster(names, names[0], float("nan"), float("nan"))
        index = torch.tensor(of)
        cosines = torch.nan_to_num(self.cosine[index[:, None], index])
        sums = cosines.sum(1) - cosines.diagonal()
        pairs = cosines[torch.ones_like(cosines, dtype=torch.bool).triu(1)]
        return Cluster(names, names[int(sums.argmax())], float(pairs.mean()), float(pairs.min()))

    def joints(self) -> npt.NDArray[np.float64]:
        """The tree of average linkage, as scipy has it: ``[k − 1, 4]``, a row for each joint in ascending order of
        heights: what it joins (adapters, then earlier joints counted from ``k``), its height ``1 − cosine``, and how
        many adapters lie below. Raises :class:`InputError` where scipy is not installed."""
        try:
            from scipy.cluster.hierarchy import linkage
            from scipy.spatial.distance import squareform
        except ImportError as error:
            raise InputError(
                f"clusters need scipy, which cannot be imported ({error}): `pip install fastlora[pools]`"
            ) from None
        distances = (1 - torch.nan_to_num(self.cosine)).clamp(0, 2)
        distances.fill_diagonal_(0.0)
        condensed = squareform(((distances + distances.mT) / 2).numpy(), checks=False)
        tree: npt.NDArray[np.float64] = linkage(condensed, "average")
        return tree


def _gap(heights: npt.NDArray[np.float64]) -> float:
    """The middle of the widest gap between ascending heights below 1, with 1 as the last."""
    import numpy as np

    below = np.sort(np.append(heights[heights < 1], [0.0, 1.0]))
    widest = int(np.argmax(np.diff(below)))
    return float((below[widest] + below[widest + 1]) / 2)
