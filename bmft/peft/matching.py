"""Which modules the fields of a PEFT adapter's configuration mean, and fields that mean given ones.

Hugging Face PEFT matches by rules of its own, on transformers' names only (ours: bmft.names):

    target_modules      a list: a whole name, or what it ends in after a dot; a text: a regular
                        expression for a whole name; layers_to_transform counts for endings alone
    modules_to_save     what a name ends in, dot or not: `classifier` is `pre_classifier` too
    feedforward_modules likewise, or a regular expression; of the targets
    rank_pattern        the first regular expression, in the order of the file, that fits the end

A choice of modules is {module path: bool [l]}, bool [] for a module outside the stack.
"""

import functools
import re

import numpy as np

from bmft.errors import Mistake

# PEFT trains these in any sequence classifier, whatever modules_to_save says.
HEADS = ("classifier", "score")
KINDS = {"dense": "dense layer", "conv": "convolution", "embed": "embedding", "norm": "norm"}
KINDS["tied"] = "head that is the word embedding"


def targets(names, fields, kinds=("dense", "conv")):
    """The modules a targeted method is put on.

    fields: target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save.
    Raises Mistake where one of them is of another kind, or there is none.
    """
    if fields["target_modules"] is None:
        raise Mistake(
            "target_modules is null, which leaves the choice to a table inside peft; "
            "the adapter has to name them"
        )
    table, known, hit = modules(names), names.modules(*kinds), {}
    for name in [*table, *_holders(table)]:
        if not _is_target(fields, name, names):
            continue
        path, layer = table.get(name, (None, None))
        if path not in known:
            wanted = " or ".join(KINDS[kind] for kind in kinds)
            raise Mistake(f"target_modules means {name!r}, which is no {wanted}")
        _mark(hit, names, path, layer)
    if not hit:
        raise Mistake(f"target_modules {fields['target_modules']!r} match no module of the model")
    return hit


def saved(names, entries):
    """The modules (those that hold leaves) that PEFT trains whole for these modules_to_save."""
    table, hit = modules(names), {}
    tops = _saved_tops(table, entries)
    for name, (path, layer) in table.items():
        if any(name == top or name.startswith(top + ".") for top in tops):
            _mark(hit, names, path, layer)
    return hit


def part(names, sites, entries, field):
    """Those of the modules `sites` that a field like feedforward_modules means."""
    if entries is None:
        raise Mistake(
            f"{field} is null, which leaves the choice to a table inside peft; "
            "the adapter has to name them"
        )
    hit = {}
    for path, mask in sites.items():
        for layer in layers(mask):
            name = names.called(path, layer)[1]
            by_list = not isinstance(entries, str)
            if any(map(name.endswith, entries)) if by_list else _fits(entries, name, field, True):
                _mark(hit, names, path, layer)
    return hit


def pattern_values(names, sites, patterns, default, field):
    """{module path: [l]}: the value of rank_pattern or alpha_pattern for each module of `sites`."""
    values = {path: np.full(mask.shape, default, object) for path, mask in sites.items()}
    for path, mask in sites.items():
        for layer in layers(mask):
            name = names.called(path, layer)[1]
            found = (v for key, v in patterns.items() if _fits(rf"(.*\.)?({key})$", name, field))
            values[path][at(layer)] = next(found, default)
    return values


def full_names(names, sites):
    """The whole names of transformers of a choice of modules."""
    return tuple(
        names.called(path, layer)[1] for path, mask in sites.items() for layer in layers(mask)
    )


def exact_names(names, sites):
    """What bmft.names takes for exactly these modules: transformers' names, or ours where theirs is
    the ending of another (as torchvision's `conv1` is of `layer1.0.conv1`)."""
    called = (names.called(path, layer) for path, mask in sites.items() for layer in layers(mask))
    endings = _endings(names)
    return tuple(ours if theirs in endings else theirs for ours, theirs, *_ in called)


def _endings(names):
    """The whole names that others end in."""
    table = modules(names)
    tails = {
        name.split(".", n)[-1]
        for name in (*table, *_holders(table))
        for n in range(1, 1 + name.count("."))
    }
    return tails & table.keys()


# --- fields that mean given modules ----------------------------------------------------------


def spell_targets(names, sites, saved_entries, kinds=("dense", "conv"), parts=None, by_layer=True):
    """target_modules and layers_to_transform that PEFT takes for exactly `sites`.

    The shortest endings that mean nothing else; whole names where there is none, or where the
    layers differ by module; a regular expression where a whole name is the ending of another.

    saved_entries: what PEFT takes for modules_to_save. parts: {field: those of `sites` that it
    means}: fields beside, whose entries are among the targets. by_layer: is there a
    layers_to_transform?
    """
    masks = {tuple(mask) for mask in sites.values() if mask.ndim}
    some = None
    if by_layer and len(masks) == 1 and not all(*masks):
        some = layers(np.array(*masks))
    parts = parts or {}
    others = {path: mask & ~_union(parts.values(), path, mask) for path, mask in sites.items()}
    spelled = {
        field: _entries(names, chosen, some, saved_entries)
        for field, chosen in {"target_modules": others, **parts}.items()
    }
    spelled["target_modules"] = sorted({entry for listed in spelled.values() for entry in listed})
    whole = {"target_modules": sites, **parts}
    whole = {field: _expression(full_names(names, chosen)) for field, chosen in whole.items()}
    for fields in (spelled | {"layers_to_transform": some}, whole | {"layers_to_transform": None}):
        got = targets(names, fields | _no_other(saved_entries), kinds)
        of_parts = {field: part(names, sites, fields[field], field) for field in parts}
        if _same(got, sites) and all(_same(of_parts[field], parts[field]) for field in parts):
            return {key: fields[key] for key in fields if by_layer or key != "layers_to_transform"}
    raise AssertionError(f"no target_modules means {sorted(sites)}")


def spell_saved(names, wanted, entries, implied):
    """modules_to_save that PEFT takes for exactly `wanted`; None if there is no such.

    The given entries if they do, else the last words of the names, else the whole names. implied:
    what PEFT takes for entries beside them.
    """
    table, heads = modules(names), head_names(names)
    others = {path: mask for path, mask in wanted.items() if path not in head_modules(names)}
    full = full_names(names, others)
    words = sorted({name.rpartition(".")[2] for name in full})
    words = [] if any(map(str.isdigit, words)) else words  # numbers are names of what has no leaves
    for rest in (entries, words, full):
        spelled = [*heads, *(entry for entry in rest if entry not in heads)]
        nested = _nested(_saved_tops(table, (*spelled, *implied)))
        if not nested and _same(saved(names, (*spelled, *implied)), wanted):
            return spelled
    return None


def spell_pattern(names, sites, given, values, default, field):
    """A rank_pattern or alpha_pattern that gives each module its value in `values` {path: [l]}.

    The given one if it does, in the sorted order that JSON files have; else an entry a module.
    """
    endings, explicit = _endings(names), {}
    for path, mask in sites.items():
        for layer in layers(mask):
            name, value = names.called(path, layer)[1], values[path][at(layer)]
            if value != default:
                explicit["^" * (name in endings) + name] = value.item()
    for spelled in (dict(sorted(given.items())), explicit):
        got = pattern_values(names, sites, spelled, default, field)
        if all(np.all(got[path][mask] == values[path][mask]) for path, mask in sites.items()):
            return spelled
    raise AssertionError(f"no {field} gives {values}")


# --- names -----------------------------------------------------------------------------------


def modules(names):
    """{name in transformers: (path, layer)} of every module that holds leaves."""
    return {
        theirs.format(layer): (path, layer)
        for path, theirs in names.modules(*KINDS).items()
        for layer in names.layers_of(path)
    }


def head_modules(names):
    """The modules of the head."""
    paths = {leaf.path.rpartition("/")[0] for leaf in names.leaves if leaf.top}
    return {path: everywhere(names, path) for path in sorted(paths)}


def head_names(names):
    """The topmost names in transformers that hold modules of the head, and no others."""
    table, heads, tops = modules(names), head_modules(names), set()
    for name in full_names(names, heads):
        parts = name.split(".")
        for top in (".".join(parts[:i]) for i in range(1, len(parts) + 1)):
            held = [path for other, (path, _) in table.items() if _within(other, top)]
            if all(path in heads for path in held):
                tops.add(top)
                break
    return sorted(tops)


def everywhere(names, path):
    """The mask of a module in all layers."""
    return np.ones(() if None in names.layers_of(path) else names.layers, bool)


def at(layer):
    """The index of a layer in what may have a layer axis."""
    return () if layer is None else layer


def layers(mask):
    """The layers of a mask [l]; [None] for a true mask []."""
    if mask.ndim:
        return [int(layer) for layer in np.flatnonzero(mask)]
    return [None] if mask else []


def _holders(table):
    """The modules that hold others: encoder.layer.0.attention, encoder.layer.0, ..."""
    cuts = (name.split(".")[:i] for name in table for i in range(1, name.count(".") + 1))
    return sorted({".".join(cut) for cut in cuts} - set(table))


def _is_target(fields, name, names):
    """peft.tuners.tuners_utils.check_target_module_exists."""
    exclude, entries = fields["exclude_modules"], fields["target_modules"]
    if isinstance(exclude, str):
        if exclude and _fits(exclude, name, "exclude_modules", whole=True):
            return False
    elif any(_ends(name, entry) for entry in exclude or ()):
        return False
    for entry in fields["modules_to_save"] or ():
        if _fits(rf"(^|.*\.){entry}($|\..*)", name, "modules_to_save"):
            return False
    if isinstance(entries, str):
        if entries.lower() == "all-linear":
            return name in full_names(names, _all_linear(names))
        return _fits(entries, name, "target_modules", whole=True)
    if name in entries:
        return True
    return any(_ends(name, entry) for entry in entries) and _in_layers(fields, name)


def _in_layers(fields, name):
    some, patterns = fields["layers_to_transform"], fields["layers_pattern"] or ()
    some = [some] if isinstance(some, int) else some
    if not some:
        return True
    patterns = [patterns] if isinstance(patterns, str) else patterns
    regexes = [rf"(?:^|.*?\.){pattern}\.(?P<i>\d+)\." for pattern in patterns]
    for regex in regexes or [r".*?\.[^.]*\.(?P<i>\d+)\."]:
        if found := _fits(regex, name, "layers_pattern"):
            return int(found["i"]) in some
    return False


def _all_linear(names):
    return {
        path: everywhere(names, path)
        for path in names.modules("dense")
        if path not in head_modules(names) and path != names.head_module
    }


def _saved_tops(table, entries):
    """Names of the modules, or holders of modules, that modules_to_save hits."""
    return [
        name
        for name in [*table, *_holders(table)]
        if any(name.endswith(entry) for entry in entries)  # without a dot: peft's rule
    ]


def _nested(tops):
    return any(a.startswith(b + ".") for a in tops for b in tops)


def _entries(names, chosen, some, saved_entries):
    """Entries of target_modules for the modules `chosen`; some: layers_to_transform beside them."""
    table, theirs = modules(names), names.modules(*KINDS)
    known = [*table, *_holders(table)]

    def is_chosen(name):
        path, layer = table.get(name, (None, None))
        return path in chosen and (some is not None or bool(chosen[path][at(layer)]))

    @functools.cache
    def fits(entry):
        """Does it mean chosen modules alone?"""
        fields = {"target_modules": [entry], "layers_to_transform": None}
        fields |= _no_other(saved_entries)
        return all(is_chosen(name) for name in known if _is_target(fields, name, names))

    entries = set()
    for path, mask in chosen.items():
        by_ending = mask.all() if some is None else mask.ndim
        words = theirs[path].rpartition("{}.")[2].split(".") if by_ending else ()
        endings = (".".join(words[-n:]) for n in range(1, len(words) + 1))
        # A number alone may be what has no leaves, too: an activation in torch's Sequential.
        ending = next((e for e in endings if not e.isdigit() and fits(e)), None)
        entries |= {ending} if ending else set(full_names(names, {path: mask}))
    return sorted(entries)


def _expression(full):
    """A regular expression for exactly these names."""
    return "|".join(re.escape(name) for name in full)


def _union(parts, path, mask):
    return np.any([part.get(path, np.zeros_like(mask)) for part in parts], axis=0) | (mask & False)


def _no_other(saved_entries):
    return {"exclude_modules": None, "layers_pattern": None, "modules_to_save": saved_entries}


def _within(name, top):
    return name == top or name.startswith(top + ".")


def _ends(name, entry):
    return name == entry or name.endswith("." + entry)


def _fits(regex, name, field, whole=False):
    try:
        return re.fullmatch(regex, name) if whole else re.match(regex, name)
    except re.error as error:
        raise Mistake(f"{field}: no regular expression: {error}") from None


def _mark(hit, names, path, layer):
    mask = hit.setdefault(path, np.zeros(() if layer is None else names.layers, bool))
    mask[at(layer)] = True


def _same(one, other):
    return one.keys() == other.keys() and all(
        np.array_equal(one[path], other[path]) for path in one
    )
