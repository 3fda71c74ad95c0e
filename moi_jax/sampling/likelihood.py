"""Log-likelihoods of given continuations, and whether greedy decoding would generate them."""

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moi_jax.models.config import ModelConfig
from moi_jax.models.decoder import Bind, Tree
from moi_jax.models.loss import token_scores
from moi_jax.parallel.context import context_order, context_places, context_shards
from moi_jax.parallel.placing import batch_shards, bucket, place_rows, replicated, round_up
from moi_jax.parallel.stuck import limited_batch
from moi_jax.sampling.prompt_batches import PREFILL_TOKENS

# (context ids, continuation ids); neither is empty.
Pair = tuple[Sequence[int], Sequence[int]]
Ids = tuple[int, ...]

# Rows are padded to this times a power of two; each width is a compilation.
_SHORTEST_ROW = 32
# A row scores only its last so many tokens, or else all: the vocabulary is wide.
_SHORT = 16


@dataclass(frozen=True, slots=True)
class Likelihood:
    """How likely a continuation is.

    Attributes:
      log_likelihood: of all its tokens, in nats; NaN if it was not scored.
      greedy: whether each of its tokens is the likeliest one.
      finish: scored; too_long (it does not fit the context); not_finite (the model gave logits
        that are NaN or infinite).
    """

    log_likelihood: float
    greedy: bool
    finish: Literal["scored", "too_long", "not_finite"] = "scored"


class LikelihoodScorer:
    """Scores pairs of context and continuation, in batches of similar length."""

    def __init__(
        self,
        bind: Bind,
        config: ModelConfig,
        *,
        rows: int = 8,
        context: int | None = None,
        mesh: Mesh | None = None,
    ):
        """
        Args:
          bind: parameters -> model.
          rows: of a batch, rounded up to the mesh's batch shards; fewer where rows are long.
          context: the most tokens the model reads; None means the model's seq_length.
          mesh: where the parameters are laid out; None is one device.
        """
        self.context = config.seq_length if context is None else context
        self._mesh = mesh
        self._rows = round_up(rows, mesh)

        def score(
            parameters: Tree, tokens: jax.Array, lengths: jax.Array, before: int
        ) -> tuple[jax.Array, ...]:
            """See `_score`; tokens int32[B, S] in `context_order`, lengths int32[B]."""
            model = bind(parameters)
            split = tokens.shape[1], context_shards(mesh)
            index = jnp.broadcast_to(jnp.asarray(context_order(*split), jnp.int32), tokens.shape)
            place_of = jnp.asarray(context_places(*split))
            real = (index < lengths[:, None]).astype(jnp.int32)
            hidden = model.hidden_states(tokens, index, real, extend_context=True)
            last = jnp.take_along_axis(hidden, place_of[lengths - 1][:, None, None], axis=1)
            log_probs = jax.nn.log_softmax(model.logits(last)[:, 0])
            likeliest = jnp.argmax(log_probs, axis=-1)
            # The `before` tokens before the last one. A row may have fewer.
            scored = lengths[:, None] - 1 - before + jnp.arange(before)
            counts, scored = scored >= 0, jnp.maximum(scored, 0)
            states = jnp.take_along_axis(hidden, place_of[scored][..., None], axis=1)
            targets = jnp.take_along_axis(tokens, place_of[scored + 1], axis=1)
            scores = token_scores(states, model.head_kernel(), targets, counts)
            return log_probs, likeliest, *scores

        self._score_rows = jax.jit(
            score,
            static_argnums=3,
            # Replicated, so that every host can read the results.
            out_shardings=None if mesh is None else replicated(mesh),
        )

    def run(self, parameters: Tree, pairs: Sequence[Pair]) -> Iterator[tuple[int, Likelihood]]:
        """Yields (index of the pair, its likelihood), batch by batch, the longest first.

        The model reads context and continuation, without the last token, in one pass, as in
        training. Beyond Qwen v1's seq_length the NTK factor is therefore that of this length; a
        sampler keeps the factor of its prompt. Pairs for which the model reads the same tokens,
        such as the lettered choices of one question, share a row.
        """
        indices: dict[Ids, list[int]] = {}
        for index, (context, continuation) in enumerate(pairs):
            read = (*context, *continuation)[:-1]
            if len(read) > self.context:
                yield index, Likelihood(math.nan, False, "too_long")
            else:
                indices.setdefault(read, []).append(index)
        shapes: dict[tuple[int, int], list[Ids]] = {}
        for read, sharing in indices.items():
            before = max(len(pairs[index][1]) for index in sharing) - 1
            shapes.setdefault(self._shape(len(read), before), []).append(read)
        for (width, before), rows in sorted(shapes.items(), reverse=True):
            # The scores of attention are width x width, so long rows come in smaller batches.
            count = min(self._rows, max(PREFILL_TOKENS // width, 1) * batch_shards(self._mesh))
            for first in range(0, len(rows), count):
                batch = rows[first : first + count]
                scores = self._score(parameters, batch, count, width, before)
                for read, *of_row in zip(batch, *scores, strict=False):  # padding rows are left out
                    for index in indices[read]:
                        yield index, _likelihood(pairs[index][1], *of_row)

    def _shape(self, length: int, before: int) -> tuple[int, int]:
        """The width of a row that holds `length` tokens, and how many of them it scores."""
        width = bucket(length, _SHORTEST_ROW, self.context)
        return width, _SHORT if before <= _SHORT < width else width

    def _score(
        self, parameters: Tree, batch: Sequence[Ids], count: int, width: int, before: int
    ) -> tuple[np.ndarray, ...]:
        """Runs the model over a batch of rows, padded to `count` rows.

        Returns:
          log_probs [B, V] of the token after each row; the likeliest one, int[B]; nll [B, before]
          of the row's own last `before` tokens; whether each of them is the likeliest, bool.
        """
        tokens = np.zeros((count, width), np.int32)
        lengths = np.ones(count, np.int32)  # padding rows have one token
        for row, read in enumerate(batch):
            tokens[row, : len(read)] = read
            lengths[row] = len(read)
        arrays = place_rows((tokens, lengths), self._mesh)
        on_mesh = nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)
        with limited_batch(), on_mesh:
            return jax.device_get(self._score_rows(parameters, *arrays, before))


def _likelihood(
    continuation: Sequence[int],
    log_probs: np.ndarray,
    likeliest: int,
    nll: np.ndarray,
    hits: np.ndarray,
) -> Likelihood:
    """The likelihood of a continuation that ends one token after a row of `_score`."""
    *rest, last = continuation
    own = slice(len(nll) - len(rest), None)
    log_likelihood = float(log_probs[last]) - float(nll[own].sum(dtype=np.float64))
    if not math.isfinite(log_likelihood):
        return Likelihood(math.nan, False, "not_finite")
    return Likelihood(log_likelihood, bool(likeliest == last and hits[own].all()))
