"""What tasks with classes share, of texts or images: names, loss, metrics, predictions."""

import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
import sklearn.metrics

from bmft.errors import Mistake, nearest

BINS = 15  # of the calibration error, as in its paper


# Names


def training_table(tables):
    """The labelled training split, which says what the classes are. Raises Mistake without one."""
    table = tables.get("train")
    if table is None or table.labels is None:
        raise Mistake(
            "no labelled training split says what the classes are; name them: task.labels"
        )
    return table


def check_labels(names):
    """The names as a tuple, if there are two at least and none comes twice."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise Mistake(f"task.labels: {twice[0]!r} comes twice")
    if len(names) < 2:
        raise Mistake(f"all labels are {names[0]!r}: there is nothing to tell apart")
    return tuple(names)


def check_loss(labels, label_smoothing, class_weights):
    """Raise Mistake unless these fit `cross_entropy` and the classes."""
    if not 0 <= label_smoothing < 1:
        raise Mistake(f"task.label_smoothing={label_smoothing} is not in [0, 1)")
    if class_weights is None:
        return
    if len(class_weights) != len(labels):
        raise Mistake(
            f"task.class_weights has {len(class_weights)} numbers for {len(labels)} classes: "
            f"{', '.join(labels[:20])}"
        )
    if not all(0 < weight < math.inf for weight in class_weights):
        raise Mistake(f"task.class_weights={class_weights}: weights are above 0")


def targets(table, labels):
    """int32 [n]: the positions of a table's labels in `labels`; None for an unlabelled table."""
    if table.labels is None:
        return None
    names = map(name_of, table.labels)
    if table.names is not None:
        names = (table.names[label] for label in table.labels)
    position = {name: i for i, name in enumerate(labels)}
    found = [position.get(name) for name in names]
    if None in found:
        row = found.index(None)
        name = name_of(table.labels[row]) if table.names is None else table.names[table.labels[row]]
        raise Mistake(f"{table.where(row)}: unknown label {name!r}; {nearest(name, labels)}")
    return np.array(found, np.int32)


def name_of(label):
    """A label as the name of a class: 1, 1.0 and "1" are one, true and "true" another."""
    if isinstance(label, bool):
        return str(label).lower()
    if isinstance(label, float) and label.is_integer():
        return str(int(label))
    return str(label).strip()


# Loss


def cross_entropy(logits, labels, weights, label_smoothing=0.0, class_weights=None):
    """(sum, weight), float32 []; torch's F.cross_entropy is sum / weight.

    (1 - s) * w[y] * -log p[y]  +  s / C * sum over c of w[c] * -log p[c],  weight w[y]

    logits [..., C]; labels int32 and weights float32 [...]: how often an example counts. Sums, so
    that parts of a batch add up exactly. class_weights: w, one a class; None: 1.
    """
    # A place that does not count may hold anything: not even a NaN of it may get out.
    logits = jnp.where(weights[..., None] > 0, logits.astype(jnp.float32), 0.0)
    costs = -jax.nn.log_softmax(logits)
    of_class = jnp.ones(logits.shape[-1]) if class_weights is None else jnp.array(class_weights)
    costs = costs * of_class
    own = jnp.take_along_axis(costs, labels[..., None], -1)[..., 0]
    each = (1 - label_smoothing) * own + label_smoothing * costs.mean(-1)
    return (each * weights).sum(), (of_class[labels] * weights).sum()


# Metrics


def metrics(logits, targets, classes):
    """{name: float} of logits float64 [n, C] and targets int [n].

    loss, accuracy; macro_precision, macro_recall, macro_f1: means over all classes, of which one
    that never occurs counts 0; top5: of more than five classes.
    calibration_error: how far accuracy is from confidence, the mean of 15 bins of confidence
    weighted by their examples (ECE; Guo et al. 2017, arXiv:1706.04599).
    """
    log_p = scipy.special.log_softmax(logits, axis=-1)
    predicted = logits.argmax(-1)
    precision, recall, f1, _ = sklearn.metrics.precision_recall_fscore_support(
        targets, predicted, labels=np.arange(classes), average="macro", zero_division=0.0
    )
    found = {
        "loss": -log_p[np.arange(len(targets)), targets].mean(),
        "accuracy": (predicted == targets).mean(),
        "macro_precision": precision,
        "macro_recall": recall,
        "macro_f1": f1,
        "calibration_error": _calibration_error(np.exp(log_p.max(-1)), predicted == targets),
    }
    if classes > 5:
        five = np.argpartition(-logits, 4, axis=-1)[:, :5]
        found["top5"] = (five == targets[:, None]).any(-1).mean()
    return found


def _calibration_error(confidence, right):
    upper = np.linspace(0, 1, BINS + 1)[1:]
    place = np.minimum(np.searchsorted(upper, confidence), BINS - 1)  # (0, 1/15], (1/15, 2/15], ...
    gaps = np.bincount(place, weights=confidence - right, minlength=BINS)
    return np.abs(gaps).sum() / len(right)


# Predictions


def decode(logits, labels):
    """A dict an example: label, scores {name: probability}, logits."""
    logits = np.asarray(logits, np.float32)
    scores = scipy.special.softmax(logits, axis=-1)
    return [
        {
            "label": labels[best],
            "scores": dict(zip(labels, row.tolist(), strict=True)),
            "logits": raw.tolist(),
        }
        for best, row, raw in zip(logits.argmax(-1), scores, logits, strict=True)
    ]
