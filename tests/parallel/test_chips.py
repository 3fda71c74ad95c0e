"""The table of chips: what jax calls them, and that no figure is of another unit."""

import pytest

from moi_jax.parallel.chips import CHIPS, chip_of


@pytest.mark.parametrize(
    ("kind", "name"),
    [("TPU v5", "v5p"), ("TPU v5 lite", "v5e"), ("TPU v6 lite", "v6e"), ("NVIDIA H200", "h200")],
)
def test_a_chip_is_found_by_its_device_kind(kind, name):
    chip = chip_of(kind)
    assert chip is not None
    assert chip.name == name


def test_another_device_has_no_figures():
    assert chip_of("cpu") is None
    assert chip_of("NVIDIA H100 PCIe") is None  # it has less of everything than the SXM card


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_figures_are_in_bytes_and_operations(chip):
    """Each bandwidth is below the one nearer to the chip, and the peak far above them."""
    assert 15e9 < chip.hbm_bytes < 200e9
    assert 100 < chip.bf16_flops / chip.hbm_bandwidth < 1000
    assert 2 < chip.hbm_bandwidth / chip.link_bandwidth < 20
    if chip.network_bandwidth:
        assert 5 < chip.link_bandwidth / chip.network_bandwidth < 120
