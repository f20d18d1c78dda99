"""Tasks: what an example's loss is, how a split is measured, what a prediction looks like.

One file a task, found by its name; a file with a function `make` is one. `EXAMPLES` in it is the
type of the splits it learns from.
"""

import importlib
import pathlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from bmft.errors import Mistake, nearest


class Task(NamedTuple):
    """Pure functions and facts, made by make(tables, **the task's own config group).

    forward(batch, *, train) -> logits float32 [R, K, num_outputs] is the model with its variables
    bound; batch is what `bmft.data.batches` makes, for images `bmft.data.image_batches`, whose
    arrays, and so the logits, have one axis of rows, not R and K. n is the number of examples of a
    split. A language model (num_outputs None) gives the negative log-likelihood of the batch's
    targets, float32 [R, T], and `Dialogs` take the place of `Table`. forward(..., adapter=False) is
    the base without what methods add.
    """

    name: str
    labels: tuple | None  # names of the classes in the order of the logits; None: there are none
    num_outputs: int | None  # None: a language model
    heads: tuple  # globs of the parameters that the task owns
    metric: tuple  # (name, "max" or "min"): what the best checkpoint is best in
    directions: dict  # {metric: "max" or "min"}: all there are
    targets: Callable[[Any], Any]  # Table -> int32 or float32 [n], None if it has no labels
    loss: Callable[..., Any]  # (forward, batch, key) -> (sum, weight), {name: sum}
    outputs: Callable[..., dict]  # (forward, batch) -> {name: [R, K, ...]}
    metrics: Callable[..., dict]  # (outputs {name: numpy [n, ...]}, targets) -> {metric: float}
    decode: Callable[[dict], list]  # outputs {name: numpy [n, ...]} -> a dict an example
    view: Callable | None = None  # batch -> batch as evaluation sees it; None: as it comes
    deterministic: bool = True  # training sees each example as evaluation does, every time
    # (table, tokenizer, max_length, cache folder) -> text.Encoded; None: text.encode
    encode: Callable | None = None
    show: Callable | None = None  # (Encoded, tokenizer) -> what to print of it before training
    # (table, tokenizer) -> [(ids that an answer is to be written after, its references)]
    prompts: Callable | None = None
    # (answers that were written, references of each) -> {measure: float}; None: nothing to measure
    measure: Callable | None = None
    check_moving: Callable | None = None  # paths of the leaves that move -> None, or a Mistake


def get(name):
    """The module of the task `name`, with its `make`. Raises Mistake for an unknown one."""
    if name not in names():
        raise Mistake(f"task.name={name!r}; {nearest(name, names())}")
    return importlib.import_module(f"{__name__}.{name}")


def names():
    """Names of all tasks."""
    files = sorted(pathlib.Path(__file__).parent.glob("*.py"))
    return [
        file.stem for file in files if re.search(r"^def make\(", file.read_text(), re.MULTILINE)
    ]
