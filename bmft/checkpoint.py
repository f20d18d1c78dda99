"""Checkpoints of a run: written beside the training, sealed by a manifest, checked before use.

    checkpoints/300/state/           Orbax: every leaf of the state
    checkpoints/300/manifest.json    SHA-256 of each file, the loop's progress, base

The manifest is written last, so a directory without one was never complete. Orbax itself restores
flipped bits without a word (measured: 25 of 25), hence the sums. In Cloud Storage it is the same,
where nothing can be renamed (bmft/storage.py).

Of several processes each writes what it holds, into the one directory that all of them share. The
first one does the rest: it makes room, seals what all have written, removes what is old, and says
which checkpoint is whole.
"""

import concurrent.futures
import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import sys
import typing

import jax
import orbax.checkpoint as ocp
from etils import epath

from bmft import processes, storage
from bmft.errors import Mistake
from bmft.run import cannot_write, warn, write_whole

MARGIN = 1 << 20  # bytes left free on a disk: metadata of a checkpoint, and some rows of metrics


class Saved(typing.NamedTuple):
    """A complete checkpoint."""

    step: int
    progress: dict  # what `save` was given


class Damaged(Exception):
    """Says what is wrong with a checkpoint, as the end of a sentence that begins with its path."""


class Checkpoints:
    """The checkpoints under `directory`; a context manager, which ends what is still being saved.

    fingerprint: text that identifies the base the moving leaves belong to; keep: how many of the
    newest stay. The best ones that those refer to stay as well.
    """

    def __init__(self, directory, *, fingerprint, keep=2):
        self.shown = epath.Path(directory)  # in messages, as the user wrote it
        self.directory = storage.absolute(self.shown)  # Orbax takes no other
        self._fingerprint = fingerprint
        self._keep = max(1, keep)
        self._checked = {}  # {step: content of a manifest whose sums were right}
        self._best_of = {}  # {complete step: the best step it refers to}
        self._orbax = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "seal")
        self._pending = None
        self._unmute = _mute()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        try:
            self.wait()
        except Mistake as mistake:
            if error is None:
                raise
            warn(str(mistake))  # the error under way says more
        finally:
            self._pool.shutdown()
            self._orbax.close()
            self._unmute()

    # Reading

    def newest(self):
        """The newest `Saved` whose sums are right, or None; a warning names what was passed over.

        Raises Mistake if there are complete ones and all are damaged, or of another base.
        """
        with storage.reading(self.shown):
            found = processes.from_first(self._newest)
        if found is None:
            return None
        step, progress, best_of = found
        self._best_of = {int(one): best for one, best in best_of.items()}  # it came as JSON
        return Saved(step, progress)

    def _newest(self):
        """[step, progress, {complete step: its best}] of the `newest`, or None."""
        passed, sealed = [], False
        for step in sorted(self._steps(), reverse=True):
            try:
                content = self._check(step)
            except Damaged as damage:
                passed.append(f"{self.shown / str(step)} {damage}")
                sealed = sealed or (self._path(step) / "manifest.json").exists()
                continue
            for line in passed:
                warn(f"{line}: going on from {self.shown / str(step)}")
            self._refuse_other_base(step, content)
            return [step, content["progress"], {step: content["best"], **self._older(step)}]
        if sealed:
            raise Mistake(f"{'; '.join(passed)}: no checkpoint is left to go on from")
        for line in passed:
            warn(f"{line}: none was ever complete, so the run begins anew")
        return None

    def restore(self, step, like):
        """The state of checkpoint `step`, with the structure, dtypes and shardings of `like`.

        like: a tree of arrays or of jax.ShapeDtypeStruct with shardings.

        Raises Mistake if it is damaged or holds other leaves than `like`.
        """
        self.wait()
        where = self.shown / str(step)
        target = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), like
        )
        path = self._path(step) / "state"
        with storage.reading(self.shown):
            leaves = processes.from_first(lambda: self._leaves(step))
            _refuse_other_leaves(where, leaves, _describe(like))
            return self._orbax.restore(path, args=ocp.args.StandardRestore(target))

    def _leaves(self, step):
        try:
            return self._check(step)["leaves"]
        except Damaged as damage:
            raise Mistake(f"{self.shown / str(step)} {damage}") from None

    def last(self):
        """Words for the newest complete checkpoint of this run."""
        self.wait()
        if not self._best_of:
            return "no checkpoint is complete"
        return f"the last good checkpoint is {self.shown / str(max(self._best_of))}"

    # Writing

    def save(self, step, state, progress, best=None):
        """Begin to save; returns as soon as the state is copied, so the next step may donate it.

        state: any tree of arrays; progress: JSON for whoever restores; best: the step of the best
        checkpoint so far, which is kept. Saving a step again replaces its progress alone. Waits for
        the save before, and raises Mistake if that one failed or the disk is full.
        """
        self.wait()
        content = {
            "step": step,
            "best": best,
            "fingerprint": self._fingerprint,
            "progress": progress,
            "leaves": _describe(state),
        }
        first = processes.index() == 0
        if step in self._best_of:
            if first:
                content["files"] = self._read_manifest(step)["files"]
                self._seal(step, content)
            self._note(step, best)
            return
        path = self._path(step)
        if first:  # the others wait for it in Orbax
            self._require_space(path, state)
            storage.remove(path)  # damaged, or never complete
        with self._failures(path):
            self._orbax.save(path / "state", args=ocp.args.StandardSave(state))
        self._pending = path, self._pool.submit(self._finish, step, content)

    def wait(self):
        """Until what is being saved is complete. Raises Mistake if that failed."""
        if self._pending is not None:
            (path, future), self._pending = self._pending, None
            with self._failures(path):
                future.result()

    def _finish(self, step, content):
        """In a thread of its own: once Orbax is done, seal the step and let go of older ones."""
        self._orbax.wait_until_finished()
        if processes.index() == 0:
            content["files"] = _sums(self._path(step))
            self._seal(step, content)
        self._note(step, content["best"])

    def _seal(self, step, content):
        sealed = {"content": content, "sha256": _digest(content)}
        write_whole(self._path(step) / "manifest.json", json.dumps(sealed))

    def _note(self, step, best):
        """A step is complete: remove what neither is among the newest nor the best of one of them.

        A process other than the first notes it a little before, and leaves the files to that one.
        """
        self._best_of[step] = best
        self._checked.pop(step, None)
        newest = sorted(self._best_of)[-self._keep :]
        kept = {*newest, *(self._best_of[one] for one in newest)}
        if processes.index() == 0:
            for old in self._steps():
                if old < step and old not in kept:
                    path = self._path(old)
                    (path / "manifest.json").unlink(missing_ok=True)  # first: no half is believed
                    storage.remove(path)
        self._best_of = {old: of for old, of in self._best_of.items() if old >= step or old in kept}

    # Helpers

    def _path(self, step):
        return self.directory / str(step)

    def _steps(self):
        names = [entry.name for entry in storage.entries(self.directory)]
        return [int(name) for name in names if name.isdecimal()]

    def _older(self, step):
        """{complete step: its best} of those before `step`. Their sums are checked when needed."""
        best_of = {}
        for old in self._steps():
            if old < step:
                with contextlib.suppress(Damaged):
                    best_of[old] = self._read_manifest(old)["best"]
        return best_of

    def _read_manifest(self, step):
        """The content of a step's manifest. Raises Damaged."""
        try:
            sealed = json.loads((self._path(step) / "manifest.json").read_bytes())
            content, digest = sealed["content"], sealed["sha256"]
        except FileNotFoundError:
            raise Damaged("is incomplete (no manifest.json)") from None
        except (ValueError, KeyError, TypeError) as error:
            raise Damaged("is damaged (manifest.json cannot be read)") from error
        if _digest(content) != digest:
            raise Damaged("is damaged (manifest.json: SHA-256 differs)")
        return content

    def _check(self, step):
        """The content of a step's manifest, its sums compared once. Raises Damaged."""
        if step not in self._checked:
            content = self._read_manifest(step)
            for name, digest in content["files"].items():
                try:
                    found = _sum(self._path(step) / name)
                except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                    raise Damaged(f"is damaged ({name} is missing)") from None
                if found != digest:
                    raise Damaged(f"is damaged ({name}: SHA-256 differs)")
            self._checked[step] = content
        return self._checked[step]

    def _refuse_other_base(self, step, content):
        if content["fingerprint"] != self._fingerprint:
            raise Mistake(
                f"{self.shown / str(step)} was trained on another base: fingerprint "
                f"{content['fingerprint']!r}, not {self._fingerprint!r}"
            )

    def _require_space(self, path, state):
        """A full disk is better found before than by Orbax, which then prints pages of its own."""
        with self._failures(path):
            if storage.in_cloud(path):
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + MARGIN
            if shutil.disk_usage(path.parent).free < needed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    @contextlib.contextmanager
    def _failures(self, path):
        """What the system refuses, as one line with the path."""
        try:
            with storage.os_errors():
                yield
        except OSError as error:
            self._unmute = lambda: None  # it goes on complaining until the process ends
            mistake = cannot_write(self.shown / path.name, error)
            raise Mistake(f"{mistake}; {self.last()}") from error


def _mute():
    """Hush what libraries print of a failure that they raise, too; returns the undoing."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio", "gcsfs")]
    levels, hook = [logger.level for logger in loggers], sys.unraisablehook

    def unraisable(unraised):
        if str(unraised.exc_value) != "Event loop is closed":
            hook(unraised)

    def undo():
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        sys.unraisablehook = hook

    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = unraisable
    return undo


def _describe(state):
    """{path: [shape, dtype]} of a tree's leaves."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): [list(leaf.shape), str(leaf.dtype)]
        for path, leaf in leaves
    }


def _refuse_other_leaves(where, saved, wanted):
    """Orbax casts another dtype in silence and is verbose about another shape."""
    for path in sorted(saved.keys() | wanted.keys()):
        old, new = saved.get(path), wanted.get(path)
        if old != new:
            old, new = (f"{leaf[1]}{leaf[0]}" if leaf else "nothing" for leaf in (old, new))
            raise Mistake(f"{where} does not fit this run: {path} is {old} there, {new} here")


def _sums(path):
    """{name: SHA-256} of the files below `path` but the manifest."""
    files = (file for file in storage.files_below(path) if file.parent != path)
    return {str(file.relative_to(path)): _sum(file) for file in files}


def _sum(path):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(content):
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
