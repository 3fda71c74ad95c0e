"""Quantised matrices against the published definitions, written out a value at a time."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from moi_jax.models.quantized import LEVELS, dequantize, quantize, relative_error


def column_int8(column):
    """LLM.int8(): round(127 x / absmax), halves to even; and back."""
    absmax = np.abs(column).max()
    codes = [np.rint(np.float32(127) * x / absmax) if absmax else 0 for x in column]
    return np.array(codes, np.int8), [absmax], [float(c) * float(absmax) / 127 for c in codes]


def column_nf4(column):
    """QLoRA: the nearest level of x / absmax in each block of 64, the lower one of two."""
    codes, absmaxes, values = [], [], []
    for block in column.reshape(-1, 64):
        absmax = np.abs(block).max()
        absmaxes.append(absmax)
        for x in block:
            scaled = x / absmax if absmax else np.float32(0)
            code = int(np.argmin(np.abs(LEVELS.astype(float) - float(scaled))))
            codes.append(code)
            values.append(float(LEVELS[code]) * float(absmax))
    packed = [16 * first + second for first, second in zip(codes[::2], codes[1::2], strict=True)]
    return np.array(packed, np.uint8), absmaxes, values


ORACLES = {"int8": column_int8, "nf4": column_nf4}


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
@settings(max_examples=4, deadline=None)
@given(
    blocks=st.integers(1, 3),
    outputs=st.sampled_from([(1,), (3,), (2, 2)]),
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([1e-6, 0.02, 30.0]),
)
def test_codes_and_values_are_those_of_the_definition(scheme, blocks, outputs, seed, scale):
    matrix = np.random.default_rng(seed).normal(0, scale, (64 * blocks, *outputs))
    matrix = matrix.astype(np.float32)
    codes, absmax = map(np.asarray, quantize(scheme, jnp.asarray(matrix)))
    values = np.asarray(dequantize(scheme, jnp.asarray(codes), jnp.asarray(absmax)))
    assert values.shape == matrix.shape
    for place in np.ndindex(*outputs):
        wanted_codes, wanted_absmax, wanted = ORACLES[scheme](matrix[(slice(None), *place)])
        np.testing.assert_array_equal(codes[(slice(None), *place)], wanted_codes)
        np.testing.assert_array_equal(absmax[(slice(None), *place)], wanted_absmax)
        np.testing.assert_allclose(values[(slice(None), *place)], wanted, rtol=3e-7, atol=0)


def test_levels_are_the_published_quantiles_of_the_normal_distribution():
    """QLoRA, equation 4, with the offset of bitsandbytes' create_normal_map."""
    offset = 0.9677083
    positive = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    negative = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    levels = np.sort([*positive, 0, *negative]) / positive.max()
    np.testing.assert_allclose(LEVELS, levels, atol=1e-6)


def test_every_level_comes_back_as_it_is_and_a_block_of_zeros_is_zero():
    column = np.concatenate([np.tile(LEVELS, 4) * np.float32(0.37), np.zeros(64, np.float32)])
    codes, absmax = quantize("nf4", jnp.asarray(column)[:, None])
    np.testing.assert_array_equal(dequantize("nf4", codes, absmax)[:, 0], column)
    codes, absmax = quantize("int8", jnp.zeros((64, 2)))
    np.testing.assert_array_equal(dequantize("int8", codes, absmax), np.zeros((64, 2)))


def test_the_lower_of_two_levels_is_taken_at_their_midpoint():
    midpoint = (LEVELS[8] + LEVELS[9]) / np.float32(2)
    column = np.zeros(64, np.float32)
    column[:3] = 1, midpoint, np.nextafter(midpoint, np.float32(1))
    codes, _ = quantize("nf4", jnp.asarray(column)[:, None])
    assert [int(codes[0, 0]) & 15, int(codes[1, 0]) >> 4] == [8, 9]
    halves = jnp.asarray([127.0, 0.5, 1.5, -2.5])[:, None]
    assert quantize("int8", halves)[0][:, 0].tolist() == [127, 0, 2, -2]


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_nan_is_never_hidden(scheme):
    matrix = jnp.ones((64, 2)).at[5, 1].set(jnp.nan)
    absmax = np.asarray(quantize(scheme, matrix)[1])
    assert np.isnan(absmax[:, 1]).all()
    assert np.isfinite(absmax[:, 0]).all()
    assert np.isnan(np.asarray(dequantize(scheme, *quantize(scheme, matrix)))[:, 1]).all()


def test_the_error_of_normal_values_is_what_the_bits_allow():
    matrix = jnp.asarray(np.random.default_rng(0).normal(0, 0.02, (512, 64)), jnp.float32)
    (coarse, largest), (fine, _) = relative_error("nf4", matrix), relative_error("int8", matrix)
    values = dequantize("nf4", *quantize("nf4", matrix))
    assert coarse == pytest.approx(float(np.std(values - matrix) / np.std(matrix)), rel=1e-2)
    assert largest == pytest.approx(float(np.abs(values - matrix).max()))
    assert 0.05 < coarse < 0.12
    assert 0.004 < fine < 0.012
