"""Scores of items and what chance there is in them: bootstrap intervals, alone and paired."""

import numpy as np

RESAMPLES = 2000
# Draws whose counts are held at once.
_CHUNK = 250


def score(values: np.ndarray, weights: np.ndarray) -> float:
    """The weighted sum of the metrics' means, each over the items that have the metric.

    Args:
      values: float64[items, metrics]; nan where a metric was not measured.
      weights: float64[metrics]. A metric of weight 0 plays no part.

    Returns:
      nan where no item has one of the metrics.
    """
    measured, weights = values[:, weights != 0], weights[weights != 0]
    counts = np.ones((1, len(values)))
    return float((_means(counts, measured) @ weights)[0])


def interval(
    values: np.ndarray, weights: np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of `score`, over items.

    An item's metrics stay together: turns of one conversation are no independent witnesses.
    Draws in which a metric has no item at all are left out.
    """
    if not len(values):
        return float("nan"), float("nan")
    # Items of equal values are drawn as one, by how many they are: right or wrong is all that most
    # benchmarks know of an item.
    distinct, counts = _distinct(values[:, weights != 0])
    weights = weights[weights != 0]
    random = np.random.default_rng(seed)
    found = []
    for first in range(0, resamples, _CHUNK):
        size = min(_CHUNK, resamples - first)
        drawn = random.multinomial(len(values), counts / len(values), size)
        found.append(_means(drawn, distinct) @ weights)
    known = np.concatenate(found)
    known = known[~np.isnan(known)]
    if not len(known):
        return float("nan"), float("nan")
    low, high = np.quantile(known, (0.025, 0.975))
    return float(low), float(high)


def difference(
    a: np.ndarray, b: np.ndarray, weights: np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float, float]:
    """score(b) - score(a), and its 95 % bootstrap interval with the same items drawn for both.

    Args:
      a, b: float64[items, metrics], row by row the same items. Only what both have counts.
    """
    both = ~(np.isnan(a) | np.isnan(b))
    gaps = np.where(both, b - a, np.nan)
    return score(gaps, weights), *interval(gaps, weights, resamples, seed)


def _means(counts: np.ndarray, values: np.ndarray) -> np.ndarray:
    """[draws, metrics]: the metrics' means where item i comes counts[draw, i] times."""
    known = ~np.isnan(values)
    sums = counts @ np.where(known, values, 0.0)
    with np.errstate(invalid="ignore"):
        return sums / (counts @ known)


def _distinct(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different rows, and how often each comes; nan equals nan."""
    known = ~np.isnan(values)
    rows = np.concatenate([np.where(known, values, 0.0), known], axis=1)
    unique, counts = np.unique(rows, axis=0, return_counts=True)
    metrics = values.shape[1]
    return np.where(unique[:, metrics:] == 1, unique[:, :metrics], np.nan), counts
