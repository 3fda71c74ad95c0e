"""What a model makes of each row of a batch: the sums that losses and accuracies are made of."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moi_jax.data.loader import Batch
from moi_jax.models.decoder import Bind, Tree
from moi_jax.models.loss import token_scores
from moi_jax.parallel.placing import place_rows, replicated


class RowSums(NamedTuple):
    """Sums over the targets of each row that have a weight, [B] each."""

    nll: Any  # float32 or wider, in nats
    loss_tokens: Any  # int32
    correct: Any  # int32, targets that were the likeliest token


def make_row_sums(bind: Bind, mesh: Mesh) -> Callable[[Tree, Batch], RowSums]:
    """A function of parameters on `mesh` and a numpy batch, the same on every host.

    The rows of a batch divide by the mesh's batch shards; each host places those it holds, and
    gets the sums of all.
    """

    def step(parameters: Tree, batch: Batch) -> RowSums:
        model = bind(parameters)
        hidden, _ = model.hidden_states(
            batch.tokens, batch.positions, batch.segment_ids, extend_context=False
        )
        nll, correct = token_scores(hidden, model.head_kernel(), batch.targets)
        counts = batch.loss_weights > 0
        return RowSums(
            nll=jnp.sum(jnp.where(counts, nll, 0), axis=1),
            loss_tokens=jnp.sum(counts, axis=1, dtype=jnp.int32),
            correct=jnp.sum(counts & correct, axis=1, dtype=jnp.int32),
        )

    jitted = jax.jit(step, out_shardings=replicated(mesh))

    def sums(parameters: Tree, batch: Batch) -> RowSums:
        with jax.set_mesh(mesh):
            return jax.device_get(jitted(parameters, place_rows(batch, mesh)))

    return sums
