"""The sample set: rows are well formed, code runs, sums are right, tools exist, nothing drifts."""

import json
import re
import subprocess
import sys
import unicodedata
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from support.runs import ROOT, SAMPLES

DOMAINS = ("chat", "code", "maths", "tools")
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
OPERATIONS = {
    "+": Fraction.__add__,
    "-": Fraction.__sub__,
    "*": Fraction.__mul__,
    "/": Fraction.__truediv__,
}
GENERATED = (
    *(f"{domain}.jsonl" for domain in DOMAINS),
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
)


def read(domain: str) -> list[list[dict[str, str]]]:
    lines = (SAMPLES / f"{domain}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(SAMPLES / "tokenizer" / "tokenizer.json"))


@pytest.mark.parametrize("domain", DOMAINS)
def test_conversations_alternate_from_user_to_assistant(domain: str) -> None:
    rows = read(domain)
    assert len(rows) >= 60
    for messages in rows:
        roles = [message["role"] for message in messages]
        assert roles == ["user", "assistant"] * (len(messages) // 2)
        assert all(message["content"].strip() for message in messages)


def test_no_row_appears_twice_or_holds_control_tokens() -> None:
    rows = [json.dumps(messages) for domain in DOMAINS for messages in read(domain)]
    assert len(set(rows)) == len(rows)
    assert not [row for row in rows if "<|" in row]


def test_chat_has_many_conversations_of_several_turns() -> None:
    lengths = [len(messages) for messages in read("chat")]
    assert sum(length > 2 for length in lengths) >= 30
    assert max(lengths) <= 6


def test_every_code_block_passes_its_own_asserts() -> None:
    functions = set()
    for _, answer in read("code"):
        (block,) = re.findall(r"```python\n(.*?)\n```", answer["content"], re.DOTALL)
        assert len(re.findall(r"^assert ", block, re.MULTILINE)) == 2
        functions.update(re.findall(r"^def (\w+)", block, re.MULTILINE))
        exec(block, {})
    assert len(functions) >= 48


def test_every_sum_in_maths_is_right_and_its_numbers_are_known() -> None:
    constants = {"2", "3", "4", "5", "100"}  # halves to fifths, an average of three, legs, percent
    for question, answer in read("maths"):
        known = constants | set(re.findall(r"\d+", question["content"]))
        equations = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", answer["content"])
        assert equations
        assert answer["content"].count("=") == len(equations)
        for left, operator, right, result in equations:
            assert {left, right} <= known
            assert OPERATIONS[operator](Fraction(left), Fraction(right)) == Fraction(result)
            known.add(result)
        last_line = answer["content"].splitlines()[-1]
        assert last_line == f"The answer is {equations[-1][3]}."


def test_tool_trajectories_call_listed_tools_with_their_parameters() -> None:
    calls = []
    for messages in read("tools"):
        prompt, trajectory = (message["content"] for message in messages)
        listed = {
            name: json.loads(parameters)
            for name, parameters in re.findall(
                r"^(\w+): .* Parameters: (.*)$", prompt, re.MULTILINE
            )
        }
        assert f"Action: one of [{', '.join(listed)}]\n" in prompt
        steps = re.findall(
            r"Thought: .+\nAction: (.+)\nAction Input: (.+)\nObservation: .+\n", trajectory
        )
        end = re.search(r"Thought: .+\nFinal Answer: .+\Z", trajectory)
        assert len(trajectory.splitlines()) == 4 * len(steps) + 2
        assert end
        for name, arguments in steps:
            assert set(json.loads(arguments)) == set(listed[name])
        calls.append(len(steps))
    assert calls.count(0) >= 5
    assert sum(number >= 2 for number in calls) >= 20


def test_calculator_and_calendar_observations_are_right() -> None:
    checked = set()
    for messages in read("tools"):
        for name, arguments, observation in re.findall(
            r"Action: (.+)\nAction Input: (.+)\nObservation: (.+)", messages[1]["content"]
        ):
            values = json.loads(arguments)
            if name == "calculator":
                left, operator, right = values["expression"].split()
                assert OPERATIONS[operator](Fraction(left), Fraction(right)) == int(observation)
            elif name == "weekday":
                assert np.is_busday(values["day"], weekmask=observation[:3])
            elif name == "days_between":
                days = np.datetime64(values["end"]) - np.datetime64(values["start"])
                assert days == np.timedelta64(int(observation), "D")
            checked.add(name)
    assert {"calculator", "weekday", "days_between"} <= checked


def test_last_observation_is_told_in_the_final_answer() -> None:
    for messages in read("tools"):
        observations = re.findall(r"Observation: (.+)", messages[1]["content"])
        final = messages[1]["content"].rpartition("Final Answer: ")[2]
        if observations and "is warmer" not in final:
            assert observations[-1] in final


def test_warmer_city_is_the_one_with_more_degrees() -> None:
    answers = [messages[1]["content"] for messages in read("tools")]
    for answer in (answer for answer in answers if "is warmer" in answer):
        cities = re.findall(r'"city": "(\w+)"', answer)
        degrees = [int(number) for number in re.findall(r"Observation: (-?\d+) °C", answer)]
        ((winner, told),) = re.findall(r"Answer: (\w+) is warmer, with (-?\d+) °C", answer)
        assert (int(told), winner) == max(zip(degrees, cities, strict=True))


def test_tokenizer_has_2048_ids_with_the_specials_last(tokenizer: Tokenizer) -> None:
    assert sorted(tokenizer.get_vocab().values()) == list(range(2048))
    assert [tokenizer.token_to_id(token) for token in SPECIALS] == [2045, 2046, 2047]
    assert {len(tokenizer.encode(role).ids) for role in ("system", "user", "assistant")} == {1}


# Unassigned characters are left out: the two NFC tables may be of different Unicode versions.
@example(text="e\u0301 \u00e9 \u212b")  # characters that NFC changes
@given(text=st.text(st.characters(exclude_categories=("Cs", "Cn"))))
def test_tokenizer_round_trips_any_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == unicodedata.normalize("NFC", text)


def test_tokenizer_splits_numbers_into_digits(tokenizer: Tokenizer) -> None:
    assert [len(tokenizer.encode(text).ids) for text in ("7", "2024", "12 + 345")] == [1, 4, 7]


def test_chat_template_renders_chatml() -> None:
    tokenizer = AutoTokenizer.from_pretrained(SAMPLES / "tokenizer")
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == (
        "<|im_start|>system\nBe kind.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2047, 2045)


def test_generator_reproduces_the_committed_files(tmp_path: Path) -> None:
    maker = ROOT / "tools" / "sample_set" / "make.py"
    subprocess.run([sys.executable, maker, "--out", tmp_path], check=True)
    for name in GENERATED:
        assert (tmp_path / name).read_bytes() == (SAMPLES / name).read_bytes(), name
