"""Data sets of the Hugging Face Hub, as Parquet files; from the Hub or a folder laid out alike.

    README.md                              its YAML head may say which files are which split
    CONFIG/train-00000-of-00001.parquet    or data/train-..., train-..., CONFIG/train/0000.parquet

What has no Parquet files of its own mostly has them on the branch that the Hub makes itself.
"""

import fnmatch
import pathlib
import re

import huggingface_hub
import pyarrow
import pyarrow.parquet

from bmft.data import files, table
from bmft.errors import Mistake, nearest

CONVERTED = "refs/convert/parquet"  # the Hub's own conversion: CONFIG/SPLIT/0000.parquet
SPLIT_OF = re.compile(
    r"(\w+)(?:-[^/]*)?\.parquet|(?:partial-)?(train|validation\w*|test\w*)/[^/]+\.parquet"
)


def read(identifier, directory, columns_of, wanted):
    """{split: (Table, numbers of the examples or None)} of `OWNER/NAME[/CONFIG]`.

    directory: a copy of the repository on disk, read instead of the Hub. columns_of, wanted: as for
    `tfds.read`. The numbers are the column `idx`, which GLUE has. Raises Mistake.
    """
    paths_of, names = find(identifier, directory)
    found = {}
    for split, paths in paths_of.items():
        if wanted(split):
            columns, labelled = columns_of(split)
            found[split] = _read_split(paths, f"hub:{identifier} {split}", columns, labelled, names)
    return found


def find(identifier, directory):
    """({split: its Parquet files in order}, {column: names of its classes, as README.md has them}).

    identifier, directory: as for `read`. Raises Mistake.
    """
    repository, config = split_identifier(identifier)
    if directory is not None:
        folder = pathlib.Path(directory).expanduser()
        if not folder.is_dir():
            raise Mistake(f"data.dir: no folder {str(directory)!r}")
    else:
        folder = _download(repository, config)
    config = _config(folder, config, f"hub:{repository}")
    return _files_of_splits(folder, config, f"hub:{repository}"), _card_names(folder, config)


def split_identifier(identifier):
    """(repository, config or None): the config is what follows OWNER/NAME."""
    owner, _, rest = identifier.partition("/")
    name, _, config = rest.partition("/")
    return (f"{owner}/{name}" if name else owner), config or None


def _download(repository, config):
    """The folder of the files of one config, in the Hub's cache. Raises Mistake."""
    folder = _snapshot(repository, ["README.md"])
    config = _config(folder, config, f"hub:{repository}")
    patterns = [pattern for split in _declared(folder, config).values() for pattern in split]
    if not patterns:
        patterns = [f"{config}/*"] if config else ["data/*", "*.parquet"]
    folder = _snapshot(repository, ["README.md", *patterns])
    if not any(folder.rglob("*.parquet")):
        folder = _snapshot(repository, [f"{config or 'default'}/*"], CONVERTED)
    return folder


def _snapshot(repository, patterns, revision=None):
    try:
        path = huggingface_hub.snapshot_download(
            repository, repo_type="dataset", allow_patterns=patterns, revision=revision
        )
    except (OSError, ValueError, huggingface_hub.errors.HTTPError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise Mistake(
            f"hub:{repository} cannot be downloaded ({reason:.200}); where there is a network run "
            f"`hf download --repo-type dataset {repository} --local-dir DIR` and set data.dir=DIR"
        ) from None
    return pathlib.Path(path)


def _config(folder, config, source):
    """The name of the config to read: `config`, or README.md's default; None where it has none."""
    configs = {entry["config_name"]: entry for entry in _head(folder).get("configs") or ()}
    if not configs or config in configs:
        return config
    if config is not None:
        raise Mistake(f"{source} has no config {config!r}; {nearest(config, configs)}")
    for name, entry in configs.items():
        if entry.get("default") or name == "default" or len(configs) == 1:
            return name
    raise Mistake(f"{source} has configs: write {source}/<config>; known: {', '.join(configs)}")


def _declared(folder, config):
    """{split: [pattern]} that README.md declares for a config; {} if it does not."""
    for entry in _head(folder).get("configs") or ():
        files_of = entry.get("data_files") or ()
        if entry["config_name"] == config and all(isinstance(part, dict) for part in files_of):
            paths = {part["split"]: part["path"] for part in files_of}
            return {s: [path] if isinstance(path, str) else path for s, path in paths.items()}
    return {}  # or one pattern for all: the names of the files say the split


def _files_of_splits(folder, config, source):
    """{split: [Parquet files in order]} of one config."""
    every = sorted(path for path in folder.rglob("*.parquet") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in every}
    found = {
        split: [path for name, path in names.items() if _matches(name, patterns)]
        for split, patterns in _declared(folder, config).items()
    }
    if any(found.values()):
        return {split: paths for split, paths in found.items() if paths}
    folders = sorted({name.partition("/")[0] for name in names if "/" in name})
    alone = folders if len(folders) == 1 else []  # the only config needs no name
    named = config not in (None, "default")
    for place in [config] if named else [".", "data", "default", *alone]:
        prefix = "" if place == "." else f"{place}/"
        for name, path in names.items():
            split = SPLIT_OF.fullmatch(name.removeprefix(prefix))
            if split and name.startswith(prefix):
                found.setdefault(split[1] or split[2], []).append(path)
        if found:
            return found
    if folders and not config:
        raise Mistake(f"{source} has configs: write {source}/<config>; known: {', '.join(folders)}")
    hint = f"; {nearest(config, folders)}" if folders else ""
    raise Mistake(f"{source}: no Parquet files in {str(folder / (config or ''))!r}{hint}")


def _matches(name, patterns):
    """Does a pattern of the Hub's match `name`? `**/` in it is any folders, none too."""
    return any(fnmatch.fnmatch(name, pattern.replace("**/", "*")) for pattern in patterns)


def _read_split(paths, source, columns, labelled, card_names):
    data, names = {}, None
    try:
        known = pyarrow.parquet.read_schema(paths[0]).names
        table.check(known, columns, source, labelled=labelled)
        for path in paths:
            with pyarrow.parquet.ParquetFile(path) as file:
                wanted = [name for name in (*columns, "idx") if name in known]
                read = files.columns_of(file.read(columns=wanted), path)
                names = names or files.class_names(file.schema_arrow, columns.label)
            for name, values in read.items():
                data.setdefault(name, []).extend(values)
    except (pyarrow.ArrowException, OSError) as error:
        raise Mistake(f"{source}: {error}") from None
    names = names or card_names.get(columns.label)
    found = table.build(data, columns, source, names=names, labelled=labelled)
    return found, data.get("idx")


def _card_names(folder, config):
    """{column: names of its classes} from the README.md of the data set."""
    infos = _head(folder).get("dataset_info") or ()
    infos = [infos] if isinstance(infos, dict) else infos
    if config is not None:
        infos = [info for info in infos if info.get("config_name", config) == config]
    named = {}
    for feature in infos[0].get("features") or () if infos else ():
        classes = (
            feature["dtype"].get("class_label") if isinstance(feature["dtype"], dict) else None
        )
        if classes:
            names = classes["names"]  # {'0': name, '1': name}, or a list
            names = (
                [names[key] for key in sorted(names, key=int)] if isinstance(names, dict) else names
            )
            named[feature["name"]] = tuple(map(str, names))
    return named


def _head(folder):
    """The YAML head of README.md, {} if there is none."""
    readme = folder / "README.md"
    try:
        return (huggingface_hub.metadata_load(readme) or {}) if readme.is_file() else {}
    except ValueError as error:
        raise Mistake(f"{readme}: its YAML head is damaged: {error}") from None
