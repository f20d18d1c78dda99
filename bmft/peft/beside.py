"""What moves of a method that is put on modules: its own leaves there, and beside them biases and
modules trained whole, as PEFT's `bias` and `modules_to_save` say."""

import numpy as np

from bmft.errors import Mistake, nearest


def check_bias(name, bias, only=None):
    """Mistake for a `bias` that a method does not know; only: PEFT's word, if not <name>_only."""
    known = ("none", "all", only or f"{name}_only")
    if bias not in known:
        raise Mistake(f"peft.{name}.bias: no {bias!r}; {nearest(bias, known)}")


def moves(name, sites, leaves, saved, bias):
    """`moves` and `rows` of a method (bmft.peft.Method).

    sites: {module path: bool [l] or []}, where it has the leaves that are called as `leaves`;
    saved: those of bmft.names.saved; bias: none, all, or else those of the sites.
    """
    whole = {path.rpartition("/")[0]: mask for path, mask in saved.items()}

    def masks(path):
        """Those by which a leaf moves: bool [l] or []."""
        collection, _, base = path.partition("/")
        module, _, leaf = base.rpartition("/")
        if collection == "peft":
            return [sites[module]] if leaf in leaves else []
        if collection != "params":
            return []
        found = [whole[module]] if base in saved else []
        if leaf == "bias" and bias == "all":
            found.append(np.True_)
        elif leaf == "bias" and bias != "none" and module in sites:
            found.append(sites[module])
        return found

    def rows(path):
        mask = np.any(np.broadcast_arrays(*masks(path)), axis=0)
        return None if mask.all() else mask

    return (lambda path: name if masks(path) else None), rows
