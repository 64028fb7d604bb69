"""Decouple, modulate, recombine: the objects that users hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fastlora.adapters.lora import Adapter
from fastlora.adapters.placing import place
from fastlora.adapters.pool import Pool
from fastlora.core.dtypes import widest
from fastlora.core.names import check_name
from fastlora.core.sums import common_base, require_one_device
from fastlora.core.sums import is_base_copy as is_base_copy
from fastlora.core.updates import Update
from fastlora.dipm.frames import GRANULARITIES, SIDES, ModuleFrame, frames
from fastlora.dipm.operators import Operator, State, require_adapters
from fastlora.engine import shares
from fastlora.errors import InputError
from fastlora.runtime import devices


class Parts:
    """Directions and magnitudes of an adapter, and the operators that were applied to them; made by :func:`decouple`.

    ``adapter``, ``granularity`` and ``on`` are those of :func:`decouple`, ``operators`` what :meth:`apply` added.
    Nothing is computed until magnitudes or directions are looked at or recombined.
    """

    def __init__(self, adapter: Adapter, granularity: str, on: str, operators: Sequence[Operator] = ()) -> None:
        self.adapter = adapter
        self.granularity = granularity
        self.on = on
        self.operators = tuple(operators)

    def apply(self, *operators: Operator) -> Parts:
        """These parts with some more operators, from left to right."""
        return Parts(self.adapter, self.granularity, self.on, (*self.operators, *operators))

    @property
    def changes(self) -> list[Operator]:
        """The operators that change something."""
        return [o for o in self.operators if not o.is_identity]

    @property
    def magnitudes(self) -> dict[str, Tensor]:
        """``μ`` of every module: float64, one number a component, a column or a module. Zero where there is no
        direction."""
        return {frame.module.name: state.magnitude.clone() for frame, state in self._states()}

    def directions(self) -> Adapter:
        """``D`` as an adapter: every vector at length one (or zero). With ``on="B"`` or ``"A"``, of that factor, beside
        the other one as it is."""
        return self._adapter({f.module.name: f.update(s.direction) for f, s in self._states()}, "directions")

    def recombined(self, magnitudes: Mapping[str, Tensor] | None) -> tuple[Adapter, dict[str, Tensor]]:
        """The adapter ``D ∘ μ``, and the ``μ`` that it has; ``magnitudes`` are put in place of ``μ`` where given.

        Raises :class:`InputError` for magnitudes of another shape or of a module that these parts do not have.
        """
        pool = self._pool()

        def work() -> dict[str, tuple[Update | None, Tensor, Counter[str]]]:
            found = {}
            for frame, state in self._states(pool, shared=True):
                name, weights, used = frame.module.name, state.weights, state.magnitude
                if magnitudes is not None and name in magnitudes:
                    used = _checked(magnitudes[name], state, name)
                    weights = state.direction * used
                found[name] = frame.update(weights), used, frame.events + state.events
            return found

        found = shares.each("modulating", work, pool.adapters)
        updates = {m: found[m][0] for m in pool.modules}
        used = {m: found[m][1] for m in pool.modules}
        events: Counter[str] = Counter()
        for module in pool.modules:
            events += found[module][2]
        if magnitudes is not None and (unknown := magnitudes.keys() - updates.keys()):
            raise InputError(f"recombine: magnitudes for {sorted(unknown)[0]!r}, a module that these parts do not have")
        notes = [*pool.notices, *(f"{count} {what}" for what, count in events.items())]
        return self._adapter(updates, "recombined", notes), used

    def to(self, device: torch.device | str) -> Parts:
        """The parts with all adapters that take part on a device; each is moved once."""
        there = {id(a): a.to(device) for a in (self.adapter, *(a for o in self.operators for a in o.others))}
        operators = [replace(o, others=tuple(there[id(a)] for a in o.others)) for o in self.operators]
        return Parts(there[id(self.adapter)], self.granularity, self.on, operators)

    @property
    def adapters(self) -> list[Adapter]:
        """The modulated adapter, then every other one that takes part, once."""
        return list({id(a): a for a in (self.adapter, *(a for o in self.changes for a in o.others))}.values())

    def _pool(self) -> Pool:
        refuse_extras(self.adapters)
        return Pool(named(self.adapters))

    def _states(self, pool: Pool | None = None, *, shared: bool = False) -> Iterator[tuple[ModuleFrame, State]]:
        index_of = {id(a): i for i, a in enumerate(self.adapters)}
        for frame in frames(pool or self._pool(), self.granularity, self.on, shared=shared):
            own_squares = frame.gram[0, 0]
            weights = torch.zeros(frame.gram.shape[1:], dtype=torch.float64)
            weights[0] = (own_squares > 0).double()
            state = State(frame.gram, weights, own_squares.clamp(min=0).sqrt())
            for operator in self.changes:
                state = operator.run(state, [index_of[id(a)] for a in operator.others])
            yield frame, state

    def _adapter(self, updates: Mapping[str, Update | None], what: str, notes: Sequence[str] = ()) -> Adapter:
        adapters = self.adapters
        operators = [
            {"operator": o.name, "strength": o.strength, "others": [a.provenance for a in o.others]}
            for o in self.changes
        ]
        order = dict.fromkeys([*self.adapter.updates, *updates])
        return Adapter(
            self.adapter.name,
            {m: u for m in order if (u := updates.get(m)) is not None},
            extras=self.adapter.extras,
            base=common_base(adapters),
            dtype=widest(a.dtype for a in adapters),
            provenance={
                "dipm": what,
                "of": self.adapter.provenance,
                "granularity": self.granularity,
                "on": self.on,
                "operators": operators,
            },
            notes=tuple(dict.fromkeys([*(note for a in adapters for note in a.notes), *notes])),
        )

    def __repr__(self) -> str:
        names = ", ".join(f"{o.name}({o.strength:g})" for o in self.operators) or "as decoupled"
        return f"Parts({self.adapter.name!r}, {self.granularity} on {self.on}: {names})"


def decouple(adapter: Adapter, granularity: str = "column", on: str = "product") -> Parts:
    """Splits every update into directions ``D`` of length one and magnitudes ``μ ≥ 0``, ``X = D ∘ μ``, MATH (11).

    Args:
        adapter: a LoRA adapter.
        granularity: ``"column"``: a magnitude for every input column of ``ΔW``. ``"component"``: for every rank-one
            component of the singular value form, in order of ``σ``. ``"matrix"``: one a module.
        on: what is decoupled: ``"product"`` is ``ΔW = sBA``; ``"B"`` is ``sB`` and ``"A"`` is ``A``, which depend on
            how ``ΔW`` was factored (``column`` on ``B``: one magnitude a rank). ``component`` is the pair
            ``(u_j, v_j)`` in every case: ``on`` says whether operators turn ``u_j`` (B), ``v_j`` (A) or ``u_j v_jᵀ``
            (product).

    Returns:
        :class:`Parts`, on which operators are applied and which :func:`recombine` makes an adapter of.

    Raises:
        InputError: something that is no LoRA adapter, an unknown ``granularity`` or ``on``.

    Cost: nothing; directions and magnitudes are computed when they are looked at or recombined.
    """
    require_adapters("decouple", adapter)
    if granularity not in GRANULARITIES:
        raise InputError(f"granularity={granularity!r} does not exist: use one of {', '.join(GRANULARITIES)}")
    if on not in SIDES:
        raise InputError(f"on={on!r} does not exist: use 'product' (ΔW), 'B' or 'A'")
    return Parts(adapter, granularity, on)


def recombine(
    parts: Parts,
    *,
    magnitudes: Mapping[str, Tensor] | None = None,
    rank: int | None = None,
    energy: float | None = None,
) -> Adapter:
    """The adapter ``X' = D' ∘ μ'``, MATH (12), exact in factor space.

    Without operators that change something it is the adapter itself, untouched. Directions of other adapters add their
    ranks to a result on the product; ``rank`` or ``energy`` compresses it (:func:`fastlora.compress`), after which
    columns and matrices are brought back to the magnitudes ``μ'`` from the Gram matrix of what was compressed
    (components are those of the compressed update).

    Args:
        parts: directions and magnitudes, from :func:`decouple`, with the operators that were applied.
        magnitudes: other ``μ'`` for some modules, as many numbers as :attr:`Parts.magnitudes` has.

    Raises:
        InputError: NaN or Inf in a factor, by adapter and module; biases or replaced modules, which have no direction;
            unequal ranks with ``on="A"`` or ``"B"``.

    Cost: one pass over the factors of all adapters involved (two with ``granularity="component"`` on ``A`` or ``B``);
    on columns, two more over the ``A`` factors, of which the result holds its own copy (float32; float64 for
    float64).
    """
    if not parts.changes and magnitudes is None:
        return parts.adapter if rank is None and energy is None else parts.adapter.compress(rank, energy=energy)
    result, wanted = parts.recombined(magnitudes)
    if rank is None and energy is None:
        return result
    smaller = result.compress(rank, energy=energy)
    if parts.on != "product" or parts.granularity == "component":
        return smaller
    again, _ = Parts(smaller.without_extras(), parts.granularity, parts.on).recombined(
        {m: wanted[m] for m in smaller.updates}
    )
    return replace(smaller, updates=again.updates)


def modulate(
    adapter: Adapter,
    operators: Operator | Sequence[Operator],
    *,
    granularity: str = "column",
    on: str = "product",
    rank: int | None = None,
    energy: float | None = None,
    memory: int | str | None = None,
    device: str | torch.device | None = None,
) -> Adapter:
    """Changes the directions and magnitudes of an adapter (DiPM), MATH section 5.

    It is :func:`decouple`, the operators from left to right, and :func:`recombine`: ``ΔW = D ∘ μ → D' ∘ μ'``.

        fl.modulate(toxic, fl.dipm.reverse(0.5))
        fl.modulate(model, [fl.dipm.shift(source, target, 0.3), fl.dipm.scale(0.8)], granularity="column", rank=16)

    Args:
        adapter: a LoRA adapter.
        operators: one of ``fl.dipm``'s operators, or several.
        granularity, on: what has a direction and a magnitude, see :func:`decouple`.
        rank, energy: compress the result, see :func:`recombine`.
        memory: bound on the peak resident memory of what is worked on at once, as bytes or ``"1GiB"``; the ``A``
            factors that the result holds as its own come on top. The result has the same bits. With a ``device`` it
            bounds the memory taken there: Gram blocks of modules are streamed through it when the adapters do not fit.
        device: where to compute: ``"cuda"``, ``"cuda:1"``, ``"cpu"``; by default where the adapters are.

    Returns:
        :class:`Adapter`; the adapter itself where no operator changes anything and nothing is compressed.

    Raises:
        InputError: what :func:`decouple` and :func:`recombine` refuse.

    Cost: that of :func:`recombine`.
    """
    given = [operators] if isinstance(operators, Operator) else list(operators)
    parts = decouple(adapter, granularity, on).apply(*given)
    where = devices.parse(device)
    if where is None:
        require_one_device(parts.adapters)
    placed = place(parts.adapters, where or adapter.device, memory)
    with placed.in_use():
        return recombine(parts.to(placed.device), rank=rank, energy=energy)


def named(adapters: Sequence[Adapter]) -> list[Adapter]:
    """The adapters under names that differ, for one pool."""
    taken: set[str] = set()
    result = []
    for i, adapter in enumerate(adapters):
        name = adapter.name
        try:
            check_name(name)
        except InputError:  # the name of a long sum
            name = f"adapter {i + 1}"
        while name.casefold() in taken:
            name += "'"
        taken.add(name.casefold())
        result.append(Adapter(name, adapter.updates, base=adapter.base, dtype=adapter.dtype))
    return result


def refuse_extras(adapters: Sequence[Adapter]) -> None:
    """Biases and replaced modules have no direction and magnitude here; copies of adapted embeddings are no change."""
    terms = [(1.0, a) for a in adapters]
    for adapter in adapters:
        for name, extra in adapter.extras.items():
            if extra.kind == "delta" or not is_base_copy(name, extra, terms):
                raise InputError(
                    f"adapter {adapter.name!r} also changes {name} of its base model (a bias or modules_to_save), "
                    "which has no direction and magnitude here. Use `adapter.without_extras()` (`--drop-extras`) to "
                    "leave such parameters out"
                )


def _checked(values: Tensor, state: State, module: str) -> Tensor:
    values = values.to(torch.float64)
    if values.shape != state.magnitude.shape or not bool((values.isfinite() & (values >= 0)).all()):
        raise InputError(
            f"recombine: magnitudes of {module} must be {list(state.magnitude.shape)} finite numbers of 0 or more"
        )
    return values
