"""The figures of benchmarks/growth.py: docs/growth.json, and their table in docs/benchmarks.md."""

import json

import pytest

from support.runs import ROOT

RECORDS = json.loads((ROOT / "docs" / "growth.json").read_text(encoding="utf-8"))


@pytest.fixture
def growth(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import growth

    return growth


def test_the_table_has_the_figures_of_the_file(growth):
    assert growth.table(RECORDS) in (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")


def test_the_file_has_the_figures_of_the_arithmetic(growth, tmp_path):
    for case, record in zip(growth.CASES, RECORDS, strict=True):
        assert record["source"] == ("compiled" if case.compiled else "arithmetic")
        if not case.compiled:
            assert json.loads(json.dumps(growth.measure(case, str(tmp_path)))) == record
