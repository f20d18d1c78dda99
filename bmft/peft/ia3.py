"""IA3 (Liu et al. 2022, arXiv:2205.05638), as PEFT computes it: learnt factors of activations.

    y = base(x) * l         on most modules: on what they give, bias included
    y = base(x * l)         on feed-forward modules: on what they read

On a convolution l is a factor for each feature map. It starts as ones: the adapted model starts as
the base. A module of a stack that is feed-forward in some layers only has both, one in each layer.

    peft/<module>/ia3_out [l, out]        peft/<module>/ia3_in [l, in]
"""

import jax
import jax.numpy as jnp
import numpy as np

from bmft import names, peft, tree
from bmft.errors import Mistake
from bmft.peft import matching
from bmft.peft.files import Files, Layout

KINDS = ("dense", "conv")
MLP = "layers/mlp/down"  # the MLP's second layer: what it reads is what the paper scales
ONES = jax.nn.initializers.ones
AXES = {"ia3_in": "i", "ia3_out": "o"}  # see bmft.peft.Method


def make(
    model,
    *,
    targets: tuple[str, ...] = ("key", "value", "mlp.down"),
    feedforward: tuple[str, ...] | None = None,
    modules_to_save: tuple[str, ...] = (),
):
    """targets: the defaults are the paper's; `all-conv` is every convolution. feedforward: those of
    them whose input is scaled (None: the MLP's second layer)."""
    table = model.names
    saved = names.saved(table, modules_to_save)
    whole = {path.rpartition("/")[0]: mask for path, mask in saved.items()}
    about = {"head": model.heads, "without": whole, "kinds": KINDS}
    sites = names.target(table, targets, **about)
    inputs = _inputs(table, sites, feedforward, about)
    outputs = {path: mask & ~inputs.get(path, np.False_) for path, mask in sites.items()}
    masks = {"ia3_in": inputs, "ia3_out": {path: m for path, m in outputs.items() if m.any()}}

    def hook(module, call, *args):
        path = peft.path_of(module)
        if path in masks["ia3_in"]:
            args = (_scaled(module, "ia3_in", args[0]), *args[1:])
        out = call(*args)
        return _scaled(module, "ia3_out", out) if path in masks["ia3_out"] else out

    def moves(path):
        collection, _, base = path.partition("/")
        own = collection == "peft" and base.rpartition("/")[2] in masks
        return "ia3" if own or (collection == "params" and base in saved) else None

    def rows(path):
        module, _, leaf = path.partition("/")[2].rpartition("/")
        mask = (masks[leaf] if path.startswith("peft/") else whole)[module]
        return None if mask.all() else mask

    settings = {"peft_type": "IA3", "init_ia3_weights": True, "fan_in_fan_out": False}
    files = Files(
        settings,
        sites,
        modules_to_save,
        *_codec(table, inputs),
        parts={"feedforward_modules": inputs},
        by_layer=False,
        elsewhere=1.0,
    )
    undecayed = tuple(masks)  # they start at 1
    return peft.Method(
        "ia3", moves, hook, rows=rows, axes=AXES, undecayed=undecayed, merge=_merge, files=files
    )


def _inputs(table, sites, feedforward, about):
    """The modules of `sites` whose input is scaled: {module path: bool [l] or []}."""
    if feedforward is None:
        return {MLP: sites[MLP]} if MLP in sites else {}
    if not feedforward:
        return {}
    inputs = names.target(table, feedforward, **about)
    for path, mask in inputs.items():
        if path not in sites or (mask & ~sites[path]).any():
            raise Mistake(f"peft.ia3.feedforward means {path}, which is not among peft.ia3.targets")
    return inputs


def _scaled(module, name, x):
    factor = peft.leaf(module, name, ONES, x.shape[-1:])
    return (x.astype(jnp.float32) * factor).astype(x.dtype)


def _merge(params, added):
    """The factors in the kernels [l, ..., in / groups, out] and, of outputs, in the biases."""
    flat = tree.flatten(params)
    for path, factor in tree.flatten(added["peft"]).items():
        module, _, name = path.rpartition("/")
        if name not in ("ia3_in", "ia3_out"):
            continue
        kernel = flat[f"{module}/kernel"]
        *stack, n = factor.shape
        if name == "ia3_in":
            read, out = kernel.shape[-2:]
            groups = n // read  # each reads its own part of the input for its part of the output
            of_group = factor.reshape(*stack, groups, read).swapaxes(-1, -2)
            factor_io = of_group.repeat(out // groups, axis=-1)
        else:
            factor_io = factor[..., None, :]
            if f"{module}/bias" in flat:
                flat[f"{module}/bias"] = flat[f"{module}/bias"] * factor
        sides = (1,) * (kernel.ndim - len(stack) - 2)  # of a convolution
        flat[f"{module}/kernel"] = kernel * factor_io.reshape(*stack, *sides, *factor_io.shape[-2:])
    return tree.unflatten(flat)


# --- in PEFT's files -------------------------------------------------------------------------


def _codec(table, inputs):
    """`encode` and `decode` of bmft.peft.files.Files: one vector `ia3_l`, with axes of length 1."""
    convolutions = table.modules("conv")

    def is_input(path, layer):
        return path in inputs and bool(inputs[path][matching.at(layer)])

    def encode(path, layer, leaves):
        factor = leaves["ia3_in" if is_input(path, layer) else "ia3_out"]
        if path in convolutions:
            return {"ia3_l": factor[None, :, None, None]}
        return {"ia3_l": factor[None] if is_input(path, layer) else factor[:, None]}

    def decode(path, layer, tensors):
        return {"ia3_in" if is_input(path, layer) else "ia3_out": tensors["ia3_l"].ravel()}

    return encode, decode


def _arguments(fields, table):
    """`make`'s arguments from PEFT's configuration: with whole names, whatever it matched by."""
    sites = matching.targets(table, fields, KINDS)
    inputs = matching.part(table, sites, fields["feedforward_modules"], "feedforward_modules")
    heads = matching.head_modules(table)
    saved = matching.saved(table, fields["modules_to_save"])
    return {
        "targets": matching.exact_names(table, sites),
        "feedforward": matching.exact_names(table, inputs),
        "modules_to_save": matching.exact_names(
            table, {path: mask for path, mask in saved.items() if path not in heads}
        ),
    }


LAYOUT = Layout(
    peft_type="IA3",
    fields={"feedforward_modules": ((list[str], str), None)},
    # fan_in_fan_out speaks of GPT-2's layers; the start is of no matter afterwards.
    ignored=("fan_in_fan_out", "init_ia3_weights"),
    defaults={},
    arguments=_arguments,
)
