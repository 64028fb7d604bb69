"""Expressions over adapters, evaluated: :func:`compose`. The language is in :mod:`fastlora.expressions.grammar`."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real

import torch

from fastlora.adapters.alignment import aligned
from fastlora.adapters.dora import DoRA, refused
from fastlora.adapters.ia3 import IA3
from fastlora.adapters.loading import Element, load
from fastlora.adapters.lora import Adapter
from fastlora.adapters.one_form import in_one_form
from fastlora.adapters.pool import Pool
from fastlora.adapters.renaming import Renaming
from fastlora.adapters.task_vector import TaskVector
from fastlora.core.vector_space import VectorSpace, linear, require_one_kind
from fastlora.engine.checks import require_finite, require_finite_extras
from fastlora.errors import InputError
from fastlora.expressions.check import Checker, number, options
from fastlora.expressions.functions import FUNCTIONS, WORDS, Placement
from fastlora.expressions.grammar import Call, ExpressionError, Name, Node, bind, names, parse
from fastlora.expressions.sums import is_number, weighted
from fastlora.runtime import devices
from fastlora.runtime.memory import bounded
from fastlora.runtime.memory import parse as parse_memory
from fastlora.runtime.progress import track

ElementSource = Element | str | os.PathLike[str]


def compose(
    expression: str,
    adapters: Mapping[str, ElementSource],
    *,
    numbers: Mapping[str, float] | None = None,
    name: str | None = None,
    drop_extras: bool = False,
    memory: int | str | None = None,
    device: str | torch.device | None = None,
    rename: Mapping[str, str] | None = None,
) -> Element:
    """Computes the adapter that an expression such as ``"0.6*a + 0.4*b - 0.3*unique(c | a, b)"`` stands for.

    Args:
        expression: numbers, parentheses, ``+ - * /`` and the functions ``unique(x | a, b, …)``, ``shared(a, b, …)``,
            ``compress(x, r)``, ``negate(x, λ)``, ``analogy(a, b, c, c0, c1)`` and ``add(a, b, …)``; docs/compose.md
            has them all. Sums are exact, as the operators of :class:`Adapter`. An adapter that is named several times
            takes part once, with its weights added up.
        adapters: ``{name: adapter, or path or Hub id of one}``. Only those that the expression names are loaded;
            ``notes`` of the result name the others.
        numbers: ``{name: value}`` of what in the expression is a number and no adapter, such as ``λ`` in ``"a - λ*b"``.
        name: of the result; the expression by default.
        drop_extras: leave out biases and replaced modules (``modules_to_save``), which sums refuse.
        memory: bound on the peak resident memory, as in :func:`fastlora.decompose`.
        device: where to compute: ``"cuda"``, ``"cuda:1"``, ``"cpu"``; by default where the adapters are. With
            ``memory`` modules are streamed through it, and the result is on the CPU. LoRA adapters alone.
        rename: ``{old: new}``, names of modules or what they begin with, exchanged in all adapters, as in
            :class:`Pool`.

    Returns:
        An adapter of the kind of the inputs: :class:`Adapter`, :class:`IA3` or :class:`TaskVector`.

    Raises:
        ExpressionError: an :class:`InputError` that shows the expression and the place: what cannot be parsed, unknown
            names, a number where an adapter is needed, what a function refuses.
        InputError: adapters that cannot be read, or that belong to different base models; a device that cannot be
            used, or another kind than LoRA adapters on one.

    Cost: that of the functions in the expression. Sums and negations of LoRA adapters read no factor until the result
    is saved; every ``unique``, ``shared`` or ``compress`` is one read of the factors of its arguments.
    """
    result, _ = evaluated(
        expression,
        adapters,
        numbers=numbers,
        name=name,
        drop_extras=drop_extras,
        memory=memory,
        device=device,
        rename=rename,
    )
    return result


def evaluated(
    expression: str,
    adapters: Mapping[str, ElementSource],
    *,
    numbers: Mapping[str, float] | None = None,
    name: str | None = None,
    drop_extras: bool = False,
    memory: int | str | None = None,
    device: str | torch.device | None = None,
    rename: Mapping[str, str] | None = None,
    are_finite: bool = False,
) -> tuple[Element, list[tuple[float, VectorSpace]]]:
    """As :func:`compose`, and what the outermost sum adds up, with its weights. ``are_finite``: whoever asks has looked
    at the numbers of the adapters, so that sums read no factor here."""
    values = dict(numbers or {})
    _check_numbers(values, adapters)
    tree = bind(parse(expression), values, WORDS)
    if not Checker(expression, list(adapters)).check(tree):
        raise ExpressionError("this is a number; an expression over adapters is needed", expression, tree.at)
    used = names(tree)
    where = Placement(devices.parse(device), parse_memory(memory))
    on_device = where.device is not None and where.device.type != "cpu"
    with bounded(None if on_device else where.memory):
        chosen = {n: adapters[n] for n in used}
        notices, elements = _prepare(chosen, drop_extras, where, Renaming(rename), are_finite)
        evaluator = Evaluator(expression, elements, where)
        total = evaluator.total(tree)
        result = evaluator.summed(total, tree)
    bound_to = {"numbers": values} if values else {}
    unused = [f"{n} is not used by the expression" for n in adapters if n not in used]
    assert isinstance(result, Adapter | IA3 | TaskVector)
    told = replace(
        result,
        name=expression.strip() if name is None else name,
        provenance={"expression": expression.strip(), **bound_to, "result": result.provenance},
        notes=tuple(dict.fromkeys([*result.notes, *notices, *unused])),
    )
    return told, list(total.terms.values())


def restated(result: Adapter, expression: str, weights: Sequence[float]) -> Adapter:
    """What :func:`compose` says of ``expression``, given its ``result`` for another one in which
    :func:`~fastlora.expressions.sums.term_weights` finds the same terms in the same order. The updates are still those
    of the other."""
    said = result.provenance["result"]
    assert isinstance(said, dict)
    terms = [{**term, "weight": w} for term, w in zip(said["sum"], weights, strict=True)]
    text = expression.strip()
    return replace(result, name=text, provenance={"expression": text, "result": {**said, "sum": terms}})


def _check_numbers(values: Mapping[str, float], adapters: Mapping[str, ElementSource]) -> None:
    for name, value in values.items():
        if name in adapters:
            raise InputError(f"{name!r} is the name of an adapter and of a number; rename one")
        if not isinstance(value, Real) or not math.isfinite(value):
            raise InputError(f"the number {name!r} is {value!r}: it must be a finite number")


def _prepare(
    sources: Mapping[str, ElementSource], drop_extras: bool, where: Placement, renaming: Renaming, are_finite: bool
) -> tuple[list[str], dict[str, VectorSpace]]:
    """Notices, and the adapters under their names in the expression and one naming of modules."""
    elements: dict[str, VectorSpace] = {}
    for name, source in track(list(sources.items()), "loading"):
        if not isinstance(source, Element | str | os.PathLike):
            raise InputError(
                f"{name!r} is of type {type(source).__name__}; an adapter is needed, or the path or Hub id of one"
            )
        element: Element = source if isinstance(source, Element) else load(os.fspath(source), name)
        if isinstance(element, DoRA):
            raise refused(element)
        if drop_extras and isinstance(element, Adapter | IA3):
            element = element.without_extras()
        elements[name] = _moved(replace(renaming(element), name=name), where)
    renaming.require_used()
    notices: list[str] = []
    require_finite_extras(e for e in elements.values() if isinstance(e, Adapter | IA3))
    updates = [e for e in elements.values() if isinstance(e, Adapter)]
    if updates:
        if not are_finite:
            require_finite(updates)
        adapters, told = in_one_form(updates, strict=True)
        pool = Pool(adapters, align=False)
        elements |= {a.name: a for a in pool.adapters}
        notices += [*told, *pool.notices]
    for kind in (IA3, TaskVector):
        same: list[VectorSpace] = [e for e in elements.values() if isinstance(e, kind)]
        same, told = aligned(same, strict=kind is IA3)
        elements |= {e.name: e for e in same}
        notices += told
    return notices, elements


def _moved(element: VectorSpace, where: Placement) -> VectorSpace:
    """The element where all of the expression is: on the device, and on the host if its memory is bounded, since
    functions then bring modules to the device one after another."""
    if where.device is None:
        return element
    if isinstance(element, Adapter):
        return element.to(where.device if where.memory is None else "cpu")
    if where.device.type != "cpu":
        raise InputError(
            f"device={str(where.device)!r}: only LoRA adapters are computed on a device, and this is "
            f"{getattr(element, 'kind', 'another kind')}; compute on the CPU (`--device cpu`)"
        )
    return element


@dataclass(frozen=True, slots=True)
class Linear:
    """``Σ w_i x_i`` that is not summed yet; by identity, so that an element takes part once."""

    terms: dict[int, tuple[float, VectorSpace]] = field(default_factory=dict)

    def add(self, weight: float, element: VectorSpace) -> None:
        """Adds ``weight`` to that of the element."""
        before = self.terms[id(element)][0] if id(element) in self.terms else 0.0
        self.terms[id(element)] = before + weight, element

    def element(self) -> VectorSpace:
        """The sum as one element; an element with the weight 1 alone is itself."""
        terms = list(self.terms.values())
        kept = [(w, x) for w, x in terms if w != 0.0] or terms[:1]
        return kept[0][1] if len(kept) == 1 and kept[0][0] == 1.0 else linear(kept)


@dataclass(frozen=True, slots=True)
class Evaluator:
    """Evaluates a checked expression. Sums of sums become one sum."""

    text: str
    elements: Mapping[str, VectorSpace]
    where: Placement

    def element(self, node: Node) -> VectorSpace:
        """The element that a part of the expression stands for; errors show where it is."""
        return self.summed(self.total(node), node)

    def total(self, node: Node) -> Linear:
        """What a part of the expression adds up."""
        total = Linear()
        self._accumulate(node, 1.0, total)
        return total

    def summed(self, total: Linear, node: Node) -> VectorSpace:
        """The sum of what was found in a part of the expression."""
        try:
            return total.element()
        except InputError as error:
            raise self._placed(error, node) from error

    def _placed(self, error: InputError, node: Node) -> InputError:
        return error if isinstance(error, ExpressionError) else ExpressionError(str(error), self.text, node.at)

    def _accumulate(self, node: Node, weight: float, total: Linear) -> None:
        for own, leaf in weighted(node, self.text, weight):
            element = self.elements[leaf.name] if isinstance(leaf, Name) else self._call(leaf)
            try:
                require_one_kind([*(x for _, x in total.terms.values()), element])
            except InputError as error:
                raise self._placed(error, leaf) from error
            total.add(own, element)

    def _call(self, node: Node) -> VectorSpace:
        assert isinstance(node, Call)
        function = FUNCTIONS[node.function]
        adapters = [a for a in node.arguments if not is_number(a)]
        given = [*([] if node.target is None else [node.target]), *adapters]
        elements = self._distinct(node.function, given) if function.needs_names else [self.element(a) for a in given]
        numbers = [number(a, self.text) for a in node.arguments[len(adapters) :]]
        try:
            result = function.run(elements, numbers, options(node, function, self.text), self.where)
            return result if self.where.device is None else _moved(result, self.where)
        except InputError as error:
            raise self._placed(error, node) from error

    def _distinct(self, function: str, nodes: list[Node]) -> list[VectorSpace]:
        """Elements with names that differ, as pools need them: their own, or their place."""
        elements: list[VectorSpace] = []
        for i, node in enumerate(nodes):
            element = self.element(node)
            if any(element is other for other in elements):
                raise ExpressionError(f"{function} has {element.name} twice", self.text, node.at)
            if not isinstance(node, Name):
                element = replace(element, name=f"argument {i + 1}")
            elements.append(element)
        return elements
