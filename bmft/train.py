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
    stats: Any  # {"batch_stats": ...}, running statistics that the batches move; mostly {}
    memory: Any  # what methods keep from step to step; mostly {}


def init_state(moving, tx, key, stats=None, begin=lambda moving: {}):
    """The `State` before the first step. begin: moving -> the methods' memory."""
    moving = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), moving)
    zero = jnp.zeros((), jnp.int32)
    return State(zero, key, moving, tx.init(moving), stats or {}, begin(moving))


def variables(state, frozen):
    """All variables of the model: those that change and those that do not."""
    return tree.join(state.moving, state.stats, frozen)


def shardings(state, rest):
    """A tree of Sharding for a `State`: what the optimizer holds of a leaf in the leaf's own shape
    lies as the leaf does, all else as `rest` says."""
    moving = tree.flatten(state.moving)

    def of(keys, leaf):
        path = "/".join(str(key.key) for key in keys if isinstance(key, jax.tree_util.DictKey))
        own = next((m for name, m in moving.items() if path.endswith(name)), None)
        return own.sharding if own is not None and own.shape == leaf.shape else rest

    return jax.tree_util.tree_map_with_path(of, state)


def bind(apply, variables, key=None, seen=None) -> Callable:
    """forward(batch, *, train, adapter=True) -> outputs: the model with its variables and key.

    seen: a list that takes the batch's own statistics of each call in training.
    """
    return partial(apply, variables, key=key, seen=seen)


def make_step(
    apply, loss, tx, *, accumulate=1, rate=None, momentum=None,
    penalty=None, after=None, places=None, compiler_options=None, grad=jax.value_and_grad,
):  # fmt: skip
    """step(state, frozen, batch) -> state, metrics; jitted, the old state's memory is reused.

    loss(forward, batch, key) -> (sum, weight), {name: sum}. Sums and weights, never means: with
    `accumulate` > 1 the rows of a batch are computed in so many parts, and the result is that of
    one large batch exactly (but for a BatchNorm that normalises by the part it sees). `grad` is an
    argument for steps that take other gradients.

    rate: step -> learning rate, reported as it is; tx has its own. momentum: step -> share of the
    way that running statistics, where state.stats holds any, go towards the batch's.

    penalty: variables -> a term beside the mean loss. after: (steps done, moving, grads, memory) ->
    (moving, memory), once the optimizer's update is in `moving`; grads are those of the whole
    batch, penalty and all, as they came: not clipped.

    places: a `State` of Shardings, where the new state lies: else XLA says, and a state that lies
    otherwise than the one before costs a compilation. compiler_options: XLA's, of jax.jit.

    metrics: loss, penalty and the names of aux as means; weight; examples (aux's own, where a
    weight is no count); learning_rate; grad_norm, and grad_norms [n], a number for each moving leaf
    in the order of jax.tree.leaves(state.moving).
    """

    def gradient(state, frozen, batch, key):
        def objective(moving):
            seen = [] if state.stats else None
            joined = variables(state._replace(moving=moving), frozen)
            (total, weight), aux = loss(bind(apply, joined, key, seen), batch, key)
            stats = jax.tree.map(lambda *calls: sum(calls) / len(calls), *seen) if seen else {}
            return total, ({"loss": total, "weight": weight, **aux}, stats)

        (_, (sums, stats)), grads = grad(objective, has_aux=True)(state.moving)
        return grads, sums, stats

    def step(state, frozen, batch):
        key = jax.random.fold_in(state.key, state.step)
        grads, sums, stats = _in_parts(gradient, accumulate, state, frozen, batch, key)
        weight = sums.pop("weight")
        examples = sums.pop("examples", weight)
        grads, means = jax.tree.map(lambda x: x / weight, (grads, sums))
        if penalty:
            of = lambda moving: penalty(variables(state._replace(moving=moving), frozen))  # noqa: E731
            means["penalty"], more = jax.value_and_grad(of)(state.moving)
            grads = jax.tree.map(jnp.add, grads, more)
        updates, opt = tx.update(grads, state.opt, state.moving)
        norms = jnp.stack([jnp.linalg.norm(leaf) for leaf in jax.tree.leaves(grads)])
        metrics = {**means, "weight": weight, "examples": examples, "grad_norms": norms}
        metrics["grad_norm"] = jnp.linalg.norm(norms)
        if rate:
            metrics["learning_rate"] = rate(state.step)
        if stats:
            share = momentum(state.step)
            stats = jax.tree.map(lambda old, new: old + share * (new - old), state.stats, stats)
        moving, memory = optax.apply_updates(state.moving, updates), state.memory
        if after:
            moving, memory = after(state.step + 1, moving, grads, memory)
        return State(state.step + 1, state.key, moving, opt, stats, memory), metrics

    about = {"out_shardings": places and (places, None), "compiler_options": compiler_options}
    return jax.jit(step, donate_argnums=0, **about)


def _in_parts(gradient, count, state, frozen, batch, key):
    """gradient(state, frozen, batch, key) -> grads, sums, stats in `count` parts of the rows."""
    if count == 1:
        return gradient(state, frozen, batch, key)

    def cut(x):  # row i goes to part i % count: every device has its share of every part
        return x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)

    def add(carry, part):
        return jax.tree.map(jnp.add, carry, gradient(state, frozen, *part)), None

    parts = jax.tree.map(cut, batch), jax.random.split(key, count)
    first, rest = (jax.tree.map(lambda x, s=s: x[s], parts) for s in (0, slice(1, None)))
    grads, sums, stats = jax.lax.scan(add, gradient(state, frozen, *first), rest)[0]
    return grads, sums, jax.tree.map(lambda x: x / count, stats)
