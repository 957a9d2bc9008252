"""The table of chips against figures that their makers state together: per pod, and per system of eight."""

import pytest

from moe_jax.cost.chips import CHIPS


def test_rates_of_whole_pods():
    """Google states, for pods of 256 chips of v5e and v6e: 50.63 and 234.9 PFLOP/s, 51.2 and 102.4 TB/s on links."""
    for kind, petaflops, link_terabytes in (("v5e", 50.63, 51.2), ("v6e", 234.9, 102.4)):
        chip = CHIPS[kind]
        assert 256 * chip.flops_per_s == pytest.approx(1e15 * petaflops, rel=0.01)
        assert 256 * chip.link_bytes_per_s == pytest.approx(1e12 * link_terabytes, rel=0.01)


def test_a_system_of_eight_h100():
    """NVIDIA states for a DGX H100: 640 GB, and 7.2 TB/s through all switches, in both directions."""
    chip = CHIPS["h100"]
    assert 8 * chip.memory_bytes == pytest.approx(640 * 2**30, rel=0.02)
    assert 8 * 2 * chip.link_bytes_per_s == pytest.approx(7.2e12)


def test_every_chip_names_its_source():
    assert all(chip.source and chip.bytes_per_s > 1e10 and chip.flops_per_s > 1e11 for chip in CHIPS.values())
    assert all(chip.memory_bytes > 15e9 for kind, chip in CHIPS.items() if kind != "cpu")
