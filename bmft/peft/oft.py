"""OFT (Qiu et al. 2023, arXiv:2306.07280) on dense layers: what they read is rotated in blocks.

    y = base(x R)    R = diag(R_1 … R_n), each orthogonal, from a skew Q by Cayley's transform

On activations, as OFTv2 (Qiu et al. 2025, arXiv:2506.19847) does: no matrix as large as the kernel
is made. By default R is OFTv2's series (Cayley-Neumann), cheaper and not quite orthogonal; exact,
PEFT turns the other way round: bmft/peft/rotation.py. Q starts at zero: the adapted model starts as
the base. Constrained (COFT), each Q is at most eps / sqrt(n) long, shortened where it is applied,
gradient and all; PEFT shortens the stored one in every step.

Shapes: l layers of a stack, n blocks, k the width of a block; n is 1 if all blocks share one.

    peft/<module>/oft_q [l, n, k (k - 1) / 2]    upper triangles of Q, row by row
"""

import re

import jax
import jax.numpy as jnp

from bmft import names, peft, tree
from bmft.errors import Mistake
from bmft.peft import beside, matching, rotation
from bmft.peft.files import Files, Layout

KINDS = ("dense",)
WIDTH = 32  # of a block, if nothing is said
ZEROS = jax.nn.initializers.zeros
# The version of PEFT whose series this is: older ones computed another.
SERIES = "0.18.0"


def make(
    model,
    *,
    blocks: int | None = None,
    block_size: int | None = None,
    neumann: bool = True,
    terms: int = 5,
    block_share: bool = False,
    coft: bool = False,
    eps: float = 6e-5,
    targets: tuple[str, ...] = ("query", "value"),
    layers_to_transform: tuple[int, ...] | None = None,
    bias: str = "none",
    modules_to_save: tuple[str, ...] = (),
):
    """blocks, block_size: one of the two, the other follows from a layer's width; neither: size 32.

    neumann: the series of so many terms; False: the exact transform. block_share: one Q for all.
    """
    _check(neumann, terms, coft, eps)
    beside.check_bias("oft", bias)
    if blocks is None and block_size is None:
        block_size = WIDTH
    rotation.check("oft", blocks, block_size)
    table = model.names
    saved = names.saved(table, modules_to_save)
    whole = {path.rpartition("/")[0]: mask for path, mask in saved.items()}
    about = {"head": model.heads, "layers": layers_to_transform, "without": whole}
    sites = names.target(table, targets, kinds=KINDS, **about)

    def change(upper, k):
        if coft:
            upper = _shortened(upper, eps)
        q = rotation.skew(upper, k)
        return rotation.neumann(q, terms) if neumann else rotation.cayley(q)

    def hook(module, call, *args):
        path = peft.path_of(module)
        if path not in sites:
            return call(*args)
        x = args[0].astype(jnp.float32)
        n, k = rotation.blocks("oft", path, x.shape[-1], blocks, block_size)
        shape = (1 if block_share else n, k * (k - 1) // 2)
        upper = peft.leaf(module, "oft_q", ZEROS, shape)
        return call(rotation.turn(x, change(upper, k)).astype(args[0].dtype), *args[1:])

    def merge(params, added):
        flat = tree.flatten(params)
        for path, upper in tree.flatten(added["peft"]).items():
            module, _, leaf = path.rpartition("/")
            if leaf == "oft_q":
                kernel = flat[f"{module}/kernel"]
                width = kernel.shape[-2]
                _, k = rotation.blocks("oft", module, width, blocks, block_size)
                flat[f"{module}/kernel"] = rotation.turn_kernel(kernel, change(upper, k))
        return tree.unflatten(flat)

    settings = {
        "peft_type": "OFT",
        "peft_version": SERIES,
        "r": blocks or 0,
        "oft_block_size": block_size or 0,
        "use_cayley_neumann": neumann,
        "num_cayley_neumann_terms": terms,
        "block_share": block_share,
        "coft": coft,
        "eps": eps,
        "bias": bias,
        "module_dropout": 0.0,
        "init_weights": True,
        "fan_in_fan_out": False,
    }
    moves, rows = beside.moves("oft", sites, ("oft_q",), saved, bias)
    files = Files(settings, sites, modules_to_save, _encode, _decode, kinds=KINDS)
    axes = {"oft_q": "."}
    return peft.Method("oft", moves, hook, rows=rows, axes=axes, merge=merge, files=files)


def _shortened(upper, eps):
    """Q, as its upper triangle [..., n, k (k - 1) / 2], at most eps / sqrt(n) long."""
    longest = eps / upper.shape[-2] ** 0.5
    squared = 2 * jnp.square(upper).sum(-1, keepdims=True)
    is_longer = squared > longest**2
    # The root of what is not longer is not looked at: at zero it has no gradient.
    shorter = longest * jax.lax.rsqrt(jnp.where(is_longer, squared, 1.0))
    return upper * jnp.where(is_longer, shorter, 1.0)


def _check(neumann, terms, coft, eps):
    if neumann and terms < 2:
        raise Mistake(f"peft.oft.terms is {terms}; the series rotates nothing with less than 2")
    if coft and eps <= 0:
        raise Mistake(f"peft.oft.eps is {eps}; it must be above 0")


# --- in PEFT's files -------------------------------------------------------------------------


def _encode(path, layer, leaves):
    return {"oft_R.weight": leaves["oft_q"]}


def _decode(path, layer, tensors):
    return {"oft_q": tensors["oft_R.weight"]}


def _arguments(fields, table):
    """`make`'s arguments from PEFT's configuration: with whole names, whatever it matched by."""
    version = re.match(r"(\d+)\.(\d+)", fields["peft_version"])
    if fields["use_cayley_neumann"] and (
        not version or tuple(map(int, version.groups())) < (0, 18)
    ):
        raise Mistake(
            f"use_cayley_neumann is true and peft_version {fields['peft_version']!r}: before 0.18 "
            "peft summed another series; peft 0.17 runs it"
        )
    sites = matching.targets(table, fields, KINDS)
    heads = matching.head_modules(table)
    saved = matching.saved(table, fields["modules_to_save"])
    # PEFT's zero is "not given".
    return {
        "blocks": fields["r"] or None,
        "block_size": fields["oft_block_size"] or None,
        "neumann": fields["use_cayley_neumann"],
        "terms": fields["num_cayley_neumann_terms"],
        "block_share": fields["block_share"],
        "coft": fields["coft"],
        "eps": float(fields["eps"]),
        "targets": matching.exact_names(table, sites),
        "bias": fields["bias"],
        "modules_to_save": matching.exact_names(
            table, {path: mask for path, mask in saved.items() if path not in heads}
        ),
    }


LAYOUT = Layout(
    peft_type="OFT",
    fields={
        "r": ((int,), 0),
        "oft_block_size": ((int,), WIDTH),
        "use_cayley_neumann": ((bool,), True),
        "num_cayley_neumann_terms": ((int,), 5),
        "block_share": ((bool,), False),
        "coft": ((bool,), False),
        "eps": ((int, float), 6e-5),
        "bias": ((str,), "none"),
        "peft_version": ((str,), ""),
    },
    # The dropout is one of training, and peft 0.21 never calls it; fan_in_fan_out speaks of GPT-2's
    # layers; the start is of no matter afterwards.
    ignored=("module_dropout", "fan_in_fan_out", "init_weights"),
    defaults={},
    arguments=_arguments,
)
