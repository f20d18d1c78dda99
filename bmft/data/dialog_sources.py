"""Where instructions come from: `load(config.data)` -> {split: Dialogs}.

    files       data.train, data.validation, data.test: JSON lines, JSON, Parquet, CSV, TSV or lines
    hub:<id>    a data set of the Hugging Face Hub that has Parquet files

What the columns mean: dialog_formats. `data.text` names the column of a format that is text alone.
"""

from bmft.data import dialog_formats, files, hub
from bmft.data.sources import ALIASES, COLUMNS, SPLITS, find
from bmft.errors import Mistake

KEYS = {  # of the data group, beside the common ones: (type, default)
    "format": (str | None, None),  # a name of dialog_formats.FORMATS; None: by the columns
}
UNREAD = {"files": ("dir",), "hub": SPLITS}  # kind: keys of the data group that it does not read


def load(data, *, pairs=False, splits=None):
    """{split: Dialogs} of the `data` group of a config, in the order train, validation, test.

    pairs: preference pairs are wanted. splits: names of those to read, None for all there are. Of
    train, the first data.max_train_examples are taken. Raises Mistake, naming the key, or the file
    and line.
    """
    source = find(data.name)
    if source.kind not in UNREAD:
        raise Mistake(f"data.name={data.name!r} has labels, no answers: write files or hub:<id>")
    for key in (*UNREAD[source.kind], "text_pair", "label"):
        if getattr(data, key) != COLUMNS.get(key):
            raise Mistake(f"data.{key}={getattr(data, key)!r} is not read with instructions")

    def wanted(split):
        split = ALIASES.get(split, split)
        return split in SPLITS and (splits is None or split in splits)

    paths = _files(data) if source.kind == "files" else hub.find(source.name, data.dir)[0]
    tables = {}
    for split, split_paths in paths.items():
        if wanted(split):
            read = _hub_split if source.kind == "hub" else _file
            table = read(split, split_paths, data, pairs)
            tables[ALIASES.get(split, split)] = table
    if not tables:
        raise Mistake(
            f"data.name={data.name!r} has none of the splits {', '.join(splits or SPLITS)}"
        )
    if data.max_train_examples is not None and "train" in tables:
        tables["train"] = tables["train"].take(slice(data.max_train_examples))
    return {split: tables[split] for split in sorted(tables, key=SPLITS.index)}


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
    return table._replace(notes=(f"format {table.format}",))
