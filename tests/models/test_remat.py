"""Remat policies: what the forward pass keeps for the backward pass grows along the ladder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moi_jax.config import Config
from moi_jax.models.compute import Compute
from moi_jax.models.decoder import make_model
from moi_jax.models.parameters import abstract_parameters
from moi_jax.models.remat import SAVED, remat_policy

from support.trainer import MODEL, random_batch

L = MODEL.num_layers


def kept_by_the_layers(name, tensors=None, model=MODEL) -> list[tuple[int, ...]]:
    """The shapes of the arrays that the forward scan over the layers stacks, one for each layer."""
    bind = make_model(model, Compute(remat=remat_policy(name, tensors or {})))
    batch = random_batch(0)

    def loss(parameters):
        hidden = bind(parameters).hidden_states(
            batch.tokens, batch.positions, batch.segment_ids, extend_context=False
        )
        return jnp.sum(hidden)

    jaxpr = jax.make_jaxpr(jax.grad(loss))(abstract_parameters(model, "float32"))
    forward = next(e for e in jaxpr.eqns if e.primitive.name == "scan")
    shapes = [v.aval.shape for v in forward.outvars]
    return sorted(shape[1:] for shape in shapes if shape[:3] == (L, *batch.tokens.shape))


def size(shapes):
    return sum(int(np.prod(shape)) for shape in shapes)


def test_each_policy_keeps_more_than_the_one_before():
    sizes = [size(kept_by_the_layers(name)) for name in (*SAVED, "none")]
    assert sizes == sorted(set(sizes))


def test_full_keeps_the_input_of_a_layer_alone():
    b, s = random_batch(0).tokens.shape
    assert kept_by_the_layers("full") == [(b, s, MODEL.hidden_size)]


def test_minimal_with_context_keeps_the_named_tensors():
    b, s = random_batch(0).tokens.shape
    width, heads, mlp = MODEL.hidden_size, MODEL.num_heads, MODEL.mlp_width
    kept = [
        *[(b, s, width)] * 2,  # decoder_layer_input, which every policy keeps, and out_proj
        *[(b, s, heads, MODEL.head_dim)] * 2,  # query_proj, context
        *[(b, s, MODEL.num_kv_heads, MODEL.head_dim)] * 2,  # key_proj, value_proj
        *[(b, s, mlp)] * 2,  # mlp_gate, mlp_up
    ]
    assert kept_by_the_layers("minimal_with_context") == sorted(kept)


def test_exceptions_change_single_tensors():
    b, s = random_batch(0).tokens.shape
    mlp = (b, s, MODEL.mlp_width)
    full, more = (kept_by_the_layers("full", t) for t in ({}, {"mlp_up": "save"}))
    assert sorted([*full, mlp]) == more
    fewer = kept_by_the_layers("minimal", {"mlp_up": "recompute", "mlp_gate": "recompute"})
    assert mlp not in fewer


@pytest.mark.parametrize("name", ["full", "minimal_with_context"])
def test_layers_that_do_not_rotate_keep_nothing_more(name):
    """Their angles are computed again from those of all layers."""
    flags = dataclasses.replace(MODEL, rope_layers=(True, False) * (L // 2))
    assert kept_by_the_layers(name, model=flags) == kept_by_the_layers(name)


def test_an_exception_without_remat_is_refused():
    values = {"remat": "none", "remat_tensors": {"mlp_up": "save"}}
    with pytest.raises(ValueError, match="remat_tensors has no effect with remat: none"):
        Config(model=values, data={"domains": []})
