"""Numbers that differ by module: entries `pattern=value`, as Hugging Face PEFT's rank_pattern and
alpha_pattern have them."""

import re

import numpy as np

from bmft import names
from bmft.errors import Mistake, nearest
from bmft.peft import matching


def read(key, entries, kind):
    """{pattern: value} of `pattern=value` entries; key: what the config calls them."""
    found = {}
    for entry in entries:
        pattern, equals, value = entry.rpartition("=")
        try:
            found[pattern] = kind(value)
            re.compile(pattern)
        except (ValueError, re.error):
            equals = ""
        if not equals or not pattern or found[pattern] <= 0:
            form = "'layer.0.attention.self.query=4'"
            raise Mistake(f"{key}: {entry!r} is not of the form {form}")
    return found


def values(key, table, sites, patterns, default):
    """{module path: [l] or []}: what the patterns say of each module of `sites`; 0 elsewhere."""
    found = {path: np.where(mask, default, 0) for path, mask in sites.items()}
    used = set()
    for path, mask in sites.items():
        for layer in matching.layers(mask):
            called = table.called(path, layer)
            found[path][matching.at(layer)] = names.pattern_value(patterns, called, default)
            used |= {
                pattern for pattern in patterns if names.pattern_value({pattern: 1}, called, 0)
            }
    for pattern in patterns:
        if pattern not in used:
            raise Mistake(f"{key}: {pattern!r} matches no target; {nearest(pattern, sites)}")
    return found


def entries(table, sites, patterns, default, field):
    """The `pattern=value` entries, with whole names, of a field of PEFT's configuration."""
    theirs = matching.pattern_values(table, sites, patterns, default, field)
    others = {path: mask & (theirs[path] != default) for path, mask in sites.items()}
    numbers = [value for path, mask in others.items() for value in theirs[path][mask]]
    called = matching.exact_names(table, others)
    return tuple(f"{name}={value}" for name, value in zip(called, numbers, strict=True))
