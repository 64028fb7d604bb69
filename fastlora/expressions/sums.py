"""Expressions as weighted sums: what is added up, and how much of each."""

from __future__ import annotations

from collections.abc import Iterator

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


def plain_weights(tree: Node, text: str) -> dict[str, float] | None:
    """``{name: weight}`` of a checked expression that is a sum of two adapters or more, none of weight 0 and no
    function among them; ``None`` for others."""
    weights: dict[str, float] = {}
    for weight, leaf in weighted(tree, text):
        if not isinstance(leaf, Name):
            return None
        weights[leaf.name] = weights.get(leaf.name, 0.0) + weight
    return weights if len(weights) > 1 and all(weights.values()) else None
