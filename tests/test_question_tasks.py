"""GSM8K, MATH and MMLU on a few rows written by hand in the layout of the public files."""

import gzip
from pathlib import Path

import pytest

from moi_jax.errors import UserError
from moi_jax.evaluation.rows import csv_rows, json_rows


def test_rows_of_json_say_where_they_stand(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"q": "a\u2028b"}\r\n\n{"q": "c"}\n'.encode())
    assert list(json_rows(path, q=str)) == [
        (f"{path}, line 1", {"q": "a\u2028b"}),
        (f"{path}, line 3", {"q": "c"}),
    ]
    path.write_bytes(gzip.compress(path.read_bytes()))
    assert [row["q"] for _, row in json_rows(path, q=str)] == ["a\u2028b", "c"]


@pytest.mark.parametrize("line", ["{", "[1]", '{"r": "a"}', '{"q": 1}', '{"q": " "}', "\udcff"])
def test_malformed_row_of_json_is_named(tmp_path: Path, line: str):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"q": "a"}}\n{line}\n', errors="surrogateescape")
    with pytest.raises(UserError, match=r"rows\.jsonl, line 2: .*mend the row"):
        list(json_rows(path, q=str))


def test_rows_of_csv_keep_newlines_and_separators_in_cells(tmp_path: Path):
    path = tmp_path / "rows.csv"
    path.write_bytes('\ufeff"a\r\nb",None\r\n\r\n" ""c""\u2028", d\r\n'.encode())
    assert list(csv_rows(path)) == [
        (f"{path}, line 1", ["a\nb", "None"]),
        (f"{path}, line 4", [' "c"\u2028', " d"]),
    ]


@pytest.mark.parametrize("row", [b'"a', b'"a"b,c\n', b"\xff\n"])
def test_malformed_row_of_csv_is_named(tmp_path: Path, row: bytes):
    path = tmp_path / "rows.csv"
    path.write_bytes(b"x,y\n" + row)
    with pytest.raises(UserError, match=r"rows\.csv.*mend the row"):
        list(csv_rows(path))
