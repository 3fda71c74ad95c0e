"""Scores over items with 95 % intervals, for one model and for paired differences."""

import numpy as np

RESAMPLES = 2000
# Resamples whose counts are in memory at the same time.
_CHUNK = 250


def score(values: np.ndarray, weights: np.ndarray) -> float:
    """The weighted sum of the metrics' means, each over the items that have the metric.

    Args:
      values: float64[items, metrics]; nan where a metric was not measured.
      weights: float64[metrics]. A metric of weight 0 is ignored.

    Returns:
      nan where some metric with a weight was measured on no item.
    """
    measured, weights = values[:, weights != 0], weights[weights != 0]
    counts = np.ones((1, len(values)))
    return float((_means(counts, measured) @ weights)[0])


def interval(
    values: np.ndarray, weights: np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of `score`, over items.

    The metrics of an item stay together, because the turns of one conversation are not
    independent. Resamples in which a metric has no item are left out.
    """
    if not len(values):
        return float("nan"), float("nan")
    # Items with equal values are counted together and drawn by one multinomial. Most benchmarks
    # have only two different items, right and wrong.
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


def share_interval(values: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of the `score` of a share of right items; Clopper and Pearson's if needed.

    The bootstrap's has no width where every item is right (1) or every item is wrong (0). The
    bounds of Clopper and Pearson (1934) are then simple: 0 of n is at most 1 - 0.025^(1/n), and n
    of n is at least 0.025^(1/n).
    """
    low, high = interval(values, weights)
    measured, (whole, *others) = values[:, weights != 0], weights[weights != 0]
    known = measured[~np.isnan(measured)]
    if others or not len(known) or np.min(known) != np.max(known) or known[0] not in (0, 1):
        return low, high
    bound = 0.025 ** (1 / len(known))
    return (whole * bound, whole) if known[0] else (0.0, whole * (1 - bound))


def difference(
    a: np.ndarray, b: np.ndarray, weights: np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float, float]:
    """score(b) - score(a), and its 95 % bootstrap interval. Both use the same resampled items.

    Args:
      a, b: float64[items, metrics] with the same items in the same order. A value counts only
        where both have it.
    """
    both = ~(np.isnan(a) | np.isnan(b))
    gaps = np.where(both, b - a, np.nan)
    return score(gaps, weights), *interval(gaps, weights, resamples, seed)


def _means(counts: np.ndarray, values: np.ndarray) -> np.ndarray:
    """[resamples, metrics]: the metrics' means where item i occurs counts[resample, i] times."""
    known = ~np.isnan(values)
    sums = counts @ np.where(known, values, 0.0)
    with np.errstate(invalid="ignore"):
        return sums / (counts @ known)


def _distinct(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct rows, and how often each occurs; nan equals nan."""
    known = ~np.isnan(values)
    rows = np.concatenate([np.where(known, values, 0.0), known], axis=1)
    unique, counts = np.unique(rows, axis=0, return_counts=True)
    metrics = values.shape[1]
    return np.where(unique[:, metrics:] == 1, unique[:, :metrics], np.nan), counts
