"""What a step and a run have to do: tokens and pairs of attention, from the plan of the data."""

import dataclasses
import logging
import re

import numpy as np

from moi_jax.checkpoints.experiment import open_experiment
from moi_jax.common.errors import UserError
from moi_jax.config import Config
from moi_jax.data.cache.prepare import are_prepared
from moi_jax.data.dataset import open_dataset
from moi_jax.models.config import ModelConfig
from moi_jax.models.flops import causal_pairs
from moi_jax.models.lora import adapted
from moi_jax.models.presets import preset

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Work:
    """The mean step of a run.

    Attributes:
      tokens: in segments, without padding.
      pairs: (query, key) pairs that attention uses.
      loss_tokens: tokens that carry loss; None if the data is not known.
      steps: of the whole run; None if it depends on the data, and that is not known.
      source: where the figures come from, as a sentence.
      row_loss_tokens: int64[R], those of each row of an epoch; None if the data is not known.
    """

    tokens: int
    pairs: int
    loss_tokens: int | None
    steps: int | None
    source: str
    row_loss_tokens: np.ndarray | None = dataclasses.field(default=None, compare=False)

    def logit_tokens(self, rows: int, microbatch_rows: int, shards: int) -> int:
        """Counts the tokens of a step whose logits are computed, at least; see models/loss.py.

        In each microbatch the part of the mesh with the most loss tokens decides for all of them.
        Without the data all tokens count.

        Args:
          rows: of the global batch.
          microbatch_rows: a multiple of `shards`.
          shards: the parts into which the mesh splits the rows of a microbatch.
        """
        if self.row_loss_tokens is None:
            return self.tokens
        microbatches = -(-len(self.row_loss_tokens) // microbatch_rows)
        shape = microbatches, shards, microbatch_rows // shards
        most = np.resize(self.row_loss_tokens, shape).sum(axis=2).max(axis=1)
        return round(most.mean() * shards * rows / microbatch_rows)


def open_model(config: Config) -> ModelConfig:
    """Returns the architecture: the preset, or that of model.init_from.

    Raises:
      UserError: there is none of that name.
    """
    if config.model.preset:
        return adapted(preset(config.model.preset), config.lora)
    return open_experiment(config).model


def work_of(config: Config) -> Work:
    """Returns the work of a step, from the first epoch's plan where the data is prepared.

    Nothing is prepared here. Without the data the rows count as full, each of them one segment.
    """
    try:
        experiment = open_experiment(config)
        if not are_prepared(experiment.config.data, experiment.tokenizer):
            raise UserError("the data is not prepared; run python -m moi_jax.prepare first")
        plan = open_dataset(experiment.config, experiment.tokenizer).plan()
        epoch = plan.epoch_plan(0)
    except UserError as error:
        # The first clause says what is missing, the rest what to do about it.
        return full_rows(config, re.split(r"[;:] ", str(error))[0])
    data = experiment.config.data
    assert data.mask is not None  # resolved by the config
    lengths = epoch.segment_lengths(0, epoch.rows, data.mask)
    share = config.train.global_batch_rows / epoch.rows
    return Work(
        tokens=round(epoch.tokens * share),
        pairs=round(causal_pairs(lengths) * share),
        loss_tokens=round(epoch.loss_tokens * share),
        steps=plan.total_steps,
        source="segments of the first epoch's plan",
        row_loss_tokens=epoch.row_loss_tokens(),
    )


def full_rows(config: Config, reason: str) -> Work:
    """Returns the work of rows that are full, one segment each."""
    rows, length = config.train.global_batch_rows, config.data.sequence_length
    return Work(
        tokens=rows * length,
        pairs=rows * causal_pairs(np.array(length)),
        loss_tokens=None,
        steps=config.train.steps,
        source=f"assumed: full rows, one segment each ({reason})",
    )
