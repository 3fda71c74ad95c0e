"""Readers: every container gives the rows that stand in it, whole, in order and told apart."""

import gzip
import json
import pickle
import sys
import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from moi_jax.common.errors import UserError
from moi_jax.data.sources import containers
from moi_jax.data.sources.readers import SourceFile, parse
from moi_jax.data.sources.rows import detect_format, source_rows
from moi_jax.text.conversations import BadRow

ROWS = [{"question": f"{n} + 1?\n", "answer": "é" * n} for n in range(40)]
LINES = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in ROWS)
ARRAY = json.dumps(ROWS, indent=1).encode()


def parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)


def array_record(path: Path, rows: list[dict[str, Any]]) -> None:
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for row in rows:
        writer.write(json.dumps(row).encode())
    writer.close()


def zstd(content: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(content)


def written(path: Path, content: bytes) -> SourceFile:
    path.write_bytes(content)
    return SourceFile(path.name, path)


def read(file: SourceFile) -> list[Any]:
    """The rows' objects, and the reasons of those that are bad."""
    found = []
    for row in file.rows():
        try:
            found.append(parse(row.raw))
        except BadRow as bad:
            found.append(bad.reason)
    return found


TEXTS = {
    "lines": LINES,
    "lines_without_last_line_feed": LINES.rstrip(),
    "lines_with_bom_and_crlf": b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n"),
    "array": ARRAY,
    "array_on_one_line": json.dumps(ROWS).encode() + b"\n",
    "array_with_bom": b"\xef\xbb\xbf\n " + ARRAY + b"\r\n",
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstd])
def test_text_of_any_layout_and_compression_gives_its_rows(
    tmp_path: Path, name: str, compress: Callable[[bytes], bytes]
) -> None:
    # The content tells, not the ending.
    file = written(tmp_path / "rows.dat", compress(TEXTS[name]))
    assert read(file) == ROWS
    assert [row.line for row in file.rows()] == list(range(1, 41))
    assert file.splittable == (compress is bytes and name.startswith("lines"))
    assert sum(row.size for row in file.rows()) <= file.size


@pytest.mark.parametrize("write", [parquet, array_record])
def test_binary_containers_give_their_rows(tmp_path: Path, write: Callable) -> None:
    write(tmp_path / "rows", ROWS * 60)
    file = SourceFile("rows", tmp_path / "rows")
    assert read(file) == ROWS * 60
    assert [row.line for row in file.rows()] == list(range(1, 2401))
    assert not file.splittable
    assert read(pickle.loads(pickle.dumps(file))) == ROWS * 60
    assert list(file.rows(10, 20)) == list(file.rows())


def test_one_object_over_several_lines_is_one_row(tmp_path: Path) -> None:
    for content in (json.dumps(ROWS[3], indent=2).encode(), b"\xef\xbb\xbf{\r\n}\n"):
        file = written(tmp_path / "row.json", content)
        assert read(file) == [json.loads(content.decode("utf-8-sig"))]
        assert not file.splittable


def test_lines_that_look_like_another_container_stay_lines(tmp_path: Path) -> None:
    assert read(written(tmp_path / "a", b'[1]\n{"a": 1}\n')) == ["not_an_object", {"a": 1}]
    assert read(written(tmp_path / "a", b'{"a": [\n{"a": 1}\n')) == ["invalid_json", {"a": 1}]
    assert read(written(tmp_path / "a", b"\n\n")) == []
    assert read(written(tmp_path / "a", b"[\n]")) == []


def test_empty_containers_have_no_rows(tmp_path: Path) -> None:
    parquet(tmp_path / "parquet", [{"a": 1}])
    table = pyarrow.parquet.read_table(tmp_path / "parquet").slice(0, 0)
    pyarrow.parquet.write_table(table, tmp_path / "parquet")
    array_record(tmp_path / "array_record", [])
    for name in ("parquet", "array_record"):
        assert list(SourceFile(name, tmp_path / name).rows()) == []
    for content in (b"", gzip.compress(b""), zstd(b""), b"\xef\xbb\xbf"):
        assert list(written(tmp_path / "a", content).rows()) == []


def test_members_and_zero_padding_of_a_gzip_are_read_through(tmp_path: Path) -> None:
    half = LINES.index(b"\n", len(LINES) // 2) - 5
    content = gzip.compress(LINES[:half]) + gzip.compress(LINES[half:]) + b"\0" * 3000
    assert read(written(tmp_path / "a", content)) == ROWS
    assert read(written(tmp_path / "a", zstd(LINES[:half]) + zstd(LINES[half:]))) == ROWS


@pytest.mark.parametrize("layout", ["lines", "array"])
@pytest.mark.parametrize("compress", [gzip.compress, zstd])
def test_compressed_file_cut_short_keeps_the_rows_before_and_tells(
    tmp_path: Path, compress: Callable[[bytes], bytes], layout: str
) -> None:
    content = compress(TEXTS[layout])
    seen = set()
    for end in range(len(content) // 8, len(content), 7):
        found = read(written(tmp_path / "a", content[:end]))
        assert found == [*ROWS[: len(found) - 1], "cut_short"]
        seen.add(len(found))
    # zstd has the whole text in one block: nothing comes out before it is complete.
    assert len(seen) > 10 or compress is zstd
    rows = list(written(tmp_path / "a", content[:-9]).rows())
    assert [row.line for row in rows] == list(range(1, len(rows) + 1))


def test_damaged_compressed_file_is_told(tmp_path: Path) -> None:
    for content in (gzip.compress(LINES), zstd(LINES)):
        file = written(tmp_path / "a", content[:20] + b"\xff" * 20 + content[40:])
        assert read(file)[-1] == "cut_short"
    file = written(tmp_path / "a", gzip.compress(LINES) + b"more")
    assert read(file) == [*ROWS, "cut_short"]


def test_rows_before_a_cut_convert_and_the_cut_is_a_bad_row(tmp_path: Path) -> None:
    file = written(tmp_path / "a", gzip.compress(LINES)[:-12])
    form = detect_format(file)
    rows = [row.conversation for row in source_rows(file, form)]
    assert form == "question_answer"
    assert rows[-1].reason == "cut_short"


@pytest.mark.parametrize("write", [parquet, array_record])
def test_binary_container_cut_short_is_one_bad_row(tmp_path: Path, write: Callable) -> None:
    write(tmp_path / "whole", ROWS)
    content = (tmp_path / "whole").read_bytes()
    file = written(tmp_path / "a", content[: len(content) // 2])
    assert read(file) == ["cut_short"]
    assert detect_format(file) is None


def test_array_cut_short_or_followed_by_text_is_told(tmp_path: Path) -> None:
    for end in range(1, len(ARRAY), 11):
        found = read(written(tmp_path / "a", ARRAY[:end]))
        assert found == [*ROWS[: len(found) - 1], "cut_short"]
    assert read(written(tmp_path / "a", ARRAY + b"\n\n[]")) == [*ROWS, "invalid_json"]


def test_bad_elements_of_an_array_are_told_one_by_one(tmp_path: Path) -> None:
    content = b'[\n{"a": "],[\\"\\\\"}, {oops}, 7, , {"a": NaN},\n{"a": {"b": [1, 2]}}]'
    found = read(written(tmp_path / "a", content))
    bad = ["invalid_json", "not_an_object", "invalid_json", "not_finite"]
    assert found == [{"a": '],["\\'}, *bad, {"a": {"b": [1, 2]}}]


VALUES = st.recursive(
    st.none() | st.integers() | st.text('a"\\[]{},\n\u2028é', max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('k"\\', max_size=3), inner),
    max_leaves=6,
)


@settings(deadline=None)
@given(
    rows=st.lists(st.dictionaries(st.text(max_size=3), VALUES, max_size=3), max_size=6),
    indent=st.sampled_from([None, 0, 3]),
    ascii_only=st.booleans(),
    piece=st.integers(1, 9),
)
def test_array_is_cut_as_json_reads_it_however_it_is_read(
    tmp_path_factory: pytest.TempPathFactory, rows: list, indent: int, ascii_only: bool, piece: int
) -> None:
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    file = written(tmp_path_factory.getbasetemp() / "array", text.encode())
    with mock.patch.object(containers, "PIECE", piece):
        assert read(file) == rows


@settings(deadline=None)
@given(
    lines=st.lists(
        st.sampled_from([b"", b" ", b"\r", b"{}", b'{"a": 1}\r', b"\xe2\x80\xa8", b"x" * 9])
    ),
    last=st.sampled_from([b"", b'{"last": 1}']),
    bom=st.booleans(),
    cuts=st.lists(st.integers(0, 80), max_size=4),
)  # fmt: skip
def test_byte_ranges_share_out_the_lines(
    tmp_path_factory: pytest.TempPathFactory, lines: list, last: bytes, bom: bool, cuts: list
) -> None:
    content = b"\xef\xbb\xbf" * bom + b"".join(line + b"\n" for line in lines) + last
    file = written(tmp_path_factory.getbasetemp() / "lines", content)
    with mock.patch.object(containers, "PIECE", 4):
        whole = list(file.rows())
        borders = [0, *sorted(cuts), None]
        parts = [list(file.rows(start, end)) for start, end in pairwise(borders)]
    assert [row[1:] for part in parts for row in part] == [row[1:] for row in whole]


def test_line_is_of_the_range_its_first_byte_lies_in_and_counted_from_there(tmp_path: Path) -> None:
    bom = b"\xef\xbb\xbf"
    lines = [bom + b"{}\n", b"\n", b'{"a": 1}\r\n', bom + b"x\n", b" \n", b"{}"]
    begins = [sum(map(len, lines[:n])) for n in range(len(lines))]
    content = b"".join(lines)
    file = written(tmp_path / "lines", content)
    for start in range(len(content) + 2):
        for end in range(start, len(content) + 2):
            inside = [n for n, begin in enumerate(begins) if start <= begin < end]
            expected = [
                (n - inside[0] + 1, len(lines[n]), lines[n] if n else b"{}\n")
                for n in inside
                if lines[n].strip()
            ]
            assert list(file.rows(start, end)) == expected


def test_row_over_the_limit_is_bad_and_its_neighbours_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(containers, "MAX_ROW", 50)
    monkeypatch.setattr(containers, "PIECE", 16)
    for size, expected in ((50, {"a": "x" * 42}), (51, "row_too_large"), (300, "row_too_large")):
        row = b'{"a":"%s"}' % (b"x" * (size - 8))
        for content in (b'{"b": 1}\n%s\n{"b": 2}\n' % row, b'[{"b": 1},%s,{"b": 2}]' % row):
            found = read(written(tmp_path / "a", content))
            assert found == [{"b": 1}, expected, {"b": 2}]


@pytest.mark.parametrize("compress", [bytes, lambda content: gzip.compress(content, 1), zstd])
@pytest.mark.parametrize("frame", [b'{"b": 1}\n%s\n{"b": 2}', b'[{"b": 1},\n%s,{"b": 2}]'])
def test_giant_row_is_never_held_whole(
    tmp_path: Path,
    compress: Callable[[bytes], bytes],
    frame: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(containers, "MAX_ROW", 2**20)
    row = b'{"a": "%s"}' % (b"x" * 60_000_000)
    file = written(tmp_path / "a", compress(frame % row))
    tracemalloc.start()
    try:
        assert read(file) == [{"b": 1}, "row_too_large", {"b": 2}]
        assert tracemalloc.get_traced_memory()[1] < 30_000_000
    finally:
        tracemalloc.stop()


def test_parquet_without_known_columns_is_refused_by_its_columns(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", [{"ask": "a", "reply": "b"}])
    with pytest.raises(UserError, match=r"a\.parquet:1: no known format has the keys 'ask'"):
        detect_format(SourceFile("a.parquet", tmp_path / "a.parquet"))


def test_nested_columns_of_parquet_are_a_chat(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "2 + 2?", "tool_calls": None},
        {"role": "assistant", "content": None,
         "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 2}'}}]},
        {"role": "tool", "content": "4", "tool_calls": None},
        {"role": "assistant", "content": "4", "tool_calls": None},
    ]  # fmt: skip
    parquet(tmp_path / "a", [{"messages": turns}])
    (row,) = source_rows(SourceFile("a", tmp_path / "a"), "messages")
    user, assistant = row.conversation.messages
    assert user.content == "2 + 2?"
    assert 'Action Input: {"a": 2}\nObservation: 4\n' in assistant.content


@pytest.mark.parametrize("package", ["pyarrow", "zstandard"])
def test_missing_package_is_named_with_the_way_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    parquet(tmp_path / "a", ROWS)
    if package == "zstandard":
        written(tmp_path / "a", zstd(LINES))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"needs {package}: pip install 'moi_jax\[sources\]'"):
        list(SourceFile("a", tmp_path / "a").rows())


def test_digest_is_that_of_the_bytes(tmp_path: Path) -> None:
    one, two = written(tmp_path / "a", LINES), written(tmp_path / "b", LINES + b"\n")
    assert one.digest() != two.digest()
    assert one.digest() == written(tmp_path / "c", LINES).digest()
