"""Utilisation and memory of devices, with chips and rows whose figures are known by hand."""

from types import SimpleNamespace

import numpy as np
import pytest

from moi_jax.models.presets import preset
from moi_jax.training.device_figures import DeviceFigures, Work

PEAK = 197e12  # of a v5e in bfloat16, from its data sheet
MODEL = preset("qwen2.5-0.5b")


def mesh(kind, count=1, memory=(None,)):
    devices = [SimpleNamespace(device_kind=kind) for _ in range(count)]
    local = [SimpleNamespace(memory_stats=lambda stats=stats: stats) for stats in memory]
    return SimpleNamespace(devices=np.array(devices, object), local_devices=local)


def test_the_utilisation_is_that_of_the_tokens_pairs_and_logits():
    """2 rows of 2,048 hold segments of 1,000 and 900, and of 500 tokens; two seconds, 4 chips.

    1,300 of these tokens carry loss.
    """
    figures = DeviceFigures(MODEL, 2048, mesh("TPU v5 lite", 4))
    pairs = sum(n * (n + 1) // 2 for n in (1000, 900, 500))
    found = figures.record(Work(rows=2, tokens=2400, pairs=pairs, loss_tokens=1300, seconds=2.0))
    # From the published config.json: 24 layers of width 896, 14 heads of 64, 2 of keys, MLP 4,864.
    layer = 896 * 896 * 2 + 2 * 896 * 128 + 3 * 896 * 4864
    head = 896 * 151936
    useful = 6 * 24 * layer * 2400 + 6 * head * 1300 + 12 * 24 * 14 * 64 * pairs
    usual = 6 * (24 * layer + head) * 4096 + 12 * 24 * 14 * 64 * 2 * 2048 * 2048 / 2
    assert found == pytest.approx(
        {"mfu": useful / (2 * 4 * PEAK), "mfu_full_causal": usual / (2 * 4 * PEAK)}
    )


def test_an_unknown_chip_has_no_utilisation_and_a_cpu_no_memory():
    work = Work(rows=2, tokens=10, pairs=10, loss_tokens=5, seconds=1.0)
    assert DeviceFigures(MODEL, 2048, mesh("cpu")).record(work) == {}
    memory = [{"peak_bytes_in_use": 5}, {"peak_bytes_in_use": 9}]
    figures = DeviceFigures(MODEL, 2048, mesh("another", 2, memory))
    assert figures.record(work) == {"peak_device_memory_bytes": 9}
