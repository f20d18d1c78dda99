"""Frozen kernels in few bits: how they are made of a file's numbers, and what they stand for.

    nf4    16 quantiles of a normal distribution, for blocks of 64 numbers, each of which is scaled
           by its largest absolute value (absmax). The absmax, less their mean, are quantized too,
           with the dynamic 8-bit map, in groups of 256 (double quantization). To the bit as
           bitsandbytes does it; QLoRA, Dettmers et al. 2023, arXiv:2305.14314.
    int8   round(127 w / absmax), with an absmax for each output
    int4   round(w / scale), -7 to 7, for blocks of 32 numbers, with scale = absmax / 7 in bfloat16

Blocks run along the inputs of one output, as in torch's [out, in], which bitsandbytes reads row by
row: so the values are those of the same checkpoint there. Where the inputs are no whole number of
blocks, blocks would straddle outputs, and shards: that is refused.

A module's leaves, in the collection `quant` beside `params`; the name says what it is:

    nf4         uint8 [l, out, in/2]: of two codes the first is in the high bits
    nf4_absmax  uint8 [l, out, in/64]
    nf4_scale   float32 [l, out in / 64 / 256, rounded up]
    nf4_offset  float32 [l]
    int8        int8 [l, out, in]
    int8_scale  float32 [l, out]
    int4        uint8 [l, out, in/2], as nf4
    int4_scale  bfloat16 [l, out, in/32]

All functions take one layer or a stack of them, with any axes in front.
"""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from bmft import tree
from bmft.errors import Mistake

SCHEMES = ("nf4", "int8", "int4")
# Of each leaf its axes behind the layers': o outputs, i inputs; the rest is small, and held whole.
AXES = {
    "nf4": "oi",
    "nf4_absmax": "oi",
    "nf4_scale": "",
    "nf4_offset": "",
    "int8": "oi",
    "int8_scale": "o",
    "int4": "oi",
    "int4_scale": "oi",
}
BLOCK = {"nf4": 64, "int4": 32, "int8": 1}  # numbers along the inputs that cannot be parted
GROUP = 256  # absmax of nf4 that share a scale

# The paper's appendix E: quantiles of N(0, 1), zero among them, over the largest.
NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453]
    + [-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0]
    + [0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
    + [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0],
    np.float32,
)


@functools.cache
def dynamic_map():
    """The 256 numbers of the dynamic 8-bit data type, ascending (Dettmers 2016, arXiv:1511.04561):
    0, 1, and ± the middles of 2^e equal parts of [0.1, 1] times 10^(e - 6), for e from 0 to 6.
    """
    middles = []
    for exponent in range(7):
        # As torch.linspace rounds: each bound once, from the nearer end, by a step of float32.
        n, ends = 2**exponent, np.array([0.1, 1], np.float32)
        step, i = np.float64((ends[1] - ends[0]) / np.float32(n)), np.arange(n + 1)
        bounds = np.where(2 * i < n, ends[0] + step * i, ends[1] - step * (n - i))
        bounds = bounds.astype(np.float32)
        middles.append(np.float32(10.0 ** (exponent - 6)) * ((bounds[:-1] + bounds[1:]) / 2))
    positive = np.concatenate(middles)
    return np.sort(np.concatenate([-positive, positive, [0, 1]]).astype(np.float32))


# --- from numbers to leaves, on the host -----------------------------------------------------


def check(how, path, inputs):
    """Refuses a kernel of so many inputs that are no whole blocks."""
    if inputs % BLOCK[how]:
        raise Mistake(
            f"model.quantize={how!r}: {path} has {inputs} inputs, no whole blocks of {BLOCK[how]}; "
            "'int8' takes any number"
        )


def shapes(how, shape):
    """{leaf: jax.ShapeDtypeStruct} of a quantized kernel [l, in, out]."""
    count, inputs, outputs = shape
    blocks = inputs // BLOCK[how]
    of = {
        "nf4": {
            "nf4": ((outputs, inputs // 2), jnp.uint8),
            "nf4_absmax": ((outputs, blocks), jnp.uint8),
            "nf4_scale": ((-(-outputs * blocks // GROUP),), jnp.float32),
            "nf4_offset": ((), jnp.float32),
        },
        "int8": {
            "int8": ((outputs, inputs), jnp.int8),
            "int8_scale": ((outputs,), jnp.float32),
        },
        "int4": {
            "int4": ((outputs, inputs // 2), jnp.uint8),
            "int4_scale": ((outputs, blocks), jnp.bfloat16),
        },
    }[how]
    return {name: jax.ShapeDtypeStruct((count, *own), dtype) for name, (own, dtype) in of.items()}


def quantize(how, kernel_oi):
    """{leaf: array} of one layer's kernel [out, in], torch's way round."""
    kernel_oi = np.ascontiguousarray(kernel_oi, np.float32)
    return {"nf4": _nf4, "int8": _int8, "int4": _int4}[how](kernel_oi)


def _nf4(kernel_oi):
    outputs = len(kernel_oi)
    blocks = kernel_oi.reshape(outputs, -1, BLOCK["nf4"])
    absmax = np.abs(blocks).max(-1)
    codes = _nearest(NF4, blocks * _inverse(absmax)[..., None])
    # Summed in float64: bitsandbytes' mean is one of float32, whose last bit hangs on its order.
    offset = absmax.mean(dtype=np.float64).astype(np.float32)
    groups = np.zeros(-(-absmax.size // GROUP) * GROUP, np.float32)
    groups[: absmax.size] = absmax.ravel() - offset
    groups = groups.reshape(-1, GROUP)
    scale = np.abs(groups).max(-1)
    of_absmax = _nearest(dynamic_map(), groups * _inverse(scale)[:, None])
    return {
        "nf4": _packed(codes.reshape(outputs, -1)),
        "nf4_absmax": of_absmax.ravel()[: absmax.size].reshape(absmax.shape),
        "nf4_scale": scale,
        "nf4_offset": offset,
    }


def _int8(kernel_oi):
    scale = np.abs(kernel_oi).max(-1) / np.float32(127)
    codes = np.rint(kernel_oi * _inverse(scale)[:, None])
    return {"int8": codes.astype(np.int8), "int8_scale": scale}


def _int4(kernel_oi):
    outputs = len(kernel_oi)
    blocks = kernel_oi.reshape(outputs, -1, BLOCK["int4"])
    scale = (np.abs(blocks).max(-1) / 7).astype(ml_dtypes.bfloat16)
    codes = np.rint(blocks * _inverse(scale.astype(np.float32))[..., None]).clip(-7, 7)
    packed = _packed((codes + 8).astype(np.uint8).reshape(outputs, -1))
    return {"int4": packed, "int4_scale": scale}


def _inverse(absmax):
    """1 / absmax; where all numbers are zero they stay so."""
    return np.float32(1) / np.maximum(absmax, np.float32(1e-38))


def _nearest(values, x):
    """The indices, uint8, of the nearest of the ascending values; of two as near the lower."""
    bounds = (values[:-1] + values[1:]) / 2
    if len(bounds) > 15:
        return np.searchsorted(bounds, x).astype(np.uint8)
    codes = np.zeros(x.shape, np.uint8)
    for bound in bounds:  # 15 comparisons are several times as quick as a search
        codes += x > bound
    return codes


def _packed(codes):
    return codes[..., ::2] << 4 | codes[..., 1::2]


# --- from leaves to numbers ------------------------------------------------------------------


def scheme(leaves):
    """The name of what a module's leaves are quantized by."""
    return next(name for name in SCHEMES if name in leaves)


def kernel(leaves):
    """The kernel [..., in, out], float32, that a module's leaves stand for; NumPy's of NumPy's."""
    how = scheme(leaves)
    codes, scale = leaves[how], leaves[f"{how}_scale"]
    xp = np if isinstance(codes, np.ndarray) else jnp
    if how == "int8":
        return (codes.astype(xp.float32) * scale[..., None]).swapaxes(-1, -2)
    codes = xp.stack([codes >> 4, codes & 15], -1).reshape(*codes.shape[:-1], -1)
    if how == "int4":
        values, absmax = codes.astype(xp.float32) - 8, scale.astype(xp.float32)
    else:
        values, absmax = _looked_up(codes, xp), _absmax(leaves, xp)
    blocks = values.reshape(*absmax.shape, BLOCK[how]) * absmax[..., None]
    return blocks.reshape(codes.shape).swapaxes(-1, -2)


def _looked_up(codes, xp):
    """NF4[codes]."""
    if xp is np:
        return NF4[codes]
    # A choice by each of the four bits, of the numbers as words: on two cores 1 ns a number, and a
    # gather 2 ns or more. The first by arithmetic: jnp.where would spread each of the 16 numbers
    # over an array as large as the kernel, and a scan keeps such arrays for its backward pass.
    words, first = NF4.view(np.uint32), (codes & 1).astype(jnp.uint32)
    values = [first * (low ^ high) ^ low for low, high in zip(words[::2], words[1::2], strict=True)]
    for bit in range(1, 4):
        is_set = (codes >> bit) & 1 == 1
        pairs = zip(values[::2], values[1::2], strict=True)
        values = [jnp.where(is_set, high, low) for low, high in pairs]
    return jax.lax.bitcast_convert_type(values[0], jnp.float32)


def _absmax(leaves, xp):
    """The absmax [..., out, in/64] of nf4's blocks, as their codes have it."""
    codes, scale = leaves["nf4_absmax"], leaves["nf4_scale"]
    *front, outputs, blocks = codes.shape
    each = xp.repeat(scale, GROUP, -1)[..., : outputs * blocks].reshape(codes.shape)
    values = xp.take(xp.asarray(dynamic_map()), codes, mode="clip")
    return values * each + leaves["nf4_offset"][..., None, None]


# --- trees of leaves -------------------------------------------------------------------------


def modules(quant):
    """{module path: {leaf: array}} of a tree of the collection quant."""
    found = {}
    for path, leaf in tree.flatten(quant).items():
        module, _, name = path.rpartition("/")
        found.setdefault(module, {})[name] = leaf
    return found


def restored(params, quant):
    """The tree params with the kernels that are quantized in the tree quant."""
    kernels = {f"{path}/kernel": kernel(leaves) for path, leaves in modules(quant).items()}
    return tree.join(params, tree.unflatten(kernels))


def described(quant):
    """[(path, shape, scheme, bits a number)] of the quantized kernels, bits by their arrays, or
    their shapes."""
    found = []
    for module, leaves in sorted(modules(quant).items()):
        how = scheme(leaves)
        *front, outputs, inputs = leaves[how].shape
        inputs *= 1 if how == "int8" else 2
        count = int(np.prod([*front, outputs, inputs]))
        held = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves.values())
        bits = 8 * held / count
        found.append((f"{module}/kernel", (*front, inputs, outputs), how, bits))
    return found
