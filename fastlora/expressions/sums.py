"""Expressions as weighted sums: what is added up, and how much of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from fastlora.expressions.check import number
from fastlora.expressions.grammar import Call, Name, Node, Product, Sum, walk


def is_number(node: Node) -> bool:
    """Whether a part of an expression holds no adapter."""
    return all(not isinstance(n, Name | Call) for n in walk(node))


def weighted(node: Node, text: str, weight: float = 1.0) -> Iterator[tuple[float, Node]]:
    """The names and calls that a checked expression adds up, in their order, each with its weight times ``weight``; a
    name that is there twice comes twice."""
    if isinstance(node, Sum):
        for sign, term in node.terms:
            yield from weighted(term, text, sign * weight)
    elif isinstance(node, Product):
        inner = next(f for _, f in node.factors if not is_number(f))
        for divides, factor in node.factors:
            if factor is not inner:
                other = number(factor, text)
                weight = weight / other if divides else weight * other
        yield from weighted(inner, text, weight)
    else:
        yield weight, node


def shape(node: object) -> object:
    """What a part of an expression says, as plain data that can be compared: without the places in its text."""
    if isinstance(node, Node):
        return (type(node).__name__, *(shape(getattr(node, f.name)) for f in fields(node) if f.name != "at"))
    return tuple(map(shape, node)) if isinstance(node, tuple) else node


def term_weights(tree: Node, text: str) -> dict[object, float] | None:
    """``{shape of a term: weight}`` of a checked expression that adds up two adapters or results of functions, or more;
    ``None`` where it does not, where a weight is 0, and where it calls one function twice in the same way."""
    weights: dict[object, float] = {}
    for weight, leaf in weighted(tree, text):
        term = shape(leaf)
        if term in weights and not isinstance(leaf, Name):
            return None
        weights[term] = weights.get(term, 0.0) + weight
    return weights if len(weights) > 1 and all(weights.values()) else None
