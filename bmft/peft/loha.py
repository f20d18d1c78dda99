"""LoHa: a low-rank Hadamard product (FedPara, Hyeon-Woo et al. 2021, arXiv:2108.06098; in LyCORIS,
Yeh et al. 2023, arXiv:2309.14859), as PEFT computes it; o multiplies element by element:

    y = base(x) + x ((B1 A1) o (B2 A2)) alpha / rank

so that the update has rank^2 for its rank. A1 and A2 start uniform in ±1/sqrt(rank), B1 in
±1/sqrt(in) (torch's kaiming with a = sqrt 5), B2 is zero: the adapted model starts as the base.

(B1 A1) o (B2 A2) is itself a product of two matrices, of rank^2 columns and rows that are products
of those of B1 and B2, A1 and A2. A dense layer computes with these wherever that is less work than
building the whole matrix: the gradient of 2,048 tokens through 768 x 768 at rank 8 took 26 ms and
not 208 ms on two cores. A convolution builds its kernel (PEFT's plain form, in which the kernel is
flattened to [in kh kw, out]).

    peft/<module>/loha_{b1,b2} [l, in, r]                     loha_{a1,a2} [l, r, out]
    peft/<module>/loha_{b1,b2} [kh, kw, in / groups, r]       loha_{a1,a2} [r, out]

r is the largest rank of a module over its layers; constants: bmft.peft.lycoris.
"""

import jax
import jax.numpy as jnp
import numpy as np

from bmft import layers, names, peft, tree
from bmft.peft import convolution, lycoris
from bmft.peft.files import Layout

KINDS = ("dense", "conv")
# Ours -> PEFT's, whose A is the one that gives the outputs, and so ours.
LEAVES = {
    "loha_a1": "hada_w1_a",
    "loha_b1": "hada_w1_b",
    "loha_a2": "hada_w2_a",
    "loha_b2": "hada_w2_b",
}


def make(
    model,
    *,
    rank: int = 8,
    alpha: float = 8.0,
    targets: tuple[str, ...] = ("query", "value"),
    rank_dropout: float = 0.0,
    module_dropout: float = 0.0,
    rank_pattern: tuple[str, ...] = (),
    alpha_pattern: tuple[str, ...] = (),
    layers_to_transform: tuple[int, ...] | None = None,
    modules_to_save: tuple[str, ...] = (),
):
    """rank_pattern, alpha_pattern: `pattern=value` by unstacked module name, first match wins.
    rank_dropout, module_dropout: see bmft.peft.lycoris."""
    placed = lycoris.place(
        "loha",
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

    def hook(module, call, *args):
        out, path = call(*args), peft.path_of(module)
        if path not in placed.sites:
            return out
        x, r = args[0].astype(jnp.float32), int(placed.ranks[path].max())
        own = module.get_variable("peft_const", "loha_rank")
        scale = module.get_variable("peft_const", "loha_scale")
        of_b, of_a = (x.shape[-1], r), (r, out.shape[-1])
        if isinstance(module, layers.Conv):
            of_b = (*module.kernel, x.shape[-1] // module.groups, r)
        zeros, by_rank = jax.nn.initializers.zeros, lycoris.uniform(own)
        b1 = peft.leaf(module, "loha_b1", convolution.start, of_b)
        a1 = peft.leaf(module, "loha_a1", by_rank, of_a)
        b2 = peft.leaf(module, "loha_b2", zeros, of_b)
        a2 = peft.leaf(module, "loha_a2", by_rank, of_a)
        factors = *_own(own, b1, b2), a1, a2
        if isinstance(module, layers.Conv):
            update = layers.convolve(x, _change(*factors), module)
        else:
            update = _update(x, *factors)
        update = lycoris.dropped(module, update * scale, rank_dropout, module_dropout, scaled=True)
        return out + update.astype(out.dtype)

    codec = _codec(model, placed)
    axes = {leaf: "i." if leaf.startswith("loha_b") else ".o" for leaf in LEAVES}
    return lycoris.method("loha", placed, LEAVES, axes, hook, _merge, *codec)


def _own(rank, *bs):
    """B without the columns past a layer's own rank."""
    return tuple(jnp.where(jnp.arange(b.shape[-1]) < rank, b, 0.0) for b in bs)


def _change(b1, b2, a1, a2):
    return (b1 @ a1) * (b2 @ a2)


def _update(x, b1, b2, a1, a2):
    """x change, by the smaller of two ways."""
    (width, r), out = b1.shape, a1.shape[-1]
    if r * r * (width + out) >= width * out:
        return x @ _change(b1, b2, a1, a2)
    b = (b1[:, :, None] * b2[:, None, :]).reshape(width, -1)
    a = (a1[:, None, :] * a2[None, :, :]).reshape(-1, out)
    return (x @ b) @ a


def _merge(params, added):
    flat, own = tree.flatten(params), tree.flatten(added["peft"])
    fixed = tree.flatten(added["peft_const"])
    for path in [path for path in own if path.endswith("/loha_a1")]:
        module = path.removesuffix("/loha_a1")
        a1, b1, a2, b2 = (own[f"{module}/{name}"] for name in LEAVES)
        rank, scale = (fixed[f"{module}/loha_{name}"] for name in ("rank", "scale"))
        of_b = (*rank.shape, *[1] * (b1.ndim - rank.ndim))
        rank, scale = rank.reshape(of_b), scale.reshape(of_b)
        flat[f"{module}/kernel"] += _change(*_own(rank, b1, b2), a1, a2) * scale
    return tree.unflatten(flat)


# --- in PEFT's files -------------------------------------------------------------------------


def _codec(model, placed):
    """`encode` and `decode` of bmft.peft.files.Files: torch has A [out, r] and B [r, in], on a
    convolution [r, in kh kw]."""
    on_conv = [path for path in model.names.modules("conv") if path in placed.sites]
    found = convolution.geometry(model) if on_conv else {}
    kernels = {path: found[path].kernel for path in on_conv}

    def rank_of(path, layer):
        return int(placed.ranks[path][() if layer is None else layer])

    def encode(path, layer, leaves):
        r, tensors = rank_of(path, layer), {}
        for ours, theirs in LEAVES.items():
            leaf = leaves[ours]
            if ours.startswith("loha_a"):
                tensors[theirs] = leaf[:r].T
            else:
                layout = "conv" if path in kernels else "transpose"
                tensors[theirs] = names.to_file(layout, leaf[..., :r]).reshape(r, -1)
        return tensors

    def decode(path, layer, tensors):
        missing, leaves = int(placed.ranks[path].max()) - rank_of(path, layer), {}
        for ours, theirs in LEAVES.items():
            tensor = np.pad(tensors[theirs], ((0, 0), (0, missing))[:: 1 if "_a" in ours else -1])
            if ours.startswith("loha_b") and path in kernels:
                tensor = tensor.reshape(len(tensor), -1, *kernels[path])
                leaves[ours] = names.from_file("conv", tensor)
            else:
                leaves[ours] = tensor.T
        return leaves

    return encode, decode


LAYOUT = Layout(
    peft_type="LOHA",
    fields=lycoris.FIELDS,
    ignored=lycoris.IGNORED,
    defaults={},
    arguments=lambda fields, table: lycoris.arguments(fields, table, KINDS),
)
