"""A built method's leaves as the tensors of a PEFT adapter, and back.

Which leaves stand there is a function of the modules the method is on, of `bias`, and of the
modules trained whole: the head, what no base file had, modules_to_save, and each norm whose running
statistics moved. Writing and reading both go by it, so what is written is what is looked for.
"""

import re

import jax
import numpy as np

from bmft import layers, peft, tree
from bmft.errors import Mistake, nearest
from bmft.names import from_file, in_file, to_file
from bmft.peft import matching

PREFIX = "base_model.model."
COUNTER = "num_batches_tracked"  # stands beside running statistics in torch; decides nothing here


def encode(method, model, moving, frozen, implied):
    """(fields of adapter_config.json, {key: tensor}) of one method and what moved with it; None if
    PEFT has no such adapter.

    implied: what PEFT takes for modules_to_save beside those of the file.
    """
    own, names = method.files, model.names
    moved, still = _base(moving), _base(frozen)
    whole = _moved_whole(method, names, moved)
    saved = matching.spell_saved(names, whole, own.modules_to_save, implied) if own.saves else []
    if saved is None or (own.expressible and not own.expressible(model)):
        return None
    slots = _slots(names, own, whole)
    _check_complete(method, names, moved, slots)
    tensors = {key: np.zeros((), np.int64) for key in _counters(slots)}
    for key, (leaf, layer) in slots.items():
        array = np.asarray(moved[leaf.path] if leaf.path in moved else still[leaf.path])
        tensors[key] = to_file(_layout(leaf), array if layer is None else array[layer])
    tensors |= _encode_added(method, names, peft.added(moving, frozen))
    where = {}
    if own.sites:
        where = matching.spell_targets(
            names, own.sites, (*saved, *implied), own.kinds, own.parts, own.by_layer
        )
    fields = own.settings | where | ({"modules_to_save": saved} if own.saves else {})
    return own.pack(fields, tensors) if own.pack else (fields, tensors)


def dialect(names, keys):
    """The names table in that spelling of transformers' modules which the keys of an adapter have:
    the newest of those that know the most of them."""

    def known(table):
        modules = tuple(f"{PREFIX}{name}." for name in matching.modules(table))
        return sum(key.startswith(modules) for key in keys)

    return max(names.dialects(), key=known)


def decode(method, model, shapes, tensors, modules_to_save, file):
    """(leaves, rows, repeated) of bmft.peft.files.Adapter from the {key: tensor} of a file; the
    model's names are in the file's dialect, shapes are those that `expected` gives.

    Raises Mistake, naming file and key, unless the keys and shapes are exactly the method's.
    """
    names, own, bias = model.names, method.files, method.files.settings.get("bias")
    base, added = shapes
    whole = matching.saved(names, modules_to_save) | matching.head_modules(names)
    whole = whole if own.saves else _standing(names, own, tensors)
    slots = _slots(names, own, whole)
    wanted = dict.fromkeys(_counters(slots), ()) | {
        key: _shape(leaf, layer, base[leaf.path].shape) for key, (leaf, layer) in slots.items()
    }
    zeros = {path: np.zeros(leaf.shape, np.float32) for path, leaf in added.items()}
    zeros |= tree.flatten(peft.constants((method,)))
    of_method = _encode_added(method, names, tree.unflatten(zeros))
    wanted |= {key: tensor.shape for key, tensor in of_method.items()}
    repeated = {key: leaf for key, leaf in _embeddings(names).items() if key not in wanted}
    repeated = {key: leaf for key, leaf in repeated.items() if key in tensors}
    wanted |= {key: _shape(leaf, None, base[leaf.path].shape) for key, leaf in repeated.items()}
    check(wanted, tensors, file, may_have=_copies(tensors, wanted) if bias == "all" else ())
    leaves, rows = {}, {}
    for key, (leaf, layer) in slots.items():
        path = f"{'batch_stats' if leaf.is_statistic else 'params'}/{leaf.path}"
        if layer is None:
            leaves[path] = from_file(_layout(leaf), tensors[key])
            continue
        leaves.setdefault(path, np.zeros(base[leaf.path].shape, np.float32))
        rows.setdefault(path, np.zeros(names.layers, bool))
        leaves[path][layer] = from_file(_layout(leaf), tensors[key])
        rows[path][layer] = True
    leaves |= _decode_added(method, names, added, tensors)
    rows = {path: mask for path, mask in rows.items() if not mask.all()}
    return (
        leaves,
        rows,
        {
            f"params/{leaf.path}": from_file(_layout(leaf), tensors[key])
            for key, leaf in repeated.items()
        },
    )


def expected(methods, model):
    """The shapes of the base tree and of what `methods` add to it: ({path: shape},
    {collection/path: shape})."""
    base = layers.shapes(model.module, model.dummy)
    added = jax.eval_shape(peft.attach(methods, model).add, jax.random.key(0), base)
    leaves = tree.join(*(base[name] for name in peft.BASE if name in base))
    return tree.flatten(leaves), tree.flatten(added)


def check(wanted, tensors, file, may_have=()):
    """Refuses missing and unexpected keys, and wrong shapes; wanted is {key: shape}."""
    unexpected = sorted(set(tensors) - set(wanted) - set(may_have))
    missing = sorted(set(wanted) - set(tensors))
    if missing:
        near = nearest(missing[0], unexpected) if unexpected else f"{len(missing)} are missing"
        raise Mistake(f"{file}: no tensor {missing[0]!r}; {near}")
    if unexpected:
        near = nearest(unexpected[0], wanted)
        raise Mistake(f"{file}: tensor {unexpected[0]!r} has no place in the model; {near}")
    for key, shape in wanted.items():
        if tensors[key].shape != tuple(shape):
            found = list(tensors[key].shape)
            raise Mistake(
                f"{file}: tensor {key!r} has shape {found}, the model needs {list(shape)}"
            )


# --- leaves of the base ----------------------------------------------------------------------


def _base(variables):
    """{path: leaf} of the base's leaves and running statistics."""
    params, statistics = (variables.get(name, {}) for name in ("params", "batch_stats"))
    return tree.flatten(params) | tree.flatten(statistics)


def _slots(names, own, whole):
    """{key: (leaf, layer)} of the base leaves in an adapter.

    own: the method's Files, whose `bias` says of which modules the biases are in it: all, those of
    its sites (lora_only, ...), or none. whole: modules trained whole {path: bool [l]}.
    """
    slots, bias = {}, own.settings.get("bias")
    for leaf in names.leaves:
        module, _, last = leaf.path.rpartition("/")
        for layer in names.layers_of(leaf.path):
            on_site = _holds(own.sites, module, layer)
            biased = last == "bias" and (bias == "all" or (bias not in (None, "none") and on_site))
            copied = on_site and own.copies
            if biased or copied or _holds(whole, module, layer):
                name, _, end = names.full(leaf).format(layer).rpartition(".")
                # PEFT's module on a site holds the original as base_layer.
                name += f".{own.copies or 'base_layer'}" if on_site else ""
                slots[f"{own.prefix}{name}.{end}"] = leaf, layer
    return slots


def _standing(names, own, tensors):
    """The modules, and their layers, of which a leaf stands in a file."""
    every = {path: matching.everywhere(names, path) for path in names.modules(*matching.KINDS)}
    found = {path: np.zeros_like(mask) for path, mask in every.items()}
    for key, (leaf, layer) in _slots(names, own, every).items():
        if key in tensors:
            found[leaf.path.rpartition("/")[0]][matching.at(layer)] = True
    return found


def _counters(slots):
    """The keys of torch's counters of batches."""
    ends = (key.rpartition(".")[0] for key, (leaf, _) in slots.items() if leaf.is_statistic)
    return {f"{module}.{COUNTER}" for module in ends}


def _holds(chosen, module, layer):
    return module in chosen and bool(chosen[module][matching.at(layer)])


def _moved_whole(method, names, moved):
    """The head, and modules that moved by more than the method's own leaves and `bias` say."""
    own, bias = method.files, method.files.settings.get("bias")
    whole = dict(matching.head_modules(names))
    for path in moved:
        module, _, last = path.rpartition("/")
        by_bias = last == "bias" and (
            bias == "all" or (bias not in (None, "none") and module in own.sites)
        )
        by_site = own.copies and module in own.sites
        if not by_bias and not by_site and module not in whole:
            rows = peft.moving_rows((method,), f"params/{path}")
            whole[module] = matching.everywhere(names, module) if rows is None else rows
    return whole


def _check_complete(method, names, moved, slots):
    """Every layer of every leaf that moved has a place in the file."""
    placed = {(leaf.path, layer) for leaf, layer in slots.values()}
    for path in moved:
        rows = peft.moving_rows((method,), f"params/{path}")
        for layer in names.layers_of(path):
            still = rows is not None and not rows[matching.at(layer)]
            assert still or (path, layer) in placed, f"{path}, layer {layer}, would be lost"


def _layout(leaf):
    return leaf.written_layout or leaf.layout


def _shape(leaf, layer, shape):
    """The shape of a leaf of a layer in the file."""
    return in_file(_layout(leaf), shape if layer is None else shape[1:])


def _embeddings(names):
    """{key: leaf} of the tables of embeddings, and of a language model's head, that PEFT may write
    beside an adapter (save_embedding_layers), by themselves or as what its module on them holds."""
    tables = {
        name: names.leaf(f"{path}/embedding") for path, name in names.modules("embed").items()
    }
    if names.head:
        leaf = names.leaf("embeddings/word/embedding") if names.is_tied else names.head
        tables[names.full(names.head).rpartition(".")[0]] = leaf
    return {
        f"{PREFIX}{name}{inside}.weight": leaf
        for name, leaf in tables.items()
        for inside in ("", ".base_layer", ".token_adapter.base_layer")
    }


def _copies(keys, wanted):
    """Keys of biases that PEFT writes again under bias=all: the copies its wrappers hold."""
    wrappers = (r"\.original_module\.", r"\.modules_to_save\.", r"\.modules_to_save\.[^.]+\.")
    return [
        key
        for key in keys
        if key.endswith(".bias")
        and any(re.sub(wrapper, ".", key) in wanted for wrapper in wrappers)
    ]


# --- leaves of the method --------------------------------------------------------------------


def _by_module(leaves, sites):
    """({module path: {name: leaf}} of the modules `sites`, {path: leaf} of all others) of leaves
    {collection/path: leaf}."""
    modules, others = {}, {}
    for path, leaf in leaves.items():
        collection, _, where = path.partition("/")
        module, _, name = where.rpartition("/")
        if module in sites and collection != "peft_shared":
            modules.setdefault(module, {})[name] = leaf
        else:
            others[path] = leaf
    return modules, others


def _encode_added(method, names, added):
    """{key: tensor} of what the method added, {collection: tree}."""
    added = {path: np.asarray(leaf) for path, leaf in tree.flatten(added).items()}
    modules, others = _by_module(added, method.files.sites)
    tensors = method.files.encode_others(others) if method.files.encode_others else {}
    for path, leaves in modules.items():
        for layer in matching.layers(method.files.sites[path]):
            mine = {name: leaf[matching.at(layer)] for name, leaf in leaves.items()}
            theirs = PREFIX + names.called(path, layer)[1]
            encoded = method.files.encode(path, layer, mine)
            tensors |= {f"{theirs}.{end}": tensor for end, tensor in encoded.items()}
    return tensors


def at_rest(own, path):
    """What the leaf at a path is in layers that the method (its Files `own`) is not on."""
    rest = own.elsewhere
    return rest.get(path.rpartition("/")[2], 0.0) if isinstance(rest, dict) else rest


def _decode_added(method, names, added, tensors):
    """{collection/path: leaf} of those in `added` {collection/path: shape} that move."""
    own = method.files
    moving = {path: leaf for path, leaf in added.items() if path.startswith("peft/")}
    leaves = {
        path: np.full(leaf.shape, at_rest(own, path), np.float32) for path, leaf in moving.items()
    }
    leaves |= own.decode_others(tensors) if own.decode_others else {}
    for path in _by_module(moving, own.sites)[0]:
        for layer in matching.layers(own.sites[path]):
            theirs = PREFIX + names.called(path, layer)[1] + "."
            mine = {
                key.removeprefix(theirs): t for key, t in tensors.items() if key.startswith(theirs)
            }
            for name, array in method.files.decode(path, layer, mine).items():
                leaves[f"peft/{path}/{name}"][matching.at(layer)] = array
    return leaves
