"""Classes or a number for a text or a pair of texts: GLUE, tweets, anybody's file.

Classes come from the training split: in the order of the source where it has one (GLUE, TFDS, the
Hub), otherwise sorted, whole numbers by value. STS-B is a regression, and so is what `regression`
says.
"""

import math
from collections import Counter

import jax.numpy as jnp
import numpy as np
import scipy.stats
import sklearn.metrics

from bmft.data import glue
from bmft.data.table import Table
from bmft.errors import Mistake
from bmft.tasks import Task, classes

EXAMPLES = Table
MOST_CLASSES = (
    1000  # more are hardly classes but a wrong column, unless the source or task.labels names them
)


def make(
    tables,
    *,
    labels: tuple[str, ...] | None = None,
    regression: bool = False,
    label_smoothing: float = 0.0,
    class_weights: tuple[float, ...] | None = None,
):
    """The `Task` of `{split: Table}`; without tables, of the classes `labels` alone.

    labels: names of the classes in order; None: those of the training split.
    regression: labels are numbers; the loss is their mean squared error.
    label_smoothing: share of the target that is spread evenly over all classes, in [0, 1).
    class_weights: one a class, in the order of the classes. An example counts as much as the weight
    of its class, as in torch.nn.functional.cross_entropy(weight=...).
    Raises Mistake where these do not fit each other or the data.
    """
    benchmark = next((table.glue for table in tables.values() if table.glue), None)
    if benchmark is not None:
        expected = glue.find(benchmark).labels
        if labels not in (None, expected) or (regression and expected):
            raise Mistake(f"glue/{benchmark} has labels of its own: {expected or 'numbers'}")
        labels, regression = expected, expected is None
    if not regression:
        labels = classes.check_labels(labels) if labels else _labels_of(tables)
        classes.check_loss(labels, label_smoothing, class_weights)
    elif labels or class_weights or label_smoothing:
        raise Mistake("task: labels, class_weights and label_smoothing do not go with a regression")

    metric, directions = _metric_names(benchmark, labels)
    return Task(
        name="text_classification",
        labels=labels,
        num_outputs=len(labels) if labels else 1,
        heads=("classifier/**",),
        metric=metric,
        directions=directions,
        targets=_numbers if labels is None else lambda table: classes.targets(table, labels),
        loss=squared_error if labels is None else cross_entropy(label_smoothing, class_weights),
        outputs=lambda forward, batch: {"logits": forward(batch, train=False)},
        metrics=lambda outputs, targets: _metrics(outputs["logits"], targets, labels, directions),
        decode=lambda outputs: _decode(outputs["logits"], labels),
    )


# Losses: sums and weights over a batch, so that parts of a batch add up exactly


def cross_entropy(label_smoothing=0.0, class_weights=None):
    """loss(forward, batch, key) -> (sum, weight), {examples}, as `classes.cross_entropy`."""

    def loss(forward, batch, key):
        logits, labels, real = forward(batch, train=True), batch["labels"], batch["weights"]
        sums = classes.cross_entropy(logits, labels, real, label_smoothing, class_weights)
        return sums, {"examples": real.sum()}

    return loss


def squared_error(forward, batch, key):
    """(sum of squared errors, number of examples), {}."""
    real = batch["weights"]
    logits = forward(batch, train=True)[..., 0].astype(jnp.float32)
    error = jnp.where(real > 0, logits - batch["labels"], 0.0)
    return ((error**2 * real).sum(), real.sum()), {}


# Labels


def _labels_of(tables):
    """Names of the classes, from the training split."""
    table = classes.training_table(tables)
    if table.names is not None:
        return table.names
    found = Counter(map(classes.name_of, table.labels))
    names = list(found)
    if all(_is_whole(name) for name in names):
        names.sort(key=int)
    elif all(_number(name) is not None for name in names):
        raise Mistake(
            f"{table.source}: labels are numbers, such as {names[0]}: "
            "set task.regression=true, or name the classes: task.labels"
        )
    else:
        names.sort()
    if len(names) > MOST_CLASSES:
        raise Mistake(
            f"{table.source}: {len(names)} different labels in {table.size} examples, such as "
            f"{names[0]!r}: is data.label the right column? If so, name them: task.labels"
        )
    return classes.check_labels(names)


def _numbers(table):
    """float32 [n]: the labels of a regression; None for an unlabelled table."""
    if table.labels is None:
        return None
    numbers = [_number(label) for label in table.labels]
    for row, number in enumerate(numbers):
        if number is None:
            raise Mistake(f"{table.where(row)}: label {table.labels[row]!r} is no number")
    return np.array(numbers, np.float32)


def _is_whole(name):
    return name.removeprefix("-").isdecimal() and name.isascii()


def _number(label):
    """A finite number, or None."""
    try:
        number = float(label)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


# Metrics


def _metric_names(benchmark, labels):
    """((name, direction) of the main metric, {name: direction} of all)."""
    if benchmark is not None:
        names = glue.find(benchmark).metrics
        names = ("score", *names) if len(names) > 1 else names
    elif labels is None:
        names = ("pearson", "spearman", "mean_squared_error")
    else:
        names = ("accuracy", "macro_f1", "matthews", *(["f1"] if len(labels) == 2 else []))
    least = ("mean_squared_error", "loss")
    directions = {name: "min" if name in least else "max" for name in (*names, "loss")}
    return (names[0], directions[names[0]]), directions


def _metrics(logits, targets, labels, wanted):
    """{name: float} of logits [n, C] and targets [n]; {} without targets.

    `f1` is that of the second class, `score` the mean of GLUE's two metrics. A correlation with
    something constant, which is not defined, counts as 0.
    """
    if targets is None:
        return {}
    logits = np.asarray(logits, np.float64)
    if labels is None:
        found = _regression_metrics(logits[:, 0], np.asarray(targets, np.float64))
    else:
        found = _class_metrics(logits, np.asarray(targets), len(labels))
    if "score" in wanted:
        found["score"] = float(
            np.mean([found[name] for name in wanted if name not in ("score", "loss")])
        )
    return {name: float(found[name]) for name in wanted}


def _class_metrics(logits, targets, count):
    predicted = logits.argmax(-1)
    found = classes.metrics(logits, targets, count)
    found["matthews"] = sklearn.metrics.matthews_corrcoef(targets, predicted)
    if count == 2:
        found["f1"] = sklearn.metrics.f1_score(targets, predicted, zero_division=0.0)
    return found


def _regression_metrics(predicted, targets):
    error = ((predicted - targets) ** 2).mean()
    found = {"loss": error, "mean_squared_error": error, "pearson": 0.0, "spearman": 0.0}
    if np.ptp(predicted) > 0 and np.ptp(targets) > 0:
        found["pearson"] = scipy.stats.pearsonr(predicted, targets).statistic
        found["spearman"] = scipy.stats.spearmanr(predicted, targets).statistic
    return found


def _decode(logits, labels):
    """A dict an example: label, scores {name: probability}, logits; a number has no scores."""
    if labels is not None:
        return classes.decode(logits, labels)
    numbers = np.asarray(logits, np.float32)[:, 0].tolist()
    return [{"label": value, "logits": [value]} for value in numbers]
