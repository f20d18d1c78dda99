"""Config -> one optax transformation over the moving leaves: clip, then an optimizer per label.

A label is a method's name or `head`, or a method's name and how much faster than the method's rate
the leaf learns: `lora_plus*16`. Labels differ in learning rate and weight decay; the shape of
the schedule is the same for all. Decay never touches biases and norms, whatever their label.
"""

from functools import partial

import jax.numpy as jnp
import optax

from bmft import tree
from bmft.errors import Mistake, nearest

# Leaves of any model that are never decayed, by the last part of their path.
UNDECAYED = ("bias", "scale")


def schedule(config, peak, steps):
    """step -> learning rate: up to `peak` over the warm-up, then by optim.schedule to `steps`."""
    warmup = round(config.optim.warmup * steps)
    after = {
        "linear": lambda: optax.linear_schedule(peak, 0.0, steps - warmup),
        "cosine": lambda: optax.cosine_decay_schedule(peak, max(1, steps - warmup)),
        "constant": lambda: optax.constant_schedule(peak),
    }
    name = config.optim.schedule
    if name not in after:
        raise Mistake(f"optim.schedule: no {name!r}; {nearest(name, after)}")
    if not warmup:
        return after[name]()
    # Starts at peak / warmup: a first step with rate zero would be a step for nothing.
    rise = optax.linear_schedule(peak / warmup, peak, warmup - 1) if warmup > 1 else None
    return optax.join_schedules([rise or optax.constant_schedule(peak), after[name]()], [warmup])


def rates(config, labels):
    """{label: (learning rate, weight decay)} of config.optim and each method's own group."""
    found = {}
    for label in sorted(set(labels)):
        method, _, factor = label.partition("*")
        own = config.peft.get(method, {})
        rate, decay = own.get("learning_rate"), own.get("weight_decay")
        if label == "head":
            rate = config.optim.head_learning_rate
        found[label] = (
            (config.optim.learning_rate if rate is None else rate) * float(factor or 1),
            config.optim.weight_decay if decay is None else decay,
        )
    return found


def make(config, labels, steps, rows=None, undecayed=()):
    """The transformation for a tree of moving leaves, and {label: schedule}.

    labels: {path: label}, every moving leaf. rows: {path: bool [l]} for leaves of which only some
    layers move: the others stay bit-identical. undecayed: names of methods' leaves that, like
    biases and norms, are never decayed.
    """
    optimizers, schedules = {}, {}
    for label, (rate, decay) in rates(config, labels.values()).items():
        schedules[label] = schedule(config, rate, steps)
        mask = partial(decayed, never=(*UNDECAYED, *undecayed))
        optimizers[label] = _optimizer(config.optim, schedules[label], decay, mask)
    chain = [optax.multi_transform(optimizers, lambda _: tree.unflatten(labels))]
    if config.optim.clip:
        chain.insert(0, optax.clip_by_global_norm(config.optim.clip))
    if rows:
        chain = [keep_rows(rows), *chain, keep_rows(rows)]
    return optax.chain(*chain), schedules


def _optimizer(optim, rate, decay, mask):
    """The named optimizer of optax. Adafactor's row and column statistics and its scale by the
    parameter's size are taken over a stacked leaf as a whole, not layer by layer."""
    betas = optim.beta1, optim.beta2
    makers = {
        "adamw": lambda: optax.adamw(rate, *betas, optim.eps, weight_decay=decay, mask=mask),
        "lion": lambda: optax.lion(rate, *betas, weight_decay=decay, mask=mask),
        "sgd": lambda: optax.chain(
            optax.add_decayed_weights(decay, mask), optax.sgd(rate, momentum=optim.beta1 or None)
        ),
        "adafactor": lambda: optax.adafactor(
            rate, weight_decay_rate=decay or None, weight_decay_mask=mask
        ),
    }
    if optim.name not in makers:
        raise Mistake(f"optim.name: no {optim.name!r}; {nearest(optim.name, makers)}")
    return makers[optim.name]()


def decayed(leaves, never=UNDECAYED):
    """Tree of bool: which leaves weight decay touches."""
    return tree.map_with_path(lambda path, _: path.rpartition("/")[2] not in never, leaves)


def keep_rows(rows):
    """Zeroes the gradient or update of the layers of a stacked leaf that do not move."""

    def update(updates, state, params=None):
        def one(path, leaf):
            if path not in rows:
                return leaf
            mask = jnp.asarray(rows[path]).reshape(-1, *[1] * (leaf.ndim - 1))
            return jnp.where(mask, leaf, 0)

        return tree.map_with_path(one, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
