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

KINDS = {"kernel": "dense", "embedding": "embed", "scale": "norm"}


class Leaf(NamedTuple):
    """One leaf of the base tree; `{}` in a name stands for the layer."""

    path: str  # ours: layers/attention/query/kernel
    file: str  # in a weights file, without the model's prefix: encoder.layer.{}.….query.weight
    layout: str  # "same", or "transpose": torch's [out, in] against our [in, out]
    top: bool = False  # True: the name never takes the model's prefix (a head)


class Names(NamedTuple):
    """A model's names table. `prefix` is what a headed model puts before its encoder's names."""

    leaves: tuple
    layers: int
    prefix: str  # "bert."; files may come with or without it

    def full(self, leaf):
        """The leaf's name in a headed model of transformers, which is what is written."""
        return leaf.file if leaf.top else self.prefix + leaf.file

    def layers_of(self, path):
        """[0 … layers), or [None] for what lies outside the stack."""
        return range(self.layers) if path.startswith("layers/") else [None]

    def leaf(self, path):
        """The row of one of our paths (KeyError if there is none)."""
        return {leaf.path: leaf for leaf in self.leaves}[path]

    def modules(self, *kinds):
        """{module path: its name in transformers, with {} for the layer}, of the given kinds."""
        found = {}
        for leaf in self.leaves:
            path, _, name = leaf.path.rpartition("/")
            if KINDS.get(name) in kinds:
                found[path] = self.full(leaf).rpartition(".")[0]
        return found

    def called(self, path, layer):
        """The two unstacked names of the module at `path` in `layer`: ours and theirs."""
        theirs = next(self.full(leaf) for leaf in self.leaves if leaf.path.startswith(path + "/"))
        return unstacked(path, layer), theirs.rpartition(".")[0].format(layer)


def unstacked(path, layer):
    """layers/attention/query in layer 3 -> layers.3.attention.query"""
    ours = path.replace("/", ".")
    return ours if layer is None else ours.replace("layers.", f"layers.{layer}.", 1)


def matches(entry, name):
    """peft's rule: the module is named so, or its name ends in `.` + entry."""
    return name == entry or name.endswith("." + entry)


def target(names, entries, *, head=(), without=None, kinds=("dense",), layers=None):
    """Which modules a method is put on: {module path: bool [l], or bool [] outside the stack}.

    entries: a list of names matched by peft's rule against both names of each module; or
        `all-linear` (every dense module but the head); or `re:` and a regular expression that
        matches a whole name. Each must match, else `Mistake` with the nearest name.
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
        (path, layer, (unstacked(path, layer), theirs.format(layer)))
        for path, theirs in names.modules(*kinds).items()
        for layer in names.layers_of(path)
        if not any(path == h or path.startswith(h + "/") for h in head)
        if not (without and path in without and without[path][() if layer is None else layer])
    ]
    hit = {}
    for entry in entries:
        chosen = [c for c in candidates if any(_hits(entry, name) for name in c[2])]
        if not chosen:
            known = {n.rpartition(".")[2] for c in candidates for n in c[2]}
            raise Mistake(f"target {entry!r} matches no module; {nearest(entry, known)}")
        for path, layer, _ in chosen:
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
        before = sum(mask.sum() for mask in hit.values())
        for leaf in names.leaves:
            for layer in names.layers_of(leaf.path):
                both = unstacked(leaf.path, layer), names.full(leaf).format(layer)
                if any(matches(entry, holder) for name in both for holder in _holders(name)):
                    size = names.layers if layer is not None else ()
                    mask = hit.setdefault(leaf.path, np.zeros(size, bool))
                    mask[() if layer is None else layer] = True
        if sum(mask.sum() for mask in hit.values()) == before:
            known = {path.rpartition("/")[2] for path in names.modules(*KINDS.values())}
            raise Mistake(f"modules_to_save {entry!r} matches no module; {nearest(entry, known)}")
    return hit


def _holders(name):
    """a.b.c -> a, a.b"""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _hits(entry, name):
    if entry == "all-linear":
        return True
    if entry.startswith("re:"):
        try:
            return re.fullmatch(entry[3:], name) is not None
        except re.error as error:
            raise Mistake(f"target {entry!r} is no regular expression: {error}") from None
    return matches(entry, name)


def pattern_value(patterns, module_names, default):
    """peft's rank_pattern: the value of the first key that matches one of a module's names."""
    for key, value in patterns.items():
        if any(re.match(rf"(.*\.)?({key})$", name) for name in module_names):
            return value
    return default
