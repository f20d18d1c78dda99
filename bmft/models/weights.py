"""A model's leaves from its file, each straight into its sharding, and what was not in the file.

The file decides nothing in silence: a tensor of the wrong shape, a tensor nobody knows, a missing
one outside the head and the pooler are refused; the rest is listed in `Loaded`.
"""

import hashlib
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bmft import layers, names, quantize, tree
from bmft.errors import Mistake, nearest
from bmft.models import tensors

# Only these may be missing from a file, and are then initialised: the head, and BERT's pooler,
# which masked-language-model checkpoints leave out.
FRESH = ("classifier", "pooler")
COUNTERS = ".num_batches_tracked"  # of torch's BatchNorm; it decides nothing


class Loaded(NamedTuple):
    params: Any  # the whole base tree
    batch_stats: Any  # running statistics; {} where the model has none
    fresh: tuple  # paths that the file did not have: initialised, so they must move
    ignored: tuple  # tensors of the file that the model does without
    quant: Any  # leaves of the quantized kernels (bmft.quantize), which params lacks; mostly {}

    def variables(self):
        """{"params": ..., "batch_stats": ..., "quant": ...}, the last two where there are any."""
        more = {"batch_stats": self.batch_stats, "quant": self.quant}
        return {"params": self.params} | {name: leaves for name, leaves in more.items() if leaves}

    def leaves(self):
        """All leaves of the base in one tree; quantized kernels as what they stand for."""
        quant = jax.tree.map(np.asarray, self.quant)
        return tree.join(quantize.restored(self.params, quant), self.batch_stats)


class Files(NamedTuple):
    """The tensors of a model's files: our name of each -> where it lies."""

    where: dict
    folder: Path


def shapes(model):
    """The base tree, its running statistics included, as shapes; nothing is computed."""
    made = layers.shapes(model.module, model.dummy)
    return tree.join(made["params"], made.get("batch_stats", {}))


def quantized(model, how, moves):
    """{kernel: how} of the kernels that `model.quantize` quantizes: all of dense layers in the
    stack but those that move. how: of quantize.SCHEMES, or None; moves(path) -> bool.

    Raises Mistake for another, and for a model without such layers.
    """
    if how is None:
        return {}
    if how not in quantize.SCHEMES:
        raise Mistake(f"model.quantize: no {how!r}; {nearest(how, quantize.SCHEMES)}")
    dense = [module for module in model.names.modules("dense") if module.startswith("layers/")]
    if not dense:
        raise Mistake(f"model.quantize={how!r}: {model.name} has no stack of dense layers")
    return {path: how for module in dense if not moves(path := f"{module}/kernel")}


def expected(model, files=None, *, dtype=None, sharding=None, quantized=None):
    """`Loaded` before anything is read: in place of each array a jax.ShapeDtypeStruct of its shape,
    dtype and sharding. The arguments are those of `load`.

    files: of `index`: they say which leaves are fresh. None: weights that are not here, and are
    taken to lack nothing but the head. Raises Mistake for tensors of the wrong shape.
    """
    dtype = dtype or (lambda path: jnp.float32)
    sharding = sharding or (lambda path, shape: jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    made, quantized = tree.flatten(shapes(model)), quantized or {}
    leaves, fresh, quant = {}, [], {}
    for leaf in model.names.leaves:
        path, shape = leaf.path, made[leaf.path].shape
        if tree.under(path, model.heads) if files is None else _missing(files, leaf, model, shape):
            fresh.append(path)
        elif path in quantized:
            how, own = quantized[path], path.removesuffix("/kernel")
            quantize.check(how, path, shape[1])
            for name, stored in quantize.shapes(how, shape).items():
                where = sharding(f"quant/{own}/{name}", stored.shape)
                quant[f"{own}/{name}"] = stored.update(sharding=where)
            continue
        where = sharding(path, shape)
        leaves[path] = jax.ShapeDtypeStruct(shape, dtype(path), sharding=where)
    statistics = {leaf.path for leaf in model.names.leaves if leaf.is_statistic}
    batch_stats, params = tree.split(tree.unflatten(leaves), statistics.__contains__)
    return Loaded(params, batch_stats, tuple(fresh), (), tree.unflatten(quant))


def load(model, key, *, dtype=None, sharding=None, shared=None, quantized=None):
    """`Loaded` for a model; `key` initialises what the file does not have.

    dtype(path) -> dtype of a leaf (None: float32); sharding(path, shape) -> jax Sharding (None:
    the default device). Each process reads the slices of its own devices only.
    shared: another `Loaded` of the model, in the same sharding: what it has in the wanted dtype
    is taken from there, and not read or copied again.
    quantized: {kernel: how}, of `quantized`; one layer of one kernel is held as floats at a time.
    Raises Mistake, naming file and tensor, for anything that does not fit.
    """
    files = index(model)
    wanted = expected(model, files, dtype=dtype, sharding=sharding, quantized=quantized)
    return read(model, key, files, wanted, shared)


def read(model, key, files, wanted, shared=None):
    """`Loaded` with the arrays that `wanted`, of `expected`, describes; see `load`."""
    there = tree.flatten(tree.join(shared.params, shared.batch_stats)) if shared else {}
    kept = quantize.modules(shared.quant) if shared else {}
    places = tree.flatten(tree.join(wanted.params, wanted.batch_stats))
    compressed, whole = quantize.modules(wanted.quant), tree.flatten(shapes(model))
    leaves, used, quant = {}, set(), {}
    for leaf in model.names.leaves:
        path = leaf.path
        if path in wanted.fresh:
            continue
        used.update(_keys(leaf, model))
        if path in places:
            shape, dtype, where = places[path].shape, places[path].dtype, places[path].sharding
            if path in there and there[path].dtype == dtype:
                leaves[path] = there[path]
            else:
                slices = _reader(files, leaf, model, shape, dtype)
                leaves[path] = _array(shape, where, slices)
            continue
        own = path.removesuffix("/kernel")
        made, how = kept.get(own, {}), quantize.scheme(compressed[own])
        if how not in made:
            slices = _reader(files, leaf, model, whole[path].shape, np.float32)
            made = _quantize(how, slices, compressed[own])
        quant |= {f"{own}/{name}": array for name, array in made.items()}
    leaves |= _initialise(model, key, {path: places[path] for path in wanted.fresh})
    _check_tied(files, model.names)
    ignored = _ignored(model, files, used, wanted.fresh)
    statistics = tree.flatten(wanted.batch_stats)
    batch_stats, params = tree.split(tree.unflatten(leaves), statistics.__contains__)
    return Loaded(params, batch_stats, wanted.fresh, ignored, tree.unflatten(quant))


def _ignored(model, files, used, fresh):
    """The tensors of the files beside those `used`; Mistake where one is no known one."""
    left = sorted(set(files.where) - used)
    replaced = {leaf.file for leaf in model.names.leaves if leaf.path in fresh}
    layered = (name.format(layer) for name in model.ignored for layer in range(model.names.layers))
    without = (*model.ignored, *layered, *replaced)
    ignored = [name for name in left if name.startswith(without) or name.endswith(COUNTERS)]
    unknown = [name for name in left if name not in ignored]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise Mistake(f"{files.folder}: the model has no place for tensor {unknown[0]!r}{more}")
    return tuple(ignored)


def index(model):
    """`Files` of a model; tensors named as transformers' modules count as those of its files."""
    table, found = model.names, tensors.index(model.folder)
    spelled = {
        module.format(layer).removeprefix(table.prefix): leaf.file.format(layer)
        for leaf in table.leaves
        if not leaf.part
        for module in leaf.modules
        for layer in table.layers_of(leaf.path)
    }
    where = {_plain(name, table.prefix): at for name, at in found.items()}
    return Files({spelled.get(name, name): at for name, at in where.items()}, model.folder)


def fingerprint(model):
    """SHA-256 over the weights files (names, shapes and bytes), before any cast."""
    digest = hashlib.sha256()
    for path in sorted(tensors.paths(model.folder)):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _plain(name, prefix):
    """A tensor's name without the model's prefix and in today's words.

    Files converted from TensorFlow (bert-base-uncased among them) say gamma and beta.
    """
    name = name.removeprefix(prefix)
    name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
    return re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)


def _keys(leaf, model):
    """The tensors of a leaf, by our names of them."""
    return [leaf.file.format(layer) for layer in model.names.layers_of(leaf.path)]


def _missing(files, leaf, model, shape):
    """Whether a leaf must be initialised; refuses one that is missing and may not be."""
    keys = _keys(leaf, model)
    absent = [key for key in keys if key not in files.where]
    optional = tree.under(leaf.path, FRESH)
    if absent and not optional:
        raise Mistake(f"{files.folder}: tensor {absent[0]!r} is missing")
    if absent:
        return True
    want = names.in_file(leaf.layout, shape[1:] if _is_stacked(leaf) else shape)
    if leaf.part:
        want = (want[0] * leaf.part[1], *want[1:])
    for key in keys:
        tensor = files.where[key]
        if tensor.shape != want and leaf.path.startswith("classifier/"):
            return True  # the head of another task
        if tensor.shape != want:
            needs = f"the model needs {list(want)}"
            found = list(tensor.shape)
            raise Mistake(f"{tensor.file}: tensor {tensor.name!r} has shape {found}, {needs}")
    return False


def _check_tied(files, table):
    """Refuses a head in the file that is not the word embedding which config.json says it is."""
    words = next((leaf.file for leaf in table.leaves if leaf.kind == "embed"), None)
    if not table.is_tied or table.head.file not in files.where:
        return
    one, other = (_whole(files.where[key]) for key in (table.head.file, words))
    if not np.array_equal(one, other):
        raise Mistake(
            f"{files.folder}: {table.head.file!r} is another tensor than {words!r}; config.json "
            "must say tie_word_embeddings: false"
        )


def _whole(tensor):
    with tensors.opened(tensor.file) as file:
        return file.read(tensor.name, tuple(slice(0, size) for size in tensor.shape))


def _is_stacked(leaf):
    return leaf.path.startswith("layers/")


def _reader(files, leaf, model, shape, dtype):
    """The callback of one leaf: reads the slices one device asks for, in our layout."""
    keys = _keys(leaf, model)
    own = shape[1:] if _is_stacked(leaf) else shape
    skipped = names.in_file(leaf.layout, own)[0] * leaf.part[0] if leaf.part else 0

    def one(key, cut):
        path, name, _ = files.where[key]
        cut = names.in_file(leaf.layout, cut)
        if skipped:
            cut = (slice(cut[0].start + skipped, cut[0].stop + skipped), *cut[1:])
        with tensors.opened(path) as file:
            return names.from_file(leaf.layout, file.read(name, cut)).astype(dtype)

    def read(cut):
        cut = tuple(slice(*s.indices(n)[:2]) for s, n in zip(cut, shape, strict=True))
        if not _is_stacked(leaf):
            return one(keys[0], cut)
        stack = np.empty([s.stop - s.start for s in cut], dtype)
        for row, key in enumerate(keys[cut[0]]):
            stack[row] = one(key, cut[1:])
        return stack

    return read


def _array(shape, where, read):
    """The array of what read(slices) gives; what several devices hold is read once, and held once
    on the host."""
    found = {}

    def once(cut):
        key = tuple(s.indices(n)[:2] for s, n in zip(cut, shape, strict=True))
        if key not in found:
            found[key] = read(cut)
        return found[key]

    return jax.make_array_from_callback(shape, where, once)


def _quantize(how, read, stored):
    """{leaf: array} of a quantized kernel; read is that of `_reader`, stored {leaf: what
    `expected` says of it}."""
    arrays = {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in stored.items()}
    for i in range(len(arrays[how])):
        kernel = read((slice(i, i + 1), slice(None), slice(None)))[0].T
        for name, values in quantize.quantize(how, kernel).items():
            arrays[name][i] = values

    def placed(name):
        array = arrays[name]
        return _array(array.shape, stored[name].sharding, array.__getitem__)

    return {name: placed(name) for name in stored}


def _initialise(model, key, places):
    """{path: leaf} for leaves the file lacks, as `places` says; the rest of init is never computed
    or held."""
    if not places:
        return {}

    def some(key):
        params = tree.flatten(model.module.init(key, model.dummy)["params"])
        return {path: params[path].astype(place.dtype) for path, place in places.items()}

    where = {path: place.sharding for path, place in places.items()}
    return jax.jit(some, out_shardings=where)(key)
