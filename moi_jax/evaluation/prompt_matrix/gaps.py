"""Losses, accuracies and differences between prompts, from the sums of each conversation."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from moi_jax.evaluation.prompt_matrix.matrix import ItemSums
from moi_jax.evaluation.prompt_matrix.prompts import DEFAULT, OWN

Json = dict[str, Any]

RESAMPLES, SEED = 2000, 0
INTERVAL = (
    f"95 %, percentiles of {RESAMPLES} bootstrap samples of the domain's held-out conversations, "
    f"the same ones for all prompts and models; not over training seeds"
)


def summarize(
    sums: ItemSums, domain_of: np.ndarray, domains: Sequence[str], columns: Sequence[str]
) -> Json:
    """The figures of one model: {domain: {"cells": {column: cell}, "gap": gap}}.

    A cell is {loss, accuracy, perplexity, difference, interval}. These are token means over the
    domain's labels; `difference` is the loss minus the loss under the own prompt. The gap is
    {own_loss, own_interval, gap, interval} with gap_d = loss_d(default) - loss_d(own). A domain
    without items has no cells, and its gap is None. Intervals are None where there is one item.

    Args:
      domain_of: int[items], the index of the item's domain in `domains`.
    """
    return {
        name: _summarize_domain(_of(sums, domain_of == domain), columns)
        for domain, name in enumerate(domains)
    }


def _of(sums: ItemSums, items: np.ndarray) -> ItemSums:
    return ItemSums(sums.nll[items], sums.loss_tokens[items], sums.correct[items])


def _summarize_domain(sums: ItemSums, columns: Sequence[str]) -> Json:
    if not len(sums.nll):
        return {"cells": {}, "gap": None}
    own, default = columns.index(OWN), columns.index(DEFAULT)
    tokens = sums.loss_tokens[:, own]
    losses = sums.nll.sum(axis=0) / tokens.sum()
    accuracies = sums.correct.sum(axis=0) / tokens.sum()
    samples = resampled_means(sums.nll, tokens)
    differences = interval(samples - samples[:, [own]])
    cells = {
        name: {
            "loss": float(losses[column]),
            "accuracy": float(accuracies[column]),
            "perplexity": float(np.exp(losses[column])),
            "difference": float(losses[column] - losses[own]),
            "interval": differences[column],
        }
        for column, name in enumerate(columns)
        if np.isfinite(losses[column])
    }
    gap = {
        "own_loss": cells[OWN]["loss"],
        "own_interval": interval(samples)[own],
        "gap": cells[DEFAULT]["difference"],
        "interval": differences[default],
    }
    return {"cells": cells, "gap": gap}


def resampled_means(values: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Token means in bootstrap samples of conversations, float64[RESAMPLES, columns].

    A sample has n conversations, drawn with replacement. Its mean is the sum of their values
    divided by the sum of their tokens. The samples are paired: a sample has the same
    conversations in every column, so columns can be subtracted.

    Args:
      values: float64[n, columns], sums over the tokens of each conversation.
      tokens: int64[n].
    """
    generator = np.random.default_rng(SEED)
    means = np.empty((RESAMPLES, values.shape[1]))
    for sample in means:
        drawn = generator.integers(len(tokens), size=len(tokens))
        times = np.bincount(drawn, minlength=len(tokens))
        sample[:] = times @ values / (times @ tokens)
    if len(tokens) < 2:
        means[:] = np.nan  # one conversation says nothing about others
    return means


def interval(samples: np.ndarray) -> list[list[float] | None]:
    """The 95 % interval of each column of float64[samples, columns]; None for a column with nan."""
    low, high = np.percentile(samples, (2.5, 97.5), axis=0).tolist()
    return [
        [a, b] if np.isfinite(a) and np.isfinite(b) else None
        for a, b in zip(low, high, strict=True)
    ]
