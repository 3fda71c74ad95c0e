"""The contract of an attention backend, checked on the device at hand: numbers, and no leaks.

Each case is a batch of rows with segments of awkward lengths. The oracle computes one segment at a
time in float64 with numpy, so that it shares neither masks nor code with a backend.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from moi_jax.models.attention import AttentionFn
from moi_jax.models.attention.xla import xla_attention

# The output and the gradients of query, key and value.
Arrays = tuple[np.ndarray, ...]
NAMES = ("output", "d query", "d key", "d value")
# Largest error over the largest value. The bounds of bfloat16 are those of tokamax's own tests.
BOUNDS = {"bfloat16": (2e-2, 4e-2, 4e-2, 4e-2), "float32": (2e-6, 5e-6, 5e-6, 5e-6)}
XLA_FACTOR = 2.0  # in bfloat16, the root mean square error is at most so many times XLA's


@dataclasses.dataclass(frozen=True)
class Case:
    """A batch for a backend.

    Attributes:
      heads, kv_heads, width: H, K and N.
      rows: the lengths of each row's segments. What is left of the row is padding.
      length: S.
    """

    heads: int
    kv_heads: int
    rows: tuple[tuple[int, ...], ...]
    length: int
    width: int = 128
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        return f"{self.dtype} {self.heads}/{self.kv_heads} x {self.width}, {self.length} tokens"


@dataclasses.dataclass(frozen=True)
class Result:
    """One check of a case: `value` is at most `bound`."""

    case: Case
    check: str
    value: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.value <= self.bound  # false for NaN

    def __str__(self) -> str:
        verdict = "ok" if self.passed else "FAILED"
        return f"{verdict:6} {self.case}: {self.check} {self.value:.3g} (at most {self.bound:.3g})"


def cases(dtype: str = "bfloat16", length: int = 640) -> list[Case]:
    """Returns the whole matrix: segments of 1 to S - 1 tokens, padded tails, three pairs of heads.

    `length` is at least 640, so that the first row has its padding.
    """
    rows = ((1, 2, 63, 64, 65, 127, 192), (length - 1,), (192, 65, 1, 127, 2, 64, 63), (length,))
    return [
        Case(heads, kv, rows, length, dtype=dtype) for heads, kv in ((28, 4), (16, 8), (32, 32))
    ]


def run_contract(attend: AttentionFn, cases: Sequence[Case]) -> list[Result]:
    """Runs a backend on the default device: against the oracle, against XLA and against itself.

    Checks for each case: the output and three gradients against float64, for an output gradient
    that is random; in bfloat16 also that the error is at most twice XLA's; and that a change of
    one segment changes no bit of any other one.
    """
    return [result for case in cases for result in _run(attend, case)]


def _run(attend: AttentionFn, case: Case) -> Iterator[Result]:
    inputs, segment_ids = make_inputs(case)
    real = segment_ids > 0
    expected = oracle(inputs, segment_ids)
    compute = compiled(attend, segment_ids)
    found = compute(*inputs)
    errors = [_errors(a[real], b[real]) for a, b in zip(found, expected, strict=True)]
    for name, error, bound in zip(NAMES, errors, BOUNDS[case.dtype], strict=True):
        yield Result(case, f"{name}: largest error", error[0], bound)
    if case.dtype == "bfloat16":
        by_xla = compiled(xla_attention, segment_ids)(*inputs)
        for name, error, xla, exact in zip(NAMES, errors, by_xla, expected, strict=True):
            ratio = error[1] / _errors(xla[real], exact[real])[1]
            yield Result(case, f"{name}: error over XLA's", ratio, XLA_FACTOR)
    yield Result(case, "bits that leak", _leaks(compute, inputs, segment_ids, found), 0)


def make_inputs(case: Case) -> tuple[Arrays, np.ndarray]:
    """Returns query, key, value and the output's gradient, [B, S, heads, N], and segment_ids."""
    rng = np.random.default_rng(0)
    heads = (case.heads, case.kv_heads, case.kv_heads, case.heads)
    size = (len(case.rows), case.length)
    arrays = [rng.normal(size=(*size, count, case.width)) for count in heads]
    segment_ids = np.zeros(size, np.int32)
    for row, lengths in enumerate(case.rows):
        ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)
        segment_ids[row, : len(ids)] = ids
    arrays[3] *= (segment_ids > 0)[..., None, None]  # the loss does not depend on padding
    return tuple(array.astype(jnp.dtype(case.dtype)) for array in arrays), segment_ids


def compiled(attend: AttentionFn, segment_ids: np.ndarray) -> Callable[..., Arrays]:
    """Returns a function of query, key, value and the output's gradient to output and gradients."""
    index = np.broadcast_to(np.arange(segment_ids.shape[1], dtype=np.int32), segment_ids.shape)

    @jax.jit
    def both(query: jax.Array, key: jax.Array, value: jax.Array, gradient: jax.Array) -> tuple:
        def attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            return attend(query, key, value, jnp.asarray(segment_ids), jnp.asarray(index))

        output, pull = jax.vjp(attention, query, key, value)
        return output, *pull(gradient)

    return lambda *inputs: tuple(np.asarray(array) for array in both(*inputs))


def _errors(found: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """Returns the largest and the root mean square error, over the same of what is expected."""
    difference = found.astype(np.float64) - expected
    root = np.sqrt(np.mean(difference**2) / np.mean(expected**2))
    return float(np.abs(difference).max() / np.abs(expected).max()), float(root)


def _leaks(
    compute: Callable[..., Arrays], inputs: Arrays, segment_ids: np.ndarray, before: Arrays
) -> int:
    """Returns how many values outside a segment change when everything in the segment does.

    The first segment of each row changes, then the last one, which is the padding if there is any.
    """
    count = 0
    for changing in (segment_ids[:, :1], segment_ids[:, -1:]):
        inside = segment_ids == changing
        others = [np.roll(array, (1, 1), axis=(0, 1)) for array in inputs]
        after = compute(
            *(np.where(inside[..., None, None], *pair) for pair in zip(others, inputs, strict=True))
        )
        for old, new in zip(before, after, strict=True):
            count += int(np.sum(old[~inside] != new[~inside]))
    return count


def oracle(inputs: Arrays, segment_ids: np.ndarray) -> Arrays:
    """Computes output and gradients in float64, each segment by itself; padding stays zero.

    Args:
      inputs: query, key, value and the output's gradient, as `make_inputs` returns them.
    """
    inputs = tuple(array.astype(np.float64) for array in inputs)
    query, key, value, _ = inputs
    results = tuple(np.zeros(array.shape) for array in (query, query, key, value))
    group = query.shape[2] // key.shape[2]
    for row, ids in enumerate(segment_ids):
        for segment in set(ids[ids > 0].tolist()):
            inside = np.flatnonzero(ids == segment)
            for head in range(query.shape[2]):
                places = [(row, inside, h) for h in (head, head // group, head // group, head)]
                q, k, v, dout = (array[place] for array, place in zip(inputs, places, strict=True))
                parts = _one_head(q, k, v, dout)
                places = [(row, inside, h) for h in (head, head, head // group, head // group)]
                for result, place, part in zip(results, places, parts, strict=True):
                    result[place] += part
    return results


def _one_head(q: np.ndarray, k: np.ndarray, v: np.ndarray, dout: np.ndarray) -> Arrays:
    """Computes causal attention [T, N] of one segment and head: output, dq, dk, dv."""
    scale = 1 / math.sqrt(q.shape[1])
    scores = np.where(np.tri(len(q), dtype=bool), q @ k.T * scale, -np.inf)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    dweights = dout @ v.T
    dscores = weights * (dweights - np.sum(weights * dweights, axis=1, keepdims=True)) * scale
    return weights @ v, dscores @ k, dscores.T @ q, weights.T @ dout
