"""Tables: CSV and TSV files give the rows that were written, and name the bad ones by line."""

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moi_jax.data.sources import containers
from moi_jax.data.sources.readers import SourceFile
from moi_jax.data.sources.rows import detect_format, source_rows
from moi_jax.text.conversations import BadRow, Conversation

from support.sources import chat, run, section, texts

BOM = b"\xef\xbb\xbf"
ROWS = [
    {"question": 'Say "hi",\tplease.', "answer": "Hi!\r\n\nAnd bye."},
    {"question": "2 + 2?", "answer": "4"},
    {"question": "Größe?\u2028", "answer": "é"},
]


def table(rows: list[dict[str, Any]], separator: str = ",", end: str = "\r\n") -> bytes:
    """The rows as the csv module writes them."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(
        text, list(rows[0]), delimiter=separator, lineterminator=end, quoting=csv.QUOTE_ALL
    )
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def file_of(path: Path, content: bytes) -> SourceFile:
    path.write_bytes(content)
    return SourceFile(path.name, path)


def read(file: SourceFile) -> list[Any]:
    """(line, row) of the rows; of a bad one its reason."""
    return [(r.line, r.raw.reason if isinstance(r.raw, BadRow) else r.raw) for r in file.rows()]


@pytest.mark.parametrize(("name", "separator"), [("a.csv", ","), ("a.v2.TSV", "\t")])
@pytest.mark.parametrize("bom", [b"", BOM])
@pytest.mark.parametrize(
    ("ending", "compress"),
    [("", bytes), (".gz", gzip.compress), (".zst", zstandard.ZstdCompressor().compress)],
)
def test_table_gives_its_rows_with_the_lines_in_which_they_begin(
    tmp_path: Path, name: str, separator: str, bom: bytes, ending: str, compress: Callable
) -> None:
    content = bom + table(ROWS, separator)
    file = file_of(tmp_path / f"{name}{ending}", compress(content))
    assert read(file) == list(zip([2, 5, 6], ROWS, strict=True))
    assert not file.splittable
    assert detect_format(file) == "question_answer"
    conversations = [row.conversation for row in source_rows(file, "question_answer")]
    assert [[m.content for m in c.messages] for c in conversations] == [[*r.values()] for r in ROWS]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.fixed_dictionaries(dict.fromkeys("ab", st.text('x",\t\r\n é', max_size=6))),
        min_size=1, max_size=5,
    ),
    st.sampled_from([",", "\t"]),
    st.sampled_from(["\n", "\r\n"]),
)  # fmt: skip
def test_whatever_the_csv_module_writes_is_read(
    tmp_path: Path, rows: list[dict[str, str]], separator: str, end: str
) -> None:
    name = "a.csv" if separator == "," else "a.tsv"
    file = file_of(tmp_path / name, table(rows, separator, end))
    assert [row for _, row in read(file)] == rows


def test_bad_rows_of_a_table_are_named_between_good_ones(tmp_path: Path) -> None:
    content = b'question,answer,\n\n1,2,\n1,2\n"1"x,2,\n1,\xe9,\n"a\nb",2,\n"open,2,\n1,2,\n'
    good = {"question": "1", "answer": "2"}
    assert read(file_of(tmp_path / "a.csv", content)) == [
        (3, good), (4, "bad_table"), (5, "bad_table"), (6, "invalid_utf8"),
        (7, {"question": "a\nb", "answer": "2"}), (9, "bad_table"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("end", "how"),
    [(b"", "never closes: 31 lines are lost"),
     (b'"1",2\n1,2\n', "closes in the middle of line 52: 32 lines are lost")],
)  # fmt: skip
def test_quote_that_swallows_lines_is_told_with_their_number(
    tmp_path: Path, end: bytes, how: str
) -> None:
    good = b"1,2\n"
    content = b"question,answer\n" + 19 * good + b'"1,2\n' + 30 * good + end
    *rows, bad = [row for row in file_of(tmp_path / "a.csv", content).rows() if row.line < 50]
    assert [row.line for row in rows] == list(range(2, 21))
    assert isinstance(bad.raw, BadRow)
    assert bad.raw.detail == f"a quote opened in line 21 {how}"


def test_lines_that_a_quote_swallows_are_told(tmp_path: Path, log_text: io.StringIO) -> None:
    root = tmp_path / "data"
    (root / "a").mkdir(parents=True)
    (root / "a" / "1.csv").write_bytes(b'question,answer\n1,2\n"1,2\n1,2\n1,2\n')
    run(section(root, "a", source={"path": "a/1.csv"}))
    told = " ".join(log_text.getvalue().split())
    line = "a: a/1.csv:3: a quote opened in line 3 never closes: 3 lines are lost"
    assert told.count(line) == 1


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_quote_is_a_letter_in_tsv_without_quoted_cells(tmp_path: Path, compress: Callable) -> None:
    cells = [('"Hi" in German?', "Hallo"), ("2 + 2?", '"4'), ('"Bye"? Or "bye"?', 'It is ""')]
    lines = ["question\tanswer", *("\t".join(row) for row in cells)]
    name = "a.tsv" if compress is bytes else "a.tsv.gz"
    file = file_of(tmp_path / name, compress("\n".join(lines).encode()))
    assert [tuple(row.values()) for _, row in read(file)] == cells
    quoted = "\n".join([*lines, '"a\tb"\tc']).encode()
    rows = read(file_of(tmp_path / name, compress(quoted)))
    assert rows[0] == (2, "bad_table")


@pytest.mark.parametrize(
    ("header", "reason"), [(b"question,question\n", "duplicate_key"), (b'"question\n', "bad_table")]
)
def test_table_whose_columns_have_no_names_is_one_bad_row(
    tmp_path: Path, header: bytes, reason: str
) -> None:
    assert read(file_of(tmp_path / "a.csv", header + b"1,2\n3,4\n")) == [(1, reason)]


def test_compressed_table_cut_short_keeps_the_rows_before_and_tells(tmp_path: Path) -> None:
    rows = [{"question": f"{n} + 1?", "answer": str(hash((n, n)))} for n in range(500)]
    whole = gzip.compress(table(rows))
    found = read(file_of(tmp_path / "a.csv.gz", whole[: len(whole) // 2]))
    assert [row for _, row in found] == [*rows[: len(found) - 1], "cut_short"]
    assert len(found) > 100


def test_content_goes_before_the_name(tmp_path: Path) -> None:
    lines = b'{"question": "1", "answer": "2"}\n' * 2
    file = file_of(tmp_path / "a.csv", lines)
    assert len(read(file)) == 2
    assert file.splittable
    assert read(file_of(tmp_path / "b.csv", b"")) == []
    assert read(file_of(tmp_path / "c.csv", b"question,answer\n")) == []


def test_row_over_the_limit_is_bad_and_never_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(containers, "MAX_ROW", 200_000)  # more than the csv module's own limit
    small, large = ({"question": "1", "answer": "x" * size} for size in (199_900, 200_100))
    assert read(file_of(tmp_path / "a.csv", table([small, large, small]))) == [
        (2, small), (3, "row_too_large"),
    ]  # fmt: skip
    lines = {"question": "1", "answer": "x\n" * 100_100}
    file = file_of(tmp_path / "a.csv", table([small, lines, small]))
    assert read(file) == [(2, small), (3, "bad_table")]
    (*_, last) = file.rows()
    assert "does not close in 200,000 characters: all lines from it on are lost" in str(last.raw)


def test_chats_and_choices_stand_in_cells_as_json(tmp_path: Path) -> None:
    turns = json.dumps(chat("Hi", "Hello.")["messages"])
    file = file_of(tmp_path / "a.csv", table([{"id": "1", "messages": turns}]))
    assert detect_format(file) == "messages"
    (row,) = source_rows(file, "messages")
    assert isinstance(row.conversation, Conversation)
    choices = {"question": "2 + 2?", "choices": '["3", "4"]', "answer": "1"}
    file = file_of(tmp_path / "b.csv", table([choices]))
    (row,) = source_rows(file, detect_format(file))
    assert row.conversation.messages[1].content == "B. 4"


def test_table_that_gets_its_ending_later_is_prepared_anew(tmp_path: Path) -> None:
    root = tmp_path / "data"
    (root / "a").mkdir(parents=True)
    chats = b'{"question": "Hi", "answer": "Hello."}\n'
    (root / "a" / "1.jsonl").write_bytes(chats)
    wrong = root / "a" / "2.jsonl"
    wrong.write_bytes(table(ROWS))
    source = {"path": "a/*", "format": "question_answer"}
    (cache,) = run(section(root, "a", source=source))
    assert len(cache.lengths) == 1
    wrong.rename(root / "a" / "2.csv")
    (cache,) = run(section(root, "a", source=source))
    assert len(texts(cache)) == 1 + len(ROWS)
