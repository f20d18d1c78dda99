"""Features of a frozen backbone, computed once and kept on disk.

Where nothing moves in the first pieces of a model, and the images of every epoch are the same, so
is what comes out of these pieces. It is written to one file for each split, named by a hash of all
it depends on, and read from there in every epoch, in other runs too.

    <cache>/features/<hash>.npy      [n, ...] in the order of the split
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
import tempfile
import warnings
from pathlib import Path

import jax
import ml_dtypes  # noqa: F401 - NumPy knows bfloat16 by it
import numpy as np

from bmft import evaluate, processes

FORMAT = "bmft features 1"  # a new number leaves old files unread
SPARE = 0.1  # share of the free disk that stays free


def obtain(outputs_of, variables, batches, cache, about):
    """The features of a split, a memory-mapped array [n, ...]; computed if they are not there.

    outputs_of(variables, batch) -> {"features": [b, ...]}; batches: one pass over the split in any
    order; about: whatever decides what they are, JSON. Returns None, with a warning, where the disk
    has no room or cannot be written: they are then computed anew in each epoch.
    """
    text = json.dumps([FORMAT, about], sort_keys=True)
    path = Path(cache) / "features" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.npy"
    first = batches.at(0)
    one = jax.eval_shape(outputs_of, variables, first)["features"]
    shape, dtype = (batches.examples, *one.shape[1:]), one.dtype
    found = _open(path, shape, dtype)
    # They are computed by all processes together, or by none: each may have a disk of its own.
    if all(processes.exchange(found is not None)):
        return found
    missing = processes.exchange(_lacks_room(path.parent, math.prod(shape) * dtype.itemsize))
    reason = next(filter(None, missing), None)
    try:
        if reason:
            raise OSError(reason)
        _write(path, shape, dtype, outputs_of, variables, batches)
    except OSError as error:  # slower, not wrong
        if not reason and processes.several():
            raise  # the others are in the middle of it
        warnings.warn(f"features are not kept in {path.parent}: {error}", stacklevel=2)
        return None
    return _open(path, shape, dtype)


def _lacks_room(folder, needed):
    """Why `folder` cannot take so many bytes, or None."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free * (1 - SPARE)
    except OSError as error:
        return str(error)
    if needed > free:
        return f"{needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} are free"
    return None


def _write(path, shape, dtype, outputs_of, variables, batches):
    """All rows into a file of another name first, so that no one ever reads half of it."""
    handle, partial = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    os.close(handle)
    try:
        array = np.lib.format.open_memmap(partial, "w+", _plain(dtype), shape)
        evaluate.over_split(outputs_of, variables, batches, into={"features": array.view(dtype)})
        array.flush()
        os.replace(partial, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)


def _open(path, shape, dtype):
    try:
        found = np.load(path, mmap_mode="r")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError) as error:
        warnings.warn(f"cache {path} is damaged and made again: {error}", stacklevel=3)
        return None
    return found.view(dtype) if found.shape == shape else None


def _plain(dtype):
    """What NumPy's own format calls numbers of that size: it has no bfloat16."""
    return np.dtype(f"u{dtype.itemsize}") if dtype.kind == "V" else dtype
