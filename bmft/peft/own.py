"""Our own layout of adapters: any methods together, whole stacks by our own paths.

    params/layers/mlp/up/bias [l, f]        peft/layers/mlp/adapter_up_kernel [l, m, d]

peft_type is `BMFT_<METHOD>`; `methods` and `groups` say what was built, and how.
"""

import inspect

import numpy as np

from bmft import check, peft, tree
from bmft.errors import Mistake, nearest
from bmft.peft import portable

PREFIX = "BMFT_"


def encode(methods, groups, model, moving, frozen):
    """(fields of adapter_config.json, {path: array}) of methods and what moved with them."""
    names = [method.name for method in methods]
    moved = tree.flatten(moving)
    claimed = peft.claims(methods, moved, heads=model.heads)
    settings = {
        "peft_type": _type(methods),
        "methods": names,
        "groups": {name: _group(name, groups.get(name, {})) for name in names},
        # Leaves that no base file had, which moved with the head.
        "fresh": sorted(
            path.removeprefix("params/")
            for path in moved
            if path.startswith("params/") and path not in claimed
        ),
    }
    return settings, moved | tree.flatten(peft.added({}, frozen))


def decode(fields, tensors, model, file, tensors_file):
    """(methods, groups, leaves, rows, repeated) of bmft.peft.files.Adapter.

    fields: of adapter_config.json `file`, but those that PEFT's have, too; tensors: of
    tensors_file. Raises Mistake for a field or tensor that is missing, unknown, or does not fit.
    """
    known = {"peft_type": str, "methods": list, "groups": dict, "fresh": list}
    for field in sorted({*fields, *known}):
        if field not in known:
            raise Mistake(f"{file}: unknown field {field!r}; {nearest(field, known)}")
        if not isinstance(fields.get(field), known[field]):
            raise Mistake(f"{file}: field {field!r} must be a {known[field].__name__}")
    for field in ("methods", "fresh"):
        if not all(isinstance(entry, str) for entry in fields[field]):
            raise Mistake(f"{file}: field {field!r} must be a list of texts")
    names, groups = tuple(fields["methods"]), fields["groups"]
    try:
        for name in names:
            peft.get(name)
        groups = {name: _from_json(name, groups.get(name, {})) for name in names}
        methods = peft.build(model, names, groups) if names else ()
        if not names or fields["peft_type"] != _type(methods):
            raise Mistake(f"peft_type {fields['peft_type']!r} is not that of methods {names}")
        base, added = portable.expected(methods, model)
    except Mistake as mistake:
        raise Mistake(f"{file}: {mistake}") from None
    running = {leaf.path for leaf in model.names.leaves if leaf.is_statistic}
    statistics = {f"batch_stats/{path}": base.pop(path).shape for path in running}
    shapes = {f"params/{path}": leaf.shape for path, leaf in base.items()}
    shapes |= {path: leaf.shape for path, leaf in added.items()}
    for path in fields["fresh"]:
        if path not in base:
            raise Mistake(f"{file}: field 'fresh' names {path!r}; {nearest(path, base)}")
    claimed = peft.claims(methods, shapes, heads=model.heads, fresh=fields["fresh"])
    wanted = {path: s for path, s in shapes.items() if path in claimed or path in added}
    constants = tree.flatten(peft.constants(methods))
    if any(path.startswith("batch_stats/") for path in tensors):  # all of them moved, or none
        wanted |= statistics
    portable.check(wanted, tensors, tensors_file)
    for path, leaf in constants.items():
        if not np.allclose(tensors.pop(path), leaf, rtol=1e-6):
            raise Mistake(f"{tensors_file}: {path} is not what {file.name} makes of it")
    return methods, groups, tensors, {}, {}


def _from_json(name, group):
    """A method's group as its make takes it; Mistake for another key or a value of a wrong type."""
    wanted = inspect.signature(peft.get(name)).parameters
    wanted = {key: wanted[key].annotation for key in list(wanted)[1:]}
    if not isinstance(group, dict):
        raise Mistake(f"field 'groups': {name!r} must be a dict")
    values = {}
    for key, value in group.items():
        if key not in wanted:
            raise Mistake(f"peft.{name} has no {key!r}; {nearest(key, wanted)}")
        try:
            values[key] = check.convert(value, wanted[key], is_text=False)
        except (ValueError, OverflowError):
            needs = check.describe(wanted[key])
            raise Mistake(
                f"field 'groups': peft.{name}.{key} is {value!r}; needs {needs}"
            ) from None
    return values


def _type(methods):
    alone = methods[0].files if len(methods) == 1 else None
    names = [alone.own] if alone and alone.own else [method.name for method in methods]
    return PREFIX + "_".join(names).upper()


def _group(name, group):
    """Those keys of a method's group that are its make's."""
    wanted = inspect.signature(peft.get(name)).parameters
    return {key: value for key, value in group.items() if key in wanted}
