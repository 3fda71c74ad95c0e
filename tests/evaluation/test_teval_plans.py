"""T-Eval's parts that know no files: lenient parsing, and the matching of plans."""

import itertools
import json
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moi_jax.evaluation.teval.embedder import Similarity
from moi_jax.evaluation.teval.parsing import as_text, between, clean, load_lenient
from moi_jax.evaluation.teval.plan import Step, compare_plans, longest_increasing, match

quick = settings(deadline=None, max_examples=150)

# Lenient parsing

# No backquotes: a fence inside a value is a fence, by the published rule.
plain = st.characters(exclude_categories=["Cs"], exclude_characters="`")
basic = st.text(plain.filter(lambda letter: letter <= "\uffff"), max_size=20)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | basic,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(basic, inner, max_size=3),
    max_leaves=8,
)
pieces = st.text() | st.text(alphabet="[]{}()'\"\\:,.0eE-+xub`j \n", max_size=80)


@quick
@given(pieces)
def test_lenient_loading_and_text_never_raise(text: str):
    as_text(load_lenient(text))
    as_text(load_lenient(text, "[", "]"))
    as_text(load_lenient("```json" + text, "{", "}"))


@pytest.mark.parametrize(
    "text",
    ["(" * 5000, "-" * 100_000 + "1", "[" * 100_000, "{" * 300, '{"a":' * 5000, "9" * 5000,
     "0x" + "f" * 5000, "'\\ud800'", "'\\N{x}'", "1e999", "\x00", "b'\\xff'", "{[]: 1}", "..."],
)  # fmt: skip
def test_texts_made_to_break_the_loaders_do_not(text: str):
    as_text(load_lenient(text)).encode()


@quick
@given(st.dictionaries(basic, values, max_size=4))
def test_dicts_survive_as_literals_and_as_json(value: dict[str, Any]):
    assert load_lenient(repr(value)) == value
    assert load_lenient(json.dumps(value)) == value


@quick
@given(st.text(plain))
def test_texts_survive_as_json_whatever_their_escapes(text: str):
    assert as_text(load_lenient(json.dumps(text))) == text


def test_lenient_loading_tries_literals_then_json_then_single_quotes():
    assert load_lenient("{'a': True, 'b': None}") == {"a": True, "b": None}
    assert load_lenient('{"a": true}') == {"a": True}
    assert load_lenient("{'a': true}") == {"a": True}
    assert load_lenient("{'a': it's}") is None


def test_only_what_is_between_the_brackets_counts_where_brackets_are_asked():
    assert load_lenient("Sure: [1, [2]] as asked", "[", "]") == [1, [2]]
    assert load_lenient("Sure: [1, 2] as asked") is None
    assert load_lenient("no list", "[", "]") is None
    assert load_lenient("] [", "[", "]") is None


def test_a_code_fence_is_taken_off():
    assert clean('```json\n{"a": 1}\n```') == '{"a": 1}'
    assert clean("  `A`\n") == "A"
    assert load_lenient('So:\n```json\n{"a": 1}\n```') == {"a": 1}


@quick
@given(
    st.text("ab(\n", max_size=25),
    st.lists(st.text("ab(\n", max_size=2), min_size=4, max_size=4),
)
def test_text_between_marks_is_what_a_greedy_regex_finds(text: str, marks: list[str]):
    found = re.search("(.*)".join(map(re.escape, marks)), text, re.DOTALL)
    assert between(text, marks) == (found.groups() if found else None)


# Plans


def brute_weight(alike: np.ndarray) -> float:
    """The largest sum over all ways to give rows columns of their own, or none."""
    rows, columns = alike.shape
    edges = np.where(alike > 0.8, alike, 0)
    wide = np.hstack([edges, np.zeros((rows, rows))])
    ways = itertools.permutations(range(columns + rows), rows)
    return max(sum(wide[row, way[row]] for row in range(rows)) for way in ways)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_the_matching_is_the_heaviest_of_all(data: st.DataObject):
    shape = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    cells = st.sampled_from([0.0, 0.5, 0.8, 0.81, 0.85, 0.9, 0.99, 1.0])
    size = shape[0] * shape[1]
    alike = np.array(data.draw(st.lists(cells, min_size=size, max_size=size))).reshape(shape)
    matched = match(alike)
    assert len(set(matched.values())) == len(matched)
    assert all(alike[pair] > 0.8 for pair in matched.items())
    assert sum(alike[pair] for pair in matched.items()) == pytest.approx(brute_weight(alike))


@quick
@given(st.lists(st.integers(0, 9), max_size=9))
def test_the_longest_increasing_subsequence_is_the_longest_of_all(numbers: list[int]):
    increasing = [
        length
        for length in range(len(numbers) + 1)
        for chosen in itertools.combinations(numbers, length)
        if all(a < b for a, b in itertools.pairwise(chosen))
    ]
    assert longest_increasing(numbers) == max(increasing)


def apart(texts: list[str]) -> np.ndarray:
    """Different texts are as unlike as can be."""
    return np.eye(256)[[ord(text[0]) if text else 0 for text in texts]]


def steps(letters: str) -> list[Step]:
    return [Step(letter, letter) for letter in letters]


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("abcd", "abcd", 4),
        ("abdc", "abcd", 3),
        ("dcba", "abcd", 1),
        ("bcd", "abcde", 3),
        ("abxyd", "abcd", 3),
        ("aaaa", "aaaa", 4),  # equal steps are matched in order
        ("ab", "aba", 2),
        ("bccb", "ccb", 3),  # and of two equal steps the nearer one
        ("xyz", "abc", 0),
        ("", "abc", 0),
    ],
)
def test_steps_count_where_they_are_matched_in_the_order_of_the_gold_plan(
    answer: str, gold: str, right: int
):
    assert compare_plans(steps(answer), steps(gold), Similarity(apart)) == pytest.approx(
        {
            "precision": right / max(len(answer), 1),
            "recall": right / len(gold),
            "f1": 2 * right / (len(answer) + len(gold)),
        }
    )


def test_a_last_finish_action_is_dropped_on_both_sides_and_one_alone_is_an_empty_plan():
    finish = [Step("FinishAction", "{}")]
    similarity = Similarity(apart)
    assert compare_plans(steps("ab") + finish, steps("ab"), similarity)["precision"] == 1
    assert compare_plans(steps("ab"), steps("ab") + finish, similarity)["recall"] == 1
    values = compare_plans(finish, steps("ab"), similarity, compat=True)
    assert values == {"precision": 0, "recall": 0, "f1": 0}


def test_nothing_matched_is_one_right_step_only_as_upstream_counts():
    answer, gold, similarity = steps("xy"), steps("abcd"), Similarity(apart)
    assert compare_plans(answer, gold, similarity)["f1"] == 0
    values = compare_plans(answer, gold, similarity, compat=True)
    assert values == {"precision": 1 / 2, "recall": 1 / 4, "f1": 2 / 6}


def test_a_pair_weighs_three_quarters_by_name_and_a_quarter_by_args_and_must_be_over_the_bar():
    angles = {"n": 0.0, "same args": 0.0, "args 0.2": np.arccos(0.2), "args 0.3": np.arccos(0.3)}

    def embed(texts: list[str]) -> np.ndarray:
        return np.array([[np.cos(angles[text]), np.sin(angles[text])] for text in texts])

    def f1(args: str) -> float:
        return compare_plans([Step("n", args)], [Step("n", "same args")], Similarity(embed))["f1"]

    assert f1("args 0.3") == 1  # 0.825
    assert f1("args 0.2") == 0  # 0.8


def test_similarity_is_clipped_and_one_for_equal_texts_and_each_text_is_embedded_once():
    asked: list[str] = []
    vectors = {"east": [3.0, 0.0], "west": [-1.0, 0.0], "north-east": [1.0, 1.0], "": [0.0, 0.0]}

    def embed(texts: list[str]) -> np.ndarray:
        asked.extend(texts)
        return np.array([vectors[text] for text in texts])

    similarity = Similarity(embed)
    found = similarity(["east", ""], ["east", "west", "north-east", ""])
    np.testing.assert_allclose(found, [[1, 0, 0.5**0.5, 0], [0, 0, 0, 1]])
    similarity(["west"], ["east"])
    assert sorted(asked) == sorted(vectors)
