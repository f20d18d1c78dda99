"""The chips that a plan may be for: what their makers say of them, and the names of their slices.

TPUs: the pages "TPU v5e", "TPU v6e" and "TPU v5p" of Cloud TPU's documentation. GPUs: NVIDIA's data
sheets of the SXM boards (A100 80 GB, H100, H200), dense bfloat16. Peaks are of products in
bfloat16; a link's bytes a second are of both directions together.
"""

import importlib.util
import os
import re
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh

from bmft import sharding
from bmft.errors import Mistake, nearest

GB, GIB = 1e9, 2**30


class Chip(NamedTuple):
    name: str
    platform: str  # of JAX
    peak: float  # operations a second, products in bfloat16
    memory: float  # bytes
    bandwidth: float  # bytes a second from and to memory
    links: float  # bytes a second to and from other chips, both directions together


CHIPS = {
    "v5e": Chip("TPU v5e", "tpu", 197e12, 16 * GIB, 819 * GB, 400 * GB),
    "v6e": Chip("TPU v6e", "tpu", 918e12, 32 * GIB, 1638 * GB, 800 * GB),
    "v5p": Chip("TPU v5p", "tpu", 459e12, 95 * GIB, 2765 * GB, 1200 * GB),
    "a100": Chip("NVIDIA A100 80 GB", "gpu", 312e12, 80 * GB, 2039 * GB, 600 * GB),
    "h100": Chip("NVIDIA H100", "gpu", 989e12, 80 * GB, 3350 * GB, 900 * GB),
    "h200": Chip("NVIDIA H200", "gpu", 989e12, 141 * GB, 4800 * GB, 900 * GB),
}
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
DEEP = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")
DEEP += ("8x16x16", "16x16x16", "16x16x24")
SLICES = {"v5e": FLAT, "v6e": FLAT, "v5p": DEEP}
BOARDS = (1, 2, 4, 8)  # GPUs that one NVLink joins
NAMES = (
    "cpu",
    *(f"{kind}:{shape}" for kind, shapes in SLICES.items() for shape in shapes),
    *(f"{kind}x{n}" for kind, chip in CHIPS.items() if chip.platform == "gpu" for n in BOARDS),
)


class Topology(NamedTuple):
    name: str
    platform: str  # of JAX
    chip: Chip | None  # None: of this machine's CPU nothing is known here
    count: int
    devices: Any  # that a program can be compiled for; None: there is no compiler for them here

    def mesh(self, config):
        """The mesh of a config on them; Mistake where it does not fit."""
        if self.devices is not None:
            return sharding.mesh(config, self.devices)
        return AbstractMesh(tuple(sharding.mesh_sizes(config, self.count)), sharding.AXES)


def find(name):
    """The `Topology` of a name, as v5e:4x4, h100x8 or cpu. Mistake, with the nearest, for another,
    and where what compiles for it is missing."""
    if name not in NAMES:
        raise Mistake(f"--topology={name!r}: {_nearest(name)}")
    if name == "cpu":
        return Topology(name, "cpu", None, jax.device_count(), jax.devices())
    kind, _, shape = name.partition(":")
    if shape:
        devices = _tpus(name, shape)
        return Topology(name, "tpu", CHIPS[kind], len(devices), devices)
    kind, _, count = name.rpartition("x")
    return Topology(name, "gpu", CHIPS[kind], int(count), None)


def _nearest(name):
    """What to say of an unknown name; v5e-16 and its like are what gcloud calls a slice."""
    found = re.fullmatch(r"(v5litepod|v5e|v6e|v5p)[-:x]?(\d+(?:x\d+)*)", name)
    if not found:
        return nearest(name, NAMES)
    kind, shape = found[1].replace("v5litepod", "v5e"), found[2]
    count = _size(shape)
    if kind == "v5p" and "x" not in shape:
        count //= 2  # gcloud counts its cores, two a chip
    close = min(SLICES[kind], key=lambda one: abs(_size(one) - count))
    return f"did you mean '{kind}:{close}'?"


def _size(shape):
    size = 1
    for side in shape.split("x"):
        size *= int(side)
    return size


def _tpus(name, shape):
    """The devices of a TPU that is not here, from its compiler."""
    if importlib.util.find_spec("libtpu") is None:
        raise Mistake(
            f"--topology={name} needs the TPU's compiler, package libtpu: "
            "./run.sh -m pip install -r requirements-tpu.txt"
        )
    from jax.experimental import topologies

    # Or it asks a cloud's metadata server what machine this is, and says at length that none is.
    quiet = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    quiet["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # no chip is used: others may go on using theirs
    quiet |= {"TPU_ACCELERATOR_TYPE": f"v5litepod-{_size(shape)}", "TPU_WORKER_ID": "0"}
    for key, value in (quiet | {"TPU_MIN_LOG_LEVEL": "3", "TPU_STDERR_LOG_LEVEL": "3"}).items():
        os.environ.setdefault(key, value)
    sides = [int(side) for side in shape.split("x")]
    host = {"chips_per_host_bounds": (1, 1, 1)} if sides == [1, 1] else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **host).devices
    except jax.errors.JaxRuntimeError as error:
        raise Mistake(f"--topology={name}: libtpu says {error}") from None
