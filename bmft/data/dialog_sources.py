"""Where instructions come from: `load(config.data)` -> {split: Dialogs}.

    instruct    120 questions with answers in a house style, which lie beside this file: In short,
                Why, Try. As preference pairs: with that layout, and the same words without it
    files       data.train, data.validation, data.test: JSON lines, JSON, Parquet, CSV, TSV or lines
    hub:<id>    a data set of the Hugging Face Hub that has Parquet files

What the columns mean: dialog_formats. `data.text` names the column of a format that is text alone.
"""

import pathlib

from bmft.data import dialog_formats, files, hub, sources
from bmft.data.sources import ALIASES, COLUMNS, SPLITS
from bmft.errors import Mistake, nearest

OWN = pathlib.Path(__file__).with_name("instruct.jsonl")
NAMES = ("instruct", "files", "hub:<id>")

KEYS = {  # of the data group, beside the common ones: (type, default)
    "format": (str | None, None),  # a name of dialog_formats.FORMATS; None: by the columns
    "max_eval_examples": (int | None, None),  # the first so many of validation and of test
}
UNREAD = {  # kind: keys of the data group that it does not read
    "instruct": ("dir", *SPLITS, "format", "text"),
    "files": ("dir",),
    "hub": SPLITS,
}
HELD_OUT = 8  # of `instruct` every so many are for validation


def load(data, *, pairs=False, splits=None):
    """{split: Dialogs} of the `data` group of a config, in the order train, validation, test.

    pairs: preference pairs are wanted. splits: names of those to read, None for all there are. Of
    train the first data.max_train_examples are taken, of others data.max_eval_examples. Raises
    Mistake, naming the key, or the file and line.
    """
    kind, name = find(data.name)
    for key in (*UNREAD[kind], "text_pair", "label"):
        if getattr(data, key) != COLUMNS.get(key):
            raise Mistake(f"data.{key}={getattr(data, key)!r} is not read with instructions")

    def wanted(split):
        split = ALIASES.get(split, split)
        return split in SPLITS and (splits is None or split in splits)

    if kind == "instruct":
        tables = {split: table for split, table in _own(pairs).items() if wanted(split)}
    else:
        paths = _files(data) if kind == "files" else hub.find(name, data.dir)[0]
        read = _hub_split if kind == "hub" else _file
        tables = {
            ALIASES.get(split, split): read(split, split_paths, data, pairs)
            for split, split_paths in paths.items()
            if wanted(split)
        }
    if not tables:
        raise Mistake(
            f"data.name={data.name!r} has none of the splits {', '.join(splits or SPLITS)}"
        )
    for split in tables:
        most = data.max_train_examples if split == "train" else data.max_eval_examples
        if most is not None and most < 1:
            raise Mistake(f"data.max_eval_examples={most}: needs at least 1")
        tables[split] = tables[split].take(slice(most))
    return {split: tables[split] for split in sorted(tables, key=SPLITS.index)}


def find(name):
    """(kind, name within it) of what `data.name` means. Raises Mistake for an unknown one."""
    if name == "instruct":
        return name, name
    try:
        source = sources.find(name)
    except Mistake:
        if name.startswith("hub:"):
            raise
        raise Mistake(f"data.name={name!r}; {nearest(name, NAMES)}") from None
    if source.kind not in UNREAD:
        known = ", ".join(NAMES)
        raise Mistake(f"data.name={name!r} has labels, no answers to learn; known: {known}")
    return source.kind, source.name


def _own(pairs):
    """{split: Dialogs} of the questions that lie beside this file."""
    columns, lines, _ = files.contents(str(OWN), key="data.name")
    if pairs:
        answers = columns.pop("output")
        plain = [" ".join(line.partition(": ")[2] for line in a.split("\n")) for a in answers]
        columns = {"prompt": columns["instruction"], "chosen": answers, "rejected": plain}
    table = dialog_formats.build(columns, "instruct", lines=lines, pairs=pairs)
    held_out = [row for row in range(table.size) if row % HELD_OUT == HELD_OUT - 1]
    others = [row for row in range(table.size) if row % HELD_OUT != HELD_OUT - 1]
    return {"train": table.take(others), "validation": table.take(held_out)}


def _files(data):
    if data.train is None:
        raise Mistake("data.name='files' needs data.train, the path of a file")
    paths = {split: getattr(data, split) for split in SPLITS}
    return {split: path for split, path in paths.items() if path is not None}


def _file(split, path, data, pairs):
    columns, lines, _ = files.contents(path, key=f"data.{split}")
    return _build(columns, str(path), data, pairs, lines)


def _hub_split(split, paths, data, pairs):
    whole = {}
    for path in paths:
        columns, _, _ = files.contents(path, key="data.name")
        for name, values in columns.items():
            whole.setdefault(name, []).extend(values)
    sizes = {len(values) for values in whole.values()}
    source = f"{data.name} {split}"
    if len(sizes) > 1:
        raise Mistake(f"{source}: its {len(paths)} files have not the same columns")
    return _build(whole, source, data, pairs)


def _build(columns, source, data, pairs, lines=None):
    settings = {"format": data.format, "pairs": pairs, "column": data.text}
    table = dialog_formats.build(columns, source, lines=lines, **settings)
    if table.format != "text" and data.text != COLUMNS["text"]:
        raise Mistake(
            f"data.text={data.text!r} is not read: {source} has format {table.format}; "
            "data.format=text reads that column alone"
        )
    return table._replace(notes=(f"format {table.format}",))
