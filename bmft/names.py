"""What a model's leaves are called: by us, in the weights file, in the modules of transformers.

The layers of a model are one stacked tree, so one of our paths stands for a leaf in every layer:

    layers/attention/query/kernel [l, in, out]
    encoder.layer.{}.attention.self.query.weight, l times, each [out, in]

What differs by layer (targets, ranks) is said with unstacked module names, ours or the
checkpoint's: `layers.3.attention.query`, `bert.encoder.layer.3.attention.self.query`.
"""

import re
from typing import NamedTuple

import numpy as np

from bmft.errors import Mistake, nearest

KINDS = {"kernel": "dense", "embedding": "embed", "scale": "norm", "tied": "tied"}
EVERY = {"all-linear": "dense", "all-conv": "conv"}
STATISTICS = ("mean", "var")  # leaves of a BatchNorm that no gradient moves

# How a tensor lies in a file: the axis of ours that each of its axes is. None: the same.
LAYOUTS = {
    "same": None,
    "transpose": (1, 0),  # torch's linear [out, in]; ours [in, out]
    "conv": (3, 2, 0, 1),  # torch's OIHW; ours HWIO
}


class Leaf(NamedTuple):
    """One leaf of the base tree; `{}` in a name stands for the layer."""

    path: str  # ours: layers/attention/query/kernel
    file: str  # in the weights file that is read, without the model's prefix
    layout: str = "same"  # of LAYOUTS: how it lies there
    top: bool = False  # True: the name never takes the model's prefix (a head)
    part: tuple | None = None  # (i, n): the i-th of n equal parts of the file's first axis
    written: str | None = None  # whole name in a file we write; None: the one that is read
    written_layout: str | None = None  # None: layout
    modules: tuple = ()  # whole names in transformers' modules, newest first; (): as written

    @property
    def kind(self):
        """dense, conv, embed, norm or tied (a head that reads the word embedding): what a module is
        whose leaf this is; None: says nothing."""
        kind = KINDS.get(self.path.rpartition("/")[2])
        conv = "conv" in (self.layout, self.written_layout)
        return "conv" if kind == "dense" and conv else kind

    @property
    def is_statistic(self):
        return self.path.rpartition("/")[2] in STATISTICS


def to_file(layout, array):
    """Our leaf of one layer as a file has it."""
    return array if LAYOUTS[layout] is None else array.transpose(LAYOUTS[layout])


def from_file(layout, array):
    """The inverse of `to_file`."""
    return array if LAYOUTS[layout] is None else array.transpose(np.argsort(LAYOUTS[layout]))


def in_file(layout, axes):
    """A shape, or slices, of ours in the order of the file's axes."""
    return tuple(axes) if LAYOUTS[layout] is None else tuple(axes[i] for i in LAYOUTS[layout])


class Names(NamedTuple):
    """A model's names table. `prefix` is what a headed model puts before its encoder's names."""

    leaves: tuple
    layers: int  # of the stack; 0: none
    prefix: str  # "bert."; files may come with or without it
    stages: tuple = ()  # subtrees from the input to the output, of a model that is no stack
    # Of a language model: its head's kernel, which `all-linear` leaves out; or, where the head is
    # tied, `<module>/tied`, which is no leaf of the tree, but a module that targets may mean.
    head: Leaf | None = None

    @property
    def rows(self):
        """A row of each module that a target may mean: the leaves, and a tied head's."""
        return (*self.leaves, self.head) if self.is_tied else self.leaves

    @property
    def is_tied(self):
        return self.head is not None and self.head.kind == "tied"

    @property
    def head_module(self):
        """The module path of a language model's head; None of another model."""
        return self.head and self.head.path.rpartition("/")[0]

    def written(self, leaf):
        """The leaf's name in a file of weights that we write."""
        return leaf.written or (leaf.file if leaf.top else self.prefix + leaf.file)

    def full(self, leaf):
        """The leaf's name in the modules of today's transformers, which adapters are named by."""
        return leaf.modules[0] if leaf.modules else self.written(leaf)

    def dialects(self):
        """This table by each spelling of the modules, today's transformers first."""
        count = max((len(leaf.modules) for leaf in self.leaves), default=0)
        for i in range(max(count, 1)):
            yield self._replace(
                leaves=tuple(leaf._replace(modules=leaf.modules[i : i + 1]) for leaf in self.leaves)
            )

    def layers_of(self, path):
        """[0 … layers), or [None] for what lies outside the stack."""
        return range(self.layers) if path.startswith("layers/") else [None]

    def leaf(self, path):
        """The row of one of our paths (KeyError if there is none)."""
        return {leaf.path: leaf for leaf in self.leaves}[path]

    def modules(self, *kinds):
        """{module path: its name in transformers, with {} for the layer}, of the given kinds."""
        found = {}
        for leaf in self.rows:
            if leaf.kind in kinds:
                found[leaf.path.rpartition("/")[0]] = self.full(leaf).rpartition(".")[0]
        return found

    def called(self, path, layer):
        """The unstacked names of the module at `path` in `layer`: ours, then transformers'."""
        leaf = next(leaf for leaf in self.rows if leaf.path.startswith(path + "/"))
        theirs = dict.fromkeys((self.full(leaf), *leaf.modules, self.written(leaf)))
        modules = (name.rpartition(".")[0].format(layer) for name in theirs)
        return unstacked(path, layer), *modules


def unstacked(path, layer):
    """layers/attention/query in layer 3 -> layers.3.attention.query"""
    ours = path.replace("/", ".")
    return ours if layer is None else ours.replace("layers.", f"layers.{layer}.", 1)


def matches(entry, name):
    """peft's rule: the module is named so, or its name ends in `.` + entry."""
    return name == entry or name.endswith("." + entry)


def target(names, entries, *, head=(), without=None, kinds=("dense",), layers=None):
    """Which modules a method is put on: {module path: bool [l], or bool [] outside the stack}.

    entries: a list of names matched by peft's rule against the names of each module; or
        `all-linear` (every dense module but the head, a language model's too), `all-conv` (every
        convolution); or `re:` and a regular expression that matches a whole name. Each must match,
        else `Mistake` with the nearest name.
    head: paths a target never reaches (the task's head, trained whole).
    without: modules it does not reach in some layers, {module path: bool [l] or []}.
    layers: indices of the layers meant; None is all. Modules outside the stack are then left out.
    """
    if layers is not None:
        for layer in layers:
            if not 0 <= layer < names.layers:
                last = names.layers - 1
                raise Mistake(f"no layer {layer} to transform: the model has 0 to {last}")
    candidates = [
        (path, layer, kind if path != names.head_module else "head", names.called(path, layer))
        for kind in kinds
        for path in names.modules(kind)
        for layer in names.layers_of(path)
        if not any(path == h or path.startswith(h + "/") for h in head)
        if not (without and path in without and without[path][() if layer is None else layer])
    ]
    hit = {}
    for entry in entries:
        chosen = [(path, layer) for path, layer, *about in candidates if _hits(entry, *about)]
        if not chosen:
            known = {name.rpartition(".")[2] for *_, called in candidates for name in called}
            raise Mistake(f"target {entry!r} matches no module; {nearest(entry, known)}")
        for path, layer in chosen:
            if layers is None or layer in layers:
                size = names.layers if layer is not None else ()
                hit.setdefault(path, np.zeros(size, bool))[() if layer is None else layer] = True
    if not hit:
        raise Mistake(f"targets {tuple(entries)} match nothing in layers {tuple(layers or ())}")
    return hit


def saved(names, entries):
    """Leaves of modules trained whole, as peft's modules_to_save: {leaf path: bool [l] or []}.

    An entry may name a module or what holds modules (`classifier`, `layer.5`).
    """
    hit = {}
    for entry in entries:
        found = False
        for leaf in names.leaves:
            for layer in names.layers_of(leaf.path):
                module, _, last = leaf.path.rpartition("/")
                called = (f"{name}.{last}" for name in names.called(module, layer))
                if any(matches(entry, holder) for name in called for holder in _holders(name)):
                    size = names.layers if layer is not None else ()
                    mask = hit.setdefault(leaf.path, np.zeros(size, bool))
                    mask[() if layer is None else layer] = found = True
        if not found:
            known = {path.rpartition("/")[2] for path in names.modules(*KINDS.values())}
            raise Mistake(f"modules_to_save {entry!r} matches no module; {nearest(entry, known)}")
    return hit


def _holders(name):
    """a.b.c -> a, a.b"""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _hits(entry, kind, called):
    """Does an entry mean a module of this kind that is called so?"""
    if entry in EVERY:
        return kind == EVERY[entry]
    if entry.startswith("re:"):
        try:
            return any(re.fullmatch(entry[3:], name) for name in called)
        except re.error as error:
            raise Mistake(f"target {entry!r} is no regular expression: {error}") from None
    return any(matches(entry, name) for name in called)


def pattern_value(patterns, module_names, default):
    """peft's rank_pattern: the value of the first key that matches one of a module's names."""
    for key, value in patterns.items():
        if any(re.match(rf"(.*\.)?({key})$", name) for name in module_names):
            return value
    return default
