"""The decoder against outputs of the published reference Qwen-7B code (tests/golden)."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moi_jax.checkpoints.hf.reader import read_published
from moi_jax.checkpoints.hf.weights import import_parameters, published_shapes
from moi_jax.models import rotary
from moi_jax.models.compute import Compute
from moi_jax.models.config import read_hf_config
from moi_jax.models.decoder import Decoder, make_model
from moi_jax.models.loss import weighted_nll
from moi_jax.models.parameters import map_parameters, parameter_specs
from moi_jax.models.presets import PRESETS
from moi_jax.models.remat import SAVED, remat_policy

LOGITS_ATOL = 2e-5  # a wrong norm eps changes them by 4e-5: a looser tolerance would not notice
GRADIENTS_ATOL = 1e-6


@pytest.fixture(scope="module", params=["A", "B"])
def fixture(request, golden):
    config, parameters = read_published(golden / request.param, None)
    return request.param, config, parameters, np.load(golden / request.param / "logits.npz")


@pytest.fixture(scope="module")
def fixture_a(golden):
    return *read_published(golden / "A", None), np.load(golden / "A" / "logits.npz")


@pytest.fixture(scope="module")
def fixture_b(golden):
    return *read_published(golden / "B", None), np.load(golden / "B" / "logits.npz")


def training_logits(model: Decoder, tokens: np.ndarray) -> jax.Array:
    segment_ids = jnp.ones(tokens.shape, jnp.int32)
    positions = rotary.segment_positions(segment_ids)
    hidden = model.hidden_states(tokens, positions, segment_ids, extend_context=False)
    return model.logits(hidden)


@pytest.mark.parametrize("length", [32, 100])
def test_logits_equal_the_reference(fixture, length):
    _, config, parameters, golden = fixture
    logits = make_model(config)(parameters)(golden[f"x{length}"].astype(np.int32))
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, golden[f"eval_{length}"], atol=LOGITS_ATOL, rtol=0)


@pytest.mark.parametrize("length", [64, 65])
def test_logits_at_the_jump_of_the_ntk_factor(fixture_b, length):
    config, parameters, golden = fixture_b
    logits = make_model(config)(parameters)(golden[f"x{length}"].astype(np.int32))
    np.testing.assert_allclose(logits, golden[f"eval_{length}"], atol=LOGITS_ATOL, rtol=0)


def test_logits_of_padded_rows(fixture_a):
    config, parameters, golden = fixture_a
    mask = golden["mask_pad32_right"]
    logits = make_model(config)(parameters)(
        golden["x_pad32_right"].astype(np.int32), segment_ids=mask.astype(np.int32)
    )
    real = mask == 1
    np.testing.assert_allclose(
        logits[real], golden["eval_pad32_right"][real], atol=LOGITS_ATOL, rtol=0
    )


@pytest.mark.parametrize(
    ("switch", "key"), [("dynamic_ntk", "eval_100_nontk"), ("logn_attention", "eval_100_nologn")]
)
def test_ntk_and_logn_each_switched_off(fixture_b, switch, key):
    import dataclasses

    config, parameters, golden = fixture_b
    model = make_model(dataclasses.replace(config, **{switch: False}))(parameters)
    logits = model(golden["x100"].astype(np.int32))
    np.testing.assert_allclose(logits, golden[key], atol=LOGITS_ATOL, rtol=0)


def test_training_mode_has_neither(fixture_b):
    config, parameters, golden = fixture_b
    model = make_model(config)(parameters)
    logits = training_logits(model, golden["x100"].astype(np.int32))
    np.testing.assert_allclose(logits, golden["train_100"], atol=LOGITS_ATOL, rtol=0)


def mean_loss(config, parameters, tokens, labels, remat="none"):
    """Computes the reference's loss: unshifted labels, -100 ignored, mean over the others."""
    model = make_model(config, Compute(remat=remat_policy(remat, {})))(parameters)
    segment_ids = jnp.ones(tokens.shape, jnp.int32)
    positions = rotary.segment_positions(segment_ids)
    hidden = model.hidden_states(tokens, positions, segment_ids, extend_context=False)
    targets = np.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=-100)
    weights = (targets != -100).astype(np.float32)
    targets = np.maximum(targets, 0).astype(np.int32)
    return weighted_nll(hidden, model.head_kernel(), targets, weights)[0] / np.sum(weights)


@pytest.mark.parametrize("remat", ["none", *SAVED])
def test_loss_and_gradients_equal_the_reference(golden, fixture_a, remat):
    config, parameters, arrays = fixture_a
    tokens, labels = arrays["x32"].astype(np.int32), arrays["labels_32"]
    loss, gradients = jax.value_and_grad(lambda p: mean_loss(config, p, tokens, labels, remat))(
        parameters
    )
    report = json.loads((golden / "report.json").read_text())["A"]["loss_32"]
    np.testing.assert_allclose(loss, report["loss"], rtol=1e-5)

    expected = np.load(golden / "A" / "grads.npz")
    flat = dict(import_parameters(config, lambda name: expected[f"32/{name}"], np.float32))
    mapped = map_parameters(config, lambda path, _: flat[path])
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=GRADIENTS_ATOL, rtol=0),
        gradients,
        mapped,
    )


def test_ntk_factor_jumps_where_the_reference_does(golden):
    report = json.loads((golden / "report.json").read_text())["B"]
    for length in (32, 64, 65, 100, 129, 200):
        expected = report[f"alpha_{length}"][0]
        assert rotary.ntk_alpha(jnp.array([length]), 64).tolist() == [expected]
    # A float log2 may be off by one ulp at every power of two times the trained length.
    lengths = np.array([8192 << k for k in range(12)])
    assert rotary.ntk_alpha(jnp.asarray(lengths), 8192).tolist() == [
        (2 << k) - 1 for k in range(12)
    ]
    assert rotary.ntk_alpha(jnp.asarray(lengths + 1), 8192).tolist() == [
        (4 << k) - 1 for k in range(12)
    ]


def test_qwen_7b_has_the_published_number_of_parameters_and_tensors():
    config = PRESETS["qwen-7b"]
    assert sum(int(np.prod(p.shape)) for p in parameter_specs(config).values()) == 7_721_324_544
    shapes = published_shapes(config)
    assert len(shapes) == 259
    assert shapes["transformer.h.31.mlp.w1.weight"] == (11008, 4096)
    assert shapes["transformer.h.0.mlp.c_proj.weight"] == (4096, 11008)
    assert shapes["transformer.h.0.attn.c_attn.bias"] == (12288,)


def test_the_first_published_config_keys_are_read_too():
    """The release of August 2023 used other keys and had seq_length 2048."""
    old = {
        "model_type": "qwen",
        "n_embd": 4096,
        "n_layer": 32,
        "n_head": 32,
        "kv_channels": 128,
        "ffn_hidden_size": 22016,
        "padded_vocab_size": 151936,
        "seq_length": 2048,
        "rotary_emb_base": 10000,
        "layer_norm_epsilon": 1e-6,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
        "initializer_range": 0.02,
    }
    import dataclasses

    assert read_hf_config(json.dumps(old), "x") == dataclasses.replace(
        PRESETS["qwen-7b"], seq_length=2048
    )
