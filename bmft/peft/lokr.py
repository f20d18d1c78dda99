"""LoKr: a Kronecker product (LyCORIS, Yeh et al. 2023, arXiv:2309.14859), as PEFT computes it:

    y = base(x) + x kron(W1, W2) alpha / rank        in = m n, out = p q, W1 [m, p], W2 [n, q]

m and p are the smaller ones, divisors next to the square root, or `decompose_factor` where that
divides. W2 is a product B2 A2 of this rank where rank < max(n, q) / 2, W1 is one where rank <
max(m, p) / 2 and `decompose_both`; else they stand whole, and the rank counts for the scale alone.
The Kronecker product is never built: x is [.., m, n], and meets the factors in the order that takes
the fewest operations.

W1, or A1, starts as zero: the adapted model starts as the base. The others start uniform in
±1/sqrt(fan-in) (torch's kaiming with a = sqrt 5), A2 in ±1/sqrt(rank).

    peft/<module>/lokr_w1 [l, m, p]    or lokr_b1 [l, m, r], lokr_a1 [l, r, p]
    peft/<module>/lokr_w2 [l, n, q]    or lokr_b2 [l, n, r], lokr_a2 [l, r, q]

r is the largest rank of the layers that have such products. A module has both of a kind where the
layers differ by it (rank_pattern), each of which counts in its own. Constants: bmft.peft.lycoris.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from bmft import peft, tree
from bmft.errors import Mistake
from bmft.peft import lycoris, matching
from bmft.peft.files import Layout

KINDS = ("dense",)
ZEROS = jax.nn.initializers.zeros
LEAVES = tuple(f"lokr_{name}{side}" for side in "12" for name in "wba")


def make(
    model,
    *,
    rank: int = 8,
    alpha: float = 8.0,
    targets: tuple[str, ...] = ("query", "value"),
    decompose_both: bool = False,
    decompose_factor: int = -1,
    rank_dropout: float = 0.0,
    rank_dropout_scale: bool = False,
    module_dropout: float = 0.0,
    rank_pattern: tuple[str, ...] = (),
    alpha_pattern: tuple[str, ...] = (),
    layers_to_transform: tuple[int, ...] | None = None,
    modules_to_save: tuple[str, ...] = (),
):
    """decompose_factor: -1 is none. rank_dropout, module_dropout: see bmft.peft.lycoris;
    rank_dropout_scale: what stays makes up for it. rank_pattern, alpha_pattern: `pattern=value` by
    unstacked module name, first match wins."""
    if decompose_factor != -1 and decompose_factor < 1:
        raise Mistake(
            f"peft.lokr.decompose_factor is {decompose_factor}; it must be 1 or more, or -1: none"
        )
    placed = lycoris.place(
        "lokr",
        model.names,
        model.heads,
        rank=rank,
        alpha=alpha,
        targets=targets,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        layers_to_transform=layers_to_transform,
        modules_to_save=modules_to_save,
        rank_dropout=rank_dropout,
        module_dropout=module_dropout,
        kinds=KINDS,
    )
    placed.settings.update(
        decompose_both=decompose_both,
        decompose_factor=decompose_factor,
        rank_dropout_scale=rank_dropout_scale,
    )

    def hook(module, call, *args):
        out, path = call(*args), peft.path_of(module)
        if path not in placed.sites:
            return out
        x = args[0].astype(jnp.float32)
        (m, n), (p, q) = (
            factorize(size, decompose_factor) for size in (x.shape[-1], out.shape[-1])
        )
        ranks = placed.ranks[path][placed.sites[path]]
        own = module.get_variable("peft_const", "lokr_rank")
        one = _leaves(module, "1", (m, p), ranks if decompose_both else None, own, ZEROS)
        two = _leaves(module, "2", (n, q), ranks, own, None)
        update = _update(x, _product(one, own), _product(two, own))
        update *= module.get_variable("peft_const", "lokr_scale")
        update = lycoris.dropped(module, update, rank_dropout, module_dropout, rank_dropout_scale)
        return out + update.astype(out.dtype)

    # The update is zero to the bit, but XLA fuses what gives x otherwise where x is also reshaped:
    # 4e-7 was seen.
    axes = dict.fromkeys(LEAVES, ".")  # a factor's axis is no part of the inputs or the outputs
    codec = _codec(placed)
    return lycoris.method("lokr", placed, LEAVES, axes, hook, _merge, *codec, identity=2e-6)


def factorize(size, factor=-1):
    """(m, n) with m n = size. m is the factor where it divides; else the largest divisor that is
    neither above it (-1: any) nor above the square root."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = math.isqrt(size) if factor == -1 else min(math.isqrt(size), factor)
    m = max(m for m in range(1, most + 1) if size % m == 0)
    return m, size // m


def _is_whole(rank, shape):
    """Does a matrix of this shape stand whole at a rank, a number or an array?"""
    return rank >= max(shape[-2:]) / 2


def _leaves(module, side, shape, ranks, own, start):
    """{w, b, a: leaf} of a side, in a hook: w where it stands whole in a layer, b and a where not.

    ranks: of the layers, NumPy; None: it stands whole at any. own: this layer's, of which there is
    only the value. start: of w or a; None: uniform."""
    whole = np.True_ if ranks is None else _is_whole(ranks, shape)
    by_width, leaves = lycoris.uniform(shape[0]), {}
    if whole.any():
        leaves["w"] = peft.leaf(module, f"lokr_w{side}", start or by_width, shape)
    if not whole.all():
        r = _largest(ranks, shape)
        leaves["b"] = peft.leaf(module, f"lokr_b{side}", by_width, (shape[0], r))
        leaves["a"] = peft.leaf(
            module, f"lokr_a{side}", start or lycoris.uniform(own), (r, shape[1])
        )
    return leaves


def _largest(ranks, shape):
    """The largest rank of those at which a matrix is a product."""
    return int(ranks[~_is_whole(ranks, shape)].max())


def _product(leaves, own):
    """The matrices whose product a side is; own: the rank, [] or [l, 1, 1]."""
    if "b" not in leaves:
        return (leaves["w"],)
    b, a = leaves["b"], leaves["a"]
    b = jnp.where(jnp.arange(b.shape[-1]) < own, b, 0.0)
    if "w" not in leaves:
        return b, a
    return (jnp.where(_is_whole(own, leaves["w"].shape), leaves["w"], b @ a),)


def _update(x, one, two):
    """x kron(W1, W2) of the matrices whose products W1 and W2 are; x [.., m n] -> [.., p q]."""
    x_mn = x.reshape(*x.shape[:-1], one[0].shape[0], two[0].shape[0])
    of_one, of_two = "mp" if len(one) == 1 else "mr,rp", "nq" if len(two) == 1 else "ns,sq"
    y_pq = jnp.einsum(f"...mn,{of_one},{of_two}->...pq", x_mn, *one, *two)
    return y_pq.reshape(*x.shape[:-1], -1)


def _merge(params, added):
    flat, fixed = tree.flatten(params), tree.flatten(added["peft_const"])
    own = tree.flatten(added["peft"])
    for path in [path for path in fixed if path.endswith("/lokr_rank")]:
        module = path.removesuffix("/lokr_rank")
        # [l] -> [l, 1, 1]
        rank, scale = (
            fixed[f"{module}/lokr_{name}"][..., None, None] for name in ("rank", "scale")
        )
        w1, w2 = (_whole_side(own, module, side, rank) for side in "12")
        change_mnpq = w1[..., :, None, :, None] * w2[..., None, :, None, :]
        kernel = flat[f"{module}/kernel"]
        flat[f"{module}/kernel"] = kernel + change_mnpq.reshape(kernel.shape) * scale
    return tree.unflatten(flat)


def _whole_side(own, module, side, rank):
    named = {name: f"{module}/lokr_{name}{side}" for name in "wba"}
    leaves = {name: own[path] for name, path in named.items() if path in own}
    first, *rest = _product(leaves, rank)
    return first @ rest[0] if rest else first


# --- in PEFT's files -------------------------------------------------------------------------


def _codec(placed):
    """`encode` and `decode` of bmft.peft.files.Files: all are transposed."""

    def encode(path, layer, leaves):
        rank, tensors = int(placed.ranks[path][matching.at(layer)]), {}
        for side in "12":
            w, b, a = (leaves.get(f"lokr_{name}{side}") for name in "wba")
            if b is None or (w is not None and _is_whole(rank, w.shape)):
                tensors[f"lokr_w{side}"] = w.T
            else:
                tensors[f"lokr_w{side}_a"] = a[:rank].T
                tensors[f"lokr_w{side}_b"] = b[:, :rank].T
        return tensors

    def decode(path, layer, tensors):
        leaves = {
            f"lokr_w{side}": tensors[f"lokr_w{side}"].T
            for side in "12"
            if f"lokr_w{side}" in tensors
        }
        for side in "12":
            if f"lokr_w{side}_a" in tensors:
                a, b = (tensors[f"lokr_w{side}_{name}"].T for name in "ab")
                ranks = placed.ranks[path][placed.sites[path]]
                missing = _largest(ranks, (b.shape[0], a.shape[1])) - len(a)
                leaves[f"lokr_a{side}"] = np.pad(a, ((0, missing), (0, 0)))
                leaves[f"lokr_b{side}"] = np.pad(b, ((0, 0), (0, missing)))
        return leaves

    return encode, decode


LAYOUT = Layout(
    peft_type="LOKR",
    fields=lycoris.FIELDS
    | {
        "decompose_both": ((bool,), False),
        "decompose_factor": ((int,), -1),
        "rank_dropout_scale": ((bool,), False),
    },
    ignored=lycoris.IGNORED,
    defaults={},
    arguments=lambda fields, table: (
        lycoris.arguments(fields, table, KINDS)
        | {key: fields[key] for key in ("decompose_both", "decompose_factor", "rank_dropout_scale")}
    ),
)
