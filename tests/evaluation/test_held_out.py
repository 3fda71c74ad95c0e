"""Held-out losses: each conversation once, alone, under its own and under the default prompt."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moi_jax import config as config_lib
from moi_jax.config.load import make_config
from moi_jax.data.cache.prepare import prepare
from moi_jax.data.cache.selection import select
from moi_jax.evaluation.held_out import HeldOut
from moi_jax.evaluation.row_sums import RowSums, make_row_sums
from moi_jax.models.decoder import make_model
from moi_jax.models.parameters import random_parameters
from moi_jax.models.presets import PRESETS
from moi_jax.parallel.mesh import make_mesh
from moi_jax.text.instructions import label_mask
from moi_jax.text.rendering import with_system_prompt
from moi_jax.text.tokenizer import load_tokenizer

from support.limits import SECONDS, watched_batches
from support.runs import SAMPLES

DEFAULT = "You are a helpful assistant."


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
    held_out = HeldOut(caches, selections, config.data, "assistant", tokenizer, 2, 4)
    return config, tokenizer, caches, selections, held_out


def test_losses_equal_each_conversation_alone(material, monkeypatch):
    _, tokenizer, caches, selections, held_out = material
    model = PRESETS["micro"]
    parameters = random_parameters(model, 0, jnp.float32)
    decoder = make_model(model)(parameters)
    mesh = make_mesh(config_lib.Mesh(fsdp=1), jax.devices())
    row_sums = make_row_sums(make_model(model), mesh)
    limits = watched_batches(monkeypatch)
    losses = held_out.losses(lambda batch: row_sums(parameters, batch))
    assert set(limits) == {SECONDS}

    log_softmax = jax.jit(lambda tokens: jax.nn.log_softmax(decoder(tokens)[0]))

    def alone(instructions):
        total = count = 0.0
        for instruction in instructions:
            tokens = np.zeros((1, 512), np.int32)
            tokens[0, : len(instruction.tokens)] = instruction.tokens
            labels = np.flatnonzero(label_mask(instruction, "assistant"))
            log_probabilities = np.asarray(log_softmax(tokens))
            total -= float(log_probabilities[labels - 1, tokens[0, labels]].sum())
            count += len(labels)
        return total / count

    chat, tools = (
        cache.read(selection.held_out) for cache, selection in zip(caches, selections, strict=True)
    )
    default = [with_system_prompt(i, tokenizer, DEFAULT, "append") for i in tools]
    expected = {
        "eval/chat/loss": alone(chat),
        "eval/chat/default_prompt/loss": alone(chat),
        "eval/tools/loss": alone(tools),
        "eval/tools/default_prompt/loss": alone(default),
    }
    expected["eval/mean/loss"] = (expected["eval/chat/loss"] + expected["eval/tools/loss"]) / 2
    expected["eval/mean/default_prompt/loss"] = (
        expected["eval/chat/default_prompt/loss"] + expected["eval/tools/default_prompt/loss"]
    ) / 2
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        assert losses[name] == pytest.approx(value, rel=1e-5), name
    assert losses["eval/tools/loss"] != losses["eval/tools/default_prompt/loss"]


def test_every_held_out_conversation_stands_once_alone_in_its_row(material):
    _, _, caches, selections, held_out = material
    seen = []
    for batch in held_out.batches(held_out.own):
        assert len(batch.tokens) % 4 == 0  # divides over the mesh
        for tokens, segment_ids in zip(batch.tokens, batch.segment_ids, strict=True):
            assert set(segment_ids) <= {0, 1}
            if segment_ids.any():
                seen.append(tuple(tokens[segment_ids == 1]))
    expected = [
        tuple(instruction.tokens)
        for cache, selection in zip(caches, selections, strict=True)
        for instruction in cache.read(selection.held_out)
    ]
    assert sorted(seen) == sorted(expected)


def test_a_domain_without_loss_tokens_is_not_a_number_and_out_of_the_mean(material):
    held_out = material[-1]

    def only_chat(batch):
        tokens = 2 * np.any(batch.domain_ids == 0, axis=1)
        return RowSums(1.5 * tokens, tokens, tokens)

    losses = held_out.losses(only_chat)
    assert losses["eval/chat/loss"] == losses["eval/mean/loss"] == 1.5
    assert math.isnan(losses["eval/tools/loss"])
