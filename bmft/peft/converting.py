"""A change of weights as a LoRA adapter of a given rank; and weights without an adapter again.

Whatever merges into plain weights can be converted, and so can a model that was trained whole: the
difference of each kernel is cut to the rank by its singular values, which is the nearest update of
that rank (Eckart and Young 1936). What else changed is carried as it is:

    biases of converted modules     bias=lora_only
    norms, embeddings               whole, in modules_to_save
    the head                        whole
    what no module of PEFT holds    whole, in our own layout (a position table, a class token)
"""

from typing import Any, NamedTuple

import numpy as np

from bmft import peft, tree
from bmft.errors import Mistake
from bmft.peft import convolution, files, matching, updates

EXACT = 1e-4  # of a merge done again after it was undone: float32 gives 1e-7 and less


class Converted(NamedTuple):
    adapter: Any  # bmft.peft.files.Adapter
    # {(module path, layer): (Frobenius norm of the error, that of the difference)}
    errors: dict
    error: float  # relative, over all modules
    whole: tuple  # paths of what is carried whole, but for the head


def merged(adapter, base, fresh=()):
    """All leaves of the base in one tree {path: float32 array}, with an adapter folded in.

    base: `Loaded.variables()`, float32. Raises Mistake for a method that cannot be merged.
    """
    variables = files.insert(adapter, base, fresh)
    added = {name: variables.get(name, {}) for name in peft.ADDED}
    plain = tree.join(*(variables[name] for name in peft.BASE if name in variables))
    added = tree.map_with_path(lambda path, leaf: np.asarray(leaf), added)
    plain = tree.map_with_path(lambda path, leaf: np.asarray(leaf), plain)
    return _arrays(peft.merge(adapter.methods, plain, added))


def to_lora(before, after, model, rank, *, fresh=(), labels=None):
    """`Converted`: the adapter of that rank on `before` that is nearest to `after`.

    before, after: {path: float32 array} of all leaves; fresh: paths that the base's file does not
    have. A rank that a matrix cannot have is cut to what it can. Raises Mistake if the two are no
    weights of one architecture, or no kernel differs.
    """
    if rank < 1:
        raise Mistake(f"rank is {rank}; it must be 1 or more")
    for path in sorted({*before, *after}):
        shapes = [side[path].shape if path in side else None for side in (before, after)]
        if shapes[0] != shapes[1]:
            raise Mistake(f"{path} has the shape {shapes[0]} in one and {shapes[1]} in the other")
    table, heads = model.names, matching.head_modules(model.names)
    carried = {*heads, *(path.rpartition("/")[0] for path in fresh)}
    sites, biased = {}, False
    for path in table.modules("dense", "conv"):
        if path not in carried and (mask := _changed(table, path, before, after)).any():
            sites[path] = mask
            bias = f"{path}/bias"
            biased |= bias in before and not np.array_equal(before[bias], after[bias])
    carried |= {
        path.rpartition("/")[0]
        for path, leaf in before.items()
        if path.rpartition("/")[0] not in sites and not np.array_equal(leaf, after[path])
    }
    groups = _groups(model) if set(sites) & set(table.modules("conv")) else {}
    factors, errors = {}, {}
    for path, mask in sites.items():
        for layer in matching.layers(mask):
            at, kernel = matching.at(layer), f"{path}/kernel"
            change = after[kernel][at].astype(np.float64) - before[kernel][at]
            factors[path, layer], errors[path, layer] = _cut(change, groups.get(path, 1), rank)
    if not any(exact for _, exact in errors.values()):
        raise Mistake("no kernel differs: there is nothing that LoRA could say")
    running = {leaf.path for leaf in table.leaves if leaf.is_statistic}
    whole = {
        ("batch_stats/" if path in running else "params/") + path: leaf
        for path, leaf in after.items()
        if path.rpartition("/")[0] in carried
        or (biased and path.endswith("/bias") and path.rpartition("/")[0] in sites)
    }
    group = {"bias": "lora_only" if biased else "none"}
    made = updates.adapter(factors, model, whole, labels=labels, **group)
    beside = (p.partition("/")[2] for p in whole)
    beside = sorted(path for path in beside if path.rpartition("/")[0] not in heads)
    return Converted(made, errors, updates.relative(errors), tuple(beside))


def _changed(table, path, before, after):
    """bool [l] or []: the layers in which kernel or bias of a module differ."""
    leaves = [f"{path}/{name}" for name in ("kernel", "bias") if f"{path}/{name}" in before]
    keep = 1 if None not in table.layers_of(path) else 0
    differ = [before[leaf] != after[leaf] for leaf in leaves]
    return np.any([one.any(tuple(range(keep, one.ndim))) for one in differ], axis=0)


def _groups(model):
    """{module path: groups} of the convolutions."""
    return {path: conv.groups for path, conv in convolution.geometry(model).items()}


def _cut(change, groups, rank):
    """(Factors, (error, norm)) of the change of a kernel [..., in / groups, out]."""
    change_gno = change.reshape(-1, groups, change.shape[-1] // groups).swapaxes(0, 1)
    found = updates.truncated(change_gno, rank)
    wrong = np.linalg.norm(updates.dense(found) - change_gno)
    return found, (float(wrong), float(np.linalg.norm(change_gno)))


# --- back ------------------------------------------------------------------------------------


class Unmerged(NamedTuple):
    params: Any  # {path: float32 array}, all leaves
    error: float  # merging again against what was given, relative, the worst leaf's
    replaced: tuple  # paths that the adapter holds whole: what the base had is not to be known


def unmerge(adapter, params):
    """`Unmerged`: the weights before an adapter was folded into `params` {path: float32 array}.

    For methods whose merge is m W + c, number by number (LoRA, IA3 and what else adds or scales):
    m and c are read off merges of zeros and of ones. That it is so is measured by merging again;
    Mistake if it is not, or where a factor is 0, for then the weight is lost.
    """
    flat = adapter.leaves | tree.flatten(peft.constants(adapter.methods))
    added = {path: np.asarray(leaf) for path, leaf in flat.items() if tree.under(path, peft.ADDED)}
    added = tree.unflatten(added)

    def merge(flat):
        return _arrays(peft.merge(adapter.methods, tree.unflatten(flat), added), None)

    def all_of(value):
        # In float64, or m of LoRA would be 1 by rounding only.
        return {path: np.full(leaf.shape, value, np.float64) for path, leaf in params.items()}

    c, both = merge(all_of(0.0)), merge(all_of(1.0))
    with np.errstate(divide="ignore", invalid="ignore"):
        found = {path: (leaf - c[path]) / (both[path] - c[path]) for path, leaf in params.items()}
        found = {path: leaf.astype(np.float32) for path, leaf in found.items()}
        again = merge(found)
    errors = {
        path: float(np.linalg.norm(again[path] - leaf) / max(np.linalg.norm(leaf), 1e-30))
        for path, leaf in params.items()
    }
    worst = max(errors, key=lambda path: np.nan_to_num(errors[path], nan=np.inf))
    if not errors[worst] < EXACT:
        methods = " + ".join(adapter.names)
        raise Mistake(
            f"{methods} cannot be taken out of {worst} again: merged once more it is off by "
            f"{errors[worst]:.1e}; the base itself is needed"
        )
    replaced = (path.partition("/")[2] for path in adapter.leaves if tree.under(path, peft.BASE))
    return Unmerged(found, errors[worst], tuple(sorted(replaced)))


def _arrays(params, dtype=np.float32):
    return {path: np.asarray(leaf, dtype) for path, leaf in tree.flatten(params).items()}
