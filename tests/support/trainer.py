"""The jitted train and eval step of a tiny model on a mesh, with batches given as numpy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from moi_jax import config as config_lib
from moi_jax.data.loader import Batch
from moi_jax.evaluation.row_sums import make_row_sums
from moi_jax.models.attention.xla import xla_attention
from moi_jax.models.compute import Compute
from moi_jax.models.decoder import make_model
from moi_jax.models.parameters import parameter_shardings, random_parameters
from moi_jax.models.presets import PRESETS
from moi_jax.models.remat import remat_policy
from moi_jax.parallel.mesh import make_mesh
from moi_jax.parallel.placing import place_batch
from moi_jax.training.optimizer import make_optimizer, make_schedule
from moi_jax.training.state import new_state
from moi_jax.training.step import make_train_step

MODEL = dataclasses.replace(
    PRESETS["tiny"], num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, vocab_size=64,
    hidden_size=32, mlp_width=48,
)  # fmt: skip
OPTIMIZER = config_lib.Optimizer(learning_rate=1e-3, warmup_ratio=0.1)
DOMAINS, ROWS, LENGTH, STEPS = 3, 8, 16, 20


def random_batch(seed: int) -> Batch:
    """[ROWS, LENGTH], packed segments, padding, weights that are no multiple of one another."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 9, (ROWS, 2))
    place = np.arange(LENGTH)
    segment_ids = np.zeros((ROWS, LENGTH), np.int32)
    for row, (first, second) in enumerate(lengths):
        segment_ids[row] = np.where(place < first, 1, np.where(place < first + second, 2, 0))
    positions = np.where(segment_ids == 2, place - lengths[:, :1], place) * (segment_ids > 0)
    weights = rng.uniform(0.1, 3, (ROWS, LENGTH)) * rng.integers(0, 2, (ROWS, LENGTH))
    domain_ids = rng.integers(0, DOMAINS, (ROWS, 1))
    return Batch(
        rng.integers(0, 64, (ROWS, LENGTH)).astype(np.int32),
        rng.integers(0, 64, (ROWS, LENGTH)).astype(np.int32),
        segment_ids,
        positions.astype(np.int32),
        np.where(segment_ids > 0, domain_ids, -1).astype(np.int32),
        (weights * (segment_ids > 0)).astype(np.float32),
    )


def plain_loss(parameters, batch, config=MODEL):
    """Computes the loss of the whole batch at once: whole logits, no remat, no mesh."""
    model = make_model(config)(parameters)
    hidden = model.hidden_states(
        batch.tokens, batch.positions, batch.segment_ids, extend_context=False
    )
    log_probabilities = jax.nn.log_softmax(model.logits(hidden), axis=-1)
    nll = -jnp.take_along_axis(log_probabilities, batch.targets[..., None], axis=-1)[..., 0]
    return jnp.sum(batch.loss_weights * nll) / jnp.sum(batch.loss_weights), nll


@functools.cache
def initial_parameters(dtype, model=MODEL):
    """As numpy: they are the same on every mesh, and their drawing compiles for long."""
    mesh = make_mesh(config_lib.Mesh(fsdp=1), jax.devices())
    return jax.device_get(random_parameters(model, 0, dtype, mesh))


@functools.cache
def programs(mesh, dtype, compute, remat, attention, config, model):
    """Optimizer, train step and row sums on a mesh: traced once for all Trainers alike."""
    if dtype == "float64":
        config = config.model_copy(update={"moment_dtype": "float64"})
    optimizer, schedule = make_optimizer(config, model), make_schedule(config, STEPS)
    bind = make_model(model, Compute(compute or dtype, remat_policy(remat, {}), attention(mesh)))
    step = make_train_step(model, bind, optimizer, schedule, DOMAINS, mesh, config.gradient_dtype)
    return optimizer, step, make_row_sums(bind, mesh)


class Trainer:
    """The jitted step on a mesh, with batches given as numpy."""

    def __init__(
        self,
        mesh,
        microbatch_rows=ROWS,
        *,
        dtype="float32",
        compute=None,
        remat="none",
        attention=lambda mesh: xla_attention,
        optimizer=OPTIMIZER,
        model=MODEL,
    ):
        self.mesh = make_mesh(config_lib.Mesh(**mesh), jax.devices())
        self.microbatch_rows = microbatch_rows
        self.optimizer, self._step, self._row_sums = programs(
            self.mesh, dtype, compute, remat, attention, optimizer, model
        )
        # Copied: the state donates its arrays, which may lie in the memory of numpy's.
        parameters = jax.tree.map(np.copy, initial_parameters(dtype, model))
        placed = jax.device_put(parameters, parameter_shardings(model, self.mesh))
        self.state = new_state(model, self.optimizer, placed, self.mesh)

    def place(self, batch):
        rows = np.arange(len(batch.tokens))
        return place_batch(batch, rows, self.microbatch_rows, self.mesh)

    def step(self, batch, max_loss=np.inf):
        with jax.set_mesh(self.mesh):
            limit = np.float32(max_loss)
            self.state, metrics = self._step(self.state, self.place(batch), limit)
            return jax.device_get(metrics)

    def lower(self, batch):
        with jax.set_mesh(self.mesh):
            return self._step.lower(self.state, self.place(batch), np.float32(np.inf))

    def row_sums(self, batch):
        return self._row_sums(self.state.parameters, batch)

    def parameters(self):
        return jax.device_get(self.state.parameters)
