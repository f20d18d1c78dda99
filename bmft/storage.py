"""Where checkpoints lie: a directory, or a folder of Cloud Storage, `gs://bucket/path`.

Both are an etils.epath.Path, which Orbax takes. What holds in an object store, too, is all that
bmft/checkpoint.py relies on: a file is there as a whole or not at all, and is seen by all once it
is written. There is no renaming there (it copies and deletes), and a directory is no more than the
files in it.
"""

import contextlib
import importlib.util
import os
import re
import shutil

import fsspec
from etils import epath

from bmft.errors import Mistake

CLIENTS = ("gcsfs", "google", "aiohttp")  # packages whose errors are Cloud Storage's answers


def folder(text):
    """The folder that a text names. Raises Mistake if it is in no storage that can be used."""
    scheme, separator, bucket = text.partition("://")
    if not separator:
        return epath.Path(os.path.expanduser(text))
    if scheme != "gs" or not bucket.strip("/"):
        raise Mistake(f"checkpoint.folder={text!r}: needs a directory or gs://bucket/path")
    if not importlib.util.find_spec("gcsfs"):
        raise Mistake(
            f"checkpoint.folder={text!r} needs the package 'gcsfs': "
            "./run.sh -m pip install -r requirements-gcs.txt"
        )
    os.environ.setdefault("EPATH_USE_TF", "false")  # where TensorFlow is, epath prefers it
    # What gcsfs has listed once it does not list again, and TensorStore writes without it.
    fsspec.config.conf.setdefault("gs", {})["use_listings_cache"] = False
    return epath.Path(text)


def in_cloud(path):
    """Is it no path of a file system?"""
    return "://" in str(path)


def absolute(path):
    return path if in_cloud(path) else epath.Path(os.path.join(os.getcwd(), path))


def entries(path):
    """What is in a folder; nothing if there is none. exists() and is_dir() say no of gs://, too,
    where they got no answer, and what is there must not be taken for missing."""
    try:
        return list(path.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def files_below(path):
    """All files below a folder, however deep, in the order of their paths."""
    found = []
    for entry in sorted(path.iterdir()):
        found += files_below(entry) if entry.is_dir() else [entry]
    return found


def remove(path):
    """Remove a folder with what is in it, as far as that can be done."""
    if in_cloud(path):
        with contextlib.suppress(OSError), os_errors():
            path.rmtree()
    else:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def os_errors():
    """What a file system, TensorStore or Cloud Storage refuses, as an OSError."""
    try:
        yield
    except Exception as error:
        refused = _refused(error)
        if refused is None or refused is error:
            raise
        raise refused from error


@contextlib.contextmanager
def reading(path):
    """What is refused inside of it, as one line with the path."""
    try:
        with os_errors():
            yield
    except OSError as error:
        raise Mistake(f"cannot read {path}: {error.strerror or error}") from error


def _refused(error):
    text = str(error)
    if isinstance(error, ValueError | RuntimeError):  # TensorStore's, with the number
        if number := re.search(r"os_error_code='(\d+)'", text):
            return OSError(int(number[1]), os.strerror(int(number[1])))
        return OSError(text.partition(" [")[0]) if "http_response_code=" in text else None
    if isinstance(error, FileNotFoundError) and error.errno is None:  # gcsfs says the address
        return FileNotFoundError("no such bucket or object")
    if isinstance(error, OSError):
        return error
    is_answer = type(error).__module__.partition(".")[0] in CLIENTS
    return OSError(f"{type(error).__name__}: {text}") if is_answer else None
