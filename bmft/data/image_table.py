"""Images of one split with their labels, and what is refused when they are put together."""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from bmft.errors import Mistake, nearest

LEAVE_OUT = "data.skip_bad=True leaves it out"
NAMED = 5  # images that a note names; all that are left out are in `skipped`


class Records:
    """Images that stay where they lie until one is asked for: `records[i]` reads number i.

    read(number) -> bytes or an array; it is called from several threads. numbers: int array of the
    source's own numbers, or how many there are.
    files: the paths it reads from, part: what of them; both are for `images.content_key`.
    """

    def __init__(self, read, numbers, files, part):
        self.read = read
        self.numbers = np.arange(numbers) if isinstance(numbers, int) else numbers
        self.files, self.part = tuple(files), part

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, row):
        return self.read(int(self.numbers[row]))

    def take(self, rows):
        """The records of an integer array of rows."""
        return Records(self.read, self.numbers[rows], self.files, self.part)


class ImageTable(NamedTuple):
    """The images of one split. `ImageTable([path, another])` is what prediction needs.

    images: what `images[i]` gives is a Path or bytes to decode, or a uint8 [h, w, 3] array. It is a
    list, `Records`, or an array uint8 [n, h, w, 3].
    labels: int array [n], positions in names; None: the split is unlabelled.
    names: of the classes, in the order of the labels; None where the source does not know them.
    source: where the images are from; numbers: of their rows there, None for 0, 1, 2, ...; both
    for messages.
    to_rgb: whether grey, palette and other images are converted when read, or refused.
    notes: what a user should know of the split. skipped: `WHERE (reason)` of each image left out.
    """

    images: Sequence[Any]
    labels: np.ndarray | None = None
    names: tuple | None = None
    source: str = "images"
    numbers: np.ndarray | None = None
    to_rgb: bool = False
    notes: tuple = ()
    skipped: tuple = ()
    glue: str | None = None  # no image is of GLUE; a `Table` of texts may be

    @property
    def size(self):
        """How many images (`len` of a tuple would count its fields)."""
        return len(self.images)

    def where(self, row):
        """Where image `row` comes from: its file, or `SOURCE row 6` counted from 0."""
        if isinstance(self.images, list) and isinstance(self.images[row], os.PathLike):
            return str(self.images[row])
        return f"{self.source} row {row if self.numbers is None else self.numbers[row]}"

    def take(self, rows):
        """The table of these images alone. rows: a slice or an integer array."""
        rows = np.arange(self.size)[rows]
        if isinstance(self.images, list):
            images = [self.images[row] for row in rows.tolist()]
        elif isinstance(self.images, Records):
            images = self.images.take(rows)
        else:
            images = self.images[rows]
        return self._replace(
            images=images,
            labels=None if self.labels is None else self.labels[rows],
            numbers=rows if self.numbers is None else self.numbers[rows],
        )


def build(images, labels, source, *, names=None, labelled=True):
    """The `ImageTable` of images and their labels.

    labels: int [n], or None. labelled: each image must have a label; otherwise a split without
    labels, or with nothing but -1, is unlabelled.
    Raises Mistake where there is no image, or not one label, a whole number, for each.
    """
    if not len(images):
        raise Mistake(f"{source} holds no images")
    table = ImageTable(images, None, names, source)
    if labels is None:
        if labelled:
            raise Mistake(f"{source} has no labels; only a test split may be without")
        return table
    if len(labels) != len(images):
        raise Mistake(f"{source}: {len(images)} images and {len(labels)} labels")
    found = np.asarray(labels)
    if found.dtype.kind not in "iu" or found.ndim != 1:
        wrong = (row for row, label in enumerate(labels) if not isinstance(label, int | np.integer))
        row = next(wrong, 0)
        raise Mistake(f"{table.where(row)}: the label {labels[row]!r:.40} is no class number")
    if not labelled and (found == -1).all():
        return table
    return table._replace(labels=found.astype(np.int64))


def numbered(table):
    """The table with names "0", "1", ... for classes that have none. Mistake if one is missing."""
    found = np.unique(table.labels[table.labels >= 0])
    gaps = np.flatnonzero(found != np.arange(len(found)))
    if len(gaps):
        raise Mistake(
            f"{table.source}: the labels go to {found[-1]} and have no names, but none is "
            f"{gaps[0]}; number the classes 0, 1, 2, ... without a gap"
        )
    return table._replace(names=tuple(map(str, range(len(found)))))


def in_range(table, *, skip_bad=False):
    """The table, if each label is a position in its names.

    Otherwise the first that is none is a Mistake, or all are left out with skip_bad.
    """
    if table.labels is None:
        return table
    wrong = np.flatnonzero((table.labels < 0) | (table.labels >= len(table.names)))
    reasons = {row: f"label {table.labels[row]}" for row in wrong.tolist()}
    if reasons and not skip_bad:
        row, reason = next(iter(reasons.items()))
        last = len(table.names) - 1
        raise Mistake(f"{table.where(row)}: {reason} is not one of 0 to {last}; {LEAVE_OUT}")
    return leave_out(table, reasons)


def rename(table, names):
    """The table with labels by the order of `names`, those of train.

    Raises Mistake if a class of the table is not among them.
    """
    if table.names in (None, names):
        return table._replace(names=names)
    for name in table.names:
        if name not in names:
            raise Mistake(f"{table.source}: train has no class {name!r}; {nearest(name, names)}")
    places = np.array([names.index(name) for name in table.names])
    labels = None if table.labels is None else places[table.labels]
    return table._replace(labels=labels, names=names)


def leave_out(table, reasons):
    """The table without the rows of {row: reason}, counted and named in its notes."""
    bad = [(table.where(row), reason) for row, reason in reasons.items()]
    if len(bad) == table.size:
        raise Mistake(f"{table.source}: no image can be used: {bad[0][0]}: {bad[0][1]}")
    kept = np.setdiff1d(np.arange(table.size), list(reasons))
    return skip(table.take(kept) if bad else table, bad)


def skip(table, bad, what="image"):
    """The table with a note that what is `bad`, [(where, reason)], was left out of it."""
    if not bad:
        return table
    short = [f"{'/'.join(where.split('/')[-2:])} ({reason})" for where, reason in bad[:NAMED]]
    short += ["..."] * (len(bad) > NAMED)
    note = f"{len(bad):,} {what}{'s' * (len(bad) > 1)} left out: {', '.join(short)}"
    skipped = [f"{where} ({reason})" for where, reason in bad]
    return table._replace(notes=(*table.notes, note), skipped=(*table.skipped, *skipped))


def check_columns(known, columns, source):
    """Raise Mistake if a name of `columns`, {config key: name}, is not among the names `known`."""
    for key, name in columns.items():
        if name not in known:
            raise Mistake(f"{source} has no column {name!r} ({key}); {nearest(name, known)}")
