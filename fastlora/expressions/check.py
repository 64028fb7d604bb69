"""What can be said against an expression before anything is loaded: names, functions, numbers against adapters."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from fastlora.expressions.functions import FUNCTIONS, Function, NumberOrWord, Options, Word
from fastlora.expressions.grammar import Call, ExpressionError, Name, Node, Number, Product, Sum


@dataclass(frozen=True, slots=True)
class Checker:
    """Says what is wrong with an expression that may use adapters of the names ``known``."""

    text: str
    known: list[str]

    def check(self, node: Node) -> bool:
        """Whether a node is an adapter; otherwise it is a number."""
        if isinstance(node, Sum):
            return self._sum(node)
        if isinstance(node, Product):
            return self._product(node)
        if isinstance(node, Call):
            self._call(node)
        elif isinstance(node, Name):
            self._name(node)
        return not isinstance(node, Number)

    def _fail(self, message: str, at: Node | int) -> ExpressionError:
        return ExpressionError(message, self.text, at if isinstance(at, int) else at.at)

    def _name(self, node: Name) -> None:
        if node.name in self.known:
            return
        raise self._fail(f"no adapter is called {node.name!r}{self._hint(node)}", node)

    def _hint(self, node: Name) -> str:
        for known in self.known:
            at = self.text.find(known, max(0, node.at - len(known) + 1), node.at + len(known))
            if known.isidentifier() or not 0 <= at <= node.at < at + len(known):
                continue
            return f"; did you mean {known}? Write it in quotes, '{known}'"
        close = difflib.get_close_matches(node.name, self.known, 1)
        meant = f"; did you mean {close[0]}?" if close else ""
        return f"{meant} (known: {', '.join(self.known) or 'none'})"

    def _sum(self, node: Sum) -> bool:
        kinds = [(self.check(term), term) for _, term in node.terms]
        for is_adapter, term in kinds:
            if is_adapter != kinds[0][0]:
                what = "an adapter and a number" if kinds[0][0] else "a number and an adapter"
                raise self._fail(f"{what} cannot be added; multiply one by the other, or add adapters", term)
        return kinds[0][0]

    def _product(self, node: Product) -> bool:
        seen = False
        for divides, factor in node.factors:
            is_adapter = self.check(factor)
            if is_adapter and divides:
                raise self._fail("nothing can be divided by an adapter; a number is needed here", factor)
            if is_adapter and seen:
                raise self._fail("two adapters cannot be multiplied; one of them must be a number", factor)
            if divides and number(factor, self.text) == 0.0:
                raise self._fail("division by 0", factor)
            seen |= is_adapter
        if not seen:
            number(node, self.text)
        return seen

    def _call(self, node: Call) -> None:
        function = FUNCTIONS.get(node.function)
        if function is None:
            close = difflib.get_close_matches(node.function, FUNCTIONS, 1)
            meant = f"; did you mean {close[0]}?" if close else ""
            raise self._fail(f"no function is called {node.function!r}{meant} (known: {', '.join(FUNCTIONS)})", node)
        usage = f"write {function.usage}"
        if (node.target is not None) != function.has_target:
            what = 'needs a "|" after its first argument' if node.target is None else 'takes no "|"'
            raise self._fail(f"{node.function} {what}; {usage}", node)
        if node.target is not None and not self.check(node.target):
            raise self._fail(f"this is a number, an adapter is needed; {usage}", node.target)
        kinds = [self.check(a) for a in node.arguments]
        count = kinds.index(False) if False in kinds else len(kinds)
        if True in kinds[count:]:
            raise self._fail(f"adapters come before numbers; {usage}", node.arguments[kinds.index(True, count)])
        least, most = function.adapters
        if not least <= count <= most:
            place = node.arguments[most] if count > most else node
            raise self._fail(f"{node.function} has {_counted(count, 'adapter')} here; {usage}", place)
        if len(kinds) - count not in function.numbers(count):
            raise self._fail(
                f"{node.function} has {_counted(len(kinds) - count, 'number')} here; {usage}",
                node.arguments[count] if len(kinds) > count else node,
            )
        options(node, function, self.text)


def number(node: Node, text: str) -> float:
    """The value of an expression without adapters."""
    if isinstance(node, Number):
        return node.value
    if isinstance(node, Sum):
        value = sum(sign * number(term, text) for sign, term in node.terms)
    elif isinstance(node, Product):
        value = 1.0
        for divides, factor in node.factors:
            other = number(factor, text)
            if divides and other == 0.0:
                raise ExpressionError("division by 0", text, factor.at)
            value = value / other if divides else value * other
    else:
        raise ExpressionError("a number is needed here", text, node.at)
    if not abs(value) < float("inf"):
        raise ExpressionError("this is too large for a number", text, node.at)
    return value


def options(node: Call, function: Function, text: str) -> Options:
    """The options of a call by name, as numbers, whole numbers and words."""
    chosen: Options = {}
    for key, value in node.options:
        if key not in function.options:
            takes = f"it takes {', '.join(function.options)}" if function.options else "it takes none"
            raise ExpressionError(f"{node.function} has no option {key!r}; {takes}", text, value.at)
        wanted = function.options[key]
        if wanted is Word:
            if not isinstance(value, Name):
                raise ExpressionError(f"{key} is a word, such as {key}={function.words[key]}", text, value.at)
            chosen[key] = value.name
            continue
        if wanted is NumberOrWord:
            chosen[key] = value.name if isinstance(value, Name) else number(value, text)
            continue
        amount = number(value, text)
        if wanted is int and amount != int(amount):
            raise ExpressionError(f"{key} is a whole number", text, value.at)
        chosen[key] = wanted(amount)
    return chosen


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")
