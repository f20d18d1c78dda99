"""The training step of a config as it would be compiled, of shapes alone: no data, no weights.

    step, arguments = abstract.find(config, mesh, platform).program()
    step.trace(*arguments).lower().compile()

What a run learns from its data is told instead, or assumed: the classes, how many tokens an example
has, and how many there are. The rest is what the experiments do, by the same functions.
"""

import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bmft import peft, prepare, prepare_images, sharding, tasks, writing
from bmft.activations import ROWS, within
from bmft.config import signature
from bmft.data import dialog_sources, glue
from bmft.data.batches import row_length
from bmft.data.image_table import ImageTable
from bmft.data.text import Encoded
from bmft.errors import Mistake
from bmft.models import tensors, weights
from bmft.outline import Fit, outline

IMAGES, DIALOGS = "image_classification", ("causal_lm", "preference")
LONG = 10_000  # steps of a run of unknown length: they make numbers of schedules, no more
CLASSES = {"tweets": 3, "digits": 10}  # of the data that always are there


class Told(NamedTuple):
    """What is known of the data from elsewhere; None: not told."""

    classes: int | None = None
    tokens: int | None = None  # of an example, on average; None: data.max_length
    examples: int | None = None  # of an epoch


class Abstract(NamedTuple):
    config: Any
    task: tasks.Task
    model: Any
    mesh: Any
    fit: Fit  # of bmft.outline: shapes with shardings
    methods: tuple
    batch: dict  # {name: jax.ShapeDtypeStruct}
    tokens: int | None  # real tokens of a step; None: of images there are none
    without_weights: bool  # whether there are no files of weights here

    def program(self):
        """(the jitted step, its arguments as shapes)."""
        step = prepare.make_step(self.config, self.fit, self.task.loss)
        return step, (self.fit.state, self.fit.frozen, self.batch)


def groups(config):
    """Keys that a config takes beside the common ones, whatever its task."""
    if config.task.name == IMAGES:
        return prepare_images.groups(config)
    more = {"data": dialog_sources.KEYS, "generate": writing.KEYS}
    return prepare.groups(config) | (more if config.task.name in DIALOGS else {})


def find(config, mesh, platform, told=Told()):  # noqa: B008 - it never changes
    """The `Abstract` of a config on the devices of a mesh. Raises Mistake for what a run would
    refuse, as far as shapes tell, and for what must be told."""
    is_image = config.task.name == IMAGES
    task, model, how = (
        _images(config, platform, told) if is_image else _texts(config, platform, told)
    )
    methods = prepare.find_methods(config, model)
    prepare.find_metric(config, task)
    present = tensors.are_in(model.folder)
    files = weights.index(model) if present else None
    fit = outline(config, model, methods, mesh, steps(config, told) or LONG, files)
    if task.check_moving:
        task.check_moving(fit.labels)
    if is_image:
        batch, tokens = _image_batch(config, task, how, mesh), None
    else:
        batch, tokens = _text_batch(config, task, model, methods, mesh, platform, told)
    return Abstract(config, task, model, mesh, fit, methods, batch, tokens, not present)


def with_module(found, **changes):
    """The same `Abstract` with fields of the model's module changed: remat, unroll, ..."""
    module = found.fit.module.clone(**changes)
    apply = peft.attach(found.methods, found.model._replace(module=module)).apply
    apply = within(found.mesh, apply)
    return found._replace(fit=found.fit._replace(apply=apply, module=module))


def steps(config, told):
    """Steps of the run; None where they are told in epochs of unknown length."""
    if config.train.steps is not None or told.examples is None:
        return config.train.steps
    return max(1, round(config.train.epochs * epoch_steps(config, told.examples)))


def epoch_steps(config, examples):
    return -(-examples // config.train.batch_size)


# --- task and model --------------------------------------------------------------------------


def _texts(config, platform, told):
    make = tasks.get(config.task.name).make
    given = {key: config.task[key] for key in signature(make)}
    if config.task.name not in DIALOGS:
        given |= _classes(config, told)
    task = make({}, **given)
    return task, prepare.find_model(config, task.num_outputs, platform), None


def _images(config, platform, told):
    how = prepare_images.preprocessor(config, None, platform)
    make = tasks.get(config.task.name).make
    given = {key: config.task[key] for key in signature(make)} | _classes(config, told)
    task = make({}, how.size, **given)
    return task, prepare_images.find_model(config, task.num_outputs, how, platform), how


def _classes(config, told):
    """{"labels": ...} or {"regression": True}: what a task would learn from its data."""
    if config.task.labels or config.task.get("regression"):
        return {}
    source, _, name = config.data.name.partition("/")
    if source == "glue" and name:
        labels = glue.find(name).labels
        return {"labels": labels} if labels else {"regression": True}
    count = told.classes or CLASSES.get(source)
    if count is None:
        raise Mistake(f"data.name={config.data.name!r}: how many classes has it? --classes=N")
    return {"labels": tuple(f"LABEL_{i}" for i in range(count))}


# --- batches ---------------------------------------------------------------------------------


def _text_batch(config, task, model, methods, mesh, platform, told):
    """(the batch of a step, its real tokens) where all examples have `told.tokens` tokens."""
    prepare.check_length(config, model, methods)
    limit, sequences = config.data.max_length, 2 if task.name == "preference" else 1
    each, count = min(told.tokens or limit, limit), config.train.batch_size
    encoded = _encoded(task, each, sequences, count).behind(peft.virtual_ids(methods, model))
    length = row_length(
        config.data.row_length,
        encoded.longest + sequences * (limit - each),
        platform,
        lengths=encoded.lengths,
        batch_size=count,
        rows_multiple=sharding.rows(mesh) * config.train.accumulate,
    )
    labels = np.zeros(count, np.float32 if task.num_outputs == 1 else np.int32)
    batches = prepare.packed(config, encoded, labels, length, mesh, True, lambda arrays: arrays)
    return _shapes(batches.at(0), mesh), each * sequences * count


def _encoded(task, each, sequences, count):
    """Examples without content, as `task` has them: of so many sequences of `each` tokens."""
    total, is_language = each * sequences * count, task.num_outputs is None
    return Encoded(
        tokens=np.zeros(total, np.int32),
        types=np.zeros(total, np.uint8),
        offsets=np.arange(count + 1, dtype=np.int64) * each * sequences,
        truncated=0,
        learned=np.ones(total, bool) if is_language else None,
        second=np.full(count, each, np.int64) if sequences == 2 else None,
    )


def _image_batch(config, task, how, mesh):
    shape = (config.train.batch_size, how.host, how.host, 3)
    table = ImageTable(np.broadcast_to(np.zeros((), np.uint8), shape))
    batches = prepare_images.in_batches(
        config, task, table, how.resize, mesh, True, place=lambda arrays: arrays
    )
    return _shapes(batches.at(0), mesh)


def _shapes(arrays, mesh):
    rows = NamedSharding(mesh, P(ROWS))
    return {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=rows)
        for name, array in arrays.items()
    }


def bytes_a_chip(shapes):
    """Bytes of a tree of jax.ShapeDtypeStruct on each chip, by their shardings."""
    total = 0
    for leaf in jax.tree.leaves(shapes):
        part = leaf.sharding.shard_shape(leaf.shape)
        size = 8 if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
        total += math.prod(part) * size
    return total
