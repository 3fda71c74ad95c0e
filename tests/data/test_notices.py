"""Notices: content that is not read, unfilled templates, and why a domain has no usable row."""

import bz2
import io
import json
import lzma
import zipfile
from pathlib import Path
from typing import Any

import pytest

from moi_jax import config
from moi_jax.common.errors import UserError
from moi_jax.data.cache import blocks as cache_blocks
from moi_jax.data.cache.selection import row_counts, select
from moi_jax.data.sources.formats import FORMATS, detect
from moi_jax.data.sources.ignored import ignored_content
from moi_jax.text.templates import ChatML

from support.sources import chat, run, section, write


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "data"


def told(log_text: io.StringIO) -> str:
    """The log on one line."""
    return " ".join(log_text.getvalue().split())


QUESTION = {"question": "2 + 2?", "answer": "4"}
TURNS = chat("2 + 2?", "4")["messages"]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (QUESTION, {}),
        ({**QUESTION, "hint": "Add.", "rejected": ["5"]}, {"hint": "Add.", "rejected": "['5']"}),
        ({**QUESTION, "id": "x", "source": "web", "Category": "sums", "row_id": "7"}, {}),
        ({**QUESTION, "hint": "", "rejected": [], "context": None, "n": 7, "extra": {"a": 1}}, {}),
        ({**QUESTION, "context": "Sums.", "system": "S", "system_prompt": "", "tools": "[]"}, {}),
        ({**QUESTION, "context": {"title": ["Sums"]}}, {"context": "{'title': ['Sums']}"}),
        ({**QUESTION, "context": [["Sums"], "x"]}, {"context": "[['Sums'], 'x']"}),
        ({**QUESTION, "context": [{"type": "text", "text": "Sums"}]}, {}),
        ({**QUESTION, "loss_weight": 0.5, "weight": None}, {"loss_weight": "0.5"}),
        ({**QUESTION, "response": "four"}, {"response": "four"}),
        ({"instruction": "Add.", "output": "4", "response": "5"}, {"response": "5"}),
        ({"instruction": "Add.", "output": None, "response": "5"}, {}),
        ({"instruction": "Add.", "input": "2", "context": "3", "output": "5", "history": []}, {}),
        ({"messages": TURNS, "input": "word " * 40}, {"input": f"{'word ' * 10}word..."}),
        ({"messages": [TURNS[0], {**TURNS[1], "images": ["a.png"], "name": "bot"}]},
         {"messages[].images": "['a.png']"}),
        ({"messages": [TURNS[0], {**TURNS[1], "thinking": "Hm.", "loss_weight": 1}]}, {}),
        ({"prompt": TURNS[:1], "completion": [{**TURNS[1], "refusal": "No."}]},
         {"completion[].refusal": "No."}),
        ({"prompt": "q", "completion": "a", "response": ["x"]}, {"response": "['x']"}),
    ],
)  # fmt: skip
def test_content_beside_the_keys_of_the_format_is_found(row: dict, expected: dict) -> None:
    assert ignored_content(row, FORMATS[detect(row)]) == expected


def test_ignored_keys_are_told_once_a_file_with_their_first_row(
    root: Path, log_text: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"question": f"{n} + 1?", "answer": "It is."} for n in range(9)]
    for row in rows[4:]:
        row["hint"] = "Count on."
    rows[6]["rejected"] = "No."
    bad = {**rows[0], "answer": "", "draft": "Not kept."}
    write(root / "a" / "1.jsonl", bad, *rows)
    write(root / "a" / "2.jsonl", *({**row, "id": "x"} for row in rows[:4]))
    whole = run(section(root, "a", cache_dir=root.parent / "whole"))
    monkeypatch.setattr(cache_blocks, "LEAST_BYTES", 100)
    monkeypatch.setattr(cache_blocks, "BLOCK_BYTES", 100)
    log_text.truncate(0)
    (cache,) = run(section(root, "a", workers=1))
    assert len(cache.blocks) > 3
    assert cache.manifest == whole[0].manifest
    assert [file.get("ignored") for file in cache.manifest["files"]] == [
        {
            "hint": {"rows": 5, "line": 6, "example": "Count on."},
            "rejected": {"rows": 1, "line": 8, "example": "No."},
        },
        None,
    ]
    line = (
        "a: a/1.jsonl: the format question_answer does not read 'hint' (rows: 5; line 6: Count "
        "on.), 'rejected' (rows: 1; line 8: No.)"
    )
    assert told(log_text).count(line) == 1
    assert "2.jsonl: the format" not in told(log_text)


def test_unfilled_template_is_counted_and_shown_once_a_domain(
    root: Path, log_text: io.StringIO
) -> None:
    write(
        root / "a" / "1.jsonl",
        chat("Hi", "Hello."),
        chat(r"What is \frac{{a}}{{b}}?", "A fraction {{, }} {{}} {{ 1 }}."),
        chat("Dear {{ user.name }},", "Hello {{name}}."),
        chat("Bye", "Bye {{first_name}}."),
        chat("{{lost}}", ""),
    )
    for _ in ("made", "cached"):
        log_text.truncate(0)
        (cache,) = run(section(root, "a"))
        assert cache.manifest["unfilled"] == 2
        report = row_counts([cache], select([cache], config.HeldOut(), "assistant"))
        assert report["a"]["unfilled"] == 2
        line = "a: 2 kept rows hold what may be an unfilled variable of a template, for example "
        assert f"{line}a/1.jsonl:3: holds {{{{ user.name }}}}" in told(log_text)


def test_unfilled_template_is_no_bad_row(root: Path) -> None:
    write(root / "a" / "1.jsonl", chat("Dear {{name}},", "Hello."))
    for _ in ("made", "cached"):
        (cache,) = run(section(root, "a", on_bad_row="error"))
        assert len(cache.lengths) == 1


DECLARED = "Action: the tool to use, one of [weather]\n\nQuestion: Is it cold?"
TRACE = (
    "Thought: Look.\nAction: weather\nAction Input: {}\nObservation: snow\nThought: Done.\n"
    "Final Answer: Yes."
)


def test_answers_that_may_be_unrecognised_trajectories_are_counted_and_shown(
    root: Path, log_text: io.StringIO
) -> None:
    tools = [{"name": "weather"}]
    write(
        root / "a" / "1.jsonl",
        chat(DECLARED, TRACE),
        chat("What is ReAct?", TRACE),
        chat("What is ReAct?", f"So:\n{TRACE}"),
        chat(DECLARED, TRACE.replace("Action: weather", "Action: forecast")),
        chat(DECLARED, TRACE.replace("snow", "snow\nAction: wait")),
        {**chat("Is it cold?", f"So:\n{TRACE}"), "tools": tools},
        {**chat("Is it cold?", "Observation: yes."), "tools": tools},
    )
    for _ in ("made", "cached"):
        log_text.truncate(0)
        (cache,) = run(section(root, "a"))
        report = row_counts([cache], select([cache], config.HeldOut(), "assistant"))
        assert report["a"]["trained_observations"] == 3
        line = "a: 3 kept rows may train on what a tool wrote: an answer looks like a ReAct "
        assert line in told(log_text)
        assert "a/1.jsonl:4: the action 'forecast' is not a declared tool" in told(log_text)


def test_calls_of_tools_that_are_not_listed_are_counted_and_shown(
    root: Path, log_text: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("renders_tools", "typed"):
        monkeypatch.setattr(ChatML, name, True)

    def calling(name: str) -> dict[str, Any]:
        call = {"role": "assistant", "function_call": {"name": name}}
        turns = [*chat("Is it cold?")["messages"], call]
        return {"messages": turns, "tools": [{"name": "weather"}]}

    write(root / "a" / "1.jsonl", chat("Hi", "Hello."), calling("weather"), calling("forecast"))
    for _ in ("made", "cached"):
        log_text.truncate(0)
        (cache,) = run(section(root, "a", on_bad_row="error"))
        report = row_counts([cache], select([cache], config.HeldOut(), "assistant"))
        assert report["a"]["unlisted_tool"] == 1
        line = "a: 1 kept rows call a tool that they do not list, for example a/1.jsonl:3: calls "
        assert f"{line}'forecast'" in told(log_text)


def zipped(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.jsonl", content)
    return file.getvalue()


LINE = json.dumps(QUESTION).encode() + b"\n"
PRETTY = json.dumps(QUESTION, indent=2).encode() + b"\n"
TABLE = b'question,answer\n"2 + 2?",4\n1 + 1?,2\n'
LISTS = json.dumps(TURNS).encode() + b"\n"


@pytest.mark.parametrize(
    ("content", "source", "example", "cause"),
    [
        (TABLE, {}, "Expecting value: line 1 column 1 (char 0): question,answer;",
         "it looks like CSV; give the file the ending .csv"),
        (TABLE.replace(b",", b"\t"), {}, ": question answer;",
         "it looks like TSV; give the file the ending .tsv"),
        (TABLE.replace(b",", b";"), {}, ": question;answer;",
         "its columns are separated by ';'; save it as CSV with commas"),
        (LINE.decode().encode("utf-16"), {}, "the file is text in UTF-16; save it as UTF-8", ""),
        (LINE.decode().encode("utf-16-le"), {}, "the file is text in UTF-16; save it as UTF-8", ""),
        (zipped(LINE), {}, "the file is a zip archive or a spreadsheet; unpack it", ""),
        (bz2.compress(LINE), {}, "the file is compressed by bzip2; unpack it", ""),
        (lzma.compress(LINE), {}, "the file is compressed by xz; unpack it", ""),
        (PRETTY * 3, {}, "Expecting property name",
         "an object takes several lines; write each on one line: jq -c ."),
        (LISTS * 2, {}, 'the row is a list: [{"role": "user"',
         'a row is an object; write each list as {"messages": [...]}'),
        (LINE * 2, {"format": "alpaca"}, "no 'instruction': {\"question\": \"2 + 2?\",",
         "its rows are of the format question_answer; set the source's format to question_answer"),
        (LINE.replace(b"4", b"") * 2, {}, "an assistant turn is empty", ""),
        (b"Some notes, and more.\nNo rows at all\n", {}, ": Some notes, and more.", ""),
    ],
    ids=["csv", "tsv", "semicolons", "utf16_with_bom", "utf16", "zip", "bzip2", "xz", "pretty",
         "lists", "wrong_format", "empty_answers", "prose"],
)  # fmt: skip
def test_domain_without_a_usable_row_shows_the_first_and_guesses_why(
    root: Path, content: bytes, source: dict[str, Any], example: str, cause: str
) -> None:
    write(root / "a" / "0.jsonl")
    (root / "a" / "1.jsonl").write_bytes(content)
    for _ in ("made", "cached"):
        with pytest.raises(UserError) as error:
            run(section(root, "a", source=source))
        text = str(error.value)
        assert "\n" not in text
        assert text.startswith("domain a has no usable row in a/0.jsonl, a/1.jsonl: ")
        assert f"; the first is {root}/a/1.jsonl:1: " in text
        assert example in text
        assert cause in text
        assert cause or "it looks like" not in text


@pytest.mark.parametrize("form", ["auto", "question_answer"])
def test_table_split_by_semicolons_says_so(root: Path, form: str) -> None:
    (root / "a").mkdir(parents=True)
    (root / "a" / "1.csv").write_bytes(TABLE.replace(b",", b";"))
    with pytest.raises(UserError, match=r"columns are separated by ';'; save it as CSV with comm"):
        run(section(root, "a", source={"path": "a/1.csv", "format": form}))


def test_large_archive_is_one_bad_row(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_blocks, "LEAST_BYTES", 100)
    monkeypatch.setattr(cache_blocks, "BLOCK_BYTES", 100)
    write(root / "a" / "1.jsonl", chat("Hi", "Hello."))
    (root / "a" / "2.jsonl").write_bytes(lzma.compress(bytes(range(256)) * 9))
    (cache,) = run(section(root, "a", workers=1))
    assert cache.manifest["dropped"] == {"unknown_container": 1}
