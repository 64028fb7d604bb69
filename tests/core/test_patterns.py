"""Module patterns mean what they mean to Python's ``re``, which PEFT matches them with, but in bounded time."""

from __future__ import annotations

import re
import time
import warnings

import pytest
from hypothesis import assume, event, example, given, settings
from hypothesis import strategies as st

from fastlora.core.patterns import Patterns, Unsupported, compiled, compiled_whole
from fastlora.errors import InputError

# Few letters, so that random paths are matched often; short ones, since Python's own matcher is exponential.
PATHS = st.text("ab1._ ", max_size=9)
ATOMS = st.sampled_from(
    [
        "a",
        "b",
        "1",
        "_",
        ".",
        r"\.",
        "[ab]",
        "[^a]",
        "[a-c1-3]",
        r"[\w.]",
        "[^.]",
        "[.^$|*]",
        r"\d",
        r"\w",
        r"\S",
        r"\D",
        r"\W",
        r"\s",
        r"\b",
        r"[\]a-]",
        " ",
        "^",
        "$",
        r"\-",
        "[b-]",
    ]
)
REPEATS = st.sampled_from(["*", "+", "?", "*?", "+?", "??", "{2}", "{1,}", "{0,2}", "{1,3}?"])


def grown(patterns: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.tuples(patterns, patterns).map("".join),
        st.tuples(patterns, patterns).map("|".join),
        st.tuples(st.sampled_from(["(", "(?:"]), patterns, st.just(")")).map("".join),
        st.tuples(st.sampled_from(["(", "(?:"]), patterns, st.just(")"), REPEATS).map("".join),
        st.tuples(ATOMS, REPEATS).map("".join),
    )


PATTERNS = st.recursive(st.one_of(ATOMS, st.just("")), grown, max_leaves=7)
# Whatever Python reads in another way than RE2 is among these characters, and must be refused.
SOUP = st.text(r"ab1.|()[]{}*+?^$\,-:<=!dwsbBAzZQEpPxC&~# ", max_size=9)


def agrees(pattern: str, paths: list[str]) -> None:
    for function, whole in ((compiled, rf"(.*\.)?({pattern})$"), (compiled_whole, rf"({pattern})$")):
        try:
            matches = function(pattern)
        except Unsupported:
            event("refused")
            continue
        expression = re.compile(whole)
        event("accepted")
        for path in paths:
            assert matches(path) == (expression.match(path) is not None), (pattern, path)


@settings(deadline=None, max_examples=400)
@given(PATTERNS, st.lists(PATHS, min_size=1, max_size=8))
@example(r"(|a)+\b", ["", "a", "aa.a"])
@example("(a|b|)*1", ["ab1", "a.1"])
def test_accepted_patterns_match_as_regular_expressions_do(pattern: str, paths: list[str]) -> None:
    try:
        re.compile(pattern)
    except re.error:
        assume(False)
    agrees(pattern, paths)


@settings(deadline=None, max_examples=1000)
@given(SOUP, st.lists(PATHS, min_size=1, max_size=8))
@example("a{,2}", ["aa", "a{,2}"])
@example("[[:a]b", ["ab", ":b", ":]b"])
@example(r"(a)(b)(1)(a)(b)(1)(a)(b)\10", ["ab1ab1ab"])
@example("a*+a", ["aa"])
def test_any_characters_match_as_regular_expressions_do_or_are_refused(pattern: str, paths: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # Python's, about sets inside sets
        try:
            re.compile(pattern)
        except re.error:
            with pytest.raises(re.error):
                compiled_whole(pattern)
            return
        agrees(pattern, paths)


@pytest.mark.parametrize(
    "pattern",
    [
        "model.layers.0.self_attn.q_proj",
        r"^model\.layers\.0\.mlp\.up_proj",
        r".*\.mlp\..*",
        "(q|k|v)_proj",
        ".*",
        "^a.*b$",
        r"model\.layers\.(1|2|[4-9]|1\d)\..*(self_attn|mlp)\.(?:q|k|v|o|up|down)_proj",
        r"(?:\bmodel\.layers\.[\d]{1,}\.mlp)",
        r"(?:.*?(?:vision|language).*?(?:self_attn|attn|mlp).*?(?:k_proj|v_proj|fc1).*?)",
        "|".join(f"layer{i}" for i in range(300)),
    ],
)
def test_what_configurations_hold_is_accepted(pattern: str) -> None:
    Patterns({pattern: 1}, "here")
    compiled_whole(pattern)


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("(?!x).*", r"'\(\?!x\).\*' is not supported"),
        (r"(?<=\.)q_proj", "is not supported"),
        (r"(a)\1", "is not supported"),
        ("(?i:Q_PROJ)", "is not supported"),
        ("[[:alpha:]]+", "is not supported"),
        ("a{,3}", "is not supported"),
        ("(a?){2000}", "invalid repetition size"),
        ("(.*){900}(.*){900}(.*){900}(.*){900}(.*){900}", "too large"),
        ("é.*", "printable ASCII"),
        ("(" * 3000 + "a" + ")" * 3000, "too deeply nested"),
        ("a" * 10_001 + "*", "10002 characters"),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_cannot_be_matched_in_bounded_time_is_refused_with_the_way_out(pattern: str, why: str) -> None:
    with pytest.raises(InputError, match=why) as refused:
        Patterns({pattern: 1}, "rank_pattern in here")
    message = str(refused.value)
    assert message.startswith("rank_pattern in here has the pattern") and "or name the modules" in message


def test_a_path_outside_ascii_is_refused_where_a_class_could_mean_two_things() -> None:
    assert Patterns({"q_proj": 1}, "here").value("modèle.q_proj") == 1
    with pytest.raises(InputError, match=r"'modèle\.q_proj' has other characters than printable ASCII"):
        Patterns({r"\w+\.q_proj": 1}, "here").value("modèle.q_proj")


# Python's matcher doubles its time with every character for these, and would need centuries at 400.
@pytest.mark.parametrize(
    "pattern", ["(a*)*b", "(a|a)*b", "(a|aa)+b", "((a?){30}){30}b", "(.*a){100}b", "(a|.)*a.{500}b"]
)
def test_time_is_bounded(pattern: str) -> None:
    matches = compiled(pattern)
    start = time.process_time()
    for length in range(200, 400, 10):
        assert not matches("a" * length)
    assert time.process_time() - start < 20  # hundreds of times what it takes
