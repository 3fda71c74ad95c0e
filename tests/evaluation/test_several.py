"""Several checkpoints in one evaluation: adapters share their base, and one table has all."""

import json
import sys

import jax
import ml_dtypes
import numpy as np
import pytest

from moi_jax import evaluate
from moi_jax.checkpoints import parameters
from moi_jax.checkpoints.hf.importer import import_checkpoint
from moi_jax.checkpoints.opener import open_checkpoint
from moi_jax.common.errors import UserError

from support.adapters import save_adapters
from support.published import micro_published

QUESTIONS = [{"question": f"What is {n} + {n}?", "answer": f"#### {2 * n}"} for n in range(2, 4)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base, two kinds of adapters beside it, and the data of a benchmark."""
    folder = tmp_path_factory.mktemp("several")
    micro_published(folder / "Tiny", ml_dtypes.bfloat16, num_layers=2)
    import_checkpoint(folder / "Tiny", folder / "base")
    save_adapters(folder / "base", folder / "one", rank=2)
    save_adapters(folder / "base", folder / "other", rank=4, targets=["layers.mlp"])
    (folder / "data" / "gsm8k").mkdir(parents=True)
    lines = "".join(json.dumps(question) + "\n" for question in QUESTIONS)
    (folder / "data" / "gsm8k" / "test.jsonl").write_text(lines)
    return folder


def run(place, monkeypatch, *words):
    arguments = [
        *("--data", place / "data", "--tasks", "gsm8k", "--mesh", "tensor=1"),
        *("--max-new-tokens", "4", "--limit", "2"),
    ]
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, (*words, *arguments))])
    assert evaluate.main() == 0


def samples(folder):
    return (folder / "samples" / "gsm8k.jsonl").read_text()


def test_the_base_is_read_once_and_each_answers_as_it_does_alone(place, monkeypatch, tmp_path):
    steps, read = [place / "one", place / "other"], []
    held = parameters._read_held
    monkeypatch.setattr(
        parameters, "_read_held", lambda step, *rest: read.append(step.name) or held(step, *rest)
    )
    run(place, monkeypatch, *steps, "--out", tmp_path / "out")
    assert read == ["one", "base", "other"]
    for step in steps:
        run(place, monkeypatch, step, "--out", tmp_path / f"{step.name}-alone")
        assert samples(tmp_path / "out" / step.name) == samples(tmp_path / f"{step.name}-alone")
    assert samples(tmp_path / "out" / "one") != samples(tmp_path / "out" / "other")
    table = (tmp_path / "out" / "comparison.md").read_text().splitlines()
    score = json.loads((tmp_path / "out" / "one" / "results.json").read_text())
    score = score["tasks"]["gsm8k"]["score"]
    assert table[0] == "| checkpoint | gsm8k |"
    assert table[2:] == [f"| one | {score:.1f} |", f"| other | {score:.1f} |"]


def test_parameters_with_a_kept_base_are_those_of_the_checkpoint(place):
    bases = {}
    for name in ("one", "other", "base"):
        kept, alone = (
            open_checkpoint(place / name, devices=jax.devices()[:1], bases=given).stacked
            for given in (bases, None)
        )
        jax.tree.map(np.testing.assert_array_equal, kept, alone)
    assert len(bases) == 1


def test_a_base_that_is_kept_plain_is_another_than_the_quantised_one(place, tmp_path):
    coded = save_adapters(place / "base", tmp_path / "coded", rank=2, base_dtype="int8")
    bases = {}
    for step in (place / "one", coded, place / "one"):
        kept, alone = (
            open_checkpoint(step, devices=jax.devices()[:1], bases=given).stacked
            for given in (bases, None)
        )
        jax.tree.map(np.testing.assert_array_equal, kept, alone)


def test_two_of_one_name_are_refused(place, monkeypatch, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "one").symlink_to(place / "one")
    with pytest.raises(UserError, match="one would be the directory of results of two"):
        run(place, monkeypatch, place / "one", tmp_path / "sub" / "one", "--out", tmp_path / "out")
