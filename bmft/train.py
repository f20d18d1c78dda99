"""The training step: pure functions; no loop, no files, no printing.

    state, metrics = step(state, frozen, batch)

What moves is in `state.moving` and is differentiated; what is frozen is an argument, so that no
gradient of a frozen weight is ever computed. Both are trees of variables: collection, then path.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bmft import tree


class State(NamedTuple):
    """Everything that changes in training."""

    step: Any  # int32 []: optimizer steps done
    key: Any  # folded with the step inside it
    moving: Any  # {"params": ..., "peft": ...}, float32
    opt: Any  # of optax, over moving
    stats: Any  # running statistics, where a model has them


def init_state(moving, tx, key):
    """The `State` before the first step."""
    moving = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), moving)
    return State(jnp.zeros((), jnp.int32), key, moving, tx.init(moving), {})


def shardings(state, rest):
    """A tree of Sharding for a `State`: what the optimizer holds of a leaf in the leaf's own shape
    lies as the leaf does, all else as `rest` says."""
    moving = tree.flatten(state.moving)

    def of(keys, leaf):
        path = "/".join(str(key.key) for key in keys if isinstance(key, jax.tree_util.DictKey))
        own = next((m for name, m in moving.items() if path.endswith(name)), None)
        return own.sharding if own is not None and own.shape == leaf.shape else rest

    return jax.tree_util.tree_map_with_path(of, state)


def bind(apply, moving, frozen, key=None) -> Callable:
    """forward(batch, *, train, adapter=True) -> outputs: the model with its variables and key."""
    return partial(apply, tree.join(moving, frozen), key=key)


def make_step(apply, loss, tx, *, accumulate=1, rate=None, grad=jax.value_and_grad):
    """step(state, frozen, batch) -> state, metrics; jitted, the old state's memory is reused.

    loss(forward, batch, key) -> (sum, weight), {name: sum}. Sums and weights, never means: with
    `accumulate` > 1 the rows of a batch are computed in so many parts, and the result is that of
    one large batch exactly. `grad` is an argument for steps that take other gradients.

    rate: step -> learning rate, reported as it is; tx has its own.

    metrics: loss and the names of aux as means; weight; examples (aux's own, where a weight is no
    count); learning_rate; grad_norm, and grad_norms [n], a number for each moving leaf in the order
    of jax.tree.leaves(state.moving).
    """

    def gradient(moving, frozen, batch, key):
        def objective(moving):
            (total, weight), aux = loss(bind(apply, moving, frozen, key), batch, key)
            return total, {"loss": total, "weight": weight, **aux}

        (_, sums), grads = grad(objective, has_aux=True)(moving)
        return grads, sums

    def in_parts(moving, frozen, batch, key):
        def cut(x):  # row i goes to part i % accumulate: every device has its share of every part
            return x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1)

        parts = jax.tree.map(cut, batch)
        keys = jax.random.split(key, accumulate)

        def add(carry, part):
            return jax.tree.map(jnp.add, carry, gradient(moving, frozen, *part)), None

        first = jax.tree.map(lambda x: x[0], (parts, keys))
        rest = jax.tree.map(lambda x: x[1:], (parts, keys))
        return jax.lax.scan(add, gradient(moving, frozen, *first), rest)[0]

    def step(state, frozen, batch):
        key = jax.random.fold_in(state.key, state.step)
        compute = gradient if accumulate == 1 else in_parts
        grads, sums = compute(state.moving, frozen, batch, key)
        weight = sums.pop("weight")
        examples = sums.pop("examples", weight)
        grads, means = jax.tree.map(lambda x: x / weight, (grads, sums))
        updates, opt = tx.update(grads, state.opt, state.moving)
        norms = jnp.stack([jnp.linalg.norm(leaf) for leaf in jax.tree.leaves(grads)])
        metrics = {**means, "weight": weight, "examples": examples, "grad_norms": norms}
        metrics["grad_norm"] = jnp.linalg.norm(norms)
        if rate:
            metrics["learning_rate"] = rate(state.step)
        moving = optax.apply_updates(state.moving, updates)
        return State(state.step + 1, state.key, moving, opt, state.stats), metrics

    return jax.jit(step, donate_argnums=0)
