"""Partial fine-tuning: the last stages or layers of the base move, whole, with all that comes after
them (a last norm, a pooler, the head); what comes before stays as it is (Yosinski et al. 2014,
arXiv:1411.1792).

A stage is a piece of a model that is no stack: of a ResNet its stem or one of its stages, of a VGG
a block or a dense layer. Of a stack it is a layer.
"""

import numpy as np

from bmft import tree
from bmft.errors import Mistake
from bmft.peft import Method


def make(model, *, last: int = 1):
    """last: how many stages, or layers of the stack. Raises Mistake if there are not so many."""
    stages, depth = model.names.stages, model.names.layers
    count, unit = (len(stages), "stages") if stages else (depth, "layers")
    if not 1 <= last <= count:
        raise Mistake(f"peft.partial_tuning.last is {last}; {model.name} has 1 to {count} {unit}")
    stay = stages[: count - last] if stages else ("embeddings",)
    mask = np.arange(depth) >= depth - last

    def moves(path):
        collection, _, base = path.partition("/")
        return "partial_tuning" if collection == "params" and not tree.under(base, stay) else None

    def rows(path):
        return mask if path.startswith("params/layers/") and not mask.all() else None

    return Method("partial_tuning", moves, rows=rows)
