"""Which modules the fields of a PEFT adapter's configuration mean, and fields that mean given ones.

Hugging Face PEFT matches by rules of its own, on transformers' names only (ours: bmft.names):

    target_modules      a list: a whole name, or what it ends in after a dot; a text: a regular
                        expression for a whole name; layers_to_transform counts for endings alone
    modules_to_save     what a name ends in, dot or not: `classifier` is `pre_classifier` too
    rank_pattern        the first regular expression, in the order of the file, that fits the end

A choice of modules is {module path: bool [l]}, bool [] for a module outside the stack.
"""

import re

import numpy as np

from bmft.errors import Mistake

# PEFT trains these in any sequence classifier, whatever modules_to_save says.
HEADS = ("classifier", "score")


def targets(names, fields):
    """The modules a targeted method is put on.

    fields: target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save.
    Raises Mistake where one of them is no dense layer, or there is none.
    """
    if fields["target_modules"] is None:
        raise Mistake(
            "target_modules is null, which leaves the choice to a table inside peft; "
            "the adapter has to name them"
        )
    table, dense, hit = modules(names), names.modules("dense"), {}
    for name in [*table, *_holders(table)]:
        if not _is_target(fields, name, names):
            continue
        path, layer = table.get(name, (None, None))
        if path not in dense:
            raise Mistake(f"target_modules means {name!r}, which is no dense layer")
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


# --- fields that mean given modules ----------------------------------------------------------


def spell_targets(names, sites, saved_entries):
    """target_modules and layers_to_transform that PEFT takes for exactly `sites`.

    The shortest endings that mean nothing else; whole names where there is none, or where the
    layers differ by module.
    """
    masks = {tuple(mask) for mask in sites.values() if mask.ndim}
    some = None
    if len(masks) == 1 and not all(*masks):
        some = layers(np.array(*masks))
    entries = set()
    for path, mask in sites.items():
        by_ending = mask.all() if some is None else mask.ndim
        ending = _ending(names, path, sites, saved_entries) if by_ending else None
        entries |= {ending} if ending else set(full_names(names, {path: mask}))
    fields = {"target_modules": sorted(entries), "layers_to_transform": some}
    assert _same(targets(names, fields | _no_other(saved_entries)), sites)
    return fields


def spell_saved(names, wanted, heads, entries):
    """modules_to_save that PEFT takes for exactly `wanted`: the given entries if they do.

    heads: names of the head's topmost modules; they hold modules of `wanted`.
    """
    table = modules(names)
    others = {path: mask for path, mask in wanted.items() if path not in head_modules(names)}
    for rest in (entries, full_names(names, others)):
        spelled = [*heads, *(entry for entry in rest if entry not in heads)]
        nested = _nested(_saved_tops(table, (*spelled, *HEADS)))
        if not nested and _same(saved(names, (*spelled, *HEADS)), wanted):
            return spelled
    raise AssertionError(f"no modules_to_save means {sorted(wanted)}")


def spell_pattern(names, sites, given, values, default, field):
    """A rank_pattern or alpha_pattern that gives each module its value in `values` {path: [l]}.

    The given one if it does, in the sorted order that JSON files have; else an entry a module.
    """
    explicit = {
        names.called(path, layer)[1]: values[path][at(layer)].item()
        for path, mask in sites.items()
        for layer in layers(mask)
        if values[path][at(layer)] != default
    }
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
        for path, theirs in names.modules("dense", "embed", "norm").items()
        for layer in names.layers_of(path)
    }


def head_modules(names):
    """The modules of the head."""
    paths = {leaf.path.rpartition("/")[0] for leaf in names.leaves if leaf.top}
    return {path: everywhere(names, path) for path in sorted(paths)}


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
        if path not in head_modules(names)
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


def _ending(names, path, sites, saved_entries):
    """The shortest ending that means no other module than those of `sites`; None: none does."""
    table = modules(names)
    parts = names.modules("dense")[path].rpartition("{}.")[2].split(".")
    for start in range(len(parts) - 1, -1, -1):
        entry = ".".join(parts[start:])
        fields = {"target_modules": [entry], "layers_to_transform": None} | _no_other(saved_entries)
        hits = [name for name in [*table, *_holders(table)] if _is_target(fields, name, names)]
        if all(name in table and table[name][0] in sites for name in hits):
            return entry
    return None


def _no_other(saved_entries):
    saved_entries = (*saved_entries, *HEADS)
    return {"exclude_modules": None, "layers_pattern": None, "modules_to_save": saved_entries}


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
