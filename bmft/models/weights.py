"""A model's leaves from safetensors, each straight into its sharding, and what was not in the file.

The file decides nothing in silence: a tensor of the wrong shape, a tensor nobody knows, a missing
one outside the head and the pooler are refused; the rest is listed in `Loaded`.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401 - makes NumPy know bfloat16, which safetensors then reads
import numpy as np
from safetensors import SafetensorError, safe_open

from bmft import tree
from bmft.errors import Mistake

# Only these may be missing from a file, and are then initialised: the head, and BERT's pooler,
# which masked-language-model checkpoints leave out.
FRESH = ("classifier", "pooler")


class Loaded(NamedTuple):
    params: Any  # the whole base tree
    fresh: tuple  # paths that the file did not have: initialised, so they must move
    ignored: tuple  # tensors of the file that the model does without


class Files(NamedTuple):
    """The tensors of a directory: our name of each -> (file, its name there)."""

    where: dict
    folder: Path


def shapes(model):
    """The base tree as shapes; nothing is computed."""
    key = jax.random.key(0)
    return jax.eval_shape(model.module.init, key, model.dummy)["params"]


def load(model, key, *, dtype=None, sharding=None):
    """`Loaded` for a model; `key` initialises what the file does not have.

    dtype(path) -> dtype of a leaf (None: float32); sharding(path, shape) -> jax Sharding (None:
    the default device). Each process reads the slices of its own devices only.
    Raises Mistake, naming file and tensor, for anything that does not fit.
    """
    dtype = dtype or (lambda path: jnp.float32)
    sharding = sharding or (lambda path, shape: jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    files = index(model)
    expected = tree.flatten(shapes(model))
    params, fresh, used = {}, [], set()
    for leaf in model.names.leaves:
        shape = expected[leaf.path].shape
        keys = [leaf.file.format(layer) for layer in model.names.layers_of(leaf.path)]
        if _missing(files, leaf, keys, shape):
            fresh.append(leaf.path)
            continue
        used.update(keys)
        read = _reader(files, leaf, keys, shape, np.dtype(dtype(leaf.path)))
        params[leaf.path] = jax.make_array_from_callback(shape, sharding(leaf.path, shape), read)
    params |= _initialise(model, key, tuple(fresh), dtype, sharding)
    left = sorted(set(files.where) - used)
    replaced = {leaf.file for leaf in model.names.leaves if leaf.path in fresh}
    ignored = [name for name in left if name.startswith(model.ignored) or name in replaced]
    unknown = [name for name in left if name not in ignored]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise Mistake(f"{files.folder}: the model has no place for tensor {unknown[0]!r}{more}")
    return Loaded(tree.unflatten(params), tuple(fresh), tuple(ignored))


def index(model):
    """`Files` of a model's folder: one model.safetensors or the shards its index names."""
    folder = model.folder
    shards = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        paths = [folder / "model.safetensors"]
    elif shards.is_file():
        paths = [folder / name for name in _shard_names(shards)]
    elif any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        raise Mistake(f"{folder}: pickled weights (.bin) are refused; convert them to safetensors")
    else:
        raise Mistake(f"{folder}: no model.safetensors")
    where = {}
    for path in paths:
        try:
            with safe_open(path, framework="numpy") as file:
                found = file.keys()
                where |= {_plain(name, model.names.prefix): (path, name) for name in found}
        except (SafetensorError, OSError) as error:
            raise Mistake(f"{path}: {error}") from None
    return Files(where, folder)


def _shard_names(index):
    """The files that a model.safetensors.index.json names."""
    try:
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Mistake(f"{index}: no index of shards: {error}") from None


def fingerprint(model):
    """SHA-256 over the weights files (names, shapes and bytes), before any cast."""
    digest = hashlib.sha256()
    for path in sorted({path for path, _ in index(model).where.values()}):
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


def _missing(files, leaf, keys, shape):
    """Whether a leaf must be initialised; refuses one that is missing and may not be."""
    absent = [key for key in keys if key not in files.where]
    optional = tree.under(leaf.path, FRESH)
    if absent and not optional:
        raise Mistake(f"{files.folder}: tensor {absent[0]!r} is missing")
    if absent:
        return True
    for key in keys:
        path, name = files.where[key]
        with safe_open(path, framework="numpy") as file:
            found = tuple(file.get_slice(name).get_shape())
        want = shape[1:] if leaf.path.startswith("layers/") else shape
        want = want[::-1] if leaf.layout == "transpose" else want
        if found != want and leaf.path.startswith("classifier/"):
            return True  # the head of another task
        if found != want:
            needs = f"the model needs {list(want)}"
            raise Mistake(f"{path}: tensor {name!r} has shape {list(found)}, {needs}")
    return False


def _reader(files, leaf, keys, shape, dtype):
    """The callback of one leaf: reads the slices one device asks for, in our layout."""
    stacked = leaf.path.startswith("layers/")

    def one(key, cut):
        path, name = files.where[key]
        with safe_open(path, framework="numpy") as file:
            tensor = file.get_slice(name)
            if leaf.layout == "transpose":
                return tensor[cut[::-1]].T.astype(dtype)
            return tensor[cut].astype(dtype)

    def read(cut):
        cut = tuple(slice(*s.indices(n)[:2]) for s, n in zip(cut, shape, strict=True))
        if not stacked:
            return one(keys[0], cut)
        return np.stack([one(key, cut[1:]) for key in keys[cut[0]]])

    return read


def _initialise(model, key, paths, dtype, sharding):
    """{path: leaf} for leaves the file lacks; the rest of init is never computed or held."""
    if not paths:
        return {}

    def some(key):
        params = tree.flatten(model.module.init(key, model.dummy)["params"])
        return {path: params[path].astype(dtype(path)) for path in paths}

    made = jax.eval_shape(some, key)
    where = {path: sharding(path, leaf.shape) for path, leaf in made.items()}
    return jax.jit(some, out_shardings=where)(key)
