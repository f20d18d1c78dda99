"""What images need between a config and the loop: their size, batches, and features kept on disk.

tables -> size -> task -> model -> methods -> fit -> reuse

See experiments/image_classification.py.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bmft import evaluate, features, models, peft, prepare, processes, sharding, tasks, train
from bmft.activations import within
from bmft.config import signature
from bmft.data import image_sources, images
from bmft.data.image_batches import ImageBatches
from bmft.data.text import cache_directory
from bmft.errors import Mistake, nearest
from bmft.models import weights
from bmft.progress import total_steps

BATCH_NORM = ("frozen", "update", "reset")
STANDARDIZE_SAMPLE = 10_000  # images of train that mean and deviation are measured on
PREPROCESSOR = "preprocessor_config.json"


def groups(config):
    """Keys a config takes beside the common ones: of its methods, its task, and images."""
    return prepare.groups(config) | {
        "data": image_sources.KEYS,
        "model": {"batch_norm": (str, "frozen")},
        "train": {"reuse_features": (bool, True)},
    }


# --- from files to what the network sees -----------------------------------------------------


class Preprocessor(NamedTuple):
    """How images become what a model sees; lies beside adapters and models."""

    size: int  # pixels a side that the network sees
    host: int  # pixels a side before the middle is cut out
    squash: bool
    resample: str
    standardize: str
    mean: tuple
    std: tuple

    @property
    def resize(self):
        return images.Resize(self.host, self.resample, self.squash)

    def save_pretrained(self, folder):
        """Writes preprocessor_config.json, which transformers reads as well as it can say the same:
        its image processors neither cut out the middle of a resized image nor standardise each
        image by itself. What they do not know stands under `bmft`."""
        fields = {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True,
            "size": {"height": self.size, "width": self.size},
            "resample": int(images.RESAMPLE[self.resample]),
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": self.standardize != "image",
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "bmft": self._asdict(),
        }
        text = json.dumps(fields, indent=2, sort_keys=True) + "\n"
        (Path(folder) / PREPROCESSOR).write_text(text, encoding="utf-8")


def read_preprocessor(folder, model):
    """The `Preprocessor` that lies in an adapter's or a model's folder; the model's own if none."""
    path = Path(folder) / PREPROCESSOR
    try:
        fields = json.loads(path.read_text()).get("bmft") if path.is_file() else None
    except ValueError as error:
        raise Mistake(f"{path}: not JSON: {error}") from None
    if fields is None:
        c = model.config
        return Preprocessor(c.size, c.size, False, c.resample, c.standardize, c.mean, c.std)
    fields = {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}
    try:
        return Preprocessor(**fields)
    except TypeError as error:
        raise Mistake(f"{path}: field 'bmft': {error}") from None


def tables(config):
    """{split: ImageTable}, every image of which can be read."""
    found = image_sources.load(config.data)
    cache = cache_directory(config.data.cache)
    return {
        split: images.check(table, skip_bad=config.data.skip_bad, cache=cache)
        for split, table in found.items()
    }


def preprocessor(config, tables, platform=None):
    """The `Preprocessor` of a config: the model's own, but for what task.* says. tables None: of no
    data, of which nothing is measured. platform: see `prepare.find_model`."""
    own = models.find(config.model.name, outputs=1, fetch_weights=platform is None)
    if not takes_images(own):
        raise Mistake(f"model.name={config.model.name!r} takes no images")
    size = config.task.image_size or own.config.size
    host = round(size * config.task.margin)
    how = config.task.standardize
    mean, std = own.config.mean, own.config.std
    if how == "dataset" and tables:
        resize = images.Resize(host, own.config.resample, config.task.squash)
        mean, std = measure(tables["train"], resize)
    how = own.config.standardize if how == "model" else how
    return Preprocessor(size, host, config.task.squash, own.config.resample, how, mean, std)


def takes_images(model):
    return "images" in model.dummy


def measure(table, resize):
    """Mean and standard deviation of each channel, in [0, 1], over (some of) a table's images."""
    stride = max(1, table.size // STANDARDIZE_SAMPLE)
    some = table.take(slice(None, None, stride))
    sums, squares, count = np.zeros(3), np.zeros(3), 0
    for row in range(some.size):
        pixels = images.decode(some.images[row], resize, some.to_rgb, some.where(row)) / 255
        sums += pixels.sum((0, 1))
        squares += np.square(pixels).sum((0, 1))
        count += math.prod(pixels.shape[:2])
    mean = sums / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 1e-12))
    if (std < 1e-3).any():
        raise Mistake("task.standardize='dataset': the images of train are all alike in a channel")
    return tuple(mean.tolist()), tuple(std.tolist())


# --- task, model, batches --------------------------------------------------------------------


class Problem(NamedTuple):
    """What to learn, and from which pretrained model; no weights are read yet."""

    tables: dict  # {split: ImageTable}
    preprocessor: Preprocessor
    task: tasks.Task
    model: models.Model
    methods: tuple
    base: str  # fingerprint of the weights


def find(config):
    """The `Problem` of a config."""
    found = tables(config)
    how = preprocessor(config, found)
    task = find_task(config, found, how.size)
    model = find_model(config, task.num_outputs, how)
    methods = prepare.find_methods(config, model)
    return Problem(found, how, task, model, methods, weights.fingerprint(model))


def find_task(config, tables, size):
    """The `Task` of a config for `{split: ImageTable}` and the pixels the network sees."""
    make = prepare.task_of(config, tables).make
    return make(tables, size, **{key: config.task[key] for key in signature(make)})


def find_model(config, outputs, preprocessor, platform=None):
    """The `Model` of a config, as `preprocessor` standardises, with a policy for BatchNorm.
    platform: see `prepare.find_model`."""
    policy = config.model.batch_norm
    if policy not in BATCH_NORM:
        raise Mistake(f"model.batch_norm={policy!r}; {nearest(policy, BATCH_NORM)}")
    changes = {} if policy == "frozen" else {"batch_norm": policy}
    model = prepare.find_model(config, outputs, platform, **changes)
    return standardized(model, preprocessor)


def standardized(model, how):
    """The model with the standardisation of a `Preprocessor`, tried on images of its size."""
    config = model.config._replace(standardize=how.standardize, mean=how.mean, std=how.std)
    module = model.module.clone(config=config)
    pixels = np.linspace(0.0, 1.0, 2 * how.size**2 * 3, dtype=np.float32)
    dummy = {"images": jnp.asarray(pixels.reshape(2, how.size, how.size, 3))}
    model = model._replace(config=config, module=module, dummy=dummy)
    jax.eval_shape(module.init, jax.random.key(0), dummy)  # a size that does not fit is found here
    return model


def batches(config, problem, mesh):
    """{split: ImageBatches}: shuffled and in parts for train, in order for the others."""
    task, how = problem.task, problem.preprocessor
    processes.refuse_other({"images": {split: t.size for split, t in problem.tables.items()}})
    for split, table in problem.tables.items():
        print(f"{split}: {table.size:,} images" + "".join(f"; {note}" for note in table.notes))
    found = {
        split: in_batches(config, task, table, how.resize, mesh, split == "train")
        for split, table in problem.tables.items()
    }
    steps = found["train"].steps_per_epoch
    print(f"{how.size} x {how.size} pixels, {len(task.labels)} classes, {steps:,} steps an epoch")
    return found


def in_batches(config, task, table, resize, mesh, training, put=lambda arrays: arrays, place=None):
    """The `ImageBatches` of one split. put: what becomes of the arrays of a batch; place: and of
    those of a whole batch; None: this process puts its share of them on its devices."""
    share = ((0,), 1) if place else sharding.share(mesh)
    place = place or sharding.put_batch(mesh)
    return ImageBatches(
        table,
        task.targets(table),
        batch_size=config.train.batch_size if training else config.eval.batch_size,
        resize=resize,
        seed=config.seed,
        shuffle=training,
        rows_multiple=sharding.rows(mesh) * (config.train.accumulate if training else 1),
        put=lambda arrays: place(put(arrays)),
        share=share,
    )


# --- a frozen backbone -----------------------------------------------------------------------


def reuse_features(config, fit, batches, problem, mesh):
    """(fit, batches) from the first piece on in which something moves or is dropped at random.

    What comes before is computed once for each image (bmft.features). It is not where images differ
    from epoch to epoch, statistics of batches are used, or the run is no longer than an epoch:
    `fit` and `batches` stay as they are then, and a line says why.
    """
    task, model, methods = problem.task, problem.model, problem.methods
    pieces = peft.first_moving_piece(methods, fit.labels, model.names)
    if pieces and not model.names.stages:
        pieces += 1  # a stack's layers come after the embeddings, which are a piece, too
    pieces = min(pieces, model.config.steady)
    steps = total_steps(config, batches["train"].steps_per_epoch)
    reason = _why_not(config, model, task, pieces, steps / batches["train"].steps_per_epoch)
    if reason:
        print(f"features are computed in every epoch: {reason}")
        return fit, batches
    module = fit.module
    first = peft.attach(methods, model._replace(module=module.clone(end=pieces))).apply
    first = within(mesh, first)
    outputs_of = evaluate.make_outputs(
        first, lambda forward, batch: {"features": forward(task.view(batch), train=False)}
    )
    variables = train.variables(fit.state, fit.frozen)
    cache, resize = cache_directory(config.data.cache), problem.preprocessor.resize
    decisive = [problem.base, problem.preprocessor, pieces, str(jnp.dtype(module.dtype))]
    decisive += [how for how in (config.model.quantize, config.model.storage) if how]
    found = {}
    for split, table in problem.tables.items():
        about = [*decisive, images.content_key(table)]
        in_order = in_batches(config, task, table, resize, mesh, False)
        kept = features.obtain(outputs_of, variables, in_order, cache, about)
        if kept is None:
            return fit, batches
        print(f"{split}: features {list(kept.shape)} of the first {pieces} pieces are reused")
        found[split] = in_batches(
            config, task, table._replace(images=kept), None, mesh, split == "train", _as_features
        )
    rest = peft.attach(methods, model._replace(module=module.clone(begin=pieces))).apply
    return fit._replace(apply=within(mesh, rest)), found


def _why_not(config, model, task, pieces, epochs):
    """Why features are not reused; "" if they are."""
    if not config.train.reuse_features:
        return "train.reuse_features=False"
    if not pieces:
        return "in the first piece of the model something moves, or is dropped at random"
    if not task.deterministic:
        return "the images are augmented"
    if getattr(model.config, "batch_norm", "frozen") != "frozen":
        return f"model.batch_norm={model.config.batch_norm!r}"
    return "" if epochs > 1 else "the run is no longer than an epoch"


def _as_features(arrays):
    arrays = dict(arrays)
    return arrays | {"features": arrays.pop("images")}
