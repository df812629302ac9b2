"""Chips and device topologies to compile for.

JAX compiles for TPUs with libtpu and for NVIDIA GPUs with its CUDA plugin; neither needs the hardware. A JAX device is
one chip, or half a chip on tpu7x.
"""

import logging
import math
import os
import re
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, NamedTuple

from jax.experimental import topologies

from tfm_jax.errors import InputError
from tfm_jax.flops import PEAKS

GIB = 2**30


class Chip(NamedTuple):
    """The properties of a chip, per JAX device."""

    memory: int
    """Bytes of device memory that programs can use."""
    peak: float
    """Dense bfloat16 operations per second."""
    bandwidth: float
    """Bytes per second between the chip and its memory (HBM)."""
    interconnect: float
    """Bytes per second that the device sends to others if all of its links are busy, in one direction."""
    per_chip: int = 1
    """Devices per chip."""
    target: str = ""
    """Describes the GPU to the compiler (a GpuTargetConfigProto in text form); empty for TPUs."""


def _tpu(gib: float, peak: float, bandwidth: float, interconnect: float, per_chip: int = 1) -> Chip:
    return Chip(round(gib * GIB), peak / per_chip, bandwidth / per_chip, interconnect / per_chip, per_chip)


def _gpu(name: str, capability: str, cores: int, lanes: int, memory: int, bandwidth: int, cache: int, clock: float,
         shared: int, peak: float, interconnect: float) -> Chip:  # fmt: skip
    major, minor = capability.split(".")
    target = f"""
        gpu_device_info {{
          threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
          shared_memory_per_block: 49152 shared_memory_per_core: {shared} shared_memory_per_block_optin: {shared - 1024}
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          core_count: {cores} fpus_per_core: {lanes} clock_rate_ghz: {clock}
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          memory_bandwidth: {bandwidth} l2_cache_size: {cache} device_memory_size: {memory}
          cuda_compute_capability {{ major: {major} minor: {minor} }}
        }}
        platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 13 }} runtime_version {{ major: 13 }}
        device_description_str: "{name}"
    """
    return Chip(memory, peak, bandwidth, interconnect, target=target)


# TPUs: the memory is what libtpu 0.0.42 reports as available when a program exceeds it. Bandwidths are from the page of
# each chip, such as cloud.google.com/tpu/docs/v5p; half of the bidirectional bandwidth between chips is sent. The page
# of v4 lacks it: 6 links with 50 GB/s each are from Jouppi et al. 2023 (arXiv:2304.01433).
# GPUs: the target, with the bandwidth of the memory, comes from OpenXLA's xla/backends/gpu/target_config/specs. Half of
# the bandwidth of NVLink in NVIDIA's data sheets is sent; between hosts, it is less.
CHIPS = {
    "v4": _tpu(30.75, PEAKS["v4"], 1200e9, 300e9),
    "v5e": _tpu(15.75, PEAKS["v5e"], 819e9, 200e9),
    "v5p": _tpu(95.74, PEAKS["v5p"], 2765e9, 600e9),
    "v6e": _tpu(31.25, PEAKS["v6e"], 1638e9, 400e9),
    "tpu7x": _tpu(94.75, PEAKS["tpu7x"], 7380e9, 600e9, per_chip=2),
    "a100": _gpu("NVIDIA A100-SXM4-80GB", "8.0", 108, 64, 85_100_068_864, 2_039_040_000_000, 41_943_040, 1.41,
                 167_936, PEAKS["a100"], 300e9),
    "h100": _gpu("NVIDIA H100 80GB HBM3", "9.0", 132, 128, 84_942_979_072, 3_352_320_000_000, 52_428_800, 1.98,
                 233_472, PEAKS["h100"], 450e9),
    "h200": _gpu("NVIDIA H200 141GB HBM3e", "9.0", 132, 128, 151_397_597_184, 4_800_000_000_000, 52_428_800, 1.98,
                 233_472, PEAKS["h200"], 450e9),
    "b200": _gpu("NVIDIA B200", "10.0", 148, 128, 191_514_411_008, 7_672_320_000_000, 132_644_864, 1.965,
                 233_472, PEAKS["b200"], 900e9),
}  # fmt: skip

_NUMBER = r"[1-9]\d{0,3}"
_NAME = re.compile(rf"(?:({_NUMBER})x)?(\w+):({_NUMBER}(?:x{_NUMBER})*)")
EXAMPLES = "such as v5e:4x4, v6e:2x4, v5p:4x4x4, tpu7x:2x2x1, 2xv5e:16x16 (two slices), h100:8 or h100:2x8 (two hosts)"


class Topology(NamedTuple):
    """Devices to compile for; they need not exist."""

    name: str
    kind: str
    """Key of `CHIPS`."""
    devices: Sequence[Any]

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    @property
    def chips(self) -> int:
        """Number of chips."""
        return len(self.devices) // self.chip.per_chip

    @property
    def memory(self) -> int:
        """Bytes that programs can use on one device. By default, JAX uses only 3/4 of a GPU's memory."""
        return round(self.chip.memory * (_gpu_memory_fraction() if self.chip.target else 1))


def find_topology(name: str) -> Topology:
    """Return the topology with this name.

    The name of a TPU slice gives the number of chips along each axis, such as v5e:4x4. The name of a set of GPUs gives
    the number of hosts and of GPUs per host, such as h100:2x8.

    This neither connects to hardware nor takes a lock. Programs can be compiled for the devices, but not run on them.

    Raises:
        InputError: the topology does not exist, or the compiler for it is not installed.
    """
    match = _NAME.fullmatch(name)
    if not match or match[2] not in CHIPS:
        raise InputError(f"--topology={name}: expected one of {', '.join(CHIPS)} with a shape, {EXAMPLES}")
    # The CUDA plugin warns about missing libraries; they are needed to run programs, but not to compile them.
    logging.getLogger("jax_plugins.xla_cuda13").setLevel(logging.ERROR)
    slices, kind, shape = int(match[1] or 1), match[2], match[3]
    devices = _gpus(name, kind, slices, shape) if CHIPS[kind].target else _tpus(name, slices, f"{kind}:{shape}")
    return Topology(name, kind, devices)


def _tpus(name: str, slices: int, shape: str) -> Sequence[Any]:
    if not find_spec("libtpu"):
        wheel = f"pip install 'jax[tpu]=={version('jax')}'"
        raise InputError(f"--topology={name}: the TPU compiler is not installed; run {wheel} (no TPU is needed)")
    # libtpu must neither look for a TPU on this machine nor take the TPU lock from another program.
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_HOST_BOUNDS": "1,1,1",
    }  # fmt: skip
    for variable in ("TPU_MIN_LOG_LEVEL", "TPU_STDERR_LOG_LEVEL"):
        os.environ.setdefault(variable, "3")
    more: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if shape.startswith("v4:"):
        more["chip_config_name"] = "megacore"  # each chip is one device, although it has two cores
    if math.prod(map(int, shape.partition(":")[2].split("x"))) == 1:
        more["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=shape, **more).devices
    except Exception as error:  # libtpu raises exceptions of several types
        reason = " ".join(str(error).split()).removeprefix("INVALID_ARGUMENT: ")
        raise InputError(f"--topology={name}: {reason[:200]}; {_shape_hint(shape)}") from None


def _shape_hint(shape: str) -> str:
    """Suggest a shape in place of one that the compiler rejected."""
    kind, _, sizes = shape.partition(":")
    if not sizes.isdecimal():
        return f"expected a shape that exists, {EXAMPLES}"
    axes = 2 if kind in ("v5e", "v6e") else 3
    sides = [1] * axes
    chips = int(sizes)
    while chips % 2 == 0:  # the next larger slice doubles the shortest axis
        shortest = sides.index(min(sides))
        sides[shortest] *= 2
        chips //= 2
    if chips > 1:
        return f"expected the chips along each axis, {EXAMPLES}"
    ordered = sorted(sides, reverse=axes == 3 and int(sizes) < 8)
    return f"expected the chips along each axis: {kind}:{'x'.join(map(str, ordered))} has {sizes} chips"


def _gpus(name: str, kind: str, slices: int, shape: str) -> Sequence[Any]:
    hosts, _, gpus = f"1x{shape}".rpartition("x")
    counts = [int(n) for n in hosts.split("x")]
    if slices != 1 or len(counts) > 2:
        raise InputError(f"--topology={name}: expected the number of GPUs, or of hosts x GPUs, {EXAMPLES}")
    if not (find_spec("jax_plugins") and find_spec("jax_plugins.xla_cuda13")):
        wheel = "pip install --no-deps jax-cuda13-pjrt=={0} jax-cuda13-plugin=={0}".format(version("jax"))
        raise InputError(f"--topology={name}: JAX's CUDA plugin is not installed; run {wheel} (no GPU is needed)")
    return topologies.get_topology_desc(
        name, platform="cuda", target_config=CHIPS[kind].target, topology=f"1x{math.prod(counts)}x{gpus}"
    ).devices


def _gpu_memory_fraction() -> float:
    """Return the fraction of a GPU's memory that JAX uses."""
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):  # the second is deprecated
        if given := os.environ.get(name):
            try:
                return float(given)
            except ValueError:
                raise InputError(f"{name}={given}: expected a number, such as 0.9") from None
    return 0.75
