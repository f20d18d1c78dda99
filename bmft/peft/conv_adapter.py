"""Convolutional adapters for convolutional nets (Conv-Adapter, Chen et al. 2022, arXiv:2208.07463).

    adapter(x) = scale * up(nonlinearity(down(x)))

    down    a convolution of K x K pixels, channels -> width, in `width` groups: each of its outputs
            reads the channels of its own group, at the pixels that the block reads
    up      a convolution of one pixel, width -> the block's channels
    scale   a number a channel

    parallel   block(x) + adapter(x), with the block's stride       (the paper's residual parallel)
    after      y + adapter(y) with y = block(x)                   (the paper's residual sequential)

where a block is a unit of the net, from one feature map to the next, its last activation included
(a block of a ResNet, a convolution of a VGG). Both convolutions have a bias, as in the authors'
code. The scale starts as ones, as in the paper; up starts as zero, where theirs is random, so that
the adapted model starts exactly as the base (with a scale of zero it would, too, but then the scale
alone would have a gradient in the first step). It has no plain weights: it cannot be merged.

width is the largest divisor of the channels that is no more than channels / reduction.

    peft/<block>/conv_adapter_down_{kernel,bias}    [K, K, channels / width, width], [width]
    peft/<block>/conv_adapter_up_{kernel,bias}      [1, 1, width, out], [out]
    peft/<block>/conv_adapter_scale                 [out]
"""

import jax
import jax.numpy as jnp

from bmft import layers, peft, tree
from bmft.errors import Mistake, nearest

KINDS = ("parallel", "after")
# By fan-in (He et al. 2015): in groups, the fan-out says nothing of how much is summed.
HE = jax.nn.initializers.he_normal()
ZEROS, ONES = jax.nn.initializers.zeros, jax.nn.initializers.ones


def make(
    model,
    *,
    kind: str = "parallel",
    kernel: int = 3,
    reduction: int = 4,
    nonlinearity: str = "relu",
):
    """kind: parallel, after. kernel: K, odd. Raises Mistake for a model that is no such net."""
    _check(kind, kernel, reduction, nonlinearity)
    stages = model.names.stages
    if not any(tree.under(path, stages) for path in model.names.modules("conv")):
        raise Mistake(f"peft.conv_adapter: {model.name} is no convolutional net: it has no blocks")

    def adapter(module, x, out):
        return _adapter(module, x, out, kernel, reduction, layers.ACTIVATIONS[nonlinearity])

    def hook(module, call, *args):
        y = call(*args)
        if not isinstance(module, layers.FeatureBlock):
            return y
        return y + adapter(module, args[0] if kind == "parallel" else y, y)

    def moves(path):
        own = path.startswith("peft/") and "/conv_adapter_" in path
        return "conv_adapter" if own else None

    undecayed = tuple(f"conv_adapter_{name}" for name in ("down_bias", "up_bias", "scale"))
    axes = dict.fromkeys((*undecayed, "conv_adapter_down_kernel", "conv_adapter_up_kernel"), ".")
    return peft.Method("conv_adapter", moves, hook, axes=axes, undecayed=undecayed)


def _adapter(module, x, out, kernel, reduction, nonlinearity):
    """adapter(x) of x [b, y, x, channels], of the size and dtype of `out`; in float32 inside."""
    channels, features = x.shape[-1], out.shape[-1]
    divisors = (n for n in range(1, channels + 1) if channels % n == 0)
    width = max((n for n in divisors if n * reduction <= channels), default=1)
    strides = tuple(_stride(*sizes) for sizes in zip(x.shape[1:3], out.shape[1:3], strict=True))

    def leaf(name, init, shape):
        return peft.leaf(module, f"conv_adapter_{name}", init, shape)

    down = leaf("down_kernel", HE, (kernel, kernel, channels // width, width))
    h = _down(x.astype(jnp.float32), down, strides) + leaf("down_bias", ZEROS, (width,))
    up = leaf("up_kernel", ZEROS, (1, 1, width, features))
    y = nonlinearity(h) @ up[0, 0] + leaf("up_bias", ZEROS, (features,))
    return (y * leaf("scale", ONES, (features,))).astype(out.dtype)


def _down(x, kernel, strides):
    """The convolution of x [b, y, x, channels] in as many groups as it has outputs.

    A sum over pixels of shifted maps: XLA's gradient of a convolution in groups took 0.76 s on two
    cores for 64 maps of 16 x 16 x 32 pixels and 8 groups, where this took 0.031 s.
    """
    k, _, read, width = kernel.shape
    each_kkc = kernel.swapaxes(2, 3).reshape(k, k, width * read)
    x = jnp.pad(x, ((0, 0), (k // 2, k // 2), (k // 2, k // 2), (0, 0)))
    spans = []
    for side, stride in zip(x.shape[1:3], strides, strict=True):
        reach = (side - k) // stride * stride + 1
        spans.append([slice(i, i + reach, stride) for i in range(k)])
    taps = (
        x[:, rows, columns] * each_kkc[i, j]
        for i, rows in enumerate(spans[0])
        for j, columns in enumerate(spans[1])
    )
    h = sum(taps)
    return h.reshape(*h.shape[:-1], width, read).sum(-1)


def _stride(before, after):
    """The stride of a block that takes so many pixels to so many."""
    fits = (n for n in range(1, before + 1) if -(-before // n) == after)
    stride = next(fits, None)
    if stride is None:
        raise Mistake(f"peft.conv_adapter: a block takes {before} pixels to {after}: by no stride")
    return stride


def _check(kind, kernel, reduction, nonlinearity):
    for key, value, known in (
        ("kind", kind, KINDS),
        ("nonlinearity", nonlinearity, layers.ACTIVATIONS),
    ):
        if value not in known:
            raise Mistake(f"peft.conv_adapter.{key}: no {value!r}; {nearest(value, known)}")
    if kernel < 1 or kernel % 2 == 0:
        raise Mistake(f"peft.conv_adapter.kernel is {kernel}; it must be odd, 1 or more")
    if reduction < 1:
        raise Mistake(f"peft.conv_adapter.reduction is {reduction}; it must be 1 or more")
