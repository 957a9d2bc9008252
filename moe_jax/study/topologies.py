"""Devices that are not there, and their real compilers: slices of TPUs, a node of GPUs; and virtual devices of a CPU.

`requirements-aot.txt` brings the compiler for TPUs, `requirements-aot-gpu.txt` the one for GPUs: each in an environment
of its own, since other processes of JAX would warn beside the second.
"""

import functools
import importlib.metadata
import importlib.util
import math
import os
import pathlib
import re
from typing import NamedTuple

import jax
from absl import logging
from jax.experimental import topologies

from moe_jax import memory
from moe_jax.cost.chips import CHIPS, ChipPeaks

TPUS = ("v5e", "v5p", "v6e", "tpu7x")
GPUS = ("h100",)
MOST_DEVICES = 16384  # of a slice, or virtual ones
MOST_GPUS = 8  # of a node, whose links are NVLink
_TARGET = pathlib.Path(__file__).parent / "h100.txtpb"
_NAME = re.compile(r"([a-z0-9]+):(\d+(?:x\d+){0,2})")
_EXPECTED = f"{', '.join(TPUS)} and the sides of a slice, as v5p:4x4x8; {', '.join(GPUS)}:1 to 8; or cpu:8"


class NoCompilerError(ValueError):
    """Says in one line what to install."""


class Topology(NamedTuple):
    """Devices to compile for."""

    name: str
    kind: str  # of `CHIPS`
    devices: tuple[jax.Device, ...]
    chip: ChipPeaks  # what is published about one of them

    @property
    def platform(self) -> str:
        """As JAX names it."""
        return platform_of(self.kind)

    def compile(self, lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, bool]:
        """Compiles a program; on a GPU, without timing variants of it, which would need one.

        XLA finds tiles for most products in Triton without a device. Where it does not, all products are cuBLAS'.

        Returns:
            The program, and whether products may be in Triton, as in a run on a GPU; False on other devices.
        """
        if self.platform != "gpu":
            return lowered.compile(), False
        options = {"xla_gpu_autotune_level": 0}
        try:
            return lowered.compile(options), True
        except jax.errors.JaxRuntimeError as error:
            if "No supported config found" not in str(error):
                raise
        logging.warning("compiled without products in Triton: temporaries may be other than those of a run")
        return lowered.compile(options | {"xla_gpu_enable_triton_gemm": False}), False


def platform_of(kind: str) -> str:
    """As JAX names it: tpu, gpu or cpu."""
    return "tpu" if kind in TPUS else "gpu" if kind in GPUS else "cpu"


def parse(name: str) -> tuple[str, tuple[int, ...]]:
    """The kind of chip and the sides of a topology.

    Raises:
        ValueError: the name has another form, or the chip is not known.
    """
    match = _NAME.fullmatch(name)
    if match is None or match[1] not in (*TPUS, *GPUS, "cpu"):
        raise ValueError(f"compile.topology = {name!r}: expected {_EXPECTED}")
    kind, sides = match[1], tuple(map(int, match[2].split("x")))
    count = math.prod(sides)
    most = MOST_GPUS if kind in GPUS else MOST_DEVICES
    if not 0 < count <= most or (kind not in TPUS and len(sides) > 1):
        raise ValueError(f"compile.topology = {name!r}: expected {_EXPECTED}")
    return kind, sides


def versions(kind: str) -> dict[str, str]:
    """The versions of what compiles for a chip."""
    packages = {"tpu": ("libtpu",), "gpu": ("jax-cuda13-plugin", "nvidia-cuda-nvcc"), "cpu": ()}[platform_of(kind)]
    return {name: importlib.metadata.version(name) for name in ("jax", *packages)}


@functools.cache
def find(name: str) -> Topology:
    """The devices of a topology. GPUs must be asked for before any array is made, with JAX_PLATFORMS=cpu.

    Raises:
        NoCompilerError: the compiler is not installed.
        ValueError: there is no such topology.
    """
    kind, sides = parse(name)
    platform = platform_of(kind)
    if platform == "cpu":
        shared = memory.host_bytes() // sides[0]
        return Topology(name, kind, _virtual(name, sides[0]), CHIPS[kind]._replace(memory_bytes=shared))
    described = _tpu(name, sides) if platform == "tpu" else _gpus(kind)
    devices = tuple(described.devices)
    return Topology(name, kind, devices if platform == "tpu" else devices[: sides[0]], CHIPS[kind])


def _virtual(name: str, count: int) -> tuple[jax.Device, ...]:
    devices = jax.devices("cpu")
    if count > len(devices):
        raise ValueError(
            f"compile.topology = {name!r}: expected at most {len(devices)} devices; JAX_NUM_CPU_DEVICES={count} makes "
            "more"
        )
    return tuple(devices[:count])


def _tpu(name: str, sides: tuple[int, ...]):
    if importlib.util.find_spec("libtpu") is None:
        raise NoCompilerError(f"compile.topology = {name!r}: expected libtpu: pip install -r requirements-aot.txt")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing runs, so processes need not take turns
    alone = {"chips_per_host_bounds": [1, 1, 1]} if math.prod(sides) == 1 else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **alone)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"compile.topology = {name!r}: expected a slice that the compiler knows ({reason})") from error


def _gpus(kind: str):
    tools = importlib.util.find_spec("nvidia.cu13") if importlib.util.find_spec("nvidia") else None
    if tools is None or importlib.util.find_spec("jax_plugins.xla_cuda13") is None:
        raise NoCompilerError(
            f"compile.topology of {kind}: expected JAX's CUDA plugin and nvcc: pip install -r requirements-aot-gpu.txt"
        )
    os.environ["PATH"] = os.pathsep.join(
        [*(f"{folder}/bin" for folder in tools.submodule_search_locations), os.environ["PATH"]]
    )
    jax.config.update("jax_platforms", "cpu")  # otherwise the plugin asks for cuDNN, which only a device needs
    described = topologies.get_topology_desc(
        kind, "cuda", target_config=_TARGET.read_text(), topology=f"1x1x{MOST_GPUS}"
    )
    assert described.devices[0].compute_capability == "9.0"
    return described
