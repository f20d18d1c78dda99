"""Devices as a mesh, and which axis of which leaf lies along which of its axes.

Axes: `data` splits the batch, `fsdp` splits the batch and the weights, `tensor` splits the width of
the layers. What XLA's partitioner makes of it is the same function on any number of devices.
"""

import math

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from bmft import quantize, tree
from bmft.errors import Mistake

AXES = ("data", "fsdp", "tensor")
ROWS = P(("data", "fsdp"))  # the rows of a batch


def use_all_cores(cores):
    """On a machine without accelerators: one XLA device per core, before JAX starts.

    Splitting the batch over them was 15 to 20 % faster than one multi-threaded device (minilm,
    2,048 tokens a batch, two cores). Beyond eight the rows of a small batch run out.
    """
    try:
        jax.config.update("jax_num_cpu_devices", min(cores, 8))
    except RuntimeError:
        return  # JAX has started already (a notebook, a test): what it has is what is used


def mesh(config, devices=None):
    """The `Mesh` of `config.mesh` on all devices, or on these; one axis may be -1, the rest.
    Mistake where it does not fit."""
    sizes = mesh_sizes(config, jax.device_count() if devices is None else len(devices))
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def mesh_sizes(config, count):
    """How many of so many devices lie along each of AXES. Mistake where they do not fit."""
    sizes = [config.mesh[axis] for axis in AXES]
    named = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size == 0 or size < -1 for size in sizes):
        raise Mistake(f"mesh: {named}: sizes are 1 or more, and one of them may be -1")
    known = math.prod(size for size in sizes if size != -1)
    if count % known or (-1 not in sizes and known != count):
        raise Mistake(f"mesh: {named} does not fit {count} devices")
    return [count // known if size == -1 else size for size in sizes]


def rows(mesh):
    """Into how many parts the rows of a batch are split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def replicated(mesh):
    return NamedSharding(mesh, P())


def of_shapes(shapes):
    """The tree of the shardings that a tree of jax.ShapeDtypeStruct has."""
    return jax.tree.map(lambda leaf: leaf.sharding, shapes)


def of_leaf(mesh, rules):
    """(path, shape) -> NamedSharding, by the first of the `(pattern, axes)` rules that matches.

    A leaf `quant/...` of a quantized kernel lies as the rule of that kernel says, but that its
    inputs are never split by `fsdp`.
    Raises Mistake, with leaf, shape and mesh, where no rule matches or an axis does not divide.
    """

    def axes_of(path, shape):
        if path.startswith("quant/"):
            module, _, leaf = path.removeprefix("quant/").rpartition("/")
            return _quantized(axes_of(f"{module}/kernel", shape), quantize.AXES[leaf])
        axes = next((axes for pattern, axes in rules if tree.match(pattern, path)), None)
        if axes is None:
            raise Mistake(f"mesh: no sharding rule for {path} {list(shape)}")
        return axes

    def sharding(path, shape):
        axes = axes_of(path, shape)
        for size, split in zip(shape, axes, strict=False):
            for axis in (split,) if isinstance(split, str) else split or ():
                if size % mesh.shape[axis]:
                    named = f"{axis}={mesh.shape[axis]}"
                    raise Mistake(f"mesh: {named} does not divide {size} of {path} {list(shape)}")
                size //= mesh.shape[axis]
        return NamedSharding(mesh, P(*axes))

    return sharding


def _quantized(axes, leaf):
    """The axes of a leaf of a quantized kernel whose own are `axes`, (..., inputs, outputs).

    Blocks run along the inputs. `tensor` splits these where it splits the kernel's: its shards
    must then hold whole blocks, which the shape of the blocks' scales says. `fsdp` gathers a kernel
    before it is used, whichever way it was split: so it always splits the outputs.
    """
    if len(axes) < 2:
        return ()
    *front, inputs, outputs = axes
    if inputs == "fsdp":
        inputs, outputs = None, (outputs, "fsdp") if outputs else "fsdp"
    own = {"o": outputs, "i": inputs}
    return (*front, *(own[axis] for axis in leaf)) if leaf else ()


def put_batch(mesh):
    """numpy batch of this process -> global arrays, rows split over the mesh."""
    sharding = NamedSharding(mesh, ROWS)

    def put(batch):
        return {
            name: jax.make_array_from_process_local_data(sharding, np.asarray(array))
            for name, array in batch.items()
        }

    return put


def put_everywhere(mesh):
    """numpy arrays that every process has whole -> global arrays, rows split over the mesh."""
    sharding = NamedSharding(mesh, ROWS)

    def put(arrays):
        return {
            name: jax.make_array_from_callback(array.shape, sharding, array.__getitem__)
            for name, array in arrays.items()
        }

    return put
