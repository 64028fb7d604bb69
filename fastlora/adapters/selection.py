"""Which parameters take part: patterns on their names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from fastlora.core.architectures import BIAS, WEIGHT, is_embedding
from fastlora.core.patterns import Unsupported, compiled
from fastlora.errors import InputError

EXPRESSION = re.compile(r"[\\^$()|+{}]|^\.\*")
"""What only regular expressions have."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Patterns of parameters: those that take part, those that do not, those that are kept whole. Each is the end of
    a module's path (``q_proj``), with ``*`` and ``?`` for any text (``layers.*.mlp``), or a regular expression; it
    takes everything inside the modules that it matches."""

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    whole: Sequence[str] = ()
    embeddings: str = "factor"
    norms: str = "factor"
    """What is done with all embeddings, and with all norms: ``keep`` them whole, ``skip`` them, or ``factor``."""

    def choice(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
        """What is done with a parameter for its kind, which is told by its module's name and weight in ``shapes``."""
        if not self.takes(name):
            return "factor"  # it is left out already
        module = name.rpartition(".")[0]
        shape = shapes.get(module + WEIGHT, ())
        if len(shape) == 2 and is_embedding(module):
            return self.embeddings
        return self.norms if len(shape) == 1 else "factor"

    def check(self, names: Iterable[str]) -> None:
        """Refuses patterns that match none of the ``names``, and what is no pattern."""
        every = list(names)
        for option in ("include", "exclude", "whole"):
            for pattern in getattr(self, option):
                if not any(_matches(pattern, option, name) for name in every):
                    ends = sorted({n.removesuffix(WEIGHT).removesuffix(BIAS).rpartition(".")[2] for n in every})
                    near = difflib.get_close_matches(pattern.rpartition(".")[2], ends, 3) or ends[:6]
                    raise InputError(
                        f"{option}={pattern[:80]!r} matches no parameter of the models; there are {', '.join(near)}, …"
                    )

    def takes(self, name: str) -> bool:
        """Whether a parameter takes part with its change."""
        if self.include and not self._any("include", name):
            return False
        return not self._any("exclude", name)

    def keeps_whole(self, name: str) -> bool:
        """Whether a parameter is kept as the fine-tune has it."""
        return self._any("whole", name) and not self._any("exclude", name)

    def _any(self, option: str, name: str) -> bool:
        return any(_matches(pattern, option, name) for pattern in getattr(self, option))


def _matches(pattern: str, option: str, name: str) -> bool:
    """Whether a pattern matches a parameter, or a module that it lies in."""
    parts = name.split(".")
    matcher = _matcher(pattern, option)
    try:
        return any(matcher(".".join(parts[:n])) for n in range(len(parts), 0, -1))
    except Unsupported as error:
        raise _no_pattern(pattern, option, str(error)) from None


def _matcher(pattern: str, option: str) -> Callable[[str], bool]:
    if not pattern:
        raise _no_pattern(pattern, option, "it is empty")
    if EXPRESSION.search(pattern) is None:
        return lambda path: fnmatchcase(path, pattern) or fnmatchcase(path, f"*.{pattern}")
    try:
        return compiled(pattern)
    except (re.error, Unsupported, RecursionError, OverflowError) as error:
        raise _no_pattern(pattern, option, str(error)) from None


def _no_pattern(pattern: str, option: str, why: str) -> InputError:
    return InputError(
        f"{option}={pattern[:80]!r} is no pattern ({why}); give the end of a module's path, with * for any text, or a "
        "regular expression"
    )
