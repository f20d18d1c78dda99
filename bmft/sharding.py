"""Devices as a mesh, and which axis of which leaf lies along which of its axes.

Axes: `data` splits the batch, `fsdp` splits the batch and the weights, `tensor` splits the width of
the layers. What XLA's partitioner makes of it is the same function on any number of devices.
"""

import math

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bmft import quantize, tree
from bmft.activations import ROWS
from bmft.errors import Mistake

AXES = ("data", "fsdp", "tensor")
WIDTH = "fsdp"  # of the stream of activations, in the weights that read it or give it
ADDED = ("peft/", "peft_const/", "peft_shared/")  # collections of what methods add


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
    # jax.make_mesh lets an axis of ours split one of the chips' own on v5e alone.
    placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


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


def share(mesh):
    """(numbers, count): which of the `count` parts of a batch's rows the devices of this process
    hold. Processes between which `tensor` splits the layers hold the same ones, and where the mesh
    does not go along the hosts the parts of one need not be neighbours."""
    count = rows(mesh)
    cuts = NamedSharding(mesh, P(ROWS)).addressable_devices_indices_map((count,)).values()
    return tuple(sorted({cut.indices(count)[0] for (cut,) in cuts})), count


def replicated(mesh):
    return NamedSharding(mesh, P())


def of_shapes(shapes):
    """The tree of the shardings that a tree of jax.ShapeDtypeStruct has."""
    return jax.tree.map(lambda leaf: leaf.sharding, shapes)


def of_leaf(mesh, rules, added=None):
    """(path, shape) -> NamedSharding of every leaf there is: by the first of the model's `(pattern,
    axes)` rules that matches its path, and else by what it stands beside.

        layers/.../kernel               its rule; `params/` or `batch_stats/` may stand in front
        quant/<module>/...              as that kernel, but `fsdp` never splits its inputs
        peft/<module>/lora_a            by the letters of `added`, {leaf: letters}: bmft.peft.Method
        peft_const/<module>/...         likewise; whole on every device where it has no letters
        peft_shared/<method>/...        whole on every device

    Raises Mistake, with leaf, shape and mesh, where no rule matches or an axis does not divide.
    """

    def of_base(path, shape):
        axes = next((axes for pattern, axes in rules if tree.match(pattern, path)), None)
        if axes is None:
            raise _without_rule(mesh, path, shape, "the model's SHARDING matches none such")
        return axes

    def of_added(path, shape):
        collection, _, rest = path.partition("/")
        module, _, leaf = rest.rpartition("/")
        letters = (added or {}).get(leaf)
        if collection == "peft_shared" or (letters is None and collection == "peft_const"):
            return ()
        if letters is None:
            raise _without_rule(mesh, path, shape, f"its method's `axes` must name {leaf!r}")
        weight = "embedding" if module.startswith("embeddings/") else "kernel"
        return _beside(of_base(f"{module}/{weight}", shape), letters, len(shape))

    def axes_of(path, shape):
        if path.startswith("quant/"):
            module, _, leaf = path.removeprefix("quant/").rpartition("/")
            return _quantized(of_base(f"{module}/kernel", shape), quantize.AXES[leaf])
        return (of_added if path.startswith(ADDED) else of_base)(path, shape)

    def sharding(path, shape):
        axes = axes_of(path.removeprefix("params/").removeprefix("batch_stats/"), shape)
        for size, split in zip(shape, axes, strict=False):
            for axis in (split,) if isinstance(split, str) else split or ():
                if size % mesh.shape[axis]:
                    raise _undivided(mesh, axis, size, path, shape)
                size //= mesh.shape[axis]
        return NamedSharding(mesh, P(*axes))

    return sharding


def _beside(axes, letters, ndim):
    """The axes of a leaf that stands beside a weight whose own are `axes`, (..., inputs, outputs).

    letters: of its last axes: `i` lies as the inputs, `o` as the outputs, `d`, the width of the
    stream, as the weights that read it, and `.` whole. What stands in front, layers, is whole.
    """
    inputs, outputs = (None, None, *axes)[-2:]
    own = {"i": inputs, "o": outputs, "d": WIDTH, ".": None}
    return (*[None] * (ndim - len(letters)), *(own[letter] for letter in letters))


def _undivided(mesh, axis, size, path, shape):
    """The Mistake of an axis that does not divide, with the largest size that would."""
    most = max(n for n in range(1, mesh.shape[axis]) if size % n == 0)
    what = f"{axis}={mesh.shape[axis]} does not divide {size} of {path} {list(shape)}"
    return Mistake(f"mesh: {what} ({_named(mesh)}); {axis}={most} would")


def _without_rule(mesh, path, shape, why):
    return Mistake(f"mesh: no sharding rule for {path} {list(shape)} ({_named(mesh)}): {why}")


def _named(mesh):
    return ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())


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
    """numpy batch of this process, its `share` -> global arrays, rows split over the mesh."""
    sharding = NamedSharding(mesh, P(ROWS))
    own, count = share(mesh)

    def whole(array):
        shape = (len(array) // len(own) * count, *array.shape[1:])
        return jax.make_array_from_process_local_data(sharding, array, shape)

    def put(batch):
        return {name: whole(np.asarray(array)) for name, array in batch.items()}

    return put


def put_everywhere(mesh):
    """numpy arrays that every process has whole -> global arrays, rows split over the mesh."""
    sharding = NamedSharding(mesh, P(ROWS))

    def put(arrays):
        return {
            name: jax.make_array_from_callback(array.shape, sharding, array.__getitem__)
            for name, array in arrays.items()
        }

    return put
