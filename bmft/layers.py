"""The parts models share, all called through `@nn.compact`: a method's hook can add variables to
compact modules only (flax's own `nn.Embed` is setup-style, so there is one here).

Shapes: b rows of a batch, t and s tokens of a row, d width, f width inside the MLP, h heads,
k width of a head, v vocabulary. Kernels are [in, out]; a stack of blocks puts its layers in front.
Images and feature maps are [b, height, width, channels], kernels of convolutions [kh, kw, in, out].

Precision: parameters come in whatever dtype the tree holds them; products are computed in `dtype`,
norms and softmax in float32. The kernel of a `Dense` may be quantized (bmft/quantize.py): then its
leaves lie in the collection `quant`, and it is dequantized where it is used.

Where methods attach: `Dense`, `Embed`, `LayerNorm`, `Conv`, `BatchNorm` by target; by type: `MLP`
(parallel adapters), `Residual` and `PreNorm` (a block part's output before it meets the residual
stream: Houlsby's and Pfeiffer's adapters), `KeysValues` (what an attention reads: prefix tuning),
`FeatureBlock` (a unit of a convolutional net). All are called with positional arguments alone.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bmft import activations, quantize

# What differs by layer in a scanned stack: base parameters, a method's leaves and constants.
STACKED = {"params": 0, "quant": 0, "peft": 0, "peft_const": 0}
# A stream not named here is absent inside a scan, and its dropout silently off.
STREAMS = {"params": True, "dropout": True, "peft": True}

ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


def shapes(module, batch):
    """{collection: tree of shapes} of what a module's init makes; nothing is computed."""
    return _shapes(module, tuple((name, x.shape, x.dtype) for name, x in batch.items()))


@functools.lru_cache(maxsize=16)  # half of the time of reading an adapter
def _shapes(module, inputs):
    batch = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape, dtype in inputs}
    return jax.eval_shape(module.init, jax.random.key(0), batch)


def scan_layers(
    block, x, broadcast, own=(), *,
    depth, unroll=1, remat="none", frozen_below=0, begin=0, end=None,
):  # fmt: skip
    """x after `depth` layers of `block(x, broadcast, *own) -> x`, one stacked tree and one compiled
    body. Of the arrays `own` [l, ...] (an attention's windows) each layer has its row.

    frozen_below: below this layer nothing moves: the stack is scanned in two pieces, and no
    gradient is computed through the first. The tree is the same whatever the pieces.
    begin, end: only these layers are computed; x is what the ones before would give.
    """
    end = depth if end is None else end

    def layer(block, x, broadcast, own):
        return block(x, broadcast, *own), None

    def stack(block, x, own, length):
        scan = nn.scan(
            rematerialised(layer, remat, prevent_cse=False),
            variable_axes=STACKED,
            split_rngs=STREAMS,
            in_axes=(nn.broadcast, 0),
            length=length,
            unroll=min(unroll, length),
        )
        return scan(block, x, broadcast, own)[0]

    def piece(x, start, end):
        cut = nn.map_variables(
            lambda block, x: stack(block, x, tuple(a[start:end] for a in own), end - start),
            list(STACKED),
            trans_in_fn=lambda tree: jax.tree.map(lambda leaf: leaf[start:end], tree),
            mutable=False,
        )
        return cut(block, x)

    making = block.is_mutable_collection("params") or block.is_mutable_collection("peft")
    if making or (begin, end, frozen_below) == (0, depth, 0):
        return stack(block, x, own, depth)
    split = min(max(begin, frozen_below), end)
    if begin < split:
        x = jax.lax.stop_gradient(piece(x, begin, split))
    return piece(x, split, end) if split < end else x


def rematerialised(target, how, **options):
    """A module's class or function of which the backward pass computes again: nothing if `how` is
    none; all if it is block; else all but what the jax.checkpoint_policies called so saves."""
    if how == "none":
        return target
    policy = None if how == "block" else getattr(jax.checkpoint_policies, how)
    return nn.remat(target, policy=policy, **options)


def param(module, name, init, shape):
    """A base parameter. Unlike `module.param` it may be asked for twice in one call of a module,
    so that a hook may call on twice (Pfeiffer's adapter reads a norm that is applied again)."""
    if module.has_variable("params", name):
        return module.get_variable("params", name)
    return module.param(name, init, shape)


def stored_kernel(module):
    """The kernel of a module as it is stored: an array, or {leaf: array} if it is quantized; None
    if there is none yet."""
    if module.has_variable("params", "kernel"):
        return module.get_variable("params", "kernel")
    names = [name for name in quantize.AXES if module.has_variable("quant", name)]
    return {name: module.get_variable("quant", name) for name in names} or None


def kernel_of(module):
    """The kernel [in, out] of a module, for hooks: dequantized, if need be."""
    return as_array(stored_kernel(module))


def as_array(kernel):
    """The array of what `stored_kernel` gives."""
    return quantize.kernel(kernel) if isinstance(kernel, dict) else kernel


def product(x, kernel, dtype):
    """x [..., in] @ kernel [in, out], as `stored_kernel` gives it, in `dtype`."""

    def of(x, kernel):
        return x.astype(dtype) @ as_array(kernel).astype(dtype)

    # The backward pass dequantizes again: if not, the floats of all layers would be kept for it.
    return jax.checkpoint(of)(x, kernel) if isinstance(kernel, dict) else of(x, kernel)


class Dense(nn.Module):
    """x [..., in] @ kernel [in, out] + bias [out], in `dtype`."""

    features: int
    dtype: Any = jnp.float32
    use_bias: bool = True
    kernel_init: Any = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, x):
        kernel = stored_kernel(self)
        if kernel is None:
            kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        y = product(x, kernel, self.dtype)
        if self.use_bias:
            y += param(self, "bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        return activations.rows(y)


class Embed(nn.Module):
    """Rows of embedding [v, d] by ids [...] -> [..., d], in `dtype`, times `scale`."""

    rows: int
    features: int
    dtype: Any = jnp.float32
    scale: float = 1.0

    @nn.compact
    def __call__(self, ids):
        table = param(self, "embedding", nn.initializers.normal(0.02), (self.rows, self.features))
        found = table.astype(self.dtype)[ids] * jnp.asarray(self.scale, self.dtype)
        return activations.rows(found)


def _normalise(module, x):
    """Layer norm of x [..., d] with the scale and bias of `module`, in float32."""
    x = x.astype(jnp.float32)
    centred = x - x.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    scale = param(module, "scale", nn.initializers.ones, x.shape[-1:])
    bias = param(module, "bias", nn.initializers.zeros, x.shape[-1:])
    return (centred * jax.lax.rsqrt(variance + module.eps) * scale + bias).astype(module.dtype)


class LayerNorm(nn.Module):
    """Ba et al. 2016, over the last axis; returns `dtype`."""

    eps: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        return _normalise(self, x)


class Residual(nn.Module):
    """Where the output of a block's part meets the residual stream: norm(stream + output).

    Post-norm, as in BERT. Bottleneck adapters wrap this call: they see the output before the sum
    and, by calling on, the normed sum that Pfeiffer's adapter reads.
    """

    eps: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, output, stream):
        return _normalise(self, activations.rows(output + stream))


class PreNorm(nn.Module):
    """The norm before a block's part, and where the part's output meets the residual stream:

        output = part(norm.before(stream)); stream = norm(output, stream)

    The call is the sum alone. It is the one that adapters wrap, as they do a `Residual`'s, and at
    the same path: `before` is a method of its own, so that hooks do not take it for the call, and
    has its parameters from setup, since only one method of a module may be compact.
    """

    features: int
    eps: float
    dtype: Any = jnp.float32

    def setup(self):
        param(self, "scale", nn.initializers.ones, (self.features,))
        param(self, "bias", nn.initializers.zeros, (self.features,))

    def before(self, stream):
        return _normalise(self, stream)

    @nn.compact
    def __call__(self, output, stream):
        return activations.rows(output + stream)


class KeysValues(nn.Module):
    """The keys and values [b, s, h, k] that an attention reads under its mask, as they are.

    A method that wraps the call may put columns of its own before them, and widen the mask, if
    there is one.
    """

    @nn.compact
    def __call__(self, keys, values, mask):
        return keys, values, mask


class Attention(nn.Module):
    """Multi-head self-attention over x [b, t, d] under mask [b, 1, t, s], projected back to d.

    mask None: every token sees every other.
    """

    heads: int
    dropout: float
    train: bool
    dtype: Any = jnp.float32
    qkv_bias: bool = True

    @nn.compact
    def __call__(self, x, mask):
        d = x.shape[-1]

        def heads_of(name):
            y = Dense(d, self.dtype, self.qkv_bias, name=name)(x)
            return y.reshape(*y.shape[:-1], self.heads, d // self.heads)

        q_bthk, k_bshk, v_bshk = heads_of("query"), heads_of("key"), heads_of("value")
        k_bshk, v_bshk, mask = KeysValues(name="keys_values")(k_bshk, v_bshk, mask)
        scores = jnp.einsum("bthk,bshk->bhts", q_bthk / math.sqrt(d // self.heads), k_bshk)
        scores = scores.astype(jnp.float32)
        if mask is not None:
            scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores).astype(self.dtype)
        weights = nn.Dropout(self.dropout, deterministic=not self.train)(weights)
        context = jnp.einsum("bhts,bshk->bthk", weights, v_bshk)
        return Dense(d, self.dtype, name="output")(context.reshape(x.shape))


class MLP(nn.Module):
    """down(activation(up(x))) on x [b, t, d], f wide inside."""

    features: int
    activation: str
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        h_btf = ACTIVATIONS[self.activation](Dense(self.features, self.dtype, name="up")(x))
        return Dense(x.shape[-1], self.dtype, name="down")(h_btf)


# --- images ----------------------------------------------------------------------------------


def convolve(x, kernel, conv, groups=None):
    """x [b, y, x, in] by kernel [kh, kw, in/groups, out], with the geometry of the `Conv` conv."""
    groups = conv.groups if groups is None else groups
    if groups == 1 and math.prod(x.shape[1:3]) < math.prod(kernel.shape[:2]):
        return _as_product(x, kernel, conv)
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=conv.strides,
        padding=conv.padding,
        rhs_dilation=conv.dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def _as_product(x, kernel, conv):
    """The same of a map that has fewer pixels than the kernel, as one matrix product: XLA's CPU
    convolution took 3.1 s for 64 maps of 2 x 2 x 512 by a kernel [3, 3, 512, 512], this 0.02 s."""
    x, spans = jnp.pad(x, ((0, 0), *conv.padding, (0, 0))), []
    sides = zip(x.shape[1:3], kernel.shape[:2], conv.strides, conv.dilation, strict=True)
    for side, k, stride, dilation in sides:
        reach = (side - dilation * (k - 1) - 1) // stride * stride + 1
        spans.append([slice(i * dilation, i * dilation + reach, stride) for i in range(k)])
    taps = [x[:, rows, columns] for rows in spans[0] for columns in spans[1]]
    return jnp.concatenate(taps, -1) @ kernel.reshape(-1, kernel.shape[-1])


class Conv(nn.Module):
    """A convolution as torch's Conv2d: zero padding, counted in pixels on each side."""

    features: int
    kernel: tuple  # (kh, kw)
    strides: tuple = (1, 1)
    padding: tuple = ((0, 0), (0, 0))  # ((above, below), (left, right))
    dilation: tuple = (1, 1)
    groups: int = 1
    dtype: Any = jnp.float32
    use_bias: bool = True

    @nn.compact
    def __call__(self, x):
        shape = (*self.kernel, x.shape[-1] // self.groups, self.features)
        # He et al. 2015, by the fan-out, as torchvision's ResNet starts.
        init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
        kernel = param(self, "kernel", init, shape)
        y = convolve(x.astype(self.dtype), kernel.astype(self.dtype), self)
        if self.use_bias:
            y += param(self, "bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        return y


class BatchNorm(nn.Module):
    """Ioffe and Szegedy 2015, over all axes but the last, in float32; returns `dtype`.

    batch=False: with the running statistics, `batch_stats/<module>/{mean,var}` [channels], as they
    are. batch=True: with the batch's own, which are put in their place: how they move the running
    ones is the training step's to say. Like torch, a batch is normalised by its biased variance
    and reports the unbiased one.
    """

    eps: float
    batch: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        channels = x.shape[-1:]
        mean = self.variable("batch_stats", "mean", jnp.zeros, channels)
        var = self.variable("batch_stats", "var", jnp.ones, channels)
        scale = param(self, "scale", nn.initializers.ones, channels)
        bias = param(self, "bias", nn.initializers.zeros, channels)
        x = x.astype(jnp.float32)
        centre, spread = mean.value, var.value
        if self.batch:
            axes = tuple(range(x.ndim - 1))
            centre = x.mean(axes)
            spread = jnp.square(x - centre).mean(axes)
            if self.is_mutable_collection("batch_stats"):
                count = math.prod(x.shape[:-1])
                mean.value, var.value = centre, spread * (count / max(count - 1, 1))
        return ((x - centre) * (jax.lax.rsqrt(spread + self.eps) * scale) + bias).astype(self.dtype)


class FeatureBlock(nn.Module):
    """What a unit of a convolutional net derives from: __call__(x) -> the next feature map."""


def max_pool(x, size, stride, padding=0):
    """The largest of each size x size window, as torch's MaxPool2d."""
    pads = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    window, strides = (1, size, size, 1), (1, stride, stride, 1)
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, strides, pads)
