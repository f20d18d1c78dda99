"""Per-example outputs of a whole split, padding dropped, gathered to the host; then metrics.

Metrics are computed on all examples of a split at once: Spearman's correlation and F1 are no means
over batches.
"""

import jax
import numpy as np
from jax.experimental import multihost_utils

from bmft import train
from bmft.errors import Mistake


def make_outputs(apply, outputs):
    """outputs_of(variables, batch) -> {name: [rows, slots, ...]}; jitted, deterministic.

    outputs(forward, batch) is the task's.
    """

    def outputs_of(variables, batch):
        return outputs(train.bind(apply, variables), batch)

    return jax.jit(outputs_of)


def over_split(outputs_of, variables, batches, stop=lambda: False, into=None):
    """{name: numpy [n, ...]} in the order of the split; None if `stop()` became true on the way.

    into: {name: array [n, ...]} to write them to.
    Raises Mistake if an example of the split came in no batch.
    """
    found, seen = dict(into or {}), np.zeros(batches.examples, bool)
    for step in range(len(batches)):
        if stop():
            return None
        batch = batches.at(step)
        rows = gather(outputs_of(variables, batch) | {"index": batch["index"]})
        index = rows.pop("index")
        real = index >= 0
        seen[index[real]] = True
        for name, array in rows.items():
            if name not in found:
                shape = (batches.examples, *array.shape[index.ndim :])
                found[name] = np.zeros(shape, array.dtype)
            found[name][index[real]] = array[real]
    if not seen.all():
        raise Mistake(f"{(~seen).sum()} examples of the split were in no batch")
    return found


def gather(outputs):
    """Global arrays as numpy on every process."""
    if jax.process_count() > 1:
        return multihost_utils.process_allgather(outputs, tiled=True)
    return jax.device_get(outputs)


def compare_with_base(apply, variables, batch):
    """Largest difference of the adapted outputs from the base's, over the largest of the base's."""

    def both(variables, batch):
        forward = train.bind(apply, variables)
        with_methods, base = forward(batch, train=False), forward(batch, train=False, adapter=False)
        return abs(with_methods - base).max() / abs(base).max()

    return float(jax.jit(both)(variables, batch))
