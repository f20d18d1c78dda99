"""JSON and safetensors files of adapters, read strictly and written: what their layouts share.

Each function that reads raises Mistake, in one line that names the file.
"""

import json
import typing
from typing import Any

import jax.numpy as jnp
import ml_dtypes  # noqa: F401 - makes NumPy know bfloat16, which safetensors then reads
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from bmft.errors import Mistake
from bmft.peft.portable import COUNTER

BASE_KEY = "bmft_base_fingerprint"  # in the metadata of a file of tensors


def check_there(folder, name, pickle):
    """Mistake if a folder has no file of this name: is a pickle there in its place?"""
    if not (folder / name).is_file():
        pickled = f"; {pickle} is a pickle, which is refused" if (folder / pickle).is_file() else ""
        raise Mistake(f"{folder}: no {name}{pickled}")


def json_of(file):
    """What a JSON file holds."""
    try:
        return json.loads(file.read_text(encoding="utf-8"), parse_constant=_no_number)
    except (OSError, ValueError, RecursionError) as error:
        raise Mistake(f"{file}: not JSON: {_one_line(error)}") from None


def _no_number(constant):
    raise ValueError(f"{constant} is no number")


def is_of(value, kind):
    """Is a value of JSON of a type: list[...] of what its members are?"""
    if typing.get_origin(kind) is list:
        inside = typing.get_args(kind)[0]
        return isinstance(value, list) and all(is_of(one, inside) for one in value)
    # Python takes True for an int.
    return isinstance(value, kind) and isinstance(value, bool) == (kind is bool)


def write_json(file, fields):
    file.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_tensors(file, arrays, about):
    """A safetensors file of {key: array}, float32 but for counters; about: its metadata."""
    # safetensors writes memory as it lies, and a transposed view lies otherwise.
    laid_out = {
        key: np.array(array, np.int64 if array.dtype == np.int64 else np.float32, order="C")
        for key, array in arrays.items()
    }
    save_file(laid_out, file, about)


def headers(file):
    """(metadata, {key: shape}) of a safetensors file."""
    with _opened(file) as opened:
        shapes = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
        return opened.metadata() or {}, shapes


def tensors(file):
    """{key: float32 array}; Mistake for numbers that no weights are."""
    with _opened(file) as opened:
        found = {key: _tensor(opened, key, file) for key in opened.keys()}  # noqa: SIM118
    for key, tensor in found.items():
        if not np.isfinite(tensor).all():
            raise Mistake(f"{file}: tensor {key!r} has numbers that are not finite")
    return found


def _tensor(opened, key, file):
    try:
        tensor = opened.get_tensor(key)
        is_float = jnp.issubdtype(tensor.dtype, jnp.floating)
    except (SafetensorError, TypeError, AttributeError) as error:  # of types that NumPy lacks
        raise Mistake(f"{file}: tensor {key!r} cannot be read: {_one_line(error)}") from None
    if not is_float and not key.endswith(f".{COUNTER}"):
        raise Mistake(f"{file}: tensor {key!r} is of {tensor.dtype}, and no floating point numbers")
    return tensor.astype(np.float32)


def _one_line(error):
    return " ".join(str(error).split())


def _opened(file) -> Any:
    try:
        return safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise Mistake(f"{file}: {_one_line(error)}") from None
