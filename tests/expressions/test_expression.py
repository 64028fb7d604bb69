"""The language of expressions: what is parsed as what, and what a mistake is told."""

from __future__ import annotations

import random

import pytest

from fastlora.errors import InputError
from fastlora.expressions.grammar import DEEPEST, Call, ExpressionError, Name, Node, Number, Product, Sum, names, parse
from fastlora.expressions.sums import shape as spoken
from fastlora.expressions.sums import term_weights

pytestmark = pytest.mark.portable


def shape(node: Node) -> object:
    """A tree without places, as nested lists."""
    if isinstance(node, Number):
        return node.value
    if isinstance(node, Name):
        return node.name
    if isinstance(node, Sum):
        return ["+", *(shape(t) if sign > 0 else ["-", shape(t)] for sign, t in node.terms)]
    if isinstance(node, Product):
        return ["*", *(["/", shape(f)] if divides else shape(f) for divides, f in node.factors)]
    assert isinstance(node, Call)
    target = [] if node.target is None else [shape(node.target), "|"]
    return [node.function, *target, *map(shape, node.arguments), *((k, shape(v)) for k, v in node.options)]


PARSED = {
    "a": "a",
    "  a\n": "a",
    "a + b - c": ["+", "a", "b", ["-", "c"]],
    "a + (b - c)": ["+", "a", ["+", "b", ["-", "c"]]],
    "-a": ["+", ["-", "a"]],
    "-a + b": ["+", ["+", ["-", "a"]], "b"],
    "a - -b": ["+", "a", ["-", ["+", ["-", "b"]]]],
    "a --- b": ["+", "a", ["-", "b"]],
    "−a": ["+", ["-", "a"]],
    "0.7*a + .3*b": ["+", ["*", 0.7, "a"], ["*", 0.3, "b"]],
    "a*2/3": ["*", "a", 2.0, ["/", 3.0]],
    "2·a": ["*", 2.0, "a"],
    "-2*a": ["*", ["+", ["-", 2.0]], "a"],
    "2*-a": ["*", 2.0, ["+", ["-", "a"]]],
    "2*--a": ["*", 2.0, "a"],
    "(1/3)*a": ["*", ["*", 1.0, ["/", 3.0]], "a"],
    "1e-3*a": ["*", 1e-3, "a"],
    "2.5E+2*a": ["*", 250.0, "a"],
    "((a))": "a",
    "'trec-r16' - \"x y\"": ["+", "trec-r16", ["-", "x y"]],
    "movie.v2_final": "movie.v2_final",
    "größe + 模型": ["+", "größe", "模型"],
    "unique(x | a, b)": ["unique", "x", "|", "a", "b"],
    "unique(x + y | 2*a, threshold=0.5, chain=mean)": [
        "unique", ["+", "x", "y"], "|", ["*", 2.0, "a"], ("threshold", 0.5), ("chain", "mean")],
    "compress(a + b, 8)": ["compress", ["+", "a", "b"], 8.0],
    "compress(a, energy=1 - 0.1)": ["compress", "a", ("energy", ["+", 1.0, ["-", 0.1]])],
    "negate(shared(a, b))": ["negate", ["shared", "a", "b"]],
    "f()": ["f"],
    "unique": "unique",
}  # fmt: skip


@pytest.mark.parametrize("text", PARSED)
def test_what_is_parsed(text: str) -> None:
    assert shape(parse(text)) == PARSED[text]


def test_names() -> None:
    assert names(parse("a + 2*f(b | a, c, side=left) - 'd e'")) == ["a", "b", "c", "d e"]


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("0.5*a - b/4", {"a": 0.5, "b": -0.25}),
        ("2*(b + 3*(a - b/2)) - c", {"b": -1.0, "a": 6.0, "c": -1.0}),
        ("0.1*a + 0.2*a + b", {"a": 0.1 + 0.2, "b": 1.0}),
        ("a - a + b + c", None),  # nothing of a is left
        ("2*a", None),
        ("a - 0.5*negate(b,  1)", {"a": 1.0, "negate(b, 1)": -0.5}),
        ("negate(b, 1) + a/4 + negate(b, 2)", {"negate(b, 1)": 1.0, "a": 0.25, "negate(b, 2)": 1.0}),
        ("a + negate(b, 1) + negate(b, 1)", None),  # two results
    ],
)
def test_what_is_added_up(text: str, weights: dict[str, float] | None) -> None:
    found = term_weights(parse(text), text)
    wanted = {spoken(parse(term)): weight for term, weight in (weights or {}).items()}
    assert found == (wanted or None) and list(found or ()) == list(wanted)


QUOTED = "(names with other characters than letters, digits, _ and . are quoted)"
WRONG = {
    "0.6*movie_a + 0.4*": ("the expression ends too early; expected a name, a number, +, - or (", 18),
    "a b": ("expected +, -, *, /, ( or the end, found 'b'", 2),
    "a + * b": ("expected a name, a number, +, - or (, found '*'", 4),
    "(a": ("the expression ends too early; expected +, -, *, /, ( or )", 2),
    "a)": ("expected +, -, *, /, ( or the end, found ')'", 1),
    "2a": ("expected +, -, *, / or the end, found 'a'", 1),
    "a, b": ("expected +, -, *, /, ( or the end, found ','", 1),
    "f(a,, b)": ("expected a name, a number, +, - or (, found ','", 4),
    "f(a": ("the expression ends too early; expected +, -, *, /, a comma, =, ( or )", 3),
    "unique(x | )": ("expected a name, a number, +, - or (, found ')'", 11),
    "f(a | b | c)": ('"|" stands once, after the first argument: unique(x | a, b, …)', 8),
    "f(a, b | c)": ('"|" stands once, after the first argument: unique(x | a, b, …)', 7),
    "f(a, x=1, b)": ("arguments come before options such as threshold=0.85", 10),
    "f(a, x=1, x=2)": ("x is given twice", 10),
    "f(a, x=)": ("expected a name, a number, +, - or (, found ')'", 7),
    "a $ b": (f"expected +, -, *, /, ( or the end, found '$' {QUOTED}", 2),
    "a 'b": (f"expected +, -, *, /, ( or the end, found \"'\" {QUOTED}", 2),
    "1e999*a": ("1e999 is too large for a number", 0),
    "a ** 2": ("expected a name, a number, +, - or (, found '*'", 3),
    "a^2": (f"expected +, -, *, /, ( or the end, found '^' {QUOTED}", 1),
}  # fmt: skip


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_is_shown_in_its_place(text: str) -> None:
    message, at = WRONG[text]
    with pytest.raises(ExpressionError) as found:
        parse(text)
    assert str(found.value) == f"{message}\n  {text}\n  {' ' * at}^"


@pytest.mark.parametrize("text", ["", "   ", "\n"])
def test_nothing_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="the expression is empty; give one such as"):
        parse(text)


def test_the_caret_is_under_its_line_and_place() -> None:
    with pytest.raises(ExpressionError) as found:
        parse("a +\n\t模型 + )\n- b")
    lines = str(found.value).split("\n")
    assert lines[1:] == ["   模型 + )", "  " + " " * 8 + "^"]


def test_nothing_steers_a_terminal() -> None:
    with pytest.raises(ExpressionError) as found:
        parse("a \x1b[2J")
    assert "\x1b" not in str(found.value) and "\\x1b" in str(found.value)


def test_what_is_too_large_is_refused() -> None:
    with pytest.raises(InputError, match="more than 20000"):
        parse("a" * 20_001)
    deep = DEEPEST * "(" + "a" + DEEPEST * ")"
    assert shape(parse(deep)) == "a"
    with pytest.raises(ExpressionError, match=f"more than {DEEPEST} parentheses"):
        parse(f"({deep})")
    nested = parse("negate(" * DEEPEST + "a" + ")" * DEEPEST)
    assert names(nested) == ["a"]
    assert len(parse(" + ".join(["a"] * 5000)).terms) == 5000  # type: ignore[attr-defined]
    assert shape(parse("2*" + "-" * 10_000 + "a")) == ["*", 2.0, "a"]


def test_any_text_is_parsed_or_refused_in_a_sentence() -> None:
    pieces = ["a", "b.c", "2", ".5", "+", "-", "*", "/", "(", ")", ",", "|", "=", "unique", "'x'", '"', "'", " ", "\n",
              "é", "−", "\x00", "@", "1e5", "threshold=0.5", "\ud800"]  # fmt: skip
    random.seed(0)
    accepted = 0
    for _ in range(3000):
        text = "".join(random.choices(pieces, k=random.randint(1, 12)))
        try:
            parse(text)
            accepted += 1
        except InputError as error:
            assert str(error).replace("\n", " ").isprintable(), repr(text)
    assert 100 < accepted < 2900
