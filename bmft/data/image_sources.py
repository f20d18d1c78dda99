"""Where images come from: `load(config.data)` -> {split: ImageTable}.

    digits             handwritten digits of scikit-learn, 8 x 8 pixels: nothing to fetch
    npz                data.train, data.validation, data.test: arrays in .npz files
    folders            data.train, ...: folders with a folder for each class; or all below data.dir
    tfds:<name>        a data set of TFDS
    hub:<id>           a data set of the Hugging Face Hub that has Parquet files

Training and validation splits have labels; a test split may be without, and is then predicted for
but not measured. Images in files stay there until they are needed; those of the Hub are held in
memory as the files have them, encoded. Whether each of them can be read is for `images.check`.
"""

import hashlib
import pathlib
from typing import NamedTuple

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet

from bmft.data import files, hub, image_files, image_table, tfds
from bmft.data.image_table import Records
from bmft.data.sources import ALIASES, SPLITS
from bmft.errors import Mistake, nearest

KEYS = {  # of the data group, beside the common ones: (type, default)
    "image": (str, "image"),  # column of the image (TFDS, Hub)
    "to_rgb": (bool, False),  # convert grey, palette, CMYK and RGBA images instead of refusing them
    "skip_bad": (bool, False),  # leave out what cannot be used: counted, and listed
    "validation_share": (float, 0.0),  # of train, class by class, where there is no validation
}
NAMES = ("digits", "npz", "folders", "tfds:<name>", "hub:<id>")
DEFAULTS = {"dir": None, **dict.fromkeys(SPLITS), "label": "label"}
DEFAULTS |= {key: default for key, (_, default) in KEYS.items()}
TEXT = {"text": "text", "text_pair": None}  # and what only texts have
CHANGES = ("to_rgb", "skip_bad", "validation_share")
READS = {  # kind of source: the keys of the data group that it reads, besides those for all
    "digits": (),
    "npz": (*SPLITS, *CHANGES),
    "folders": ("dir", *SPLITS, *CHANGES),
    "tfds": ("dir", "image", "label", *CHANGES),
    "hub": ("dir", "image", "label", *CHANGES),
}
CHUNK = 256  # records of TFDS read at once for their labels: the images pass through memory


class Source(NamedTuple):
    """What `data.name` says: kind, a key of READS; name within it."""

    kind: str
    name: str


def load(data, splits=None):
    """{split: ImageTable} of the `data` group of a config, in the order train, validation, test.

    splits: names of those to give, None for all there are. Of train, data.validation_share is held
    out where there is no validation split, and the first data.max_train_examples of the rest are
    taken. Raises Mistake, naming the key, the file or the row.
    """
    source = find(data.name)
    _refuse_unread(data, source)

    def wanted(split):
        return ALIASES.get(split, split) in SPLITS

    found = READERS[source.kind](source, data, wanted)
    tables = {
        ALIASES.get(split, split): table._replace(to_rgb=data.to_rgb)
        for split, table in found.items()
    }
    if not tables:
        raise Mistake(f"data.name={data.name!r} has none of the splits {', '.join(SPLITS)}")
    tables = _named(tables, data.skip_bad)
    if data.validation_share:
        tables = _hold_out(tables, data.validation_share)
    if data.max_train_examples is not None and "train" in tables:
        tables["train"] = _first(tables["train"], data.max_train_examples)
    wanted = [split for split in SPLITS if split in tables and (splits is None or split in splits)]
    return {split: _noted(tables[split]) for split in wanted}


def find(name):
    """The `Source` that `data.name` means. Raises Mistake for an unknown one."""
    if name in ("digits", "npz", "folders"):
        return Source(name, name)
    kind, _, rest = name.partition(":")
    if kind in ("tfds", "hub") and rest:
        return Source(kind, rest)
    raise Mistake(f"data.name={name!r} is no source of images; {nearest(name, NAMES)}")


def _refuse_unread(data, source):
    """A key that is set and would not be read is a mistake: most likely in data.name."""
    read = READS[source.kind]
    for key, default in (DEFAULTS | TEXT).items():
        value = data.get(key, default)
        if key not in read and value != default:
            raise Mistake(
                f"data.{key}={value!r} is not read with data.name={data.name!r}; "
                f"it reads {', '.join(f'data.{name}' for name in read) or 'none of these keys'}"
            )


# What all sources have in common


def _named(tables, skip_bad):
    """The tables with labels in range and in the order of train's names."""
    first = tables.get("train") or next(iter(tables.values()))
    if first.names is None:
        if first.labels is None:
            raise Mistake(f"{first.source} has neither labels nor names of classes")
        first = image_table.numbered(first)
    named = {}
    for split, table in tables.items():
        table = table if table.names else table._replace(names=first.names)
        table = image_table.in_range(table, skip_bad=skip_bad)
        named[split] = image_table.rename(table, first.names)
    return named


def _hold_out(tables, share):
    """`share` of train as the split validation: of each class the rows of the smallest hashes.

    A hash of the row's number decides, so no random numbers are needed, and of two shares the
    larger holds the smaller.
    """
    if not 0 < share < 1:
        raise Mistake(f"data.validation_share={share!r} is not between 0 and 1")
    if "validation" in tables or "train" not in tables:
        reason = "has a validation split" if "validation" in tables else "has no train split"
        source = next(iter(tables.values())).source
        raise Mistake(f"data.validation_share={share!r}, but the data of {source} {reason}")
    train = tables["train"]
    numbers = range(train.size) if train.numbers is None else train.numbers.tolist()
    hashes = [hashlib.sha256(b"%d" % number).digest()[:8] for number in numbers]
    order = np.argsort(np.frombuffer(b"".join(hashes), ">u8"), kind="stable")
    held = np.zeros(train.size, bool)
    for label in range(len(train.names)):
        rows = order[train.labels[order] == label]
        held[rows[: min(round(share * len(rows)), len(rows) - 1)]] = True
    if not held.any():
        raise Mistake(f"data.validation_share={share!r} of {train.source} is no image of any class")
    note = f"{held.sum():,} of {train.size:,} training images held out"
    part = train.take(np.flatnonzero(held))._replace(notes=(note,), skipped=())
    return tables | {"train": train.take(np.flatnonzero(~held)), "validation": part}


def _first(table, count):
    """The first `count` images; where they are all of a few classes, a note says so."""
    part = table.take(slice(count))
    seen = len(np.unique(part.labels))
    if seen < min(len(table.names), part.size):
        note = f"the first {part.size:,} images are of {seen} of {len(table.names)} classes"
        part = part._replace(notes=(*part.notes, note))
    return part


def _noted(table):
    if table.labels is not None:
        return table
    note = f"{table.source} has no labels: it is predicted for, not measured"
    return table._replace(notes=(*table.notes, note))


# The sources


def _digits(source, data, wanted):
    """1,797 images of 8 x 8 pixels in 17 greys: of row i, i % 10 says the split.

    The rows are in the order people wrote them, some of them 0 to 9 in turn, so that the splits are
    not quite alike: 0 is test (180, each digit 10 to 31 times), 1 validation (180, 8 to 30),
    else train (1,437, 123 to 156).
    """
    from sklearn.datasets import load_digits  # scikit-learn takes a second

    digits = load_digits()
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)
    tenth = np.arange(len(grey)) % 10
    tables = {}
    for split, rows in [("train", tenth > 1), ("validation", tenth == 1), ("test", tenth == 0)]:
        rows = np.flatnonzero(rows)
        pixels = np.repeat(grey[rows, :, :, None], 3, axis=3)
        table = image_table.build(pixels, digits.target[rows], f"digits {split}")
        tables[split] = table._replace(names=tuple("0123456789"), numbers=rows)
    return tables


def _own_files(source, data, wanted):
    """npz or folders."""
    return getattr(image_files, source.kind)(data)


def _tfds(source, data, wanted):
    """Images stay in TFDS's files, encoded as they are there; only labels are read at once."""
    builder, tables = tfds.find(source.name, data.dir), {}
    features = {name: builder.info.features[name] for name in builder.info.features}
    encoded = [name for name, feature in features.items() if hasattr(feature, "encoding_format")]
    for split in filter(wanted, builder.info.splits):
        origin, labelled = f"{source.name} {split}", _labelled(split)
        columns = {"data.image": data.image} | ({"data.label": data.label} if labelled else {})
        image_table.check_columns(features, columns, origin)
        _check_feature(features[data.image], f"{origin}: {data.image!r}")
        records, read = tfds.records(
            builder, split, {data.label} & features.keys(), origin, encoded, CHUNK
        )
        paths = [pathlib.Path(builder.data_path, f) for f in builder.info.splits[split].filenames]
        part = f"{origin} {data.image}"
        tables[split] = image_table.build(
            Records(lambda i, records=records: records[i][data.image], len(records), paths, part),
            read.get(data.label),
            origin,
            names=tuple(getattr(features.get(data.label), "names", None) or ()) or None,
            labelled=labelled,
        )
    return tables


def _check_feature(feature, where):
    """Images in TFDS are Image features, or arrays [h, w, 3] where the data set made them so."""
    if len(feature.shape or ()) != 3:
        raise Mistake(f"{where} is no image but {type(feature).__name__}")
    if feature.np_dtype == np.float32:
        raise Mistake(f"{where} is float32, not uint8")


def _hub(source, data, wanted):
    paths_of, card_names = hub.find(source.name, data.dir)
    return {
        split: _parquet(paths, f"hub:{source.name} {split}", data, card_names, _labelled(split))
        for split, paths in paths_of.items()
        if wanted(split)
    }


def _parquet(paths, source, data, card_names, labelled):
    """The table of Parquet files whose column of images is {bytes, path}, or bytes alone."""
    try:
        schema = pyarrow.parquet.read_schema(paths[0])
        columns = {"data.image": data.image} | ({"data.label": data.label} if labelled else {})
        image_table.check_columns(schema.names, columns, source)
        wanted = [name for name in (data.image, data.label) if name in schema.names]
        parts = []
        for path in paths:
            with pyarrow.parquet.ParquetFile(path) as file:
                parts.append(file.read(columns=wanted))
        whole = pyarrow.concat_tables(parts)
        column = whole[data.image]
        if pyarrow.types.is_struct(column.type):
            column = pyarrow.compute.struct_field(column, "bytes")
    except (pyarrow.ArrowException, OSError) as error:
        raise Mistake(f"{source}: {error}") from None
    if not (pyarrow.types.is_binary(column.type) or pyarrow.types.is_large_binary(column.type)):
        raise Mistake(f"{source}: {data.image!r} is a column of {column.type}, not of images")
    return image_table.build(
        Records(lambda i: column[i].as_py() or b"", len(column), paths, data.image),
        whole[data.label].to_pylist() if data.label in wanted else None,
        source,
        names=files.class_names(schema, data.label) or card_names.get(data.label),
        labelled=labelled,
    )


def _labelled(split):
    return not split.startswith("test")


READERS = {
    "digits": _digits,
    "npz": _own_files,
    "folders": _own_files,
    "tfds": _tfds,
    "hub": _hub,
}
