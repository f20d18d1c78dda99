"""A fine-tuning method: which leaves of the parameter tree move, plus some leaves of its own.

A method is a file of this folder with `make(model, *, ...) -> Method`; its keyword arguments are
its config group. `attach` puts methods into a model at call time: the base tree keeps its paths,
and what a method adds lives in collections of its own:

    peft/layers/attention/query/lora_a [l, in, r]    moves, float32
    peft_const/layers/attention/query/lora_scale     saved, never moves
    peft_shared/vera/a [in, r]                       one for all layers; moves if the method says so
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.errors import NameInUseError

from bmft import quantize, tree
from bmft.errors import Mistake, nearest

# Label of the leaves that the task's head, or nobody, claims.
HEAD = "head"
# Collections of variables that a model has by itself.
BASE = ("params", "batch_stats", "quant")
# Those that methods add.
ADDED = ("peft", "peft_const", "peft_shared")


class Method(NamedTuple):
    """Pure functions; every field but `name` and `moves` may stay None."""

    name: str
    # path -> label or None. Asked for base leaves (params/...) and added ones (peft/...,
    # peft_shared/<method>/...). A label is the method's name, or name*factor for a leaf that learns
    # so much faster.
    moves: Callable
    # (module, call, *args) -> output: around the call of a module of bmft.layers.
    hook: Callable | None = None
    # {module path: {name: array}}: the method's constants, stacked as the module is.
    constants: dict | None = None
    # (key, params) -> {name: array}: leaves that all layers share, float32, made on the loaded
    # weights. Hooks read them by `peft.shared`.
    shared: Callable | None = None
    # path -> bool [l] or None: of a moving leaf of the stack, which layers move; None is all.
    rows: Callable | None = None
    # {leaf's name: letters}, one of each of its last axes: how what it adds at a module lies on a
    # mesh. `i` as the inputs of the module's weight, `o` as its outputs, `d` as the width of the
    # stream, `.` whole. A leaf in `peft` must have them; one in `peft_const` without any is whole.
    axes: dict | None = None
    # Names of its leaves that weight decay never touches: biases, and what does not start at 0.
    undecayed: tuple = ()
    # (params, added) -> params: folded into plain weights, float32; added has all of ADDED. None:
    # cannot be folded in, or adds nothing.
    merge: Callable | None = None
    # Largest difference between adapted and base logits before the first step, relative to the
    # largest base logit. 0: the same to the bit.
    identity: float = 0.0
    # Tokens that it puts before each example (their ids: `virtual_ids`), and how many positions of
    # the table they, or keys and values in their place, take of an example.
    virtual_tokens: int = 0
    positions: int = 0
    # variables -> scalar: a term beside the mean loss.
    penalty: Callable | None = None
    # steps of the run -> (begin, after), for what it keeps from step to step: begin(moving) ->
    # memory; after(steps done, moving, grads, memory) -> (moving, memory), after each of the
    # optimizer's steps. Mistake where the run has too few.
    memory: Callable | None = None
    # How Hugging Face PEFT writes it (bmft.peft.files.Files); None: as BMFT_<METHOD>.
    files: Any = None


def names():
    """The methods there are: the files of this folder that have a `make`."""
    return [entry.name for entry in pkgutil.iter_modules(__path__) if _make(entry.name)]


def _make(name):
    return getattr(importlib.import_module(f"bmft.peft.{name}"), "make", None)


def get(name):
    """The `make` of a method by name; Mistake, with the nearest, where there is none."""
    if name not in names():
        raise Mistake(f"peft.methods: no method {name!r}; {nearest(name, names())}")
    return _make(name)


def build(model, methods, groups):
    """The `Method`s of a config: their names and {name: arguments of make}."""
    if not methods:
        raise Mistake(f"peft.methods is empty; known: {', '.join(names())}")
    if len(set(methods)) < len(methods):
        raise Mistake(f"peft.methods names a method twice: {', '.join(methods)}")
    made = []
    for name in methods:
        wanted = inspect.signature(get(name)).parameters
        given = {key: value for key, value in groups.get(name, {}).items() if key in wanted}
        made.append(get(name)(model, **given))
    before = [method.name for method in made if method.positions]
    if len(before) > 1:
        raise Mistake(
            f"peft.methods: {' and '.join(before)} both take the first positions of each example; "
            "give up one of the two methods"
        )
    return tuple(made)


def virtual_ids(methods, model):
    """The ids of the virtual tokens that methods put before each example: a range that begins
    behind the vocabulary. Whoever makes batches puts them there."""
    count = sum(method.virtual_tokens for method in methods)
    begin = model.config.vocabulary if count else 0
    return range(begin, begin + count)


def room(methods, model):
    """Tokens of the longest example there is room for in the position table."""
    return model.config.max_length - sum(method.positions for method in methods)


# --- for hooks -------------------------------------------------------------------------------


def path_of(module):
    return "/".join(module.path)


def leaf(module, name, init, shape):
    """A method's own leaf (float32) at `module`: made by init(key, shape, dtype) if not there."""
    make = lambda: init(module.make_rng("peft"), shape, jnp.float32)  # noqa: E731
    try:
        return module.variable("peft", name, make).value
    except NameInUseError:
        raise Mistake(
            f"peft.methods: two of them add {name} to {path_of(module)}; give up one of the two"
        ) from None


def constant(module, name, make):
    """A leaf of a method at `module` that never moves and is made by make() on the loaded weights,
    when the method's leaves are added: what starts the method, but is no number of its config."""
    return module.variable("peft_const", name, make).value


_SHARED = ContextVar("peft_shared")


def shared(method):
    """{name: array}: the leaves of a method that all layers share, in a hook."""
    return _SHARED.get()[method]


@contextmanager
def _sharing(leaves):
    # A scan over layers lifts the variables of its own modules alone, so these come in beside them.
    token = _SHARED.set(leaves)
    try:
        yield
    finally:
        _SHARED.reset(token)


def dropout(module, x, rate):
    """x with a share `rate` dropped from the method's own stream; x itself when not training."""
    if rate == 0.0 or not module.has_rng("peft"):
        return x
    keep = jax.random.bernoulli(module.make_rng("peft"), 1.0 - rate, x.shape)
    # Drawn once: XLA's TPU compiler draws it anew in each loop that reads it, and took over 4
    # minutes for two layers of a Llama, now 2.4.
    keep = jax.lax.optimization_barrier(keep)
    return jnp.where(keep, x / (1.0 - rate), 0.0)


# --- into the model --------------------------------------------------------------------------


class Attached(NamedTuple):
    add: Callable  # (key, {"params": ...}) -> {"peft": ..., "peft_const": ..., ...}
    # (variables, batch, *, train=False, key=None, adapter=True, seen=None) -> outputs
    apply: Callable


def attach(methods, model):
    """`add` and `apply` of a model with methods in it; the only place that enters the interceptor.

    apply draws dropout from `key` when train is true; without train it is deterministic. The
    statistics of the batch that BatchNorm saw in training are appended to the list `seen`.
    """
    # Outermost are those whose ids no other method may see.
    ordered = sorted(methods, key=lambda method: not method.virtual_tokens)
    hooks = [method.hook for method in ordered if method.hook]
    fixed, virtual = constants(methods), virtual_ids(methods, model)

    def around(call, args, kwargs, context):
        if context.method_name != "__call__":  # scan and remat wrappers come through here too
            return call(*args, **kwargs)
        for hook in reversed(hooks):
            call = partial(hook, context.module, call)
        return call(*args, **kwargs)

    def run(adapter, variables, batch, rngs, train=False, mutable=False):
        entered = nn.intercept_methods(around) if adapter and hooks else nullcontext()
        variables = dict(variables)
        with _sharing(variables.pop("peft_shared", {})), entered:
            return model.module.apply(variables, batch, train, rngs=rngs, mutable=mutable)

    def add(key, base):
        """The leaves the methods add, made on the loaded variables: hooks see real kernels."""
        params = quantize.restored(base["params"], base.get("quant", {}))
        own = {
            method.name: method.shared(jax.random.fold_in(key, i), params)
            for i, method in enumerate(methods)
            if method.shared
        }
        given = fixed | ({"peft_shared": own} if own else {})
        variables, making = {**base, **given}, ["peft", "peft_const"]
        made = run(True, variables, model.dummy, {"peft": key}, mutable=making)[1]
        return {"peft": {}} | given | made

    def apply(variables, batch, *, train=False, key=None, adapter=True, seen=None):
        streams = ("dropout", "peft") if train else ()
        rngs = {name: jax.random.fold_in(key, i) for i, name in enumerate(streams)}
        if not adapter and virtual:
            batch = _without(batch, virtual)
        if not (adapter and hooks):
            variables = {name: variables[name] for name in BASE if name in variables}
        if not train or seen is None:
            return run(adapter, variables, batch, rngs, train)
        outputs, statistics = run(adapter, variables, batch, rngs, train, ["batch_stats"])
        seen.append(statistics)
        return outputs

    return Attached(add, apply)


def added(moving, frozen):
    """Of two trees of variables together, what methods added: {collection: tree}, all of ADDED."""
    return {name: tree.join(moving.get(name, {}), frozen.get(name, {})) for name in ADDED}


def _without(batch, virtual):
    """A packed batch as the base alone reads it: columns of virtual tokens are padding, of which
    nothing is asked."""
    ids = batch["input_ids"]
    real = ids < virtual.start
    count = jnp.where(real.all(), 0, len(virtual))  # the dummy has none
    batch = batch | {
        "input_ids": jnp.where(real, ids, 0),
        "segments": jnp.where(real, batch["segments"], 0),
        "positions": jnp.where(real, jnp.maximum(batch["positions"] - count, 0), 0),
    }
    if "first" in batch:
        batch["first"] = batch["first"] + count
    if "targets" in batch:
        batch["targets"] = jnp.where(real, batch["targets"], -1)
    return batch


def constants(methods):
    """{"peft_const": tree of the methods' constants}; {} if they have none."""
    flat = {
        f"peft_const/{path}/{name}": jnp.asarray(array)
        for method in methods
        for path, arrays in (method.constants or {}).items()
        for name, array in arrays.items()
    }
    return tree.unflatten(flat)


def merge(methods, params, added):
    """Plain weights of a base tree (float32) and what methods added to it, any of ADDED.

    Raises Mistake for a method that adds leaves and cannot be folded in.
    """
    added = {name: added.get(name, {}) for name in ADDED}
    for method in reversed(methods):  # the first one's hook is the outermost
        if method.merge:
            params = method.merge(params, added)
        elif method.hook:
            raise Mistake(f"method {method.name!r} cannot be merged into plain weights")
    return params


def axes(methods):
    """{leaf's name: letters} of what methods add, for bmft.sharding."""
    return {name: letters for m in methods for name, letters in (m.axes or {}).items()}


# --- in the step -----------------------------------------------------------------------------


def penalty(methods):
    """variables -> the sum of the methods' penalties; None if they have none."""
    terms = [method.penalty for method in methods if method.penalty]
    return (lambda variables: sum(term(variables) for term in terms)) if terms else None


def memory(methods, steps):
    """(begin, after) of `Method.memory` for all methods of a run of so many steps: of {method's
    name: its memory}. after is None if none of them keeps anything."""
    pairs = {method.name: method.memory(steps) for method in methods if method.memory}

    def begin(moving):
        return {name: begin_own(moving) for name, (begin_own, _) in pairs.items()}

    def after(step, moving, grads, memory):
        memory = dict(memory)
        for name, (_, after_own) in pairs.items():
            moving, memory[name] = after_own(step, moving, grads, memory[name])
        return moving, memory

    return begin, after if pairs else None


# --- what moves ------------------------------------------------------------------------------


def may_move(path):
    """Can the leaf at a path be claimed? Not a constant, nor a statistic."""
    return path.partition("/")[0] in ("params", "peft", "peft_shared")


def claims(methods, paths, *, heads, fresh=(), head_label=False):
    """{path: label} of every leaf that moves, of `paths` (those that `may_move`).

    heads: subtrees of params the task owns: claimed last, under `head`, unless a method moves them
    already; head_label=True gives them `head` whoever else claims them (a rate of their own was
    asked for). fresh: base paths that no file had: they move, or would be lost.
    Raises Mistake where two methods claim a leaf under different labels, or one moves nothing.
    """
    claimed = {}
    for method in methods:
        own = {path: label for path in paths if (label := method.moves(path))}
        for path, label in own.items():
            if claimed.setdefault(path, label) != label:
                raise Mistake(
                    f"peft.methods: {path} is moved both as {claimed[path]!r} and as {label!r}; "
                    "give up one of the two methods"
                )
        if not own and method.hook:
            raise Mistake(f"method {method.name!r} moves nothing")
    for path in paths:
        base = path.removeprefix("params/")
        head = base != path and tree.under(base, heads)
        if head and head_label:
            claimed[path] = HEAD
        elif head or (base != path and base in fresh):
            claimed.setdefault(path, HEAD)
    return claimed


def moving_rows(methods, path):
    """bool [l] of a moving leaf of the stack: which layers move; None: all of it."""
    masks = [method.rows(path) for method in methods if method.rows and method.moves(path)]
    masks = [mask for mask in masks if mask is not None]
    return masks[0] if masks else None


def first_moving_piece(methods, paths, names):
    """The first piece of a model (a stage, or a layer of the stack) in which one of the moving
    leaves at `paths` lies: the number of pieces if it is none, 0 if one comes before the stack or
    is shared, and so may be read anywhere."""
    pieces = names.stages or range(names.layers)
    first = len(pieces)
    for path in paths:
        _, _, where = path.partition("/")
        if where.startswith("embeddings/") or path.startswith("peft_shared/"):
            return 0
        if where.startswith("layers/"):
            mask = moving_rows(methods, path)
            first = min(first, 0 if mask is None else int(mask.argmax()))
        for number, stage in enumerate(names.stages):
            if tree.under(where, [stage]):
                first = min(first, number)
    return first


def head_is_still(paths):
    """Whether none of the moving leaves at `paths` may be read by a language model's head: its own,
    an embedding's, to which it may be tied, and what modules share."""

    def may_be_read(path):
        collection, _, where = path.partition("/")
        return collection == "peft_shared" or tree.under(where, ["head", "embeddings"])

    return not any(map(may_be_read, paths))
