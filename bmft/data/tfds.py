"""Data sets of TFDS in array_record files, which `tfds.data_source` reads without TensorFlow.

    tfds_data/glue/sst2/2.0.0/{dataset_info.json, features.json, glue-train.array_record-...}

What is not prepared is downloaded and prepared where there is a network.
"""

import json
import os
import pathlib
import re
import socket
import urllib.request

from bmft.data import table
from bmft.errors import Mistake, nearest

CHUNK = 8192  # records read at once: 67,000 of them took 3.5 s so, one by one 22 s
VERSION = re.compile(r"\d+\.\d+\.\d+")
INFO = "dataset_info.json"


def read(name, directory, columns_of, wanted):
    """{split: (Table, numbers of the examples or None)} of the data set `name`: `NAME[/CONFIG]`.

    directory: where TFDS keeps its data (None: its own default), or the folder of the data set or
    of one version. columns_of(split) -> (Columns, is a label required). wanted(split) -> whether to
    read it. The numbers are the feature `idx`, which GLUE has.
    """
    builder = find(name, directory)
    found = {}
    for split in builder.info.splits:
        if wanted(split):
            columns, labelled = columns_of(split)
            found[split] = _read_split(builder, name, split, columns, labelled)
    return found


def find(name, directory):
    """The builder of the data set `name`, which is downloaded and prepared if it is not on disk.

    directory: as for `read`. Raises Mistake.
    """
    return _builder(_prepared(name, directory) or _prepare(name, directory))


def _prepared(name, directory):
    """The folder of the newest version on disk, None if there is none."""
    root = pathlib.Path(directory).expanduser() if directory else default_directory()
    if directory and not root.is_dir():
        raise Mistake(f"data.dir: no folder {directory!r}")
    for folder in (root, root / name, root / name.partition("/")[2]):
        if (folder / INFO).is_file():
            return folder
        versions = [path for path in _folders(folder) if VERSION.fullmatch(path.name)]
        versions = [path for path in versions if (path / INFO).is_file()]
        if versions:
            return max(versions, key=lambda path: [int(part) for part in path.name.split(".")])
    configs = [path.name for path in _folders(root / name) if any(path.glob(f"*/{INFO}"))]
    if configs:
        raise Mistake(
            f"{name!r} in {str(root)!r} has configs: write tfds:{name}/<config>; "
            f"known: {', '.join(sorted(configs))}"
        )
    return None


def default_directory():
    """$TFDS_DATA_DIR, or where TFDS keeps its data."""
    return pathlib.Path(
        os.environ.get("TFDS_DATA_DIR") or pathlib.Path.home() / "tensorflow_datasets"
    )


def _folders(path):
    return [below for below in path.iterdir() if below.is_dir()] if path.is_dir() else []


def _prepare(name, directory):
    """Download and prepare a data set; returns its folder. Raises Mistake where that fails."""
    import tensorflow_datasets as tfds

    if name.startswith("glue/"):
        import tensorflow_datasets.text.glue  # not registered otherwise
    from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError
    from tensorflow_datasets.core.download.util import DownloadError
    from tensorflow_datasets.core.registered import DatasetNotFoundError

    root = pathlib.Path(directory).expanduser() if directory else default_directory()
    try:
        builder = tfds.builder(name, data_dir=root, file_format="array_record")
    except DatasetNotFoundError as error:
        known = re.findall(r"^\t- (\S+)$", str(error), re.MULTILINE)
        raise Mistake(f"TFDS has no data set {name!r}; {nearest(name, known)}") from None
    except ValueError as error:  # an unknown config
        raise Mistake(f"tfds:{name}: {error}") from None
    except ImportError as error:
        raise _cannot_prepare(name, root, error) from None
    try:
        _check_network()
        builder.download_and_prepare()
    except (OSError, ImportError, DownloadError, NonMatchingChecksumError) as error:
        raise _cannot_prepare(name, root, error) from None
    return pathlib.Path(builder.data_path)


def _check_network():
    """Raise OSError where there is none. TFDS itself tries for three minutes before it does."""
    if not urllib.request.getproxies():
        socket.create_connection(("storage.googleapis.com", 443), timeout=10).close()


def _cannot_prepare(name, root, error):
    module = "import tensorflow_datasets.text.glue; " if name.startswith("glue/") else ""
    program = (
        f"import tensorflow_datasets as tfds; {module}"
        f"tfds.builder('{name}', file_format='array_record').download_and_prepare()"
    )
    files = "data.name=files, for images folders or npz"
    if name.startswith("glue/"):
        files = "data.dir may be a folder with GLUE's own train.tsv, dev.tsv and test.tsv"
    reason, where = str(error), "where there is a network"
    if isinstance(error, ImportError):  # TFDS needs TensorFlow to encode arrays as images
        reason = reason.strip().rpartition("\n")[2]  # above it, the whole example
        where = "where there is a network and that package"
    return Mistake(
        f"{name!r} is not in {str(root)!r} and cannot be downloaded or prepared ({reason:.200}); "
        f'{where} run python -c "{program}" and copy ~/tensorflow_datasets/{name} '
        f"to {str(root / name)!r}; or read files: {files}"
    )


def _builder(folder):
    """The builder of a prepared folder. Raises Mistake for tfrecord files."""
    import tensorflow_datasets as tfds

    try:
        info = json.loads((folder / INFO).read_text())
        formats = {info.get("fileFormat", "tfrecord"), *info.get("alternativeFileFormats", ())}
    except (ValueError, AttributeError) as error:
        raise Mistake(f"{folder / INFO} is damaged: {error}") from None
    if "array_record" not in formats:
        below = "/".join(folder.parts[-3:])
        raise Mistake(
            f"{str(folder)!r} holds {', '.join(sorted(formats))} files, which need TensorFlow; "
            f"where it is installed run `tfds convert_format --dataset_version_dir={folder} "
            f"--out_file_format=array_record --out_dir=NEW/{below}` and set data.dir=NEW"
        )
    return tfds.builder_from_directory(folder, file_format="array_record")


def _read_split(builder, name, split, columns, labelled):
    source, features = f"{name} {split}", builder.info.features
    features = {column: features[column] for column in features}
    table.check(features, columns, source, labelled=labelled)
    wanted = [column for column in (*columns, "idx") if column in features]
    _, data = records(builder, split, wanted, source)
    names = tuple(getattr(features.get(columns.label), "names", ())) or None
    found = table.build(data, columns, source, names=names, labelled=labelled)
    return found, data.get("idx")


def records(builder, split, columns, source, encoded=(), chunk=CHUNK):
    """(the records of a split, for reading one by one; {column: list of values} of `columns`).

    encoded: names of features that are given as they are stored, images for instance. chunk: how
    many records are in memory at a time. Raises Mistake.
    """
    import tensorflow_datasets as tfds

    data = {column: [] for column in columns}
    decoders = {name: tfds.decode.SkipDecoding() for name in encoded} or None
    try:
        found = builder.as_data_source(split, decoders=decoders)
        for start in range(0, len(found), chunk):
            rows = range(start, min(start + chunk, len(found)))
            for record in found.__getitems__(list(rows)):
                for column, values in data.items():
                    values.append(_plain(record[column]))
    except (OSError, ValueError, RuntimeError, IndexError) as error:
        raise Mistake(f"{source}: cannot read {str(builder.data_path)!r}: {error}") from None
    return found, data


def _plain(value):
    """A decoded feature as a Python value."""
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    return value.tolist() if hasattr(value, "tolist") else value
