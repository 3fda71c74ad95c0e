"""Averages and merges of checkpoints, against slow versions written from the papers."""

import dataclasses
import errno
import json
import sys

import ml_dtypes
import numpy as np
import pytest

import moi_jax
from moi_jax import convert
from moi_jax.checkpoints import combined
from moi_jax.checkpoints.average import average_checkpoints
from moi_jax.checkpoints.hf.exporter import export_checkpoint
from moi_jax.checkpoints.hf.importer import import_checkpoint
from moi_jax.checkpoints.items import read_items
from moi_jax.checkpoints.merge import MergeOptions, dropped, merge_runs
from moi_jax.checkpoints.merged import merged_parameters
from moi_jax.checkpoints.parameters import save_model, stored_parameters
from moi_jax.common.errors import UserError
from moi_jax.models.parameters import parameter_specs

from support.adapters import save_adapters
from support.published import micro_published


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("merge")
    micro_published(folder / "Tiny", ml_dtypes.bfloat16, num_layers=2)
    import_checkpoint(folder / "Tiny", folder / "base")
    for number in range(3):
        tuned(folder / "base", folder / f"tuned{number}", number)
    return folder


def tuned(base, path, seed, items=None, dtype=np.float32):
    """A checkpoint that differs from the base as one after training does."""
    items = items or read_items(base)
    rng, stored = np.random.default_rng(seed), stored_parameters(base, items.model)
    stream = (
        (name, (stored.get(name).astype(np.float32)
                + 0.01 * rng.standard_normal(spec.shape)).astype(dtype))
        for name, spec in parameter_specs(items.model).items()
    )  # fmt: skip
    save_model(path, stream, np.dtype(dtype), items)
    return path


def values(step):
    """All parameters of a checkpoint, without adapters, in float64."""
    items = read_items(step)
    stored = merged_parameters(step, items)
    return {name: stored.get(name).astype(np.float64) for name in parameter_specs(items.model.base)}


def close(step, expected):
    found = values(step)
    for name, wanted in expected.items():
        np.testing.assert_allclose(found[name], wanted, rtol=0, atol=3e-7, err_msg=name)


def test_averages_are_those_of_all_values(place, tmp_path):
    steps = [place / f"tuned{number}" for number in range(3)]
    each = [values(step) for step in steps]
    for given, shares in (
        ({}, (1 / 3, 1 / 3, 1 / 3)),
        ({"weights": [2, 0, 6]}, (0.25, 0, 0.75)),
        ({"ema": 0.5}, (0.25, 0.25, 0.5)),
    ):
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        average_checkpoints(steps, out, **given)
        close(out, {
            name: sum(share * of[name] for share, of in zip(shares, each, strict=True))
            for name in each[0]
        })  # fmt: skip
    assert read_items(out).provenance["combined"]["weights"] == [0.25, 0.25, 0.5]
    moi_jax.load(out)


def test_a_run_stands_for_its_steps_and_keeps_the_dtype(place, tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    for step in (4, 12, 8):
        tuned(place / "base", folder / str(step), step, dtype=ml_dtypes.bfloat16)
    average_checkpoints([tmp_path / "run"], tmp_path / "out", ema=0.9)
    combined_of = read_items(tmp_path / "out").provenance["combined"]
    assert [name.rsplit("/", 1)[1] for name in combined_of["of"]] == ["4", "8", "12"]
    np.testing.assert_allclose(combined_of["weights"], [0.81, 0.09, 0.1])
    model = read_items(tmp_path / "out").model
    assert stored_parameters(tmp_path / "out", model).dtype == ml_dtypes.bfloat16


def test_adapters_of_one_base_are_averaged_as_adapters(place, tmp_path):
    steps = [save_adapters(place / "base", tmp_path / name) for name in "ab"]
    items = read_items(steps[1])
    doubled = stored_parameters(steps[1], items.model)
    stream = ((name, 3 * doubled.get(name)) for name in doubled.arrays)
    save_model(tmp_path / "c", stream, np.dtype(np.float32), items)
    average_checkpoints([tmp_path / "a", tmp_path / "c"], tmp_path / "out")
    averaged = stored_parameters(tmp_path / "out", items.model)
    assert read_items(tmp_path / "out").base == items.base
    for name in doubled.arrays:
        np.testing.assert_allclose(averaged.get(name), 2 * doubled.get(name), rtol=1e-6)


def slow_ties(vectors, weights, density):
    """Algorithm 1 of the paper, a value at a time."""
    trimmed = []
    for vector in vectors:
        order = sorted(range(vector.size), key=lambda i, v=vector: -abs(v[i]))
        kept = set(order[: round(density * vector.size)])
        trimmed.append([v if i in kept else 0.0 for i, v in enumerate(vector)])
    merged = np.zeros(len(trimmed[0]))
    for place in range(len(merged)):
        here = [vector[place] for vector in trimmed]
        mass = sum(weight * value for weight, value in zip(weights, here, strict=True))
        agreeing = [(w, v) for w, v in zip(weights, here, strict=True) if v * mass > 0]
        if agreeing:
            merged[place] = sum(w * v for w, v in agreeing) / sum(w for w, _ in agreeing)
    return merged


def by_matrix(base, tuned_values, merge):
    """base + merge(task vectors), a layer of a parameter at a time."""
    merged = {}
    for name, start in base.items():
        matrices = range(len(start)) if name.startswith("layers.") else [slice(None)]
        merged[name] = start.copy()
        for at in matrices:
            vectors = [(of[name][at] - start[at]).ravel() for of in tuned_values]
            merged[name][at] += merge(vectors).reshape(start[at].shape)
    return merged


def test_ties_and_average_are_those_of_the_papers(place, tmp_path):
    steps = [place / f"tuned{number}" for number in range(3)]
    base, each, weights = values(place / "base"), [values(s) for s in steps], [0.5, 0.25, 0.25]
    base = {name: start for name, start in base.items() if "key" in name or "norm" in name}
    for method, merge in (
        ("ties", lambda vectors: slow_ties(vectors, weights, 0.3)),
        ("average", lambda vectors: np.tensordot(weights, vectors, 1)),
    ):
        options = MergeOptions(method, [2, 1, 1], 0.3)
        merge_runs(steps, place / "base", tmp_path / method, options)
        close(tmp_path / method, by_matrix(base, each, merge))


def test_dare_drops_and_scales_and_keeps_the_mean(place, tmp_path):
    steps = [place / "tuned0", place / "tuned1"]
    options = MergeOptions("dare", density=0.25, seed=7)
    merge_runs(steps, place / "base", tmp_path / "out", options)
    merge_runs(steps, place / "base", tmp_path / "again", options)
    base, one, other, found, again = map(
        values, (place / "base", *steps, tmp_path / "out", tmp_path / "again")
    )
    name = "layers.mlp.gate.kernel"
    np.testing.assert_array_equal(found[name], again[name])
    added, vectors = found[name] - base[name], [v[name] - base[name] for v in (one, other)]
    # Each of the two is there, times 4 and the weight 1/2, or it is not.
    choices = [a * 2 * vectors[0] + b * 2 * vectors[1] for a in (0, 1) for b in (0, 1)]
    gaps = np.abs(np.stack(choices) - added)
    assert gaps.min(0).max() < 1e-6
    shares = np.bincount(gaps.argmin(0).ravel(), minlength=4) / added.size
    np.testing.assert_allclose(shares, [9 / 16, 3 / 16, 3 / 16, 1 / 16], atol=0.01)
    assert not np.array_equal(added[0] != 0, added[1] != 0)  # layers drop other values
    vector = np.ones(100_000, np.float32)
    assert abs(dropped(vector, 0.25, [1]).mean() - 1) < 0.02
    assert np.array_equal(dropped(vector, 1.0, [1]), vector)


def test_adapters_are_merged_as_changes_of_the_weights(place, tmp_path):
    one = save_adapters(place / "base", tmp_path / "one", rank=2)
    other = save_adapters(place / "base", tmp_path / "other", targets=["layers.mlp"])
    merge_runs([one, other], place / "base", tmp_path / "out", MergeOptions("average", [3, 1]))
    items = read_items(tmp_path / "out")
    assert (items.base, items.model.adapter) == (None, None)
    base, first, second = map(values, (place / "base", one, other))
    stored = stored_parameters(tmp_path / "out", items.model)
    assert stored.dtype == ml_dtypes.bfloat16
    for name, start in base.items():
        expected = start + 0.75 * (first[name] - start) + 0.25 * (second[name] - start)
        found = stored.get(name).astype(np.float64)
        np.testing.assert_allclose(found, expected, rtol=2**-8, atol=1e-6, err_msg=name)


def test_the_error_of_a_quantised_base_is_no_change_of_the_weights(place, tmp_path):
    coded = save_adapters(place / "base", tmp_path / "coded", base_dtype="int8")
    plain = save_adapters(place / "base", tmp_path / "plain")
    merge_runs([coded], place / "base", tmp_path / "out", MergeOptions("average"))
    merge_runs([plain], place / "base", tmp_path / "wanted", MergeOptions("average"))
    close(tmp_path / "out", values(tmp_path / "wanted"))


def test_what_does_not_belong_together_is_refused_in_one_line(place, tmp_path, monkeypatch, caplog):
    micro_published(tmp_path / "Other", np.float32, 0.03, num_layers=2)
    import_checkpoint(tmp_path / "Other", tmp_path / "other")
    micro_published(tmp_path / "Deep", np.float32, num_layers=3)
    import_checkpoint(tmp_path / "Deep", tmp_path / "deep")
    adapters = save_adapters(place / "base", tmp_path / "adapters")
    foreign = save_adapters(tmp_path / "other", tmp_path / "foreign")
    base, run, out = place / "base", place / "tuned0", tmp_path / "out"

    def refused(message, function, *arguments):
        with pytest.raises(UserError, match=message) as error:
            function(*arguments)
        assert "\n" not in str(error.value)
        assert not out.exists()
        assert not list(tmp_path.glob(".out*"))

    ties = MergeOptions("ties")
    refused("another architecture", merge_runs, [run, tmp_path / "deep"], base, out, ties)
    refused("began from Tiny, and the base", merge_runs, [run], tmp_path / "other", out, ties)
    refused("is not the base of", merge_runs, [adapters, foreign], base, out, ties)
    refused("below zero for ties", merge_runs, [run, run], base, out, MergeOptions("ties", [2, -1]))
    refused("3 numbers for 1", merge_runs, [run], base, out, MergeOptions(weights=[1, 1, 1]))
    refused("another architecture", average_checkpoints, [run, tmp_path / "deep"], out)
    refused("another base", average_checkpoints, [adapters, foreign], out)
    refused("other adapters", average_checkpoints, [run, adapters], out)
    refused("is one checkpoint", average_checkpoints, [run], out)
    refused("sum above zero", average_checkpoints, [run, run], out, [1, -1])

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(combined, "save_model", full)
    refused("nothing was left behind", average_checkpoints, [run, run], out)
    assert "is given 2 times" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["average", "A", "B", "--out", "o", "--ema", "0.9", "--weights", "1,1"], "leave out --we"),
        (["average", "A", "B", "--out", "o", "--weights", "1,x"], "no list of numbers"),
        (["merge", "A", "--base", "b", "--out", "o", "--method", "slerp"], "invalid choice"),
        (["merge", "A", "--base", "b", "--out", "o", "--method", "ties", "--density", "0"], "abov"),
    ],
)
def test_arguments_that_are_wrong_are_refused(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["convert", *arguments])
    with pytest.raises((SystemExit, UserError)) as error:
        convert.main()
    assert message in f"{error.value} {capsys.readouterr().err}"


def test_an_export_ends_turns_as_the_runs_were_trained_to(place, tmp_path):
    """The published base may be no chat model, and name another end."""
    items = read_items(place / "base")
    source = {**items.provenance, "generation_config": {"eos_token_id": 7}}
    ended = dataclasses.replace(items, provenance=source)
    steps = [tuned(place / "base", tmp_path / f"{n}", n, items=ended) for n in range(2)]
    average_checkpoints(steps, tmp_path / "out")
    export_checkpoint(tmp_path / "out", tmp_path / "exported")
    written = json.loads((tmp_path / "exported" / "generation_config.json").read_text())
    _, tokenizer = moi_jax.load(steps[0])
    assert written["eos_token_id"] == [*tokenizer.template.stops, 7]
