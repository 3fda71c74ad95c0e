"""One training step and one evaluation step: the maths of the run, jitted on the mesh."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from moi_jax.data.loader import Batch
from moi_jax.models.config import ModelConfig
from moi_jax.models.decoder import Bind, Decoder
from moi_jax.models.loss import token_nll
from moi_jax.models.parameters import Tree
from moi_jax.parallel.placing import batch_sharding, replicated
from moi_jax.training.optimizer import Schedule
from moi_jax.training.state import TrainState, state_shardings

Metrics = dict[str, jax.Array]


def batch_sums(model: Decoder, batch: Batch, domains: int) -> tuple[jax.Array, Metrics]:
    """sum(w nll) of a microbatch [M, S], and the sums every metric is made of.

    Sums, never means: they add up over microbatches and devices to what one batch gives.
    """
    hidden = model.hidden_states(batch.tokens, batch.positions, batch.segment_ids, training=True)
    nll = token_nll(hidden, model.head_weight(), batch.targets)
    counts = batch.loss_weights > 0
    # A position whose weight is zero must not reach the sum even as 0 * inf.
    nll = jnp.where(counts, nll, 0)
    in_domain = batch.domain_ids[..., None] == jnp.arange(domains)
    weighted = jnp.sum(nll * batch.loss_weights.astype(nll.dtype))
    return weighted, {
        "weights": jnp.sum(batch.loss_weights.astype(nll.dtype)),
        "nll": jnp.sum(nll),
        "loss_tokens": jnp.sum(counts, dtype=jnp.int32),
        "tokens": jnp.sum(batch.segment_ids > 0, dtype=jnp.int32),
        "domain_nll": jnp.sum(jnp.where(in_domain, nll[..., None], 0), axis=(0, 1)),
        "domain_loss_tokens": jnp.sum(in_domain & counts[..., None], axis=(0, 1), dtype=jnp.int32),
    }


def make_train_step(
    config: ModelConfig,
    bind: Bind,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    domains: int,
    mesh: Mesh,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The jitted step: (state, batch [A, M, S]) -> (state, metrics); the state is donated.

    The loss is sum(w nll) / sum(w) over the whole batch, all A microbatches and devices. The
    update is applied only where loss and gradient norm are finite and some weight is not zero
    (`applied`); else parameters and moments stay, and only the step moves on.
    """

    def loss_sums(parameters: Tree, microbatch: Batch) -> tuple[jax.Array, Metrics]:
        return batch_sums(bind(parameters), microbatch, domains)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        gradients, weighted, sums = _accumulate(loss_sums, state.parameters, batch)
        scale = 1 / jnp.where(sums["weights"] > 0, sums["weights"], 1)
        gradients = jax.tree.map(lambda g: g * scale.astype(g.dtype), gradients)
        loss, gradient_norm = weighted * scale, optax.tree.norm(gradients)
        applied = jnp.isfinite(loss) & jnp.isfinite(gradient_norm) & (sums["weights"] > 0)

        learning_rate = jnp.asarray(schedule(state.step), jnp.float32)
        updates, moments = optimizer.update(gradients, state.opt_state, state.parameters)
        parameters = jax.tree.map(
            lambda p, u: (p - learning_rate * u).astype(p.dtype),
            state.parameters,
            updates,
        )
        keep = (state.parameters, state.opt_state)
        parameters, moments = jax.tree.map(
            lambda new, old: jnp.where(applied, new, old), (parameters, moments), keep
        )
        metrics = sums | {
            "loss": loss,
            "grad_norm": gradient_norm,
            "learning_rate": learning_rate,
            "applied": applied,
        }
        return TrainState(state.step + 1, parameters, moments), metrics

    state = state_shardings(config, optimizer, mesh)
    return jax.jit(
        step,
        in_shardings=(state, batch_sharding(mesh)),
        out_shardings=(state, replicated(mesh)),
        donate_argnums=0,
    )


def _accumulate(
    loss_sums: Callable[[Tree, Batch], tuple[jax.Array, Metrics]], parameters: Tree, batch: Batch
) -> tuple[Tree, jax.Array, Metrics]:
    """Gradients and sums added over the A microbatches of a batch [A, M, S]."""

    def one(total: Any, microbatch: Batch) -> tuple[Any, None]:
        (weighted, sums), gradients = jax.value_and_grad(loss_sums, has_aux=True)(
            parameters, microbatch
        )
        return jax.tree.map(jnp.add, total, (gradients, weighted, sums)), None

    first = jax.tree.map(lambda x: x[0], batch)
    shapes = jax.eval_shape(loss_sums, parameters, first)
    gradients = jax.tree.map(
        lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)), parameters
    )
    zero = (gradients, *jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))
    total, _ = jax.lax.scan(one, zero, batch)
    return total
