"""Norm tuning: only the scales and biases of the norms move: BatchNorm-only training of
convolutional nets (Frankle et al. 2021, arXiv:2003.00152), LayerNorm tuning of transformers (Zhao
et al. 2023, arXiv:2312.11420). The task's head moves as everywhere.

What becomes of BatchNorm's running statistics is not said here, but by model.batch_norm.

PEFT has it too: it holds a copy of the norm, running statistics and all, beside the original.

    base_model.model.resnet.embedder.embedder.normalization.ln_tuning_layers.weight
"""

from bmft import names, peft
from bmft.errors import Mistake
from bmft.peft import matching
from bmft.peft.files import Files, Layout

KINDS = ("norm",)
MOVING = ("scale", "bias")


def make(model, *, targets: tuple[str, ...] | None = None):
    """targets: norms by name (None: all of them). Raises Mistake where there are none."""
    found = model.names.modules(*KINDS)
    if not found:
        raise Mistake(f"peft.norm_tuning: {model.name} has no norms")
    sites = {path: matching.everywhere(model.names, path) for path in found}
    if targets is not None:
        sites = names.target(model.names, targets, head=model.heads, kinds=KINDS)

    def moves(path):
        collection, _, base = path.partition("/")
        module, _, leaf = base.rpartition("/")
        own = collection == "params" and module in sites and leaf in MOVING
        return "norm_tuning" if own else None

    def rows(path):
        mask = sites[path.partition("/")[2].rpartition("/")[0]]
        return None if mask.all() else mask

    files = Files(
        settings={"peft_type": "LN_TUNING"},
        sites=sites,
        kinds=KINDS,
        by_layer=False,
        copies="ln_tuning_layers",
    )
    return peft.Method("norm_tuning", moves, rows=rows, files=files)


def _arguments(fields, table):
    """`make`'s arguments from PEFT's configuration."""
    return {"targets": matching.exact_names(table, matching.targets(table, fields, KINDS))}


LAYOUT = Layout("LN_TUNING", fields={}, ignored=(), defaults={}, arguments=_arguments)
