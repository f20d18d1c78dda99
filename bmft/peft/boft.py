"""BOFT (Liu et al. 2023, arXiv:2311.06243) on dense layers: OFT by a product of butterfly factors.

    y = s * (base(x B) - bias) + bias    B = B_(m-1) … B_1 B_0,  B_i = P_i diag(R_i1 … R_in) P_i^T

R_ij is orthogonal, (I - Q)(I + Q)^-1 of the skew part Q of a leaf. P_i cuts blocks in halves and
brings 2^i of them together, so that m factors mix 2^(m-1) blocks; here it is a transposition of
the input's axes, and no matrix as large as the kernel is made. The rotations start at zero and s at
one: the adapted model starts as the base. dropout: in training a share of the blocks of one factor,
drawn anew for each module, is not applied.

Shapes: l layers of a stack, m factors, n blocks, k the width of a block, n k = in.

    peft/<module>/boft_r [l, m, n, k, k]        peft/<module>/boft_s [l, out]
"""

import jax
import jax.numpy as jnp

from bmft import names, peft, tree
from bmft.errors import Mistake
from bmft.peft import beside, matching, rotation
from bmft.peft.files import Files, Layout

KINDS = ("dense",)
WIDTH = 4  # of a block, if nothing is said
ZEROS, ONES = jax.nn.initializers.zeros, jax.nn.initializers.ones


def make(
    model,
    *,
    blocks: int | None = None,
    block_size: int | None = None,
    factors: int = 1,
    dropout: float = 0.0,
    targets: tuple[str, ...] = ("query", "value"),
    layers_to_transform: tuple[int, ...] | None = None,
    bias: str = "none",
    modules_to_save: tuple[str, ...] = (),
):
    """blocks, block_size: one of the two, the other follows from a layer's width; neither: size 4.

    factors: of the butterfly; 1 is OFT with the scale s, more need blocks of an even size.
    """
    beside.check_bias("boft", bias)
    if blocks is None and block_size is None:
        block_size = WIDTH
    rotation.check("boft", blocks, block_size)
    if factors < 1:
        raise Mistake(f"peft.boft.factors is {factors}; it must be 1 or more")
    if not 0 <= dropout < 1:
        raise Mistake(f"peft.boft.dropout is {dropout}; it must be in [0, 1)")
    table = model.names
    saved = names.saved(table, modules_to_save)
    whole = {path.rpartition("/")[0]: mask for path, mask in saved.items()}
    about = {"head": model.heads, "layers": layers_to_transform, "without": whole}
    sites = names.target(table, targets, kinds=KINDS, **about)

    def hook(module, call, *args):
        path = peft.path_of(module)
        if path not in sites:
            return call(*args)
        x = args[0].astype(jnp.float32)
        n, k = rotation.blocks("boft", path, x.shape[-1], blocks, block_size, factors)
        changes = _changes(peft.leaf(module, "boft_r", ZEROS, (factors, n, k, k)))
        changes = _dropped(module, changes, dropout)
        for i in reversed(range(factors)):
            x = _turn(x, changes[i], i)
        out = call(x.astype(args[0].dtype), *args[1:])
        scale = peft.leaf(module, "boft_s", ONES, out.shape[-1:])
        scaled = out * scale
        if module.has_variable("params", "bias"):
            scaled -= module.get_variable("params", "bias") * (scale - 1)
        return scaled.astype(out.dtype)

    settings = {
        "peft_type": "BOFT",
        "boft_block_num": blocks or 0,
        "boft_block_size": block_size or 0,
        "boft_n_butterfly_factor": factors,
        "boft_dropout": dropout,
        "bias": bias,
        "init_weights": True,
        "fan_in_fan_out": False,
    }
    moves, rows = beside.moves("boft", sites, ("boft_r", "boft_s"), saved, bias)
    about = {"kinds": KINDS, "elsewhere": {"boft_r": 0.0, "boft_s": 1.0}}
    files = Files(settings, sites, modules_to_save, _encode, _decode, **about)
    return peft.Method(
        "boft",
        moves,
        hook,
        rows=rows,
        axes={"boft_r": ".", "boft_s": "o"},
        undecayed=("boft_s",),  # it starts at 1
        merge=_merge,
        # What is read is the same to the bit, but after a transposition XLA may add up the base's
        # product in another order.
        identity=0.0 if factors == 1 else 2e-6,
        files=files,
    )


def _changes(r):
    """R - I of leaves [..., k, k]."""
    return rotation.cayley((r - r.swapaxes(-1, -2)) / 2)


def _turn(x, change, i):
    """x B_i of x [..., in]; change [n, k, k]: that of the factor's blocks."""
    if i == 0:
        return rotation.turn(x, change)
    *rows, width = x.shape
    half = change.shape[-1] // 2
    # P: of the 2^i pairs of halves that lie together, first all first halves, then all second.
    x = x.reshape(*rows, -1, 2, 2**i, half).swapaxes(-3, -2)
    x = rotation.turn(x.reshape(*rows, width), change)
    return x.reshape(*rows, -1, 2**i, 2, half).swapaxes(-3, -2).reshape(*rows, width)


def _dropped(module, changes, rate):
    """changes [m, n, k, k], in training without a share `rate` of the blocks of one of the m."""
    m, n = changes.shape[:2]
    if int(rate * n) == 0 or not module.has_rng("peft"):
        return changes
    of_factor, of_block = jax.random.split(module.make_rng("peft"))
    chosen = jnp.arange(m) == jax.random.randint(of_factor, (), 0, m)
    gone = jax.random.permutation(of_block, jnp.arange(n) < int(rate * n))
    return jnp.where((chosen[:, None] & gone)[..., None, None], 0.0, changes)


def _merge(params, added):
    """B W s on every module that has rotations: W^T B^T, turned by one transposed factor at a
    time."""
    flat, own = tree.flatten(params), tree.flatten(added["peft"])
    for path in [path for path in own if path.endswith("/boft_r")]:
        module = path.removesuffix("/boft_r")
        turn = _turned if own[path].ndim == 4 else jax.vmap(_turned)
        kernel = turn(flat[f"{module}/kernel"], _changes(own[path]))
        flat[f"{module}/kernel"] = kernel * own[f"{module}/boft_s"][..., None, :]
    return tree.unflatten(flat)


def _turned(kernel, changes):
    """B W of one layer."""
    w = kernel.T
    for i, change in enumerate(changes):
        w = _turn(w, change.swapaxes(-1, -2), i)
    return w.T


# --- in PEFT's files -------------------------------------------------------------------------


def _encode(path, layer, leaves):
    return {"boft_R": leaves["boft_r"], "boft_s": leaves["boft_s"][:, None]}


def _decode(path, layer, tensors):
    return {"boft_r": tensors["boft_R"], "boft_s": tensors["boft_s"][:, 0]}


def _arguments(fields, table):
    """`make`'s arguments from PEFT's configuration: with whole names, whatever it matched by."""
    sites = matching.targets(table, fields, KINDS)
    heads = matching.head_modules(table)
    saved = matching.saved(table, fields["modules_to_save"])
    # PEFT's zero is "not given".
    return {
        "blocks": fields["boft_block_num"] or None,
        "block_size": fields["boft_block_size"] or None,
        "factors": fields["boft_n_butterfly_factor"],
        "dropout": float(fields["boft_dropout"]),
        "targets": matching.exact_names(table, sites),
        "bias": fields["bias"],
        "modules_to_save": matching.exact_names(
            table, {path: mask for path, mask in saved.items() if path not in heads}
        ),
    }


LAYOUT = Layout(
    peft_type="BOFT",
    fields={
        "boft_block_num": ((int,), 0),
        "boft_block_size": ((int,), WIDTH),
        "boft_n_butterfly_factor": ((int,), 1),
        "boft_dropout": ((int, float), 0.0),
        "bias": ((str,), "none"),
    },
    # fan_in_fan_out speaks of GPT-2's layers; the start is of no matter afterwards.
    ignored=("fan_in_fan_out", "init_weights"),
    defaults={},
    arguments=_arguments,
)
