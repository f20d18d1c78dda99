"""Rotations in blocks, for orthogonal fine-tuning: what a layer reads, turned before it reads it.

    y = base(x R)      R = diag(R_1 … R_n), each [k, k] orthogonal, so that (x R) W = x (R W)

A block is made of a skew matrix Q by Cayley's transform. What is computed is the change R - I: at
Q = 0 the input then stays the same to the bit, however coarsely a device multiplies.

Shapes: n blocks, k the width of a block, n k = in. A change is [n, k, k], or [1, k, k] for all.
"""

import jax
import jax.numpy as jnp
import numpy as np

from bmft.errors import Mistake


def check(name, blocks, block_size):
    """Mistake unless exactly one of the two arguments of a method is given, and is 1 or more."""
    if blocks is not None and block_size is not None:
        raise Mistake(
            f"peft.{name}.blocks is {blocks} and peft.{name}.block_size is {block_size}: give one "
            "of the two, the other follows from it"
        )
    field, given = ("blocks", blocks) if block_size is None else ("block_size", block_size)
    if given is None or given < 1:
        raise Mistake(f"peft.{name}.{field} is {given}; it must be 1 or more")


def blocks(name, path, width, number, size, factors=1):
    """(n, k) of the module at `path`, which reads `width` numbers; number or size is None.

    factors: in a butterfly of so many, blocks are cut in halves, and so many times paired. Raises
    Mistake where they do not come out even, or blocks are of 1, which no rotation changes.
    """
    pairs = 2 ** (factors - 1)
    known = [
        (n, width // n)
        for n in range(pairs, width // 2 + 1, pairs)
        if width % n == 0 and (factors == 1 or width // n % 2 == 0)
    ]
    given, at, field = (size, 1, "block_size") if number is None else (number, 0, "blocks")
    for found in known:
        if found[at] == given:
            return found
    of_factors = f" by {factors} factors" if factors > 1 else ""
    near = min((found[at] for found in known), key=lambda fits: abs(fits - given), default="none")
    raise Mistake(
        f"peft.{name}.{field} is {given}, which does not part the {width} inputs of {path} into "
        f"equal blocks of 2 or more{of_factors}; the nearest that does is {near}"
    )


def skew(upper, k):
    """Q [..., k, k] of its upper triangle [..., k (k - 1) / 2], row by row."""
    rows, columns = np.triu_indices(k, 1)
    half = jnp.zeros((*upper.shape[:-1], k, k)).at[..., rows, columns].set(upper)
    return half - half.swapaxes(-1, -2)


@jax.custom_vjp
def cayley(q):
    """R - I of R = (I - Q)(I + Q)^-1; the two commute."""
    return _cayley(q)[0]


def _cayley(q):
    """R - I = -2 Q S, and S = (I + Q)^-1."""
    s = _inverse(jnp.eye(q.shape[-1]) + q)
    return jnp.matmul(-2 * q, s, precision="highest"), s


def _inverse(a):
    """A^-1 of A [..., k, k] whose symmetric part is I, by Gauss and Jordan, in place.

    The same holds of what is left after each step, so that no pivot is below 1, and none is looked
    for. jnp.linalg.solve and inv are no way: on CPU they cut a batch of matrices into tasks of the
    threads they run on and wait for them. Of jax 0.10.2 on two cores, the rotations of query and
    value, four blocks of 96, waited for each other for ever.
    """
    at = jnp.arange(a.shape[-1])

    def step(i, a):
        here = at == i
        pivot, row, column = a[..., i, i], a[..., i, :], a[..., i]
        row = jnp.where(here, 1.0, row) / pivot[..., None]
        rest = jnp.where(here, 0.0, a) - column[..., None] * row[..., None, :]
        return jnp.where(here[:, None], row[..., None, :], rest)

    return jax.lax.fori_loop(0, a.shape[-1], step, a)


def _backward(kept, slope):
    """d(R - I) = -2 dQ S + 2 Q S dQ S = -(I + R) dQ S, as Q S = -(R - I) / 2."""
    change, s = kept
    product = lambda x, y: jnp.matmul(x, y, precision="highest")  # noqa: E731
    left = slope + product(change.mT, slope) / 2
    return (-2 * product(left, s.mT),)


def _forward(q):
    change, s = _cayley(q)
    return change, (change, s)


cayley.defvjp(_forward, _backward)


def neumann(q, terms):
    """R - I of R = I + 2 Q + 2 Q^2 + … + Q^(terms - 1), about (I + Q)(I - Q)^-1; 2 terms or more.

    PEFT's series: the last power counts once, unless it is the first; 3 terms are the same as 4.
    """
    change, power = 2 * q, q
    last = max(terms, 4) - 1 if terms > 2 else 1
    for exponent in range(2, last + 1):
        power = power @ q
        change += power if exponent == last else 2 * power
    return change


def turn(x, change):
    """x R of x [..., in]."""
    n, k = change.shape[-3], change.shape[-1]
    x_nk = x.reshape(*x.shape[:-1], -1, k)
    turned = x_nk @ change[0] if n == 1 else jnp.einsum("...nk,nkj->...nj", x_nk, change)
    return x + turned.reshape(x.shape)


def turn_kernel(kernel, change):
    """R W of W [..., in, out]; a stack's axes in front of both."""
    k = change.shape[-1]
    of_blocks = kernel.reshape(*kernel.shape[:-2], -1, k, kernel.shape[-1])
    return kernel + (change @ of_blocks).reshape(kernel.shape)
