"""What stands between a config and the loop: key groups, batches, a model with methods in it.

tables -> task -> model -> methods -> fit(...)          see experiments/glue_lora.py
"""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from bmft import (
    evaluate,
    export,
    models,
    peft,
    processes,
    quantize,
    sharding,
    tasks,
    train,
    tree,
)
from bmft.config import signature
from bmft.data import text
from bmft.data.batches import Batches, row_length
from bmft.data.dialogs import Dialogs
from bmft.errors import Mistake, nearest
from bmft.models import weights
from bmft.outline import expected, outline, parts
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


def find_model(config, outputs, platform=None, **changes):
    """The `Model` of a config, in its compute dtype: bfloat16 unless on CPU or told otherwise.

    platform: where it is to run, "cpu", "gpu" or "tpu", if not here; then no weights are fetched.
    changes: fields of the architecture's own Config to set."""
    on = platform or jax.default_backend()
    dtype = config.model.dtype or ("float32" if on == "cpu" else "bfloat16")
    return models.find(
        config.model.name,
        fetch_weights=platform is None,
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
    """Whether a finished run lacks something that export asks for now; process 0 looks."""
    wanted = {"adapter": config.export.adapter, "model": config.export.merged}
    return processes.from_first(
        lambda: any(asked and not (folder / name).is_dir() for name, asked in wanted.items())
    )


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
    check_length(config, model, methods)
    virtual = peft.virtual_ids(methods, model)
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
    length = row_length(
        config.data.row_length,
        max(split.longest for split in encoded.values()),
        jax.default_backend(),
        lengths=encoded["train"].lengths,
        batch_size=config.train.batch_size,
        rows_multiple=sharding.rows(mesh) * config.train.accumulate,
    )
    found = {
        split: packed(config, one, task.targets(tables[split]), length, mesh, split == "train")
        for split, one in encoded.items()
    }
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


def check_length(config, model, methods):
    """Raise Mistake unless the model has room for examples of data.max_length."""
    limit = peft.room(methods, model)
    if config.data.max_length > limit:
        has, taken = model.config.max_length, [m.name for m in methods if m.positions]
        but = f", of which {taken[0]} leaves {limit}" if taken else ""
        raise Mistake(
            f"data.max_length={config.data.max_length}: {model.name} has {has} positions{but}"
        )


def packed(config, encoded, targets, length, mesh, training, put=None):
    """The `Batches` of one split: `encoded` in rows of `length` tokens. put: what becomes of the
    arrays of a whole batch; None: this process puts its share of them on its devices."""
    return Batches(
        encoded,
        targets,
        batch_size=config.train.batch_size if training else config.eval.batch_size,
        row_length=length,
        seed=config.seed,
        shuffle=training,
        rows_multiple=sharding.rows(mesh) * (config.train.accumulate if training else 1),
        put=put or sharding.put_batch(mesh),
        share=((0,), 1) if put else sharding.share(mesh),
    )


# --- model -----------------------------------------------------------------------------------


def load(model, key, mesh, methods=(), quantize=None, storage=None):
    """The base (`weights.Loaded`) as `expected` says, from its files."""
    files = weights.index(model)
    wanted = expected(model, mesh, methods, quantize, storage, files)
    return weights.read(model, key, files, wanted)


def fit(config, model, methods, mesh, steps, shared=None):
    """Load the base, add the methods' leaves, decide what moves: a `Fit` for `steps` steps.

    shared: a base loaded before, by `load`: its frozen leaves are used as they are, and those that
    move are copied, as a step takes their memory.
    Raises Mistake where a method claims nothing or needs more steps, or the adapted model differs
    from the base by more than the methods declare.
    """
    files = weights.index(model)
    plan = outline(config, model, methods, mesh, steps, files)
    key, add_key, state_key = jax.random.split(jax.random.key(config.seed), 3)
    loaded = weights.read(model, key, files, plan.loaded, shared)
    base, where = loaded.variables(), sharding.of_shapes(plan.added)
    add = jax.jit(plan.add, out_shardings=where, compiler_options=_quickly())
    stats, moving, frozen = parts(base | add(add_key, base), model, plan.labels)
    moving = jax.tree.map(jnp.copy, moving) if shared else moving
    state = train.init_state(moving, plan.tx, state_key, stats, plan.begin)
    _check_identity(plan.apply, train.variables(state, frozen), model, methods)
    # To devices of other processes, device_put takes no typed key.
    spread = jax.jit(jax.lax.with_sharding_constraint, static_argnums=1)
    state = state._replace(key=spread(state.key, sharding.replicated(mesh)))
    state = jax.device_put(state, sharding.of_shapes(plan.state))
    return plan._replace(state=state, frozen=frozen, loaded=loaded)


def make_step(config, fit, loss, **options):
    """`train.make_step` with all that a `Fit` and the config say of it."""
    places = jax.tree.map(lambda leaf: leaf.sharding, fit.state)
    mesh = jax.tree.leaves(places)[0].mesh
    return train.make_step(
        fit.apply, loss, fit.tx,
        accumulate=config.train.accumulate, rate=fit.rate, momentum=fit.momentum,
        penalty=fit.penalty, after=fit.after,
        places=places, compiler_options=_compiled(config, mesh), **options,
    )  # fmt: skip


def _compiled(config, mesh):
    """How XLA is to compile a step for a mesh; None: as it likes.

    Language models on a CPU: vectors of 512 bits where there are such, where XLA takes 256;
    smollm2's step took 4 to 6 % less. (Its products by Eigen instead of YNNPACK are as fast for a
    layer's shapes, but on two devices the head's took twice as long, and attention's gradient half
    as long again.)
    TPU: products by a kernel that fsdp splits are not to be parted in a ring, of which each part
    reads and writes the whole result: two layers of Llama 3 8B on 16 chips moved 114 GB a chip, and
    61 without.
    """
    if isinstance(mesh, jax.sharding.AbstractMesh):  # nothing is compiled for it
        return None
    platform = mesh.devices.flat[0].platform
    if platform == "tpu":
        return _known("xla_jf_spmd_threshold_for_windowed_einsum_mib", 1 << 20, mesh)
    if platform == "cpu" and tasks.get(config.task.name).EXAMPLES is Dialogs:
        return _known("xla_cpu_prefer_vector_width", 512, mesh)
    return None


@functools.cache
def _known(name, value, mesh):
    """{name: value}, or None where this version of XLA has no such option."""
    where = {"out_shardings": sharding.replicated(mesh), "compiler_options": {name: value}}
    try:
        jax.jit(lambda: 0, **where).lower().compile()
    except jax.errors.JaxRuntimeError:
        return None
    return {name: value}


def _quickly():
    """How to compile what runs once: conv adapters of a ResNet-20 took 9.4 s to add, now 1.9."""
    on_cpu = jax.default_backend() == "cpu"
    return {"xla_backend_optimization_level": 0} if on_cpu else None


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
