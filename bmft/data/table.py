"""Examples of one split, column by column, and what is refused when they are put together."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bmft.errors import Mistake, nearest


class Columns(NamedTuple):
    """The columns to take from a source: names of the text, of the second text and of the label.

    pair and label are None where there is none to take.
    """

    text: str
    pair: str | None = None
    label: str | None = None


class Table(NamedTuple):
    """The examples of one split. `Table(["a text", "another"])` is what prediction needs.

    texts, pairs: lists of str (pairs None: single texts).
    labels: list of str, int, float or bool as the source has them; None: the split is unlabelled.
    names: what integer labels stand for, in the order of the source, where the source knows.
    source: where the examples are from; numbers: of their lines in a file, or rows (`unit`) of
    another source, None for 0, 1, 2, ...; all three for messages.
    glue: name of the GLUE task. notes: what a user should know of the split.
    """

    texts: list
    pairs: list | None = None
    labels: list | None = None
    names: tuple | None = None
    source: str = "examples"
    numbers: Sequence[int] | None = None
    unit: str = "row"
    glue: str | None = None
    notes: tuple = ()

    @property
    def size(self):
        """How many examples (`len` of a tuple would count its fields)."""
        return len(self.texts)

    def where(self, row):
        """Where example `row` comes from: `FILE line 7`, or `SOURCE row 6` counted from 0."""
        return f"{self.source} {self.unit} {self.numbers[row] if self.numbers else row}"

    def take(self, rows):
        """The table of these examples alone. rows: a slice or an integer array."""
        rows = np.arange(self.size)[rows].tolist()
        numbers = self.numbers or range(self.size)
        return self._replace(
            texts=[self.texts[row] for row in rows],
            pairs=self.pairs and [self.pairs[row] for row in rows],
            labels=self.labels and [self.labels[row] for row in rows],
            numbers=[numbers[row] for row in rows],
        )


def check(known, columns, source, *, labelled=True):
    """Raise Mistake if one of `columns` is not among the names `known`; a label may be optional."""
    wanted = {"data.text": columns.text, "data.text_pair": columns.pair}
    if labelled:
        wanted["data.label"] = columns.label
    for key, name in wanted.items():
        if name is not None and name not in known:
            short = [column if len(column) < 40 else column[:40] + "..." for column in known]
            hint = ""
            if len(short) == 1 and any(mark in short[0] for mark in ";\t|"):
                hint = "; columns of a .csv are separated by commas, of a .tsv by tabs"
            raise Mistake(f"{source} has no column {name!r} ({key}); {nearest(name, short)}{hint}")


def build(data, columns, source, *, lines=None, names=None, labelled=True, missing=(None,)):
    """The `Table` of `{column name: list of values}`.

    labelled: a label is required of every example. Otherwise a split without the column, or with no
    value in it, is unlabelled. names: meaning of integer labels, of which -1 means no label.
    missing: values that stand for none.
    Raises Mistake for a missing column, a missing value, or a text that is none.
    """
    check(data, columns, source, labelled=labelled)
    if not data[columns.text]:
        raise Mistake(f"{source} holds no examples")
    unit = "row" if lines is None else "line"
    table = Table(data[columns.text], None, None, names, source, lines, unit)
    _check_texts(table, data, columns.text, missing)
    if columns.pair is not None:
        _check_texts(table, data, columns.pair, missing)
        table = table._replace(pairs=data[columns.pair])
    if columns.label is None or columns.label not in data:
        return table
    labels = data[columns.label]
    if names is not None:
        return _with_named_labels(table, labels, columns.label, labelled)
    gaps = [row for row, label in enumerate(labels) if _is_missing(label, missing)]
    if len(gaps) == len(labels) and not labelled:
        return table
    if gaps:
        raise Mistake(f"{table.where(gaps[0])}: {columns.label!r} is missing")
    for row, label in enumerate(labels):
        if not isinstance(label, str | int | float):  # bool is an int
            kind = type(label).__name__
            raise Mistake(f"{table.where(row)}: {columns.label!r} is a {kind}, which is no label")
    return table._replace(labels=labels)


def _check_texts(table, data, name, missing):
    for row, text in enumerate(data[name]):
        if _is_missing(text, missing):
            raise Mistake(f"{table.where(row)}: {name!r} is missing")
        if reason := wrong_text(text):
            raise Mistake(f"{table.where(row)}: {name!r} {reason}")


def wrong_text(text):
    """Why this is no text to read, as the end of a sentence; None for a str that UTF-8 can hold."""
    if not isinstance(text, str):
        return f"is a {type(text).__name__} ({text!r:.40}), not text"
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        return "holds half of a surrogate pair"  # JSON can say "\ud800"; tokenizers cannot
    return None


def _is_missing(value, missing):
    blank = isinstance(value, str) and not value.strip()
    return value is None or (blank and "" in missing)


def _with_named_labels(table, labels, column, labelled):
    """Labels are positions in `table.names`; -1 and None mean none, as in SNLI and GLUE's tests."""
    absent = [label is None or label == -1 for label in labels]
    if all(absent) and not labelled:
        return table
    for row, label in enumerate(labels):
        known = isinstance(label, int) and 0 <= label < len(table.names)
        if not (known or absent[row]):
            last = len(table.names) - 1
            raise Mistake(f"{table.where(row)}: {column!r} is {label!r}, not one of 0 to {last}")
    if all(absent):
        raise Mistake(f"{table.source}: no example has a {column!r}")
    table = table._replace(labels=labels)
    if any(absent):
        note = f"{table.source}: {sum(absent)} examples without a label are left out"
        kept = np.flatnonzero(~np.array(absent))
        table = table.take(kept)._replace(notes=(*table.notes, note))
    return table
