"""The language of expressions over adapters: its grammar, its syntax tree and its errors. docs/compose.md explains it.

``0.6*movie_a + 0.4*movie_b - 0.3*unique(toxic | movie_a, trec)``
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lark import Lark, Token, Transformer, v_args
from lark.exceptions import UnexpectedCharacters, UnexpectedInput, VisitError
from lark.tree import Meta

from fastlora.errors import InputError

GRAMMAR = r"""
?sum: product | product (SIGN product)+          -> sum
?product: signed | signed (POINT signed)+        -> product
?signed: atom | SIGN+ atom                       -> signed
?atom: NUMBER                                    -> number
    | name
    | NAME "(" [argument (SEPARATOR argument)*] ")" -> call
    | "(" sum ")"                                -> group
name: NAME | QUOTED
?argument: NAME "=" sum                          -> option
    | sum

SIGN: "+" | "-" | "−"
POINT: "*" | "/" | "·"
SEPARATOR: "," | "|"
NUMBER: /(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?/
NAME: /[^\W\d][\w.]*/
QUOTED: /"[^"]+"|'[^']+'/
%ignore /\s+/
"""

EXPECTED = {
    "NAME": ("a name",),
    "NUMBER": ("a number",),
    "SIGN": ("+", "-"),
    "POINT": ("*", "/"),
    "SEPARATOR": ("a comma",),
    "EQUAL": ("=",),
    "LPAR": ("(",),
    "RPAR": (")",),
    "$END": ("the end",),
}
"""What the grammar's tokens are called in messages."""

LONGEST = 20_000
"""Characters of an expression."""
DEEPEST = 100
"""Parentheses and functions inside each other."""


class ExpressionError(InputError):
    """What is wrong with an expression, and where: the message shows it with a caret under the place."""

    def __init__(self, message: str, text: str, at: int) -> None:
        super().__init__(message)
        self.message, self.text, self.at = message, text, at

    def __str__(self) -> str:
        start = self.text.rfind("\n", 0, self.at) + 1
        line = self.text[start:].partition("\n")[0]
        before = self.text[start : self.at]
        # A caret stands below its place only if what is before it is as wide as what is above it.
        shown = "".join(c if c.isprintable() else " " for c in line)
        indent = "".join("  " if unicodedata.east_asian_width(c) in "WF" else " " for c in before)
        message = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in self.message)
        return f"{message}\n  {shown}\n  {indent}^"


@dataclass(frozen=True, slots=True)
class Node:
    """A part of an expression; ``at`` is where it starts."""

    at: int


@dataclass(frozen=True, slots=True)
class Number(Node):
    """A number that is written in the expression or bound to a name."""

    value: float


@dataclass(frozen=True, slots=True)
class Name(Node):
    """An adapter, or a word as the value of an option."""

    name: str


@dataclass(frozen=True, slots=True)
class Sum(Node):
    """``terms``: the sign, 1 or -1, and what it belongs to."""

    terms: tuple[tuple[int, Node], ...]


@dataclass(frozen=True, slots=True)
class Product(Node):
    """``factors``: whether it divides, and the factor."""

    factors: tuple[tuple[bool, Node], ...]


@dataclass(frozen=True, slots=True)
class Call(Node):
    """``function(target | arguments, options)``; no ``target`` where there is no bar."""

    function: str
    target: Node | None
    arguments: tuple[Node, ...]
    options: tuple[tuple[str, Node], ...]


def parse(text: str) -> Node:
    """The syntax tree of an expression. Raises :class:`ExpressionError`, which says what was expected where."""
    if not text.strip():
        raise InputError('the expression is empty; give one such as "0.7*a + 0.3*b"')
    if len(text) > LONGEST:
        raise InputError(f"the expression has {len(text)} characters, more than {LONGEST}; compose in several steps")
    depth = 0
    for at, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth > DEEPEST:
            raise ExpressionError(f"more than {DEEPEST} parentheses inside each other", text, at)
    try:
        tree = _parser().parse(text)
        return _Builder(text).transform(tree)  # type: ignore[no-any-return]
    except UnexpectedInput as error:
        raise _unexpected(text, error) from None
    except VisitError as error:
        raise error.orig_exc from None


def walk(node: Node) -> Iterator[Node]:
    """A node and all below it, without the values of options."""
    yield node
    if isinstance(node, Sum):
        below = [term for _, term in node.terms]
    elif isinstance(node, Product):
        below = [factor for _, factor in node.factors]
    elif isinstance(node, Call):
        below = [*([] if node.target is None else [node.target]), *node.arguments]
    else:
        below = []
    for child in below:
        yield from walk(child)


def names(node: Node) -> list[str]:
    """The adapters that an expression names, each once."""
    return list(dict.fromkeys(n.name for n in walk(node) if isinstance(n, Name)))


def bind(node: Node, values: Mapping[str, float], words: Container[str]) -> Node:
    """The expression with numbers in the place of some names, but not of those that are words: the values of the
    options ``words``."""
    if isinstance(node, Name) and node.name in values:
        return Number(node.at, float(values[node.name]))
    if isinstance(node, Sum):
        return replace(node, terms=tuple((sign, bind(term, values, words)) for sign, term in node.terms))
    if isinstance(node, Product):
        return replace(node, factors=tuple((divides, bind(factor, values, words)) for divides, factor in node.factors))
    if isinstance(node, Call):
        target = None if node.target is None else bind(node.target, values, words)
        options = tuple((k, v if k in words else bind(v, values, words)) for k, v in node.options)
        arguments = tuple(bind(a, values, words) for a in node.arguments)
        return replace(node, target=target, arguments=arguments, options=options)
    return node


@functools.cache
def _parser() -> Any:
    return Lark(GRAMMAR, start="sum", parser="lalr", propagate_positions=True, maybe_placeholders=False)


def _unexpected(text: str, error: UnexpectedInput) -> ExpressionError:
    """What was expected in the place of a character or word that the grammar does not take there."""
    if isinstance(error, UnexpectedCharacters):
        at = int(error.pos_in_stream)
        quoted = "names with other characters than letters, digits, _ and . are quoted"
        return ExpressionError(f"expected {_expected(text[:at])}, found {text[at]!r} ({quoted})", text, at)
    if error.token.type == "$END":
        message = f"the expression ends too early; expected {_expected(text)}"
        return ExpressionError(message, text, len(text.rstrip()))
    at = int(error.token.start_pos)
    return ExpressionError(f"expected {_expected(text[:at])}, found {str(error.token)!r}", text, at)


def _expected(before: str) -> str:
    """What could follow the beginning of an expression: ``a name, a number or (``.

    The error's own ``accepts`` holds less: the parser ends rules before it finds that the next token does not follow.
    """
    state = _parser().parse_interactive(before)
    state.exhaust_lexer()
    accepted = state.accepts()
    wanted = [name for token, names in EXPECTED.items() if token in accepted for name in names]
    return " or ".join(filter(None, (", ".join(wanted[:-1]), wanted[-1])))


@dataclass(frozen=True, slots=True)
class _Option:
    """``name=value`` among the arguments of a call."""

    name: Token
    value: Node


@v_args(meta=True)
class _Builder(Transformer):  # type: ignore[misc]
    """Makes the syntax tree from lark's, from the leaves up; recursion is as deep as the parentheses."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def number(self, meta: Meta, children: list[Token]) -> Number:
        value = float(children[0])
        if value in (float("inf"), float("-inf")):
            raise ExpressionError(f"{children[0]} is too large for a number", self.text, meta.start_pos)
        return Number(meta.start_pos, value)

    def name(self, meta: Meta, children: list[Token]) -> Name:
        (token,) = children
        return Name(meta.start_pos, token[1:-1] if token.type == "QUOTED" else str(token))

    def group(self, meta: Meta, children: list[Node]) -> Node:
        return children[0]

    def sum(self, meta: Meta, children: list[Any]) -> Sum:
        signs = [1, *(1 if sign == "+" else -1 for sign in children[1::2])]
        return Sum(children[0].at, tuple(zip(signs, children[::2], strict=True)))

    def product(self, meta: Meta, children: list[Any]) -> Product:
        divides = [False, *(point == "/" for point in children[1::2])]
        return Product(children[0].at, tuple(zip(divides, children[::2], strict=True)))

    def signed(self, meta: Meta, children: list[Any]) -> Node:
        atom: Node = children[-1]
        negative = sum(sign != "+" for sign in children[:-1]) % 2
        return Sum(meta.start_pos, ((-1, atom),)) if negative else atom

    def option(self, meta: Meta, children: list[Any]) -> _Option:
        return _Option(*children)

    def call(self, meta: Meta, children: list[Any]) -> Call:
        name, *others = children
        items, separators = others[::2], others[1::2]
        for i, separator in enumerate(separators):
            if separator == "|" and (i or isinstance(items[0], _Option)):
                message = '"|" stands once, after the first argument: unique(x | a, b, …)'
                raise ExpressionError(message, self.text, separator.start_pos)
        options: dict[str, Node] = {}
        arguments: list[Node] = []
        for item in items:
            if not isinstance(item, _Option):
                if options:
                    raise ExpressionError("arguments come before options such as threshold=0.85", self.text, item.at)
                arguments.append(item)
            elif item.name in options:
                raise ExpressionError(f"{item.name} is given twice", self.text, item.name.start_pos)
            else:
                options[str(item.name)] = item.value
        target = arguments.pop(0) if "|" in separators else None
        return Call(meta.start_pos, str(name), target, tuple(arguments), tuple(options.items()))
