"""What published specifications say of accelerators: memory, bandwidth, arithmetic and links, for each device.

A device is what JAX counts as one: a chip, or on a TPU7x one of its two halves. Rates are peaks in one direction; that
of arithmetic is for dense products in bfloat16. Nothing here is measured, so a time that follows from it is the least.
"""

from typing import NamedTuple

from moe_jax.cost.roofline import Machine

_GOOGLE = "docs.cloud.google.com/tpu/docs/"


class ChipPeaks(NamedTuple):
    """One device of a kind."""

    memory_bytes: int  # that programs can have
    bytes_per_s: float  # of its memory
    flops_per_s: float
    link_bytes_per_s: float  # to other devices of its slice or node, all links together, in one direction
    source: str

    @property
    def machine(self) -> Machine:
        """Memory and arithmetic, as `roofline.floor_s` takes them."""
        return Machine(self.bytes_per_s, self.flops_per_s)


def _tpu(gibibytes: float, gigabytes_per_s: float, teraflops: float, both_ways: float, page: str) -> ChipPeaks:
    """From what Google states, but for the memory, which is what libtpu lets a program have.

    Links are stated as the sum of both directions, in GB/s.
    """
    memory = int(gibibytes * 2**30)
    return ChipPeaks(memory, 1e9 * gigabytes_per_s, 1e12 * teraflops, 1e9 * both_ways / 2, _GOOGLE + page)


def _nvidia(gibibytes: float, gigabytes_per_s: float, teraflops: float, both_ways: float, document: str) -> ChipPeaks:
    """From NVIDIA's data sheets; memory is what the driver reports, NVLink is stated as the sum of both directions."""
    memory = int(gibibytes * 2**30)
    return ChipPeaks(memory, 1e9 * gigabytes_per_s, 1e12 * teraflops, 1e9 * both_ways / 2, document)


CHIPS = {
    "v5e": _tpu(15.75, 819, 197, 400, "v5e"),
    "v5p": _tpu(95.73, 2765, 459, 1200, "v5p"),
    "v6e": _tpu(31.24, 1638, 918, 800, "v6e"),
    "tpu7x": _tpu(94.74, 7380 / 2, 2307 / 2, 1200 / 2, "tpu7x"),
    "h100": _nvidia(79.1, 3350, 989, 900, "NVIDIA H100 data sheet, SXM"),
    # memory is what is free, divided by the virtual devices that share it
    "cpu": ChipPeaks(0, 35e9, 207e9, 35e9 / 2, "docs/measured.md: two cores of an AMD EPYC; links are its memory"),
}
