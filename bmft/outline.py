"""A run before anything of it is computed or read: what moves, and each array's shape and place.

What `bmft.prepare.fit` makes, it makes as `outline` says; `bmft.plan` needs nothing more.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bmft import optim, peft, quantize, sharding, train, tree
from bmft.activations import within
from bmft.errors import Mistake
from bmft.models import weights


class Fit(NamedTuple):
    """A model with methods in it, ready to train."""

    apply: Callable  # of bmft.peft.attach
    module: Any  # of the model, as it is trained
    momentum: Callable | None  # step -> share by which running statistics move
    penalty: Callable | None  # of bmft.peft.penalty
    after: Callable | None  # of bmft.peft.memory
    begin: Callable  # of bmft.peft.memory
    state: train.State
    frozen: Any
    tx: optax.GradientTransformation
    labels: dict  # {path: optimizer label} of the moving leaves
    rate: Callable  # step -> learning rate, of the first method that moves anything
    rows: list  # of the table that log.show_leaves prints
    loaded: weights.Loaded
    add: Callable  # of bmft.peft.attach
    added: Any  # shapes of what it makes, {collection: tree}

    @property
    def count(self):
        """How many numbers there are, moving or frozen; a quantized one counts as one."""
        return sum(row[-1] for row in self.rows)


def expected(model, mesh, methods=(), quantize=None, storage=None, files=None):
    """`weights.expected` of the base: in the model's dtype, but for what stays exact or moves.

    quantize, storage: those of config.model.
    """
    stored = jnp.dtype(storage or model.module.dtype)
    exact = {*model.heads, *weights.FRESH}
    # A BatchNorm computes in float32, and is exported whole where its statistics moved.
    exact |= {leaf.path.rpartition("/")[0] for leaf in model.names.leaves if leaf.is_statistic}

    def moves(path):
        return any(method.moves(f"params/{path}") for method in methods)

    def dtype(path):
        return jnp.float32 if moves(path) or tree.under(path, exact) else stored

    kernels = weights.quantized(model, quantize, moves)
    if quantize and not kernels:
        print(f"model.quantize={quantize!r}: every kernel of the stack moves; none is quantized")
    sharded = sharding.of_leaf(mesh, model.sharding)
    return weights.expected(model, files, dtype=dtype, sharding=sharded, quantized=kernels)


def outline(config, model, methods, mesh, steps, files=None):
    """The `Fit` that `fit` makes, of shapes alone: each array is a jax.ShapeDtypeStruct with its
    dtype and sharding. Nothing is computed, and no weights are read.

    files: of `weights.index`, or None where there are none; see `weights.expected`.
    Raises Mistake where a method claims nothing or needs more steps.
    """
    if config.optim.head_learning_rate is not None and not model.heads:
        raise Mistake(f"optim.head_learning_rate: {model.name} has no head of a task")
    begin, after = peft.memory(methods, steps)  # first: it may find the run too short
    whole = sharding.replicated(mesh)
    how = {"quantize": config.model.quantize, "storage": config.model.storage}
    loaded = expected(model, mesh, methods, **how, files=files)
    base, key = loaded.variables(), jax.eval_shape(lambda: jax.random.key(0))
    add = peft.attach(methods, model).add
    added = _added(add, sharding.of_leaf(mesh, model.sharding, peft.axes(methods)), key, base)
    variables = base | added
    labels = peft.claims(
        methods,
        [path for path in tree.flatten(variables) if peft.may_move(path)],
        heads=model.heads,
        fresh=loaded.fresh,
        head_label=config.optim.head_learning_rate is not None,
    )
    stats, moving, frozen = parts(variables, model, labels)
    below = peft.first_moving_piece(methods, labels, model.names)
    module = model.module.clone(frozen_below=below)
    if model.names.head:
        module = module.clone(frozen_head=peft.head_is_still(labels))
    masks = {path: peft.moving_rows(methods, path) for path in labels}
    masks = {path: mask for path, mask in masks.items() if mask is not None}
    never = [name for method in methods for name in method.undecayed]
    tx, schedules = optim.make(config, labels, steps, masks, never)
    first = next((m.name for m in methods if m.name in schedules), peft.HEAD)
    return Fit(
        apply=within(mesh, peft.attach(methods, model._replace(module=module)).apply),
        module=module,
        momentum=MOMENTUM[model.config.batch_norm] if stats else None,
        penalty=peft.penalty(methods),
        after=after,
        begin=begin,
        state=_state_shapes(moving, tx, key, stats, begin, whole),
        frozen=frozen,
        tx=tx,
        labels=labels,
        rate=schedules[first],
        rows=_table(tree.join(moving, frozen), labels, stats),
        loaded=loaded,
        add=add,
        added=added,
    )


def _added(add, where, key, base):
    """Shapes of what methods add to the variables `base`, each leaf in its place on the mesh."""
    made = jax.eval_shape(jax.jit(add), key, base)  # `fit` traces it no second time: jit remembers
    places = [where(path, leaf.shape) for path, leaf in tree.flatten(made).items()]
    places = jax.tree.unflatten(jax.tree.structure(made), places)  # empty collections, too
    return _placed(made, places)


def parts(variables, model, labels):
    """(running statistics that move, leaves that move, leaves that do not) of all variables."""
    rest = dict(variables)
    stats = {name: rest.pop(name) for name in ("batch_stats",) if _statistics_move(model)}
    return stats, *tree.split(rest, lambda path: path in labels)


def _state_shapes(moving, tx, key, stats, begin, whole):
    """The `train.State` before the first step, as shapes with their shardings."""

    def start(moving, key, stats):
        return train.init_state(moving, tx, key, stats, begin)

    state = jax.eval_shape(start, moving, key, stats)
    state = state._replace(moving=_placed(state.moving, sharding.of_shapes(moving)))
    return _placed(state, train.shardings(state, whole))


def _placed(shapes, places):
    return jax.tree.map(lambda leaf, place: leaf.update(sharding=place), shapes, places)


# How far the running statistics go towards a batch's, by the policy. The first is torch's. The
# second forgets the base's: it is the mean over the first batches, and then goes over to the first.
MOMENTUM = {
    "update": lambda step: 0.1,
    "reset": lambda step: jnp.maximum(0.1, 1.0 / (step + 1)),
}


def _statistics_move(model):
    return getattr(model.config, "batch_norm", "frozen") != "frozen"


def _table(variables, labels, stats):
    """Rows of the start table: a moving leaf each, running statistics that change in one, a
    quantized kernel each, and all else that is frozen in one."""
    leaves = tree.flatten(variables)
    rows = []
    for path, label in sorted(labels.items()):
        leaf = leaves[path]
        status = "moved" if path.startswith("params/") else "added"
        rows.append((path, leaf.shape, leaf.dtype, status, label, leaf.size))
    if stats:
        rows.append(("batch_stats", None, "float32", "measured", None, tree.count(stats)))
    for path, shape, how, bits in quantize.described(variables.get("quant", {})):
        dtype = f"{how}, {bits:.2f} bits"
        rows.append((path, shape, dtype, "quantized", "model.quantize", math.prod(shape)))
    still = [path for path in leaves if path not in labels and not path.startswith("quant/")]
    frozen = [leaves[path] for path in still]
    if frozen:
        dtypes = "/".join(sorted({str(leaf.dtype) for leaf in frozen}))
        total = sum(leaf.size for leaf in frozen)
        rows.append(("frozen", None, dtypes, "frozen total", None, total))
    return rows
