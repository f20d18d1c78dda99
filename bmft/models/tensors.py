"""Tensors in safetensors, HDF5 and GGUF files: which there are, their shapes, and slices of them.

Nothing is read before it is asked for, and of a tensor no more than the slices asked for (of GGUF:
the blocks they touch). Pickles are refused: reading one runs what its author wrote.
"""

import json
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import h5py
import ml_dtypes  # noqa: F401 - makes NumPy know bfloat16, which safetensors then reads
from safetensors import SafetensorError, safe_open

from bmft.errors import Mistake
from bmft.models import gguf_file, gguf_names

HDF5 = (".h5", ".hdf5")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".th", ".tar")


class Tensor(NamedTuple):
    """Where a tensor lies."""

    file: Path
    name: str
    shape: tuple


def index(where):
    """{name: Tensor} of a directory (one or several safetensors shards) or of one file (or all
    parts of a split GGUF file, by one of them); GGUF's are named as Hugging Face's files name them.

    Raises Mistake for what is none, is damaged, or is a pickle.
    """
    found = {}
    for path in paths(Path(where)):
        with opened(path) as file:
            found |= {name: Tensor(path, name, shape) for name, shape in file.shapes().items()}
    return found


def paths(where):
    """The files of weights in a directory; a file itself."""
    if where.suffix in PICKLES:
        raise Mistake(f"{where}: pickled weights are refused; convert them to safetensors")
    if where.suffix == gguf_file.SUFFIX:
        return gguf_file.parts(where)
    if where.is_file():
        return [where]
    single, shards = where / "model.safetensors", where / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if shards.is_file():
        return [where / name for name in _shard_names(shards)]
    if any(path.suffix in PICKLES for path in where.iterdir()):
        raise Mistake(f"{where}: pickled weights (.bin) are refused; convert them to safetensors")
    raise Mistake(f"{where}: no model.safetensors")


def are_in(where):
    """Whether there are files of weights in a directory at all; or it is one."""
    return where.is_file() or any(where.glob("*.safetensors*")) or any(where.glob("*.bin"))


def _shard_names(index):
    """The files that a model.safetensors.index.json names."""
    try:
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Mistake(f"{index}: no index of shards: {error}") from None


@contextmanager
def opened(path):
    """A file of tensors with `shapes()` and `read(name, slices)`."""
    try:
        if path.suffix in HDF5:
            with h5py.File(path) as file:
                yield _Hdf5(file)
        elif path.suffix == gguf_file.SUFFIX:
            yield _Gguf(gguf_names.index(path))
        else:
            with safe_open(path, framework="numpy") as file:
                yield _Safetensors(file)
    except (SafetensorError, OSError) as error:
        raise Mistake(f"{path}: {error}") from None


class _Safetensors(NamedTuple):
    file: object

    def shapes(self):
        names = self.file.keys()  # it is no dict
        return {name: tuple(self.file.get_slice(name).get_shape()) for name in names}

    def read(self, name, slices):
        return self.file.get_slice(name)[slices]


class _Hdf5(NamedTuple):
    file: h5py.File

    def shapes(self):
        found = {}

        def visit(name, item):
            if isinstance(item, h5py.Dataset):
                found[name] = item.shape

        self.file.visititems(visit)
        return found

    def read(self, name, slices):
        return self.file[name][slices]


class _Gguf(NamedTuple):
    named: dict

    def shapes(self):
        return {name: named.shape for name, named in self.named.items()}

    def read(self, name, slices):
        return gguf_names.read(self.named[name], slices)
