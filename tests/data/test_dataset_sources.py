"""Sources of kind tfds and hf: their rows come as those of a file do, and errors in one line."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moi_jax.common.errors import UserError
from moi_jax.config import Source
from moi_jax.config.load import make_config
from moi_jax.data.sources.readers import SourceFile, parse
from moi_jax.data.sources.rows import detect_format, expand, source_rows
from moi_jax.text.conversations import Conversation, Message

tfds = pytest.importorskip("tensorflow_datasets", reason="the extra tfds is not installed")
datasets = pytest.importorskip("datasets", reason="the extra datasets is not installed")

ROWS = [{"question": f"{n}+{n}? é\u2028", "answer": f"#### {2 * n}"} for n in range(10)]
TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Ho é"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Bye."},
]


class TypedTurns(tfds.core.GeneratorBasedBuilder):
    """A builder of somebody else, with typed features and two configs."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="a"), tfds.core.BuilderConfig(name="b")]  # noqa: RUF012

    def _info(self):
        features = {
            "messages": tfds.features.Sequence(
                {"role": tfds.features.Text(), "content": tfds.features.Text()}
            ),
            "tags": tfds.features.Sequence(tfds.features.Text()),
            "score": np.float32,
            "meta": {"id": np.int64},
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        name = self.builder_config.name
        yield 0, {"messages": TURNS, "tags": [name, "é"], "score": 0.5, "meta": {"id": 7}}


class GpteacherCodegen(TypedTurns):
    """Has the name of one of ours."""


class NeedsLibrary(TypedTurns):
    BUILDER_CONFIGS = []  # noqa: RUF012

    def _generate_examples(self):
        import no_such_library  # noqa: F401

        yield 0, {}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_cache")


def write_lines(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def opened(root: Path, **source: Any) -> SourceFile:
    ((file,),) = expand(root, [Source(**source)], root / "cache")
    return file


def contents(file: SourceFile) -> list[dict[str, Any]]:
    return [parse(row.raw) for row in file.rows()]


def gsm8k(root: Path, **source: Any) -> SourceFile:
    if not (root / "copies").exists():
        write_lines(root / "copies" / "train.jsonl", ROWS)
    return opened(root, tfds="gsm8k", manual_dir="copies", **source)


def saved(root: Path, **source: Any) -> SourceFile:
    if not (root / "set").exists():
        datasets.Dataset.from_list(ROWS).save_to_disk(root / "set")
    return opened(root, hf="set", **source)


def folder(root: Path, **source: Any) -> SourceFile:
    if not (root / "files").exists():
        write_lines(root / "files" / "train.jsonl", ROWS)
        write_lines(root / "files" / "test.jsonl", ROWS[:2])
    return opened(root, hf="files", **source)


@pytest.mark.parametrize("source", [gsm8k, saved, folder])
def test_rows_come_in_order_numbered_from_one_with_their_keys(source, tmp_path):
    file = source(tmp_path)
    assert contents(file) == ROWS
    assert [row.line for row in file.rows()] == list(range(1, 11))
    total = sum(row.size for row in file.rows())
    assert total / 3 < file.size < total * 3
    assert not file.splittable
    assert detect_format(file) == "question_answer"
    row = next(source_rows(file, "question_answer"))
    assert row.conversation == Conversation(
        (Message("user", ROWS[0]["question"]), Message("assistant", "#### 0"))
    )


@pytest.mark.parametrize("source", [gsm8k, saved, folder])
def test_a_source_can_be_sent_to_another_process(source, tmp_path):
    file = source(tmp_path)
    sent = pickle.dumps(file)
    assert len(sent) < 10_000
    assert contents(pickle.loads(sent)) == ROWS


@pytest.mark.parametrize("source", [gsm8k, folder])
def test_a_split_may_be_sliced(source, tmp_path):
    part = source(tmp_path, split="train[20%:50%]")
    assert contents(part) == ROWS[2:5]
    assert part.digest() != source(tmp_path).digest()
    assert part.path != source(tmp_path).path
    assert part.size < source(tmp_path).size


@pytest.mark.parametrize("source", [gsm8k, saved, folder])
def test_the_digest_tells_the_content(source, tmp_path):
    one, two, other = (tmp_path / name for name in ("one", "two", "other"))
    first = source(one).digest()
    assert source(one).digest() == first
    for root, rows in ((two, ROWS), (other, ROWS[1:])):
        write_lines(root / "copies" / "train.jsonl", rows)
        write_lines(root / "files" / "train.jsonl", rows)
        write_lines(root / "files" / "test.jsonl", ROWS[:2])
        datasets.Dataset.from_list(rows).save_to_disk(root / "set")
    assert source(two).digest() == first
    assert source(other).digest() != first


def test_changed_copies_are_built_anew(tmp_path):
    assert contents(gsm8k(tmp_path)) == ROWS
    write_lines(tmp_path / "copies" / "train.jsonl", ROWS[:3])
    assert contents(gsm8k(tmp_path)) == ROWS[:3]


def test_what_is_built_is_not_built_again(tmp_path):
    place = gsm8k(tmp_path).files[0]
    before = place.stat().st_mtime_ns
    assert gsm8k(tmp_path).files[0].stat().st_mtime_ns == before
    assert place.is_relative_to(tmp_path / "cache" / "tfds")


def test_ours_win_over_another_set_of_the_name(tmp_path):
    assert tfds.builder_cls("gpteacher_codegen") is GpteacherCodegen
    row = {"instruction": "Print 1.", "input": "", "response": "print(1)"}
    write_lines(tmp_path / "copies" / "gpteacher_codegen.jsonl", [row])
    assert contents(opened(tmp_path, tfds="gpteacher_codegen", manual_dir="copies")) == [row]
    assert tfds.builder_cls("gpteacher_codegen") is GpteacherCodegen


def test_a_typed_set_comes_as_plain_rows(tmp_path):
    file = opened(tmp_path, tfds="typed_turns/b")
    assert contents(file) == [
        {"messages": TURNS, "tags": ["b", "é"], "score": 0.5, "meta": {"id": 7}}
    ]
    assert detect_format(file) == "messages"


def test_a_set_that_was_built_elsewhere_is_read_without_its_code(tmp_path, monkeypatch):
    rows = contents(opened(tmp_path, tfds="typed_turns/b"))
    monkeypatch.delitem(tfds.core.registered._DATASET_REGISTRY, "typed_turns")
    assert contents(opened(tmp_path, tfds="typed_turns/b")) == rows


def test_a_damaged_set_is_named(tmp_path):
    file = gsm8k(tmp_path)
    content = file.files[0].read_bytes()
    file.files[0].write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"damaged.*delete it"):
        contents(file)


def test_a_dict_of_saved_splits_and_a_folder_give_the_split_asked_for(tmp_path):
    both = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:2])}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "dict")
    assert contents(opened(tmp_path, hf="dict", split="test")) == ROWS[:2]
    assert contents(folder(tmp_path, split="test")) == ROWS[:2]


def test_nested_rows_and_odd_values_of_a_dataset_become_json(tmp_path):
    from datetime import date

    rows = [{"messages": TURNS[:2], "day": date(2024, 5, 1)}, {"messages": [], "day": None}]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "set")
    assert contents(opened(tmp_path, hf="set")) == [
        {"messages": TURNS[:2], "day": "2024-05-01"},
        {"messages": [], "day": None},
    ]


REFUSED = [
    ({"tfds": "no_such_set"}, "there is no dataset no_such_set; use one of .*gsm8k"),
    ({"tfds": "gsm8k", "manual_dir": "nowhere"}, "nowhere is not a directory"),
    ({"tfds": "gsm8k", "manual_dir": "copies", "split": "tests"}, "Unknown split 'tests'"),
    ({"tfds": "gsm8k", "manual_dir": "empty"}, "there is no train.jsonl or"),
    ({"tfds": "math"}, "no longer online.*into manual_dir"),
    ({"tfds": "typed_turns/c"}, "BuilderConfig c not found"),
    ({"tfds": "needs_library"}, "cannot be built without no_such_library"),
    ({"hf": "files", "split": "tests"}, 'Unknown split "tests"'),
    ({"hf": "files", "subset": "main"}, "'main' not found"),
    ({"hf": "set", "split": "tests"}, "Unknown split 'tests'"),
    ({"hf": "./nowhere"}, "nowhere is neither a directory"),
    ({"hf": "broken"}, "broken: .*JSON parse error"),
    ({"tfds": "gsm8k", "format": "alpacca"}, "source gsm8k: unknown format"),
]


@pytest.mark.parametrize(("source", "match"), REFUSED, ids=[match for _, match in REFUSED])
def test_what_cannot_be_had_is_refused_in_one_line(source, match, tmp_path):
    write_lines(tmp_path / "copies" / "train.jsonl", ROWS)
    write_lines(tmp_path / "empty" / "other.txt", ROWS)
    write_lines(tmp_path / "files" / "train.jsonl", ROWS)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.jsonl").write_text('{"question": ', encoding="utf-8")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "set")
    with pytest.raises(UserError, match=match) as caught:
        opened(tmp_path, **source)
    assert "\n" not in str(caught.value)


def test_no_network_is_told_with_the_way_out(tmp_path, monkeypatch):
    import requests

    def fail(*args: Any, **kwargs: Any) -> None:
        raise requests.ConnectionError("no route to host")

    monkeypatch.setattr(requests, "head", fail)
    with pytest.raises(
        UserError, match=r"raw.githubusercontent.com cannot be reached.*into manual_dir"
    ):
        opened(tmp_path, tfds="gsm8k")
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *a, **k: (_ for _ in ()).throw(ConnectionError("offline"))
    )
    with pytest.raises(UserError, match="offline; check the id and the network"):
        opened(tmp_path, hf="openai/gsm8k")


@pytest.mark.parametrize(
    ("source", "library"),
    [({"tfds": "gsm8k"}, "tensorflow_datasets"), ({"hf": "openai/gsm8k"}, "datasets")],
)
def test_a_missing_library_is_told_with_its_extra(source, library, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=r"pip install .moi_jax\["):
        opened(tmp_path, **source)


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ({"path": "*", "manual_dir": "x"}, "manual_dir goes with tfds sources only"),
        ({"tfds": "gsm8k", "subset": "x"}, "subset goes with hf sources only"),
    ],
)
def test_keys_of_another_kind_are_refused(source, match):
    with pytest.raises(UserError, match=match):
        make_config({"data": {"domains": [{"name": "chat", "sources": [source]}]}})
