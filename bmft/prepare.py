"""What stands between a config and the loop: key groups, batches, a model with methods in it.

tables -> task -> model -> methods -> fit(...)          see experiments/glue_lora.py
"""

import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bmft import (
    evaluate,
    export,
    models,
    optim,
    peft,
    processes,
    quantize,
    sharding,
    tasks,
    train,
    tree,
)
from bmft.activations import within
from bmft.config import signature
from bmft.data import text
from bmft.data.batches import Batches, row_length
from bmft.errors import Mistake, nearest
from bmft.models import weights
from bmft.peft import files

# What every method's group takes beside its make's arguments; None: optim's.
OPTIMIZER_KEYS = {"learning_rate": (float | None, None), "weight_decay": (float | None, None)}


def groups(config):
    """Keys a config takes beside the common ones: those of its methods and its task."""
    methods = {f"peft.{name}": signature(peft.get(name)) for name in config.peft.methods}
    methods = {group: keys | OPTIMIZER_KEYS for group, keys in methods.items()}
    return methods | {"task": signature(tasks.get(config.task.name).make)}


def find_task(config, tables):
    """The `Task` of a config for `{split: Table}`, or `{split: Dialogs}`."""
    make = task_of(config, tables).make
    return make(tables, **{key: config.task[key] for key in signature(make)})


def task_of(config, tables):
    """The module of a config's task. Raises Mistake for one that does not learn from `tables`."""
    kind, found = type(next(iter(tables.values()))), tasks.get(config.task.name)
    if found.EXAMPLES is not kind:
        fit = ", ".join(name for name in tasks.names() if tasks.get(name).EXAMPLES is kind)
        name = config.task.name
        raise Mistake(f"task.name={name!r} is no task of this experiment; its own: {fit}")
    return found


def find_model(config, outputs, **changes):
    """The `Model` of a config, in its compute dtype: bfloat16 unless on CPU or told otherwise.

    changes: fields of the architecture's own Config to set."""
    dtype = config.model.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    return models.find(
        config.model.name,
        outputs=outputs,
        dtype=jnp.dtype(dtype),
        remat=config.model.remat,
        unroll=config.model.unroll,
        **changes,
    )


def find_metric(config, task):
    """(name, "max" or "min") of what the best checkpoint is best in: eval.metric, or the task's."""
    name = config.eval.metric or task.metric[0]
    if name not in task.directions:
        raise Mistake(f"eval.metric={name!r}; {nearest(name, task.directions)}")
    return name, task.directions[name]


def find_methods(config, model):
    """The `Method`s of a config."""
    chosen = config.peft.methods
    return peft.build(model, chosen, {name: dict(config.peft[name]) for name in chosen})


# --- what is left behind ---------------------------------------------------------------------


def exports_missing(config, folder):
    """Whether a finished run lacks something that export asks for now."""
    wanted = {"adapter": config.export.adapter, "model": config.export.merged}
    return any(asked and not (folder / name).is_dir() for name, asked in wanted.items())


def write_exports(config, folder, model, methods, state, frozen, *, labels, fingerprint, beside):
    """adapter/ and, if asked for, model/ in a run directory; each with what `beside` saves there, a
    tokenizer or a preprocessor of images."""
    moving = evaluate.gather(state.moving | state.stats)
    still = evaluate.gather(_beside(moving, frozen))
    if jax.process_index() != 0:
        return
    if config.export.adapter:
        groups = {name: dict(config.peft[name]) for name in config.peft.methods}

        def write(partial):
            files.write(
                partial, methods, groups, model, moving, still,
                base=models.hub_id(model.name), fingerprint=fingerprint, labels=labels,
            )  # fmt: skip

        export.adapter(folder / "adapter", write, beside)
    if config.export.merged:
        kernels = quantize.described(frozen.get("quant", {}))
        stored = {path: how for path, _, how, _ in kernels}
        export.merged(
            folder / "model",
            load=lambda: weights.load(model, jax.random.key(0), quantized=stored).leaves(),
            merge=lambda params: peft.merge(methods, params, peft.added(moving, still)),
            moving=moving,
            names=model.names,
            settings=models.written_json(model),
            labels=labels,
            beside=beside,
        )
        if stored:
            how = kernels[0][2]
            print(
                f"{folder / 'model'}: float32, merged into what {how} makes of the base: "
                f"{len(stored)} stacks of kernels are no longer those of {model.folder}"
            )


def _beside(moving, frozen):
    """Of the frozen variables the methods' constants, and leaves of modules that moved in part."""
    moved = {path.partition("/")[2].rpartition("/")[0] for path in tree.flatten(moving)}

    def goes_along(path):
        module = path.partition("/")[2].rpartition("/")[0]
        in_part = module in moved and not path.startswith("quant/")
        return not tree.under(path, peft.BASE) or in_part

    return tree.split(frozen, goes_along)[0]


# --- data ------------------------------------------------------------------------------------


def batches(config, model, methods, task, tables, mesh):
    """{split: Batches}: shuffled and in parts for train, in order for the others. Virtual tokens of
    the methods come on top of data.max_length. Of a language model, `index` counts the examples
    that were not left out."""
    limit, virtual = peft.room(methods, model), peft.virtual_ids(methods, model)
    if config.data.max_length > limit:
        has, taken = model.config.max_length, [m.name for m in methods if m.positions]
        but = f", of which {taken[0]} leaves {limit}" if taken else ""
        raise Mistake(
            f"data.max_length={config.data.max_length}: {model.name} has {has} positions{but}"
        )
    cache = text.cache_directory(config.data.cache)
    tokenizer = models.tokenizer(model)
    encode = task.encode or text.encode
    encoded = {
        split: encode(table, tokenizer, config.data.max_length, cache)
        for split, table in tables.items()
    }
    models.check_ids(max(int(found.tokens.max()) for found in encoded.values()), model)
    sums = {split: [len(e.lengths), zlib.crc32(e.tokens)] for split, e in encoded.items()}
    processes.refuse_other({"examples and their checksum": sums})
    shown = task.show(encoded["train"], tokenizer) if task.show else None
    encoded = {split: found.behind(virtual) for split, found in encoded.items()}
    rows = sharding.rows(mesh)
    length = row_length(
        config.data.row_length,
        max(split.longest for split in encoded.values()),
        jax.default_backend(),
        lengths=encoded["train"].lengths,
        batch_size=config.train.batch_size,
        rows_multiple=rows * config.train.accumulate,
    )

    def of(split):
        training = split == "train"
        return Batches(
            encoded[split],
            task.targets(tables[split]),
            batch_size=config.train.batch_size if training else config.eval.batch_size,
            row_length=length,
            seed=config.seed,
            shuffle=training,
            rows_multiple=rows * (config.train.accumulate if training else 1),
            put=sharding.put_batch(mesh),
            hosts=(jax.process_index(), jax.process_count()),
        )

    found = {split: of(split) for split in tables}
    for split, table in tables.items():
        notes = _notes(table, encoded[split], config.data.max_length)
        print(f"{split}: {table.size:,} examples" + "".join(f"; {note}" for note in notes))
    train_batches = found["train"]
    print(
        f"rows of {length} tokens, {train_batches.padding_share:.1%} padding, "
        f"{train_batches.steps_per_epoch:,} steps an epoch"
    )
    if shown:
        print(shown)
    return found


def _notes(table, encoded, max_length):
    """What a user should know of a split, and of what the cut to max_length did to it."""
    notes = list(table.notes)
    if encoded.truncated:
        notes.append(f"{encoded.truncated} cut to {max_length} tokens")
    if len(encoded.lengths) < table.size:
        left = np.setdiff1d(np.arange(table.size), encoded.rows)
        of_them = f"the first: {table.where(left[0])}"
        notes.append(f"{len(left)} left out, as the cut leaves nothing to learn ({of_them})")
    return notes


# --- model -----------------------------------------------------------------------------------


class Fit(NamedTuple):
    """A model with methods in it, ready to train."""

    apply: Callable  # of bmft.peft.attach
    module: Any  # of the model, as it is trained
    momentum: Callable | None  # step -> share by which running statistics move
    penalty: Callable | None  # of bmft.peft.penalty
    after: Callable | None  # of bmft.peft.memory
    state: train.State
    frozen: Any
    tx: optax.GradientTransformation
    labels: dict  # {path: optimizer label} of the moving leaves
    rate: Callable  # step -> learning rate, of the first method that moves anything
    rows: list  # of the table that log.show_leaves prints
    loaded: weights.Loaded

    @property
    def count(self):
        """How many numbers there are, moving or frozen; a quantized one counts as one."""
        return sum(row[-1] for row in self.rows)


def load(model, key, mesh, methods=(), shared=None, quantize=None, storage=None):
    """The base (`weights.Loaded`) in the model's dtype, but for what stays exact or moves.

    shared: one loaded before, whose leaves it takes as they are. quantize, storage: those of
    config.model.
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
    about = {"dtype": dtype, "sharding": sharded, "shared": shared, "quantized": kernels}
    return weights.load(model, key, **about)


def fit(config, model, methods, mesh, steps, shared=None):
    """Load the base, add the methods' leaves, decide what moves: a `Fit` for `steps` steps.

    shared: a base loaded before, by `load`: its frozen leaves are used as they are, and those that
    move are copied, as a step takes their memory.
    Raises Mistake where a method claims nothing or needs more steps, or the adapted model differs
    from the base by more than the methods declare.
    """
    if config.optim.head_learning_rate is not None and not model.heads:
        raise Mistake(f"optim.head_learning_rate: {model.name} has no head of a task")
    begin, after = peft.memory(methods, steps)  # first: it may find the run too short
    key, add_key, state_key = jax.random.split(jax.random.key(config.seed), 3)
    whole = sharding.replicated(mesh)
    how = {"quantize": config.model.quantize, "storage": config.model.storage}
    loaded = load(model, key, mesh, methods, shared, **how)
    base = loaded.variables()
    variables = base | _added(methods, model, mesh, add_key, base)
    stats = {name: variables.pop(name) for name in ("batch_stats",) if _statistics_move(model)}
    labels = peft.claims(
        methods,
        [path for path in tree.flatten(variables) if peft.may_move(path)],
        heads=model.heads,
        fresh=loaded.fresh,
        head_label=config.optim.head_learning_rate is not None,
    )
    below = peft.first_moving_piece(methods, labels, model.names)
    module = model.module.clone(frozen_below=below)
    if model.names.head:
        module = module.clone(frozen_head=peft.head_is_still(labels))
    apply = peft.attach(methods, model._replace(module=module)).apply
    apply = within(mesh, apply)
    moving, frozen = tree.split(variables, lambda path: path in labels)
    moving = jax.tree.map(jnp.copy, moving) if shared else moving
    masks = {path: peft.moving_rows(methods, path) for path in labels}
    masks = {path: mask for path, mask in masks.items() if mask is not None}
    never = [name for method in methods for name in method.undecayed]
    tx, schedules = optim.make(config, labels, steps, masks, never)
    state = train.init_state(moving, tx, state_key, stats, begin)
    _check_identity(apply, train.variables(state, frozen), model, methods)
    # To devices of other processes, device_put takes no typed key.
    spread = jax.jit(jax.lax.with_sharding_constraint, static_argnums=1)
    state = state._replace(key=spread(state.key, whole))
    state = jax.device_put(state, train.shardings(state, whole))
    rows = _table(variables, labels, stats)
    first = next((m.name for m in methods if m.name in schedules), peft.HEAD)
    return Fit(
        apply=apply,
        module=module,
        momentum=MOMENTUM[model.config.batch_norm] if stats else None,
        penalty=peft.penalty(methods),
        after=after,
        state=state,
        frozen=frozen,
        tx=tx,
        labels=labels,
        rate=schedules[first],
        rows=rows,
        loaded=loaded,
    )


def make_step(config, fit, loss, **options):
    """`train.make_step` with all that a `Fit` and the config say of it."""
    return train.make_step(
        fit.apply, loss, fit.tx,
        accumulate=config.train.accumulate, rate=fit.rate, momentum=fit.momentum,
        penalty=fit.penalty, after=fit.after,
        places=jax.tree.map(lambda leaf: leaf.sharding, fit.state), **options,
    )  # fmt: skip


def _added(methods, model, mesh, key, base):
    """What the methods add to the loaded variables `base`, each leaf in its place on the mesh."""
    add = peft.attach(methods, model).add
    where = sharding.of_leaf(mesh, model.sharding, peft.axes(methods))
    shapes = jax.eval_shape(jax.jit(add), key, base)  # traced once for both: jit remembers
    places = [where(path, leaf.shape) for path, leaf in tree.flatten(shapes).items()]
    places = jax.tree.unflatten(jax.tree.structure(shapes), places)  # empty collections, too
    return jax.jit(add, out_shardings=places, compiler_options=_quickly())(key, base)


def _quickly():
    """How to compile what runs once: conv adapters of a ResNet-20 took 9.4 s to add, now 1.9."""
    on_cpu = jax.default_backend() == "cpu"
    return {"xla_backend_optimization_level": 0} if on_cpu else None


# How far the running statistics go towards a batch's, by the policy. The first is torch's. The
# second forgets the base's: it is the mean over the first batches, and then goes over to the first.
MOMENTUM = {
    "update": lambda step: 0.1,
    "reset": lambda step: jnp.maximum(0.1, 1.0 / (step + 1)),
}


def _statistics_move(model):
    return getattr(model.config, "batch_norm", "frozen") != "frozen"


def _check_identity(apply, variables, model, methods):
    allowed = max(method.identity for method in methods)
    if model.names.modules("conv"):  # XLA computes one convolution in two programs not to the bit:
        allowed += 8 * float(jnp.finfo(model.module.dtype).eps)  # 1 of them with vgg16_hed
    found = evaluate.compare_with_base(apply, variables, model.dummy)
    if not found <= allowed:
        names = ", ".join(method.name for method in methods)
        raise Mistake(
            f"before the first step, {names} changes the outputs by {found:.3g} of their size; "
            f"{allowed:g} is declared"
        )


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
