"""Classes for images: digits, CIFAR, a folder a class, anybody's file.

What the keys of the group `task` mean, beside labels, label_smoothing and class_weights, which are
those of text_classification. The network sees `image_size` pixels a side (None: the model's own).

    read by bmft.prepare_images, only checked here:
    image_size   pixels a side                    margin       how much larger the host's images are
    squash       resize without cutting           standardize  model, image or dataset

    in training; where a line is not asked for, training sees what evaluation sees, the middle:
    crop           pad: anywhere in the image with crop_padding black pixels around it;
                   resized: a box of 8 to 100 % of the image, resized; none: the middle
    flip           left and right swapped in half of the images
    randaugment    n, m: so many operations at magnitude m of 30
    jitter         brightness, contrast, saturation, hue, as torchvision's ColorJitter
    erasing        share of the images in which a box is filled with noise
    mixup, cutmix  alpha of the Beta distribution of the share; 0: not mixed

They are applied in this order (bmft/augment.py); images are float32 in [0, 1] all the while, and
the model standardises what comes out.
"""

import csv
import io
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import sklearn.metrics

from bmft import augment
from bmft.data.image_table import ImageTable
from bmft.errors import Mistake, nearest
from bmft.run import write_whole
from bmft.tasks import Task, classes

EXAMPLES = ImageTable
CROPS = ("none", "pad", "resized")
STANDARDIZE = ("model", "image", "dataset")
STREAM = 1000  # of the step's key; the model's own streams (dropout, ...) are 0, 1, 2, ...


class Augmentation(NamedTuple):
    """What happens to an image in training alone. The defaults do nothing."""

    crop: str = "none"
    crop_padding: int = 4
    flip: bool = False
    jitter: tuple = ()
    randaugment: tuple = ()
    mixup: float = 0.0
    cutmix: float = 0.0
    erasing: float = 0.0

    @property
    def nothing(self):
        """Does training see an image as evaluation does, every time?"""
        random = (self.flip, any(self.jitter), self.randaugment, self.mixup, self.cutmix)
        return self.crop == "none" and not any(random) and not self.erasing


def make(
    tables,
    size,
    *,
    labels: tuple[str, ...] | None = None,
    image_size: int | None = None,
    margin: float = 1.0,
    squash: bool = False,
    standardize: str = "model",
    label_smoothing: float = 0.0,
    class_weights: tuple[float, ...] | None = None,
    crop: str = "none",
    crop_padding: int = 4,
    flip: bool = False,
    jitter: tuple[float, ...] = (),
    randaugment: tuple[int, ...] = (),
    mixup: float = 0.0,
    cutmix: float = 0.0,
    erasing: float = 0.0,
):
    """The `Task` of `{split: ImageTable}`; without tables, of the classes `labels` alone.

    size: pixels a side that the network sees. The images of a batch are uint8 [b, h, w, 3] with h
    and w at least `size`. A batch may hold `features` in their place, activations that were kept:
    they go to the model as they are.
    Raises Mistake where the keys (see above) do not fit each other or the data.
    """
    _check_reading(image_size, margin, standardize)
    labels = classes.check_labels(labels or classes.training_table(tables).names)
    classes.check_loss(labels, label_smoothing, class_weights)
    augmentation = Augmentation(
        crop, crop_padding, flip, jitter, randaugment, mixup, cutmix, erasing
    )
    _check(augmentation, margin)

    def view(batch):
        return evaluation_view(batch, size)

    names = ("accuracy", "macro_precision", "macro_recall", "macro_f1", "calibration_error", "loss")
    names += ("top5",) * (len(labels) > 5)
    least = ("calibration_error", "loss")
    return Task(
        name="image_classification",
        labels=labels,
        num_outputs=len(labels),
        heads=("classifier/**",),
        metric=("accuracy", "max"),
        directions={name: "min" if name in least else "max" for name in names},
        targets=lambda table: classes.targets(table, labels),
        loss=cross_entropy(size, augmentation, label_smoothing, class_weights),
        outputs=lambda forward, batch: {"logits": forward(view(batch), train=False)},
        metrics=lambda outputs, targets: _metrics(outputs["logits"], targets, names),
        decode=lambda outputs: classes.decode(outputs["logits"], labels),
        view=view,
        deterministic=augmentation.nothing,
    )


def _check_reading(image_size, margin, standardize):
    if image_size is not None and image_size < 1:
        raise Mistake(f"task.image_size={image_size!r}: an image has a pixel at least")
    if not 1 <= margin < math.inf:
        raise Mistake(f"task.margin={margin!r}: needs at least 1, nothing to cut off")
    if standardize not in STANDARDIZE:
        raise Mistake(f"task.standardize={standardize!r}; {nearest(standardize, STANDARDIZE)}")


def _check(changes, margin):
    """Raise Mistake for a key of an `Augmentation` that is out of its range."""
    crop, padding, jitter = changes.crop, changes.crop_padding, changes.jitter
    if crop not in CROPS:
        raise Mistake(f"task.crop={crop!r}; {nearest(crop, CROPS)}")
    if padding < 0:
        raise Mistake(f"task.crop_padding={padding!r}: needs at least 0 pixels")
    if crop == "pad" and not padding and margin == 1:
        raise Mistake("task.crop='pad' with crop_padding=0 needs task.margin above 1: what to cut?")
    if len(jitter) not in (0, 4) or not all(0 <= x < math.inf for x in jitter):
        raise Mistake(f"task.jitter={jitter!r}: needs brightness, contrast, saturation, hue")
    if jitter and jitter[3] > 0.5:
        raise Mistake(f"task.jitter={jitter!r}: hue is at most 0.5, half of the circle")
    if changes.randaugment:
        _check_randaugment(changes.randaugment)
    for name in ("mixup", "cutmix"):
        alpha = getattr(changes, name)
        if not 0 <= alpha < math.inf:
            raise Mistake(f"task.{name}={alpha!r}: needs an alpha of at least 0")
    if not 0 <= changes.erasing <= 1:
        raise Mistake(f"task.erasing={changes.erasing!r}: needs a share from 0 to 1")


def _check_randaugment(found):
    if len(found) != 2 or found[0] < 1 or not 0 <= found[1] <= augment.MOST:
        raise Mistake(
            f"task.randaugment={found!r}: needs n, m: at least 1 operation, "
            f"magnitude 0 to {augment.MOST}"
        )


# What the network sees


def evaluation_view(batch, size):
    """The batch with the middle of its images, float32 [b, size, size, 3] in [0, 1]."""
    if "images" not in batch:
        return batch
    return batch | {"images": augment.centre_crop(_floats(batch["images"]), size)}


def training_view(batch, key, size, changes):
    """The batch with changed images, float32 [b, size, size, 3]; (labels, other labels, share [b]).

    The target of an example is `share` of its label and the rest of the other label.
    """
    labels = batch["labels"]
    pairs = labels, labels, jnp.ones(labels.shape)
    if changes.nothing or "images" not in batch:
        return evaluation_view(batch, size), pairs
    keys = jax.random.split(jax.random.fold_in(key, STREAM), 6)
    images = _floats(batch["images"])
    if changes.crop == "pad":
        images = augment.random_crop(keys[0], images, size, changes.crop_padding)
    elif changes.crop == "resized":
        images = augment.random_resized_crop(keys[0], images, size)
    else:
        images = augment.centre_crop(images, size)
    if changes.flip:
        images = augment.random_flip(keys[1], images)
    if changes.randaugment:
        images = augment.randaugment(keys[2], images, *changes.randaugment)
    if changes.jitter:
        images = augment.jitter(keys[3], images, *changes.jitter)
    if changes.erasing:
        images = augment.erase(keys[4], images, changes.erasing)
    if changes.mixup or changes.cutmix:
        images, pairs = augment.mix(
            keys[5], images, labels, batch["weights"], changes.mixup, changes.cutmix
        )
    return batch | {"images": images}, pairs


def _floats(images):
    return images.astype(jnp.float32) / 255


# Loss: sums and weights over a batch, so that parts of a batch add up exactly


def cross_entropy(size, augmentation, label_smoothing=0.0, class_weights=None):
    """loss(forward, batch, key) -> (sum, weight), {examples}, as `classes.cross_entropy`.

    A mixed example counts as its share of one and the rest of another.
    """

    def loss(forward, batch, key):
        real = batch["weights"]
        batch, (labels, others, share) = training_view(batch, key, size, augmentation)
        logits = forward(batch, train=True)
        total, weight = 0.0, 0.0
        for each, counts in ((labels, real * share), (others, real * (1 - share))):
            sums = classes.cross_entropy(logits, each, counts, label_smoothing, class_weights)
            total, weight = total + sums[0], weight + sums[1]
        return (total, weight), {"examples": real.sum()}

    return loss


# Metrics, and what a run leaves of its classes


def _metrics(logits, targets, names):
    """{name: float} of logits [n, C] and targets [n]; {} without targets."""
    if targets is None:
        return {}
    logits = np.asarray(logits, np.float64)
    found = classes.metrics(logits, np.asarray(targets), logits.shape[-1])
    return {name: float(found[name]) for name in names}


def per_class(outputs, targets, labels):
    """A dict a class: label, precision, recall, f1, support (examples of it).

    outputs {"logits": [n, C]}, targets int [n]. What is not defined, as the recall of a class
    without examples, counts as 0.
    """
    predicted = outputs["logits"].argmax(-1)
    columns = sklearn.metrics.precision_recall_fscore_support(
        targets, predicted, labels=np.arange(len(labels)), zero_division=0.0
    )
    names = ("label", "precision", "recall", "f1", "support")
    rows = zip(labels, *(column.tolist() for column in columns), strict=True)
    return [dict(zip(names, row, strict=True)) for row in rows]


def csv_text(rows):
    """Rows of `per_class` as the text of a CSV file."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def draw_confusion(path, outputs, targets, labels):
    """Draw a PNG (path) of how often each class was taken for each.

    Colours are shares of a row, the examples of a class. Up to 20 classes have numbers in their
    cells; of more than 50 only some are named; of more than 250 a cell is the largest of a block.
    Raises Mistake where it cannot be written.
    """
    from matplotlib.colors import PowerNorm  # 1 s to import
    from matplotlib.figure import Figure

    count = len(labels)
    counts = sklearn.metrics.confusion_matrix(
        targets, outputs["logits"].argmax(-1), labels=np.arange(count)
    )
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    blocks = np.arange(0, count, -(-count // 250))
    cells = np.maximum.reduceat(np.maximum.reduceat(shares, blocks, 0), blocks, 1)
    side = 3 + min(max(0.45 * count, 2), 9)
    figure = Figure(figsize=(side + 1, side), layout="constrained", dpi=120)
    axes = figure.add_subplot(xlabel="predicted", ylabel="true")
    edge, root = count - 0.5, PowerNorm(0.5, 0, 1)  # the root brings out what is rare
    style = {"cmap": "Blues", "norm": root, "interpolation": "none"}
    image = axes.imshow(cells, extent=(-0.5, edge, edge, -0.5), **style)
    figure.colorbar(image, label="share of the true class", shrink=0.8)
    places = np.arange(0, count, -(-count // 50))
    names = [_short(labels[place]) for place in places]
    size = 9 if count <= 20 else 6
    axes.set_xticks(places, names, rotation=90, fontsize=size)
    axes.set_yticks(places, names, fontsize=size)
    if count <= 20:
        for row, column in np.argwhere(counts):
            colour = "white" if shares[row, column] > 0.4 else "black"
            style = {"ha": "center", "va": "center", "fontsize": 8, "color": colour}
            axes.text(column, row, counts[row, column], **style)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_whole(path, picture.getvalue())


def _short(name, most=24):
    return name if len(name) <= most else name[: most - 3] + "..."
