"""The parts models share, all `@nn.compact`: a method's hook can add variables to compact modules
only (flax's own `nn.Embed` is setup-style, so there is one here).

Shapes: b rows of a batch, t and s tokens of a row, d width, f width inside the MLP, h heads,
k width of a head, v vocabulary. Kernels are [in, out]; a stack of blocks puts its layers in front.

Precision: parameters come in whatever dtype the tree holds them; products are computed in `dtype`,
norms and softmax in float32.

Where methods attach: `Dense`, `Embed`, `LayerNorm` by target; `MLP` (its input and output, for
parallel adapters) and `Residual` (a block part's output before it meets the residual stream, for
Houlsby and Pfeiffer adapters) by type. Everything is called with positional arguments, since hooks
see no others.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

# What differs by layer in a scanned stack: base parameters, a method's leaves and constants.
STACKED = {"params": 0, "peft": 0, "peft_const": 0}
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


def scan_layers(block, x, broadcast, *, depth, unroll=1, remat=False, frozen_below=0):
    """x after `depth` layers of `block(x, broadcast) -> x`, one stacked tree and one compiled body.

    frozen_below: below this layer nothing moves: the stack is scanned in two pieces, and no
    gradient is computed through the first. The tree is the same whatever the pieces.
    """

    def layer(block, x, broadcast):
        return block(x, broadcast), None

    def stack(block, x, length):
        scan = nn.scan(
            nn.remat(layer, prevent_cse=False) if remat else layer,
            variable_axes=STACKED,
            split_rngs=STREAMS,
            in_axes=nn.broadcast,
            length=length,
            unroll=min(unroll, length),
        )
        return scan(block, x, broadcast)[0]

    def piece(x, start, end):
        cut = nn.map_variables(
            lambda block, x: stack(block, x, end - start),
            list(STACKED),
            trans_in_fn=lambda tree: jax.tree.map(lambda leaf: leaf[start:end], tree),
            mutable=False,
        )
        return cut(block, x)

    if (
        not frozen_below
        or block.is_mutable_collection("params")
        or block.is_mutable_collection("peft")
    ):
        return stack(block, x, depth)
    x = jax.lax.stop_gradient(piece(x, 0, frozen_below))
    return piece(x, frozen_below, depth) if frozen_below < depth else x


def param(module, name, init, shape):
    """A base parameter. Unlike `module.param` it may be asked for twice in one call of a module,
    so that a hook may call on twice (Pfeiffer's adapter reads a norm that is applied again)."""
    if module.has_variable("params", name):
        return module.get_variable("params", name)
    return module.param(name, init, shape)


class Dense(nn.Module):
    """x [..., in] @ kernel [in, out] + bias [out], in `dtype`."""

    features: int
    dtype: Any = jnp.float32
    use_bias: bool = True
    kernel_init: Any = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, x):
        kernel = param(self, "kernel", self.kernel_init, (x.shape[-1], self.features))
        y = x.astype(self.dtype) @ kernel.astype(self.dtype)
        if self.use_bias:
            y += param(self, "bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        return y


class Embed(nn.Module):
    """Rows of embedding [v, d] by ids [...] -> [..., d], in `dtype`."""

    rows: int
    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids):
        table = param(self, "embedding", nn.initializers.normal(0.02), (self.rows, self.features))
        return table.astype(self.dtype)[ids]


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
        return _normalise(self, output + stream)


class Attention(nn.Module):
    """Multi-head self-attention over x [b, t, d] under mask [b, 1, t, s], projected back to d."""

    heads: int
    dropout: float
    train: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, mask):
        d = x.shape[-1]

        def heads_of(name):
            y = Dense(d, self.dtype, name=name)(x)
            return y.reshape(*y.shape[:-1], self.heads, d // self.heads)

        q_bthk, k_bshk, v_bshk = heads_of("query"), heads_of("key"), heads_of("value")
        scores = jnp.einsum("bthk,bshk->bhts", q_bthk / math.sqrt(d // self.heads), k_bshk)
        scores = jnp.where(mask, scores.astype(jnp.float32), jnp.finfo(jnp.float32).min)
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
