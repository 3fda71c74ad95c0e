"""The TFDS builders: each from a tiny hand-written file, read back as the rows written."""

import gzip
import http.server
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from moi_jax.data.tfds_datasets import NAMES, builder_class

tfds = pytest.importorskip("tensorflow_datasets", reason="the extra tfds is not installed")

GSM8K = [
    {"question": f"{n} + {n}?", "answer": f"<<{n}+{n}={2 * n}>>\n#### {2 * n}"} for n in (1, 2)
]
MATH = {"problem": "$1+1$?", "level": "Level 1", "type": "Algebra", "solution": "\\boxed{2}"}
# The task_ids at the borders of the authors' splits.
MBPP = {
    "prompt": [1, 10],
    "test": [11, 510],
    "validation": [511, 600],
    "train": [601, 974],
}
TREE = {
    "message_tree_id": "t",
    "prompt": {
        "text": "Hi \U0001f600\u2028",
        "role": "prompter",
        "replies": [{"text": "Ho", "role": "assistant", "rank": None, "replies": []}],
    },
}
TASK = {"instruction": "Print 1.", "input": "", "response": "print(1)"}
CALL = {
    "conversations": [
        {"from": "human", "value": "Time?"},
        {"from": "function_call", "value": '{"name": "time", "arguments": {}}'},
        {"from": "observation", "value": '{"time": "12:00"}'},
        {"from": "gpt", "value": "Noon."},
    ],
    "tools": '[{"name": "time"}]',
}


def write_lines(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def built(name: str, manual_dir: Path, data_dir: Path) -> Any:
    builder = builder_class(name)(data_dir=data_dir, file_format="array_record")
    config = tfds.download.DownloadConfig(manual_dir=manual_dir)
    builder.download_and_prepare(download_config=config)
    return builder


def rows_of(builder: Any, split: str) -> list[Any]:
    source = builder.as_data_source(split=split)
    return [json.loads(source[index]["json"]) for index in range(len(source))]


def build(name: str, tmp_path: Path) -> Any:
    return built(name, tmp_path, tmp_path / "built")


def test_gsm8k_has_the_rows_of_its_parts_in_order(tmp_path):
    write_lines(tmp_path / "gsm8k_train_1.jsonl", GSM8K[:1])
    write_lines(tmp_path / "gsm8k_train_2.jsonl", GSM8K[1:])
    write_lines(tmp_path / "test.jsonl", GSM8K[:1])
    write_lines(tmp_path / "train_socratic.jsonl", [{"question": "other"}])
    builder = build("gsm8k", tmp_path)
    assert rows_of(builder, "train") == GSM8K
    assert rows_of(builder, "test") == GSM8K[:1]


def test_math_is_read_from_one_file_a_problem(tmp_path):
    for split, subject in (("train", "algebra"), ("train", "geometry"), ("test", "algebra")):
        folder = tmp_path / "MATH" / split / subject
        folder.mkdir(parents=True)
        row = {**MATH, "type": f"{split} {subject}"}
        (folder / "7.json").write_text(json.dumps(row, indent=4), encoding="utf-8")
    builder = build("math", tmp_path)
    assert [row["type"] for row in rows_of(builder, "train")] == ["train algebra", "train geometry"]
    assert [row["type"] for row in rows_of(builder, "test")] == ["test algebra"]


def test_math_is_read_from_one_problem_a_line(tmp_path):
    write_lines(tmp_path / "hendrycks_math_train.jsonl", [MATH, MATH])
    builder = build("math", tmp_path)
    assert rows_of(builder, "train") == [MATH, MATH]
    assert list(builder.info.splits) == ["train"]


def test_math_without_a_copy_says_where_to_put_one(tmp_path):
    builder = builder_class("math")(data_dir=tmp_path, file_format="array_record")
    with pytest.raises(FileNotFoundError, match="into manual_dir"):
        builder.download_and_prepare()


def test_mbpp_is_split_by_task_id_as_its_authors_did(tmp_path):
    rows = [
        {
            "text": f"Task {number}.",
            "code": "x = 1\r\n",
            "task_id": number,
            "test_list": ["assert x"],
        }
        for ids in MBPP.values()
        for number in ids
    ]
    write_lines(tmp_path / "mbpp.jsonl", rows)
    builder = build("mbpp", tmp_path)
    for split, ids in MBPP.items():
        assert [row["task_id"] for row in rows_of(builder, split)] == ids
    assert rows_of(builder, "prompt") == rows[:2]


def test_oasst1_keeps_the_trees_whole(tmp_path):
    with gzip.open(tmp_path / "2023-04-12_oasst_ready.trees.jsonl.gz", "wt") as file:
        file.write(json.dumps(TREE) + "\n")
    assert rows_of(build("oasst1", tmp_path), "train") == [TREE]


@pytest.mark.parametrize(
    ("name", "file", "row"),
    [
        ("gpteacher_codegen", "codegen-instruct.json", TASK),
        ("gpteacher_codegen", "gpteacher_codegen_instruct.jsonl", TASK),
        ("glaive_toolcall", "glaive_toolcall_en_demo.json", CALL),
        ("glaive_toolcall", "glaive_toolcall_en_demo.jsonl", CALL),
    ],
)
def test_an_array_and_lines_give_the_same_rows(name, file, row, tmp_path):
    if file.endswith(".json"):
        (tmp_path / file).write_text(json.dumps([row, row], indent=2), encoding="utf-8")
    else:
        write_lines(tmp_path / file, [row, row])
    assert rows_of(build(name, tmp_path), "train") == [row, row]


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_without_the_files_is_refused(name, tmp_path):
    (tmp_path / "notes.txt").write_text("nothing", encoding="utf-8")
    with pytest.raises(FileNotFoundError, match="there is no"):
        build(name, tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_every_builder_tells_origin_licence_and_where_copies_go(name, tmp_path):
    builder = builder_class(name)(data_dir=tmp_path)
    info = builder.info
    assert info.name == name
    assert info.homepage.startswith("https://")
    assert info.redistribution_info.license in {"MIT", "Apache-2.0", "CC BY 4.0"}
    assert info.citation.startswith("@")
    assert "manual_dir" in builder.MANUAL_DOWNLOAD_INSTRUCTIONS
    # An address names the version of the file: a branch would move.
    assert set(builder.URLS) <= set(builder.FILES)
    for url in builder.URLS.values():
        assert any(len(part) == 40 for part in url.split("/"))


@pytest.mark.parametrize("name", NAMES)
def test_every_checksum_is_of_an_address_in_use(name):
    builder = builder_class(name)
    sums = builder.url_infos or {}
    assert set(sums) <= set(builder.URLS.values())
    assert all(len(info.checksum) == 64 for info in sums.values())


def test_gsm8k_test_and_mbpp_have_checksums():
    assert [info.size for info in builder_class("gsm8k").url_infos.values()] == [749738]
    assert [info.size for info in builder_class("mbpp").url_infos.values()] == [563743]


@pytest.fixture
def server(tmp_path):
    """Serves tmp_path/served, and lists what was fetched (not merely asked about)."""
    (tmp_path / "served").mkdir()
    fetched: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any):
            super().__init__(*args, directory=str(tmp_path / "served"))

        def log_request(self, code: Any = "-", size: Any = "-") -> None:
            if self.command == "GET":
                fetched.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}", fetched
        served.shutdown()


def test_a_file_of_several_splits_is_downloaded_once(server, tmp_path, monkeypatch):
    address, fetched = server
    rows = [{"text": "T", "task_id": number} for ids in MBPP.values() for number in ids]
    write_lines(tmp_path / "served" / "mbpp.jsonl", rows)
    urls = dict.fromkeys(MBPP, f"{address}/mbpp.jsonl")
    monkeypatch.setattr(builder_class("mbpp"), "URLS", urls)
    builder = builder_class("mbpp")(data_dir=tmp_path / "built", file_format="array_record")
    builder.download_and_prepare()
    assert {split: [row["task_id"] for row in rows_of(builder, split)] for split in MBPP} == MBPP
    assert fetched == ["/mbpp.jsonl"]


def test_a_download_that_differs_from_its_checksum_is_refused(server, tmp_path, monkeypatch):
    address, _ = server
    write_lines(tmp_path / "served" / "test.jsonl", GSM8K)
    gsm8k = builder_class("gsm8k")
    url = f"{address}/test.jsonl"
    monkeypatch.setattr(gsm8k, "URLS", {"test": url})
    (known,) = gsm8k.url_infos.values()
    monkeypatch.setattr(gsm8k, "url_infos", {url: known})
    builder = gsm8k(data_dir=tmp_path / "built", file_format="array_record")
    with pytest.raises(Exception, match="checksum"):
        builder.download_and_prepare()


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"question": "q"}\n{"question": \n', encoding="utf-8")
    from moi_jax.data.tfds_datasets.json_rows import read_rows

    with pytest.raises(ValueError, match=r"train\.jsonl:2"):
        list(read_rows(path))


def test_building_needs_no_tensorflow(tmp_path):
    write_lines(tmp_path / "train.jsonl", GSM8K)
    code = f"""
import sys
from moi_jax.data.tfds_datasets import builder_class
import tensorflow_datasets as tfds
builder = builder_class("gsm8k")(data_dir={str(tmp_path / "built")!r}, file_format="array_record")
config = tfds.download.DownloadConfig(manual_dir={str(tmp_path)!r})
builder.download_and_prepare(download_config=config)
assert len(builder.as_data_source(split="train")) == 2
assert "tensorflow" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
