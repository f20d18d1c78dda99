"""Where activations lie on a mesh: their rows are split, the rest is as XLA's partitioner finds it.

Left to itself it lets what an embedding gives lie as the table does, its width split by `fsdp`, and
then every device computes all rows of the batch.
"""

from contextlib import contextmanager
from contextvars import ContextVar

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

ROWS = ("data", "fsdp")  # the axes of the mesh that split the rows of a batch
_MESH = ContextVar("mesh", default=None)


def within(mesh, function):
    """The function, in whose calls `rows` knows the mesh."""

    def call(*args, **kwargs):
        with _on(mesh):
            return function(*args, **kwargs)

    return call


@contextmanager
def _on(mesh):
    token = _MESH.set(mesh)
    try:
        yield
    finally:
        _MESH.reset(token)


def parts():
    """Into how many parts rows are split; 1 where no mesh is known."""
    mesh = _MESH.get()
    return mesh.shape["data"] * mesh.shape["fsdp"] if mesh else 1


def rows(x):
    """x [b, ...] with its rows on their devices; as it is where they are no multiple of `parts`."""
    if parts() == 1 or x.shape[0] % parts():
        return x
    free = [P.UNCONSTRAINED] * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, NamedSharding(_MESH.get(), P(ROWS, *free)))
