"""Sums over each row of a batch, from which losses and accuracies are computed."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moi_jax.data.loader import Batch
from moi_jax.models.decoder import Bind, Tree
from moi_jax.models.loss import token_scores
from moi_jax.parallel.placing import place_rows, replicated
from moi_jax.parallel.stuck import limited_batch


class RowSums(NamedTuple):
    """Sums over the targets with a positive loss weight, [B] each."""

    nll: Any  # float32 or wider, in nats
    loss_tokens: Any  # int32
    correct: Any  # int32, targets that are the most likely token


def row_sums_step(bind: Bind, mesh: Mesh) -> Callable[[Tree, Batch], RowSums]:
    """Returns the jitted function (parameters, batch [B, S]), both on the mesh, -> `RowSums`."""

    def step(parameters: Tree, batch: Batch) -> RowSums:
        model = bind(parameters)
        hidden = model.hidden_states(
            batch.tokens, batch.positions, batch.segment_ids, extend_context=False
        )
        counts = batch.loss_weights > 0
        nll, correct = token_scores(hidden, model.head_kernel(), batch.targets, counts)
        return RowSums(
            nll=jnp.sum(nll, axis=1),
            loss_tokens=jnp.sum(counts, axis=1, dtype=jnp.int32),
            correct=jnp.sum(correct, axis=1, dtype=jnp.int32),
        )

    return jax.jit(step, out_shardings=replicated(mesh))


def make_row_sums(bind: Bind, mesh: Mesh) -> Callable[[Tree, Batch], RowSums]:
    """Returns a function (parameters on `mesh`, numpy batch) -> numpy `RowSums`.

    Every host passes the same batch. Its number of rows is a multiple of the mesh's batch shards.
    Each host places its own rows on its devices and gets the sums of all rows.
    """
    step = row_sums_step(bind, mesh)

    def sums(parameters: Tree, batch: Batch) -> RowSums:
        with limited_batch(), jax.set_mesh(mesh):
            return jax.device_get(step(parameters, place_rows(batch, mesh)))

    return sums
