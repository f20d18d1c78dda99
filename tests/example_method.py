"""Steering vectors (Subramani et al. 2022, arXiv:2205.05124): what each block adds to the stream of
activations gets a vector more. It starts as zero: the adapted model starts as the base.

    peft/layers/mlp_norm/steering [l, d]
"""

import jax
import numpy as np

from bmft import peft, tree

SITE = "layers/mlp_norm"  # where the output of a block's second part meets the stream


def make(model, *, last: int = 0):
    """last: only the last so many blocks are steered; 0: all of them."""
    mask = np.arange(model.names.layers) >= (model.names.layers - last if last else 0)

    def hook(module, call, output, *args):
        if peft.path_of(module) == SITE:
            vector = peft.leaf(module, "steering", jax.nn.initializers.zeros, output.shape[-1:])
            output += vector.astype(output.dtype)
        return call(output, *args)

    def moves(path):
        return "steering" if path == f"peft/{SITE}/steering" else None

    def merge(params, added):
        flat, own = tree.flatten(params), tree.flatten(added["peft"])
        flat["layers/mlp/down/bias"] = flat["layers/mlp/down/bias"] + own[f"{SITE}/steering"]
        return tree.unflatten(flat)

    axes = {"steering": "d"}
    return peft.Method("steering", moves, hook, rows=lambda path: mask, axes=axes, merge=merge)
