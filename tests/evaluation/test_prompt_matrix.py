"""The prompt matrix: each held-out conversation under each prompt, and what is said of the gaps."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moi_jax import config as config_lib
from moi_jax.checkpoints.opener import open_checkpoint
from moi_jax.common.errors import UserError
from moi_jax.config.load import load_config, make_config
from moi_jax.data.cache.prepare import prepare
from moi_jax.data.cache.selection import select
from moi_jax.data.loader import Batch
from moi_jax.evaluation import held_out as held_out_file
from moi_jax.evaluation.held_out import HeldOut
from moi_jax.evaluation.options import HeldOutOptions
from moi_jax.evaluation.prompt_matrix import measure as measure
from moi_jax.evaluation.prompt_matrix.gaps import summarize
from moi_jax.evaluation.prompt_matrix.matrix import ItemSums, PromptMatrix
from moi_jax.evaluation.prompt_matrix.measure import measure_held_out
from moi_jax.evaluation.prompt_matrix.prompts import columns, make_prompt_table
from moi_jax.evaluation.prompt_matrix.report import draw_matrix, print_matrix
from moi_jax.evaluation.row_sums import RowSums, make_row_sums
from moi_jax.evaluation.while_training import make_evaluations
from moi_jax.models.decoder import make_model
from moi_jax.models.parameters import parameter_shardings, random_parameters
from moi_jax.models.presets import PRESETS
from moi_jax.parallel.mesh import make_mesh
from moi_jax.text.instructions import label_mask
from moi_jax.text.rendering import with_system_prompt
from moi_jax.text.tokenizer import load_tokenizer
from moi_jax.training.train import train

from support.published import micro_published
from support.runs import SAMPLES, records, small_config

DEFAULT = "You are a helpful assistant."
OWN = {"chat": DEFAULT, "tools": "Use tools."}
MODEL = dataclasses.replace(PRESETS["tiny"], num_layers=1)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    config = make_config(
        {
            "data": {
                "root": str(SAMPLES),
                "cache_dir": str(tmp_path_factory.mktemp("cache")),
                "sequence_length": 512,
                "default_system_prompt": DEFAULT,
                "domains": [
                    {"name": "chat", "sources": [{"path": "chat.jsonl"}]},
                    {"name": "tools", "prompt": "Use tools.", "sources": [{"path": "tools.jsonl"}]},
                ],
            }
        }
    )
    tokenizer = load_tokenizer(SAMPLES / "tokenizer")
    caches = prepare(config.data, tokenizer)
    selections = select(caches, config.data.held_out, "assistant")
    return config.data, tokenizer, caches, selections


def make_matrix(material, rows=4, row_multiple=1, targets="assistant", table=None, **changes):
    data, tokenizer, caches, selections = material
    limit = changes.pop("limit", None)
    data = data.model_copy(update=changes)
    if table is None:
        table = make_prompt_table(OWN, DEFAULT, tokenizer, {"tools": "Work with tools."})
    return PromptMatrix(
        caches, selections, data, targets, tokenizer, table, rows, row_multiple, limit
    )


def model_sums(**axes):
    mesh = make_mesh(config_lib.Mesh(**axes), jax.devices())
    parameters = random_parameters(MODEL, 0, jnp.float32)
    placed = jax.device_put(parameters, parameter_shardings(MODEL, mesh))
    sums = make_row_sums(make_model(MODEL), mesh)
    return lambda batch: sums(placed, batch)


def counted(batch) -> RowSums:
    """A model that costs nothing: its loss is a row's first label, plus one a label."""
    labels = batch.loss_weights > 0
    first = batch.targets[np.arange(len(labels)), labels.argmax(axis=1)]
    count = labels.sum(axis=1)
    return RowSums((first + count).astype(np.float32), count, (batch.targets * labels).max(axis=1))


@pytest.fixture(scope="module")
def plain(material):
    matrix = make_matrix(material, limit=5)
    return matrix, matrix.measure(model_sums(fsdp=1))


def test_sums_are_those_of_each_conversation_alone_under_each_prompt(material, plain):
    _, tokenizer, _, _ = material
    matrix, sums = plain
    decoder = make_model(MODEL)(random_parameters(MODEL, 0, jnp.float32))
    log_softmax = jax.jit(lambda tokens: jax.nn.log_softmax(decoder(tokens)[0]))
    prompts = {
        ("chat", "own"): DEFAULT,
        ("chat", "default"): DEFAULT,
        ("chat", "as tools"): "Use tools.",
        ("chat", "paraphrase"): "You are an assistant who helps.",
        ("chat", "unrelated"): "You are a gardener.",
        ("chat", "none"): None,
        ("tools", "own"): "Use tools.",
        ("tools", "default"): DEFAULT,
        ("tools", "paraphrase"): "Work with tools.",
        ("tools", "unrelated"): "You are a gardener.",
        ("tools", "none"): None,
    }
    assert matrix.columns == ["own", "default", "as tools", "paraphrase", "unrelated", "none"]
    assert [item.domain for item in matrix.items] == [0] * 5 + [1] * 5
    for number, item in enumerate(matrix.items):
        for column, name in enumerate(matrix.columns):
            found = [part[number, column] for part in dataclasses.astuple(sums)]
            if (matrix.domains[item.domain], name) not in prompts:
                assert np.isnan(found[0])
                assert found[1:] == [0, 0]
                continue
            prompt = prompts[matrix.domains[item.domain], name]
            alone = with_system_prompt(item.instruction, tokenizer, prompt, "append")
            tokens = np.zeros((1, 512), np.int32)
            tokens[0, : len(alone.tokens)] = alone.tokens
            labels = np.flatnonzero(label_mask(alone, "assistant"))
            before = np.asarray(log_softmax(tokens))[labels - 1]
            assert found[0] == pytest.approx(
                -before[np.arange(len(labels)), tokens[0, labels]].sum(), rel=1e-5
            )
            assert found[1] == len(labels)
            assert found[2] == np.sum(before.argmax(axis=1) == tokens[0, labels])


@pytest.mark.parametrize("axes", [{"fsdp": 1}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_sums_do_not_depend_on_batches_widths_and_meshes(material, plain, monkeypatch, axes):
    monkeypatch.setattr(held_out_file, "_SHORTEST_ROW", 256)
    other = make_matrix(material, rows=3, row_multiple=4, limit=5).measure(model_sums(**axes))
    _, sums = plain
    np.testing.assert_array_equal(other.loss_tokens, sums.loss_tokens)
    np.testing.assert_array_equal(other.correct, sums.correct)
    np.testing.assert_allclose(other.nll, sums.nll, rtol=1e-5)


def test_every_conversation_is_read_back_from_its_own_row(material):
    one = make_matrix(material, rows=1)
    many = make_matrix(material, rows=64, row_multiple=8)
    assert len(one.items) == sum(len(selection.held_out) for selection in material[3])
    assert [item.id for item in one.items] == [item.id for item in many.items]
    assert len({item.id for item in one.items}) == len(one.items)
    alone, batched = one.measure(counted), many.measure(counted)
    for a, b in zip(dataclasses.astuple(alone), dataclasses.astuple(batched), strict=True):
        np.testing.assert_array_equal(a, b)


def test_losses_are_those_that_training_logs(material):
    data, tokenizer, caches, selections = material
    matrix = make_matrix(material)
    logged = HeldOut(caches, selections, data, "assistant", tokenizer, 2, 1).losses(counted)
    domain_of = np.array([item.domain for item in matrix.items])
    told = summarize(matrix.measure(counted), domain_of, matrix.domains, matrix.columns)
    for name in ("chat", "tools"):
        assert told[name]["cells"]["own"]["loss"] == pytest.approx(logged[f"eval/{name}/loss"])
        default = logged[f"eval/{name}/default_prompt/loss"]
        assert told[name]["cells"]["default"]["loss"] == pytest.approx(default)


def test_labels_of_the_system_block_do_not_count(material):
    """Else qwen_official would count fewer tokens where there is no block."""
    matrix = make_matrix(material, targets="qwen_official")
    sums = matrix.measure(counted)
    there = ~np.isnan(sums.nll)
    for row, tokens in zip(there, sums.loss_tokens, strict=True):
        assert len(set(tokens[row])) == 1
    assistant = make_matrix(material).measure(counted)
    assert np.all(sums.loss_tokens[there] > assistant.loss_tokens[there])


def test_an_item_too_long_under_one_prompt_is_left_out_under_all(material):
    everything = make_matrix(material)
    long = "Tell it at length. " * 30
    table = {name: {"own": OWN[name], "default": DEFAULT, "none": None} for name in OWN}
    table["chat"]["paraphrase"] = long
    matrix = make_matrix(material, table=table, sequence_length=256)
    tokenizer = material[1]

    def fits(item) -> bool:
        prompts = table[everything.domains[item.domain]].values()
        return all(
            len(with_system_prompt(item.instruction, tokenizer, prompt, "append").tokens) <= 256
            for prompt in prompts
        )

    kept = [item.id for item in everything.items if fits(item)]
    assert 0 < len(kept) < len(everything.items)
    assert [item.id for item in matrix.items] == kept
    assert sum(matrix.too_long.values()) == len(everything.items) - len(kept)
    assert matrix.too_long["chat"] > 0
    sums = matrix.measure(counted)
    chat = np.array([item.domain for item in matrix.items]) == 0
    assert np.all(np.isfinite(sums.nll[chat]))


def test_a_loss_that_is_not_finite_is_named(material):
    matrix = make_matrix(material)

    def broken(batch):
        return counted(batch)._replace(nll=np.full(len(batch.tokens), np.nan))

    with pytest.raises(UserError, match=r"domain (chat|tools) is nan under the prompt '"):
        matrix.measure(broken)


@pytest.fixture(scope="module")
def half_right():
    """Rows in which about half of the targets, and half of the labels, are the likeliest token."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, MODEL.vocab_size, (8, 32)).astype(np.int32)
    decoder = make_model(MODEL)(random_parameters(MODEL, 0, jnp.float32))
    likeliest = np.asarray(decoder(tokens)).argmax(axis=-1)
    right = rng.integers(0, 2, tokens.shape).astype(bool)
    batch = Batch(
        tokens=tokens,
        targets=np.where(right, likeliest, (likeliest + 1) % MODEL.vocab_size).astype(np.int32),
        segment_ids=np.ones_like(tokens),
        positions=np.tile(np.arange(32, dtype=np.int32), (8, 1)),
        domain_ids=np.zeros_like(tokens),
        loss_weights=rng.integers(0, 2, tokens.shape).astype(np.float32),
    )
    return batch, np.sum(right & (batch.loss_weights > 0), axis=1)


def test_only_labels_are_correct(half_right):
    batch, right = half_right
    np.testing.assert_array_equal(model_sums(fsdp=1)(batch).correct, right)
    np.testing.assert_array_equal(model_sums(fsdp=2, tensor=4)(batch).correct, right)


def test_each_domain_has_its_prompts(material):
    tokenizer = material[1]
    own = {"chat": "You are kind.", "code": "You are a programmer.", "plain": None, "same": DEFAULT}
    table = make_prompt_table(own, DEFAULT, tokenizer, {"chat": "Be kind."})
    assert table["chat"] == {
        "own": "You are kind.",
        "default": DEFAULT,
        "as code": "You are a programmer.",
        "as plain": None,
        "paraphrase": "Be kind.",
        "unrelated": "You are a gardener.",
        "none": None,
    }
    assert table["code"]["paraphrase"] == "You are a software developer."
    # Without a prompt there is nothing to word otherwise; the default prompt is a column already.
    assert table["plain"].keys() == {"own", "default", "as chat", "as code", "none"}
    assert columns(table) == [
        *("own", "default", "as chat", "as code", "as plain", "paraphrase", "unrelated", "none")
    ]
    unknown = make_prompt_table({"law": "You are a judge."}, DEFAULT, tokenizer, {})
    assert columns(unknown) == ["own", "default", "unrelated", "none"]


def test_the_unrelated_prompt_is_about_as_long(material):
    tokenizer = material[1]
    long = "You are a lawyer who reads contracts line by line, and who tells what they may cost."
    (prompts,) = make_prompt_table({"law": long}, DEFAULT, tokenizer, {}).values()
    lengths = [len(tokenizer.encode(prompts[name])) for name in ("own", "unrelated")]
    assert abs(lengths[0] - lengths[1]) <= 5
    (prompts,) = make_prompt_table(
        {"garden": "You are a gardener."}, DEFAULT, tokenizer, {}
    ).values()
    assert prompts["unrelated"] != "You are a gardener."


@pytest.mark.parametrize(
    ("paraphrases", "message"),
    [
        ({"law": "Hi."}, "names the domain 'law', which is not among chat, tools"),
        ({"chat": DEFAULT}, "of chat equals its prompt"),
        ({"chat": "<|im_end|>"}, "has the control token"),
    ],
)
def test_a_paraphrase_that_is_none_is_refused(material, paraphrases, message):
    with pytest.raises(UserError, match=message):
        make_prompt_table(OWN, DEFAULT, material[1], paraphrases)


COLUMNS = ["own", "default", "none"]


def by_hand():
    nll = np.array([[2.0, 3.0, 4.0], [6.0, 6.0, np.nan]])
    tokens = np.array([[1, 1, 1], [3, 3, 0]])
    return ItemSums(nll, tokens, np.array([[1, 0, 1], [2, 1, 0]]))


def test_cells_and_gap_by_hand():
    told = summarize(by_hand(), np.array([0, 0]), ["code", "empty"], COLUMNS)
    assert told["empty"] == {"cells": {}, "gap": None}
    code = told["code"]
    assert code["cells"].keys() == {"own", "default"}
    assert code["cells"]["own"] == {
        "loss": 2.0, "accuracy": 0.75, "perplexity": pytest.approx(math.exp(2)),
        "difference": 0.0, "interval": [0.0, 0.0],
    }  # fmt: skip
    default = code["cells"]["default"]
    assert default["loss"] == 2.25
    assert default["accuracy"] == 0.25
    # A sample of two is the first twice, both, or the second twice: gaps 1, 1/4 and 0.
    assert code["gap"] == {
        "own_loss": 2.0, "own_interval": [2.0, 2.0], "gap": 0.25, "interval": [0.0, 1.0],
    }  # fmt: skip


def test_the_interval_of_a_gap_is_that_of_a_ratio_of_paired_sums():
    rng = np.random.default_rng(1)
    tokens = rng.integers(5, 200, 300)
    own = tokens * rng.normal(3, 1, 300)  # losses of items differ far more than prompts do
    difference = tokens * rng.normal(0.05, 0.1, 300)
    columns = np.stack([own, own + difference, own + 0.2 * tokens], axis=1)
    counts = np.repeat(tokens[:, None], 3, axis=1)
    sums = ItemSums(columns, counts, 0 * counts)
    told = summarize(sums, np.zeros(300), ["code"], COLUMNS)["code"]
    ratio = difference.sum() / tokens.sum()
    error = math.sqrt(np.sum((difference - ratio * tokens) ** 2)) / tokens.sum()  # delta method
    low, high = told["gap"]["interval"]
    assert told["gap"]["gap"] == pytest.approx(ratio)
    assert (low, high) == pytest.approx((ratio - 1.96 * error, ratio + 1.96 * error), abs=error / 3)
    assert told["cells"]["none"]["interval"] == pytest.approx([0.2, 0.2])


def test_one_item_has_no_interval():
    sums = by_hand()
    first = ItemSums(sums.nll[:1], sums.loss_tokens[:1], sums.correct[:1])
    told = summarize(first, np.array([0]), ["code"], COLUMNS)["code"]
    assert told["gap"] == {"own_loss": 2.0, "own_interval": None, "gap": 1.0, "interval": None}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    config = load_config(small_config(directory, mesh={"fsdp": 1}, train={"steps": 1}))
    assert train(config, make_evaluations=make_evaluations).finished
    return config.logging.run_dir


def test_a_checkpoint_is_measured_beside_what_it_began_from(run, tmp_path, log_text):
    opened = open_checkpoint(run, mesh="fsdp=1", devices=jax.devices())
    options = HeldOutOptions(paraphrases={"maths": "You are good at sums."})
    told = measure_held_out(opened, options, tmp_path)
    assert json.loads((tmp_path / "held_out.json").read_text()) == told
    assert (tmp_path / "held_out.png").read_bytes().startswith(b"\x89PNG")
    assert told["untrained"] == "random parameters, train.seed 0"
    assert told["domains"]["maths"]["prompts"]["paraphrase"]["text"] == "You are good at sums."

    logged = [r for r in records(run / "metrics.jsonl") if "eval/chat/loss" in r]
    assert [r["step"] for r in logged] == [0, 1]
    for model, values in zip(("untrained", "trained"), logged, strict=True):
        for name in ("chat", "maths"):
            gap = told["models"][model][name]["gap"]
            own, default = (values[f"eval/{name}/{kind}loss"] for kind in ("", "default_prompt/"))
            assert gap["own_loss"] == pytest.approx(own, rel=1e-5)
            assert gap["own_loss"] + gap["gap"] == pytest.approx(default, rel=1e-5)

    lines = [json.loads(line) for line in (tmp_path / "held_out_items.jsonl").open()]
    own = [
        line
        for line in lines
        if (line["model"], line["domain"], line["prompt"]) == ("trained", "maths", "own")
    ]
    assert len(own) == told["domains"]["maths"]["items"]
    assert sum(line["loss_tokens"] for line in own) == told["domains"]["maths"]["loss_tokens"]
    loss = sum(line["nll"] for line in own) / sum(line["loss_tokens"] for line in own)
    assert loss == pytest.approx(told["models"]["trained"]["maths"]["gap"]["own_loss"])

    shown = log_text.getvalue()
    gap = told["models"]["trained"]["maths"]["gap"]
    (line,) = [x for x in shown.splitlines() if x.startswith("maths") and " trained" in x]
    assert f"{gap['own_loss']:.3f}" in line
    assert f"{gap['gap']:+.3f}" in line


def test_a_checkpoint_without_data_or_beginning(run, tmp_path):
    opened = open_checkpoint(run, mesh="fsdp=1", devices=jax.devices())
    imported = dataclasses.replace(opened, step=tmp_path / "imported")
    with pytest.raises(UserError, match="names no data"):
        measure_held_out(imported, HeldOutOptions(), tmp_path)
    missing = HeldOutOptions(untrained=tmp_path / "nothing")
    with pytest.raises(UserError, match="nothing is no checkpoint"):
        measure_held_out(opened, missing, tmp_path)


def test_the_untrained_model_is_the_one_named_or_left_out(run, tmp_path, monkeypatch, log_text):
    opened = open_checkpoint(run, mesh="fsdp=1", devices=jax.devices())
    told = measure_held_out(opened, HeldOutOptions(untrained=run, limit=2), tmp_path)
    assert [domain["items"] for domain in told["domains"].values()] == [2, 2]
    assert told["untrained"] == str(run)
    assert told["models"]["untrained"] == told["models"]["trained"]

    began = load_config(run / "config.yaml", [f"model.init_from={tmp_path / 'gone'}"])
    monkeypatch.setattr(measure, "_own_config", lambda step: began)
    told = measure_held_out(opened, HeldOutOptions(limit=1), tmp_path)
    assert told["untrained"] is None
    assert told["models"].keys() == {"trained"}
    assert told["models"]["trained"]["chat"]["gap"]["interval"] is None
    assert "is left out: " in log_text.getvalue()


def test_a_run_that_began_from_published_weights_is_compared_with_them(run, tmp_path, monkeypatch):
    opened = open_checkpoint(run, mesh="fsdp=1", devices=jax.devices())
    published = micro_published(tmp_path / "Tiny", np.float32)
    overrides = [f"model.init_from={published}", "model.preset=null", "tokenizer.path=null"]
    began = load_config(run / "config.yaml", [*overrides, f"data.cache_dir={tmp_path}"])
    monkeypatch.setattr(measure, "_own_config", lambda step: began)
    told = measure_held_out(opened, HeldOutOptions(limit=1), tmp_path / "out")
    assert told["untrained"] == str(published)
    assert len(list((tmp_path / "imported").glob("Tiny-*/parameters"))) == 1


def test_pictures_and_tables_take_any_domains(tmp_path, log_text):
    told = summarize(by_hand(), np.array([0, 0]), ["code", "empty"], COLUMNS)
    draw_matrix({"one": told, "two": told}, COLUMNS, tmp_path / "matrix.png")
    assert (tmp_path / "matrix.png").stat().st_size > 1000
    prompts = {"own": {"text": "Code."}, "default": {"text": "Help."}}
    domains = {
        "code": {"items": 2, "loss_tokens": 4, "prompts": prompts},
        "empty": {"items": 0, "loss_tokens": 0, "prompts": prompts},
    }
    print_matrix({"models": {"trained": told}, "domains": domains, "columns": COLUMNS})
    shown = log_text.getvalue()
    assert "2.250 25.0%" in shown
    assert "+0.250   +0.000 to +1.000" in shown
    with pytest.raises(UserError, match="cannot write"):
        draw_matrix({"one": told}, COLUMNS, tmp_path / "missing" / "matrix.png")
