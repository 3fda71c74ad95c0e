"""The chunked vocabulary loss: it equals the unchunked loss and never materialises the logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moi_jax import config as config_lib
from moi_jax.models import loss as loss_lib
from moi_jax.models.loss import weighted_nll
from moi_jax.parallel.mesh import make_mesh

B, S, D, V = 4, 24, 8, 50


def inputs():
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(B, S, D)).astype(np.float32)
    head = rng.normal(size=(D, V)).astype(np.float32)
    targets = rng.integers(0, V, (B, S)).astype(np.int32)
    return hidden, head, targets


def whole_nll(hidden, head, targets):
    log_probabilities = jax.nn.log_softmax(hidden @ head, axis=-1)
    return -jnp.take_along_axis(log_probabilities, targets[..., None], axis=-1)[..., 0]


@pytest.mark.parametrize("chunk_tokens", [1, 16, 20, 10_000])
def test_chunks_give_the_whole_loss_and_gradients(monkeypatch, chunk_tokens):
    monkeypatch.setattr(loss_lib, "CHUNK_TOKENS", chunk_tokens)
    hidden, head, targets = inputs()
    weights = np.linspace(0, 1, B * S).reshape(B, S)

    def chunked(hidden, head):
        return weighted_nll(hidden, head, targets, weights)

    def plain(hidden, head):
        nll = whole_nll(hidden, head, targets)
        return jnp.sum(weights * nll), nll

    ours, whole = (
        jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(hidden, head)
        for total in (chunked, plain)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours, whole)


@pytest.mark.parametrize(
    "axes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=["fsdp", "data, fsdp, tensor"]
)
def test_a_vocabulary_that_does_not_divide_over_the_mesh_gives_the_same(axes):
    """V = 50 is padded to 56 or 52 where the logits are split, and only there."""
    hidden, head, targets = (np.repeat(x, 2, axis=0) if x.ndim > 1 else x for x in inputs())
    head, weights = head[:D], np.linspace(0, 1, 2 * B * S, dtype=np.float32).reshape(2 * B, S)
    mesh = make_mesh(config_lib.Mesh(**axes), jax.devices())

    def loss(hidden, head):
        return weighted_nll(hidden, head, targets, weights)

    with jax.set_mesh(mesh):
        ours = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(hidden, head)
    nll = whole_nll(hidden, head, targets)
    np.testing.assert_allclose(ours[0][1], nll, rtol=1e-5, atol=1e-5)
    whole = jax.grad(lambda h, w: jnp.sum(weights * whole_nll(h, w, targets)), argnums=(0, 1))(
        hidden, head
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours[1], whole
    )


def test_a_position_without_weight_counts_nothing_even_if_it_is_not_finite():
    hidden, head, targets = inputs()
    weights = np.ones((B, S), np.float32)
    weights[1, 3] = 0
    hidden[1, 3] = np.inf

    def loss(hidden, head):
        return weighted_nll(hidden, head, targets, weights)[0]

    value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(hidden, head)
    assert np.isfinite(value)
    others = weights > 0
    of_hidden, of_head = map(np.asarray, gradients)
    assert np.isfinite(of_hidden[others]).all()
    assert np.isfinite(of_head).all()
    np.testing.assert_array_equal(of_hidden[1, 3], 0)


def largest_array(jaxpr) -> int:
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [v.aval.size for v in equation.outvars if hasattr(v.aval, "size")]
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                if hasattr(inner, "jaxpr"):
                    inner = inner.jaxpr
                if hasattr(inner, "eqns"):
                    sizes.append(largest_array(inner))
    return max(sizes)


def test_logits_are_never_whole_forward_or_backward(monkeypatch):
    monkeypatch.setattr(loss_lib, "CHUNK_TOKENS", 16)
    hidden, head, targets = inputs()

    def of(total):
        gradient = jax.grad(total, argnums=(0, 1))
        return largest_array(jax.make_jaxpr(gradient)(hidden, head).jaxpr)

    weights = np.ones((B, S), np.float32)
    # The check does find whole logits where they exist.
    assert of(lambda h, w: jnp.sum(whole_nll(h, w, targets))) >= B * S * V
    assert of(lambda h, w: weighted_nll(h, w, targets, weights)[0]) <= max(16 * V, B * S * D)
