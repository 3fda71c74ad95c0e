"""The chunked vocabulary loss: it equals the unchunked loss and never materialises the logits.

Nor does it compute those of a chunk in which no position counts.
"""

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
        nll = jnp.where(weights > 0, whole_nll(hidden, head, targets), 0)
        return jnp.sum(weights * nll), nll

    ours, whole = (
        jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(hidden, head)
        for total in (chunked, plain)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours, whole)


MESHES = pytest.mark.parametrize(
    "axes",
    [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 2, "fsdp": 2, "context": 2}],
    ids=", ".join,
)


@MESHES
def test_a_vocabulary_that_does_not_divide_over_the_mesh_gives_the_same(axes):
    """V = 50 is padded to 56 or 52 where the logits are split, and only there."""
    hidden, head, targets = (np.repeat(x, 2, axis=0) if x.ndim > 1 else x for x in inputs())
    head, weights = head[:D], np.linspace(0, 1, 2 * B * S, dtype=np.float32).reshape(2 * B, S)
    mesh = make_mesh(config_lib.Mesh(**axes), jax.devices())

    def loss(hidden, head):
        return weighted_nll(hidden, head, targets, weights)

    with jax.set_mesh(mesh):
        ours = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(hidden, head)
    nll = np.where(weights > 0, whole_nll(hidden, head, targets), 0)
    np.testing.assert_allclose(ours[0][1], nll, rtol=1e-5, atol=1e-5)
    whole = jax.grad(lambda h, w: jnp.sum(weights * whole_nll(h, w, targets)), argnums=(0, 1))(
        hidden, head
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours[1], whole
    )


def sparse_weights(seed: int, rows: int) -> np.ndarray:
    """float32[rows, S]; the share of positions with a weight differs from row to row, down to 0."""
    rng = np.random.default_rng(seed)
    counts = rng.random((rows, S)) < np.linspace(0, 0.7, rows)[:, None]
    return np.where(counts, rng.random((rows, S)), 0).astype(np.float32)


@MESHES
@pytest.mark.parametrize("chunk_tokens", [1, 5])
def test_scattered_weights_give_the_whole_loss_on_a_mesh(monkeypatch, axes, chunk_tokens):
    monkeypatch.setattr(loss_lib, "CHUNK_TOKENS", chunk_tokens)
    hidden, head, targets = (np.repeat(x, 2, axis=0) if x.ndim > 1 else x for x in inputs())
    head, weights = head[:D], sparse_weights(1, 2 * B)

    def loss(hidden, head):
        return weighted_nll(hidden, head, targets, weights)

    with jax.set_mesh(make_mesh(config_lib.Mesh(**axes), jax.devices())):
        (_, nll), ours = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(
            hidden, head
        )
    whole = np.where(weights > 0, whole_nll(hidden, head, targets), 0)
    np.testing.assert_allclose(nll, whole, rtol=1e-5, atol=1e-5)
    gradients = jax.grad(lambda h, w: jnp.sum(weights * whole_nll(h, w, targets)), argnums=(0, 1))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        ours,
        gradients(hidden, head),
    )


@pytest.mark.parametrize("share", [0, 0.3, 1])
def test_only_chunks_with_a_position_that_counts_are_computed(monkeypatch, share):
    """Chunks of 8 of 96 positions. jax calls back for each chunk whose logits it computes."""
    monkeypatch.setattr(loss_lib, "CHUNK_TOKENS", 8)
    computed = []

    def counted(*args):
        logits = logits_of(*args)
        jax.debug.callback(lambda: computed.append(1))
        return logits

    logits_of = loss_lib._logits
    monkeypatch.setattr(loss_lib, "_logits", counted)
    hidden, head, targets = inputs()
    weights = (np.random.default_rng(0).random((B, S)) < share).astype(np.float32)
    nll, likeliest = loss_lib.token_scores(hidden, head, targets, weights > 0)
    gradients = jax.grad(lambda h: weighted_nll(h, head, targets, weights)[0])(hidden)
    jax.effects_barrier()
    assert len(computed) == 2 * np.ceil(weights.sum() / 8)  # once for each of the two functions
    for result in (nll, likeliest, gradients):
        assert not np.asarray(result)[weights == 0].any()
    whole = whole_nll(hidden, head, targets)
    np.testing.assert_allclose(nll, np.where(weights > 0, whole, 0), rtol=1e-5, atol=1e-5)
    right = (hidden @ head).argmax(axis=-1) == targets
    np.testing.assert_array_equal(likeliest, right & (weights > 0))


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


def test_a_frozen_head_has_no_gradient(monkeypatch):
    monkeypatch.setattr(loss_lib, "CHUNK_TOKENS", 16)
    hidden, head, targets = inputs()
    weights = sparse_weights(1, B)

    def compiled(argnums):
        loss = jax.grad(lambda h, w: weighted_nll(h, w, targets, weights)[0], argnums)
        return jax.jit(loss).lower(hidden, head).compile().as_text()

    sum_of_chunks = f"f32[1,{D},{V}]"
    assert sum_of_chunks in compiled((0, 1))
    assert sum_of_chunks not in compiled(0)
