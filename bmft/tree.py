"""Nested dicts addressed by '/'-path: flatten, split, join, cut by layer, count, describe.

A parameter tree is a dict of dicts of arrays; the path of a leaf is its keys joined by '/':
`layers/attention/query/kernel`. A tree of variables has the collection's name in front:
`params/layers/attention/query/kernel`, `peft/layers/attention/query/lora_a`.
"""

import math
import re


def flatten(tree, prefix=""):
    """{path: leaf}, in the order of the sorted keys (the order JAX flattens dicts in)."""
    flat = {}
    for key in sorted(tree):
        path = f"{prefix}/{key}" if prefix else key
        if isinstance(tree[key], dict):
            flat.update(flatten(tree[key], path))
        else:
            flat[path] = tree[key]
    return flat


def unflatten(flat):
    """The nested dict of `{path: leaf}`."""
    tree = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def split(tree, belongs):
    """Two trees: the leaves whose path satisfies `belongs(path)`, and the others."""
    flat = flatten(tree)
    return (
        unflatten({path: leaf for path, leaf in flat.items() if belongs(path)}),
        unflatten({path: leaf for path, leaf in flat.items() if not belongs(path)}),
    )


def join(*trees):
    """One tree of several that share no leaf; raises KeyError, naming the path, if they do."""
    joined = {}
    for tree in trees:
        for path, leaf in flatten(tree).items():
            if path in joined:
                raise KeyError(f"two leaves at {path}")
            joined[path] = leaf
    return unflatten(joined)


def map_with_path(function, tree):
    """The tree of `function(path, leaf)`."""
    return unflatten({path: function(path, leaf) for path, leaf in flatten(tree).items()})


def under(path, prefixes):
    """Is `path` one of `prefixes`, or below one of them?"""
    return any(path == prefix or path.startswith(prefix + "/") for prefix in prefixes)


def match(pattern, path):
    """Full match of a glob: `*` is anything within one level, `**` anything."""
    regex = re.escape(pattern).replace(r"\*\*", ".*").replace(r"\*", "[^/]*")
    return re.fullmatch(regex, path) is not None


def count(tree):
    """How many numbers the leaves hold."""
    return sum(math.prod(leaf.shape) for leaf in flatten(tree).values())


def describe(tree):
    """A row a leaf: (path, shape, dtype name)."""
    return [(path, tuple(leaf.shape), str(leaf.dtype)) for path, leaf in flatten(tree).items()]
