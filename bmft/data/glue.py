"""The nine tasks of GLUE (Wang et al. 2018, arXiv:1804.07461): columns, labels, metrics, files.

Labels are in the order of TFDS and the Hub. Their examples come from three places, and `ordered`
brings them into one order, that of GLUE's own files, which submissions are numbered by.
"""

import pathlib
from typing import NamedTuple

import numpy as np

from bmft.data import files, table
from bmft.data.table import Columns
from bmft.errors import Mistake, nearest


class Glue(NamedTuple):
    """What is particular to one task.

    folder: its name in GLUE's own download. columns, own: names in TFDS and on the Hub, and in
    GLUE's own files. labels: None for a regression. metrics: as GLUE reports them; where there are
    two, their mean counts. written: what the server reads for each label, if not the label.
    """

    folder: str
    columns: Columns
    own: Columns
    labels: tuple | None
    metrics: tuple = ("accuracy",)
    written: tuple | None = None


PAIR = Columns("sentence1", "sentence2", "label")
SINGLE = Columns("sentence", None, "label")
ENTAILMENT = ("entailment", "not_entailment")
INDEX = ("0", "1")

TASKS = {
    "cola": Glue(
        "CoLA", SINGLE, SINGLE, ("unacceptable", "acceptable"), ("matthews",), written=INDEX
    ),
    "sst2": Glue("SST-2", SINGLE, SINGLE, ("negative", "positive"), written=INDEX),
    "mrpc": Glue(
        "MRPC",
        PAIR,
        Columns("#1 String", "#2 String", "Quality"),
        ("not_equivalent", "equivalent"),
        ("accuracy", "f1"),
        written=INDEX,
    ),
    "stsb": Glue(
        "STS-B", PAIR, Columns("sentence1", "sentence2", "score"), None, ("pearson", "spearman")
    ),
    "qqp": Glue(
        "QQP",
        Columns("question1", "question2", "label"),
        Columns("question1", "question2", "is_duplicate"),
        ("not_duplicate", "duplicate"),
        ("accuracy", "f1"),
        written=INDEX,
    ),
    "mnli": Glue(
        "MNLI",
        Columns("premise", "hypothesis", "label"),
        Columns("sentence1", "sentence2", "gold_label"),
        ("entailment", "neutral", "contradiction"),
    ),
    "qnli": Glue(
        "QNLI",
        Columns("question", "sentence", "label"),
        Columns("question", "sentence", "label"),
        ENTAILMENT,
    ),
    "rte": Glue("RTE", PAIR, PAIR, ENTAILMENT),
    "wnli": Glue("WNLI", PAIR, PAIR, ("not_entailment", "entailment"), written=INDEX),
}

COLA_COLUMNS = ("source", "label", "mark", "sentence")  # of train and dev, which have no header


def find(name):
    """The `Glue` of a task. Raises Mistake for an unknown one."""
    if name not in TASKS:
        raise Mistake(f"no GLUE task {name!r}; {nearest(name, TASKS)}")
    return TASKS[name]


def splits(name):
    """{split: file of GLUE's own download}."""
    if name != "mnli":
        return {"train": "train.tsv", "validation": "dev.tsv", "test": "test.tsv"}
    return {
        "train": "train.tsv",
        "validation_matched": "dev_matched.tsv",
        "validation_mismatched": "dev_mismatched.tsv",
        "test_matched": "test_matched.tsv",
        "test_mismatched": "test_mismatched.tsv",
    }


def own_folder(name, directory):
    """The folder with GLUE's own files of a task, `directory` or one in it; None: there is none."""
    task = find(name)
    for folder in (".", task.folder, name):
        path = pathlib.Path(directory) / folder
        if any((path / file).is_file() for file in splits(name).values()):
            return path
    return None


def read_own(name, folder, wanted):
    """{split: Table} of GLUE's own TSV files in `folder`. wanted(split) -> whether to read it."""
    found = {}
    for split, file in splits(name).items():
        path = folder / file
        if path.is_file() and wanted(split):
            found[split] = _read_own_split(name, path, labelled=not split.startswith("test"))
    return found


def _read_own_split(name, path, labelled):
    task, ragged = find(name), []
    header = COLA_COLUMNS if name == "cola" and labelled and not _has_header(path) else None
    # A few rows of QQP lack fields; TFDS and the Hub leave them out, too.
    data, lines = files.read_tsv(path, header, ragged if name == "qqp" else None)
    columns = Columns(
        *(own if own in data else usual for own, usual in zip(task.own, task.columns, strict=True))
    )
    read = table.build(data, columns, str(path), lines=lines, labelled=labelled)
    if read.labels is not None:
        read = read._replace(labels=[_label(task, read, row) for row in range(read.size)])
    if ragged:
        read = read._replace(notes=(f"{path}: {len(ragged)} rows with missing fields left out",))
    return read._replace(names=task.labels, glue=name)


def _has_header(path):
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        return "sentence" in file.readline().rstrip("\r\n").split("\t")


def _label(task, read, row):
    """The position of a label, which is written as the position or as the name."""
    written = read.labels[row].strip()
    if task.labels is None:
        try:
            return float(written)
        except ValueError:
            raise Mistake(f"{read.where(row)}: score {written!r} is not a number") from None
    if written in task.labels:
        return task.labels.index(written)
    if written.isascii() and written.isdigit() and int(written) < len(task.labels):
        return int(written)
    raise Mistake(f"{read.where(row)}: label {written!r}; {nearest(written, task.labels)}")


def ordered(name, read, rows):
    """A table of TFDS or the Hub as that of a GLUE task: sorted by its numbers `rows`.

    TFDS shuffles what it stores. Raises Mistake if a test split, which submissions number, is not
    whole, and if labels are not in GLUE's order.
    """
    task = find(name)
    if task.labels is None and read.labels and set(read.labels) == {-1.0}:
        read = read._replace(labels=None)  # scores of a test split
    if read.names not in (None, task.labels):
        raise Mistake(f"{read.source}: labels are {read.names}, not {task.labels} as in GLUE")
    rows = np.arange(read.size) if rows is None else np.asarray(rows)
    if read.numbers is not None:  # examples without a label have been left out
        rows = rows[read.numbers]
    if read.labels is None and sorted(rows.tolist()) != list(range(read.size)):
        raise Mistake(f"{read.source}: the split is not whole, its 'idx' has gaps or repeats")
    read = read._replace(numbers=rows.tolist()).take(np.argsort(rows, kind="stable"))
    return read._replace(names=task.labels, glue=name)


def write_submission(directory, name, split, outputs):
    """Write what GLUE's server takes for a test split, such as CoLA.tsv; returns the path.

    name: the task, `cola` or `glue/cola`. split: `test`, for MNLI `test_matched` or
    `test_mismatched`. outputs: {"logits": float [n, classes or 1]} in the order of the split.
    Scores of STS-B are cut to 0 to 5.
    """
    name = name.removeprefix("glue/")
    task, logits = find(name), np.asarray(outputs["logits"])
    if not split.startswith("test") or split not in splits(name):
        tests = [known for known in splits(name) if known.startswith("test")]
        raise Mistake(f"no test split {split!r} of {name}; {nearest(split, tests)}")
    if task.labels is None:
        predictions = [f"{score:.3f}" for score in np.clip(logits[:, 0], 0.0, 5.0)]
    else:
        written = task.written or task.labels
        predictions = [written[label] for label in logits.argmax(-1)]
    suffix = {"test_matched": "-m", "test_mismatched": "-mm"}.get(split, "")
    path = pathlib.Path(directory) / f"{task.folder}{suffix}.tsv"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [f"{row}\t{prediction}\n" for row, prediction in enumerate(predictions)]
    path.write_text("index\tprediction\n" + "".join(rows))
    return path
