"""The language of expressions over adapters: its grammar, its syntax tree and its errors. docs/compose.md explains it.

``0.6*movie_a + 0.4*movie_b - 0.3*unique(toxic | movie_a, trec)``
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

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
    from lark.exceptions import UnexpectedCharacters, UnexpectedToken

    try:
        return _Builder(text).transform(_parser().parse(text))
    except UnexpectedCharacters as error:
        at = int(error.pos_in_stream or 0)
        _fail(text, at, f"{text[at]!r} (names with other characters than letters, digits, _ and . are quoted)")
    except UnexpectedToken as error:
        ended = error.token.type == "$END"
        at = len(text) if ended else int(error.token.start_pos or 0)
        _fail(text, at, None if ended else repr(str(error.token)))


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
    from lark import Lark

    return Lark(GRAMMAR, start="sum", parser="lalr", propagate_positions=True, maybe_placeholders=False)


def _expected(accepted: Container[str]) -> str:
    """``a name, a number or (``."""
    wanted = [text for token, texts in EXPECTED.items() if token in accepted for text in texts]
    return " or ".join(filter(None, (", ".join(wanted[:-1]), wanted[-1])))


def _accepted(text: str, at: int) -> list[str]:
    """The tokens that could follow those before ``at``."""
    from lark.exceptions import UnexpectedInput

    state = _parser().parse_interactive(text)
    tokens = state.lexer_thread.lex(state.parser_state)
    try:
        for token in tokens:
            if token.start_pos >= at:
                break
            state.feed_token(token)
    except UnexpectedInput:
        pass  # the character at ``at``
    return list(state.accepts())


def _fail(text: str, at: int, found: str | None) -> NoReturn:
    expected = _expected(_accepted(text, at))
    if found is None:
        raise ExpressionError(f"the expression ends too early; expected {expected}", text, len(text.rstrip())) from None
    raise ExpressionError(f"expected {expected}, found {found}", text, at) from None


class _Builder:
    """Makes the syntax tree from lark's."""

    def __init__(self, text: str) -> None:
        self.text = text

    def transform(self, tree: Any) -> Node:
        """Recursion is as deep as the parentheses."""
        node: Node = getattr(self, tree.data)(tree, tree.children)
        return node

    def number(self, tree: Any, children: list[Any]) -> Number:
        at, value = int(children[0].start_pos), float(children[0])
        if value in (float("inf"), float("-inf")):
            raise ExpressionError(f"{children[0]} is too large for a number", self.text, at)
        return Number(at, value)

    def name(self, tree: Any, children: list[Any]) -> Name:
        token = children[0]
        return Name(int(token.start_pos), str(token)[1:-1] if token.type == "QUOTED" else str(token))

    def group(self, tree: Any, children: list[Any]) -> Node:
        return self.transform(children[0])

    def sum(self, tree: Any, children: list[Any]) -> Node:
        signs = [1, *(1 if sign == "+" else -1 for sign in children[1::2])]
        terms = tuple(zip(signs, map(self.transform, children[::2]), strict=True))
        return Sum(terms[0][1].at, terms)

    def product(self, tree: Any, children: list[Any]) -> Node:
        divides = [False, *(point == "/" for point in children[1::2])]
        factors = tuple(zip(divides, map(self.transform, children[::2]), strict=True))
        return Product(factors[0][1].at, factors)

    def signed(self, tree: Any, children: list[Any]) -> Node:
        atom = self.transform(children[-1])
        negative = sum(sign != "+" for sign in children[:-1]) % 2
        return Sum(int(children[0].start_pos), ((-1, atom),)) if negative else atom

    def call(self, tree: Any, children: list[Any]) -> Call:
        name, *rest = children
        target: Node | None = None
        arguments: list[Node] = []
        options: list[tuple[str, Node]] = []
        for i, child in enumerate(rest[::2]):
            after = rest[2 * i + 1] if 2 * i + 1 < len(rest) else None
            if after is not None and after == "|" and (i or child.data == "option"):
                raise ExpressionError(
                    '"|" stands once, after the first argument: unique(x | a, b, …)', self.text, int(after.start_pos)
                )
            if child.data == "option":
                word, value = child.children
                if str(word) in (key for key, _ in options):
                    raise ExpressionError(f"{word} is given twice", self.text, int(word.start_pos))
                options.append((str(word), self.transform(value)))
            elif options:
                node = self.transform(child)
                raise ExpressionError("arguments come before options such as threshold=0.85", self.text, node.at)
            elif after is not None and after == "|":
                target = self.transform(child)
            else:
                arguments.append(self.transform(child))
        return Call(int(name.start_pos), str(name), target, tuple(arguments), tuple(options))
