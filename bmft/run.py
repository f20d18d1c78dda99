"""The run directory: made, recognised, refused when it is another run's, finished.

    runs/glue_lora-tweets/
        config.json     the resolved config, versions, commit, fingerprint of the base
        report.json     written last: a directory with it is a finished run
        metrics.jsonl, curves.png, tensorboard/    bmft/log.py
        checkpoints/    bmft/checkpoint.py
        adapter/, model/    bmft/export.py

A run that was killed is opened again by the same command. What was computed must not be mixed with
another config's, so `open_run` refuses one that differs where it matters.

With `checkpoint.folder` the checkpoints lie there instead, with a config.json of their own. The
first process alone reads and writes the rest, so no other one needs to see it, and what is there
without the rest is gone on from: it may be another machine's.

    gs://bucket/run/
        config.json, checkpoints/
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import re
import subprocess
import sys
import time

from etils import epath

from bmft import processes, storage
from bmft.config import difference, to_json
from bmft.errors import Mistake

MAY_DIFFER = ("mesh", "log", "checkpoint", "eval", "export")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "transformers")
REPORT = (  # what report.json holds at least
    *("metrics", "trainable_params", "total_params", "steps", "examples_per_second"),
    *("tokens_per_second", "padding_share", "compile_seconds", "compilations"),
    *("peak_memory_bytes", "wall_seconds", "jax", "devices"),
)
# Of a run that has begun to compute; results.jsonl: of several (bmft/comparison.py).
TRACES = ("checkpoints", "metrics.jsonl", "report.json", "results.jsonl")
NAME_LENGTH = 80  # of a default directory; file systems allow 255 bytes


@dataclasses.dataclass(frozen=True)
class Run:
    """A run directory, opened."""

    path: pathlib.Path
    checkpoints: epath.Path  # where they lie: below `path`, or in checkpoint.folder
    continued: bool  # something was computed in `path` before
    finished: bool  # report.json is there, and train.steps has not grown since
    opened: float  # time.monotonic() at that moment

    def finish(self, report):
        """Write report.json, which makes this a finished run.

        report: {name: JSON value} with at least the names in `REPORT`. Raises KeyError without
        them, and Mistake if the file cannot be written.
        """
        if missing := [name for name in REPORT if name not in report]:
            raise KeyError(f"a report needs {', '.join(missing)}")
        if processes.index() == 0:
            write_whole(self.path / "report.json", json.dumps(finite(report), indent=2) + "\n")

    @contextlib.contextmanager
    def lock(self):
        """Keeps a second process from the same run. The system drops the lock of a killed one."""
        if processes.index() != 0:
            yield
            return
        folder = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(folder)
            raise Mistake(f"another process is training in {self.path}") from None
        except OSError as error:  # a file system without locks
            warn(f"cannot lock {self.path} ({error.strerror}): start no second process on it")
        try:
            yield
        finally:
            os.close(folder)


def open_run(config, workdir, name, fingerprint, may_differ=MAY_DIFFER, may_grow=True):
    """The `Run` in directory `workdir`: new, continued or finished, which is printed.

    config: the resolved config (`bmft.config.Config.config`); name: the experiment's; fingerprint:
    text that identifies the base's file. Raises Mistake if the directory holds another run (with
    the keys that differ; those of `may_differ` may, and train.steps may grow where it `may_grow`)
    or cannot be used; if one of several processes has another config or base than the first, or
    does not see where the checkpoints lie.
    """
    path, homes = _homes(workdir, config.checkpoint.folder)
    record = {
        "experiment": name,
        "config": to_json(config),
        "base_fingerprint": fingerprint,
        "versions": _versions(),
        "commit": _commit(),
    }
    alike = {key: record[key] for key in ("experiment", "base_fingerprint")} | record["config"]
    processes.refuse_other(alike)
    records, reported = processes.from_first(lambda: _look(homes))
    _refuse_other_folder(path, records[0], record)
    grown = False
    for home, found in zip(homes, records, strict=True):
        if found is not None:
            grown |= _refuse_other(home, found, record, may_differ, may_grow)
    finished = reported and not grown
    if processes.index() == 0:
        if grown:  # before the config changes: killed in between, it is still a run to continue
            _remove(path / "report.json")
        for home, found in zip(homes, records, strict=True):
            if found is None or found["config"] != record["config"]:
                write_whole(home / "config.json", json.dumps(record, indent=2) + "\n")
        if finished:
            print(f"{path} is a finished run: see {path / 'report.json'}")
    if processes.several():
        _refuse_other_disk(homes[-1] / "config.json")
    checkpoints = epath.Path(homes[-1]) / "checkpoints"
    return Run(path, checkpoints, records[0] is not None, finished, time.monotonic())


def default_workdir(name, variant=None, overrides=None):
    """`runs/NAME-VARIANT` and the overrides, as `rank=4`; those that may differ leave no trace.

    overrides: {dotted key: value}. A name that would be too long ends in a digest instead.
    """
    overrides = {
        key: value
        for key, value in (overrides or {}).items()
        if key.partition(".")[0] not in MAY_DIFFER
    }
    lasts = [key.rpartition(".")[2] for key in overrides]
    parts = [name, variant] if variant else [name]
    for (key, value), last in zip(overrides.items(), lasts, strict=True):
        parts.append(f"{last if lasts.count(last) == 1 else key}={_short(value)}")
    directory = re.sub(r"[^\w.,=+-]+", "_", "-".join(parts))
    if len(directory) > NAME_LENGTH:
        digest = hashlib.sha256(directory.encode()).hexdigest()[:8]
        directory = f"{directory[: NAME_LENGTH - 9]}-{digest}"
    return f"runs/{directory}"


def write_whole(path, content):
    """Write a file (text or bytes) so that it is there as a whole or not at all.

    Makes its directory. Raises Mistake, naming the path, where the system refuses.
    """
    content = content.encode() if isinstance(content, str) else content
    unfinished = path.with_name(path.name + ".tmp")
    try:
        with storage.os_errors():
            if storage.in_cloud(path):
                path.write_bytes(content)
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(unfinished, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path, error):
    """The `Mistake` for an OSError met while writing `path`."""
    return Mistake(f"cannot write {path}: {error.strerror or error}")


def warn(text):
    """Print a warning line to stderr; only the first of several processes does."""
    if processes.index() == 0:
        print(f"warning: {text}", file=sys.stderr, flush=True)


def finite(value):
    """`value` with None for each NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _homes(workdir, folder):
    """The run directory, and where a config.json lies: there, and in checkpoint.folder if set."""
    if storage.in_cloud(workdir):
        raise Mistake(f"--workdir={workdir} is no directory; checkpoint.folder may be gs://...")
    path = pathlib.Path(workdir)
    return path, [path, storage.folder(folder)] if folder else [path]


def _look(homes):
    """[[what config.json says, or None where nothing was computed], is there a report.json?]"""
    records = [_read_record(home) for home in homes]
    for number, home in enumerate(homes):
        if not _traces(home):
            records[number] = None  # a mistake ended it before: there is nothing to mix
    if records[0] is None and any(records):
        warn(f"{homes[1]} holds checkpoints of this run, {homes[0]} nothing: going on from those")
    return records, (homes[0] / "report.json").is_file()


def _traces(home):
    with storage.reading(home):
        names = {entry.name for entry in storage.entries(home)}
    return [trace for trace in TRACES if trace in names]


def _read_record(path):
    """What config.json says, or None for a new directory."""
    file = path / "config.json"
    try:
        with storage.os_errors():
            record = json.loads(file.read_text())
        if not isinstance(record, dict) or "experiment" not in record:
            raise Mistake(f"{file} is no run's: choose another --workdir")
        return record
    except FileNotFoundError:
        for trace in _traces(path):
            raise Mistake(
                f"{path} has {trace} but no config.json, so what was run there is not known: "
                "choose another --workdir"
            ) from None
        return None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise Mistake(f"{file} is damaged ({error}): choose another --workdir") from error
    except OSError as error:
        raise Mistake(f"cannot read {file}: {error.strerror or error}") from error


def _refuse_other_disk(file):
    """Raises Mistake if a process does not see a file that process 0 has written."""

    def digest():
        with storage.reading(file):
            return hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else None

    first = processes.from_first(digest)
    seen = processes.exchange(digest() == first)
    if not all(seen):
        raise Mistake(
            f"process {seen.index(False)} does not see the {file} of process 0: --workdir must be "
            "a directory that all hosts share, or checkpoint.folder one, or gs://bucket/path"
        )


def _refuse_other_folder(path, old, new):
    """Raises Mistake if the checkpoints of a run that has begun are not where it looks for them."""
    was = old and old["config"]["checkpoint"].get("folder")
    now = new["config"]["checkpoint"]["folder"]
    if old and was != now:
        raise Mistake(
            f"{path} has its checkpoints in checkpoint.folder={was!r}, not {now!r}: give that one, "
            "or choose another --workdir"
        )


def _refuse_other(path, old, new, may_differ, may_grow):
    """Raises Mistake if `old` is another run than `new`; True if train.steps has grown."""
    steps, wanted = (record["config"]["train"]["steps"] for record in (old, new))
    grown = may_grow and steps is not None and wanted is not None and wanted > steps
    may_differ = (*may_differ, "train.steps") if grown else may_differ
    differ = difference(old["config"], new["config"], may_differ)
    for key in ("experiment", "base_fingerprint"):
        if old[key] != new[key]:
            differ.insert(0, f"{key}: {old[key]!r} != {new[key]!r}")
    if differ:
        grows = may_grow and any("train.steps" in line for line in differ)
        only = "; train.steps may only grow" if grows else ""
        raise Mistake(
            f"{path} holds another run ({', '.join(differ)}){only}: choose another --workdir"
        )
    changed = [
        f"{name} {old['versions'].get(name)} -> {version}"
        for name, version in new["versions"].items()
        if old["versions"].get(name) != version
    ]
    if changed:
        warn(f"{path} was begun with other versions: {', '.join(changed)}")
    return grown


def _versions():
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _commit():
    """The commit of the source, `+` if files have changed since; None outside of a repository."""

    def git(*arguments):
        folder = pathlib.Path(__file__).parent
        done = subprocess.run(
            ["git", "-C", folder, *arguments], capture_output=True, text=True, timeout=10
        )
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        commit = git("rev-parse", "HEAD")
        return commit and commit + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.TimeoutExpired):  # no git here
        return None


def _remove(path):
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error


def _short(value):
    """A value as part of a directory's name: `query+value`, and of a path its last part."""
    if isinstance(value, list | tuple):
        return "+".join(map(_short, value))
    return str(value).rstrip("/").rpartition("/")[2]
