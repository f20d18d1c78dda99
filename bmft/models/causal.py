"""What causal language models share: who sees whom, the cache, grouped attention, norms without a
mean, the gated MLP, and the head with its loss in chunks.

Shapes: b rows of a batch, t tokens of a row, s keys (tokens, or columns of the cache), d width,
f width inside the MLP, h heads, g heads of keys and values (h is a multiple), k width of a head,
l layers, v vocabulary, e chosen columns. A batch:

    input_ids, segments, positions   int32 [b, t]; segments 0: nothing lies there
    targets                          int32 [b, t], -1: none; then the loss is what comes out
    smoothing                        float32 []: the share of each target that is spread evenly over
                                     the vocabulary (Szegedy et al. 2015, arXiv:1512.00567)
    at                               int32 [b, e]: the columns of which the logits come out
    cache                            {"keys", "values"} [l, b, s, g, k], which comes out again

Without a cache a token sees the tokens of its own segment at its own or an earlier column. With one
its keys and values are written at column `positions` of its row, and it sees the columns up to
there: a row is one text, from column 0 on, however it is cut into calls.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from bmft import activations, layers
from bmft.models.attention import capped
from bmft.names import Leaf

EVERYTHING = 2**31 - 1  # the window of a layer that has none


class Sight(NamedTuple):
    """What all layers know of the tokens."""

    distance: Any  # int32 [b, t, s]: how many positions back a key lies; -1: it is not seen
    columns: Any  # int32 [b, t]: where the cache is written; None without one
    cos: Any = None  # float32 [n, b, t, k/2] of bmft.models.rotary; None: not rotary
    sin: Any = None


def sight(batch):
    """The `Sight` of a batch, without its rotary tables."""
    segments, positions = batch["segments"], batch["positions"]
    if "cache" in batch:
        s = batch["cache"]["keys"].shape[2]
        columns = jnp.where(segments > 0, positions, s)  # outside: never written
        return Sight(positions[:, :, None] - jnp.arange(s), columns)
    same_bts = segments[:, :, None] == segments[:, None, :]
    earlier_ts = jnp.tri(segments.shape[1], dtype=bool)
    back_bts = positions[:, :, None] - positions[:, None, :]
    return Sight(jnp.where(same_bts & earlier_ts, back_bts, -1), None)


def mask(sight, window):
    """bool [b, 1, t, s]: which keys a token sees of those less than `window` positions back."""
    return ((sight.distance >= 0) & (sight.distance < window))[:, None]


def empty_cache(config, rows, columns, dtype=jnp.float32):
    """A cache for so many rows and columns of a model with this Config."""
    shape = (config.depth, rows, columns, config.kv_heads, config.head_dim)
    return {"keys": jnp.zeros(shape, dtype), "values": jnp.zeros(shape, dtype)}


def remember(cache, layer, sight, keys, values):
    """(the cache with keys and values [b, t, g, k] written in it, those of the layer to be attended
    to [b, s, g, k]). Without a cache they are what was given."""
    if cache is None:
        return None, keys, values
    where = layer, jnp.arange(len(keys))[:, None], sight.columns
    new = {"keys": keys, "values": values}
    cache = {
        name: old.at[where].set(new[name].astype(old.dtype), mode="drop")
        for name, old in cache.items()
    }
    return cache, *(cache[name][layer].astype(new[name].dtype) for name in ("keys", "values"))


def dummy(config):
    """A batch of the smallest shape, for shapes and for adding a method's leaves."""
    ids = jnp.zeros((1, 2), jnp.int32)
    return {"input_ids": ids, "segments": ids + 1, "positions": ids}


def head_leaf(config):
    """The row of the head in the names table; where it is tied it is no leaf of the tree."""
    leaf = Leaf("head/kernel", "lm_head.weight", "transpose", written="lm_head.weight")
    return leaf._replace(path="head/tied") if config.tied else leaf


# --- norms and MLP ---------------------------------------------------------------------------


def _normalise(module, x):
    """x [..., d] over its root mean square, by the scale of `module`, in float32."""
    scale = layers.param(module, "scale", _start(module.offset), x.shape[-1:])

    @jax.checkpoint  # keeps x alone for the gradient, as it came
    def normal(x, scale):
        x = x.astype(jnp.float32)
        x *= jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + module.eps)
        return (x * (module.offset + scale.astype(jnp.float32))).astype(module.dtype)

    return normal(x, scale)


def _start(offset):
    return nn.initializers.constant(1.0 - offset)


class RMSNorm(nn.Module):
    """Zhang and Sennrich 2019 (arXiv:1910.07467), over the last axis; returns `dtype`.

    offset: what the scale is counted from: 1 in Gemma, else 0.
    """

    eps: float
    dtype: Any = jnp.float32
    offset: float = 0.0

    @nn.compact
    def __call__(self, x):
        return _normalise(self, x)


class PreRMSNorm(layers.PreNorm):
    """A `PreNorm` that is an RMSNorm."""

    offset: float = 0.0

    def setup(self):
        layers.param(self, "scale", _start(self.offset), (self.features,))

    def before(self, stream):
        return _normalise(self, stream)


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)) on x [b, t, d], f wide inside."""

    features: int
    activation: str
    dtype: Any = jnp.float32
    use_bias: bool = False

    @nn.compact
    def __call__(self, x):
        def dense(features, name):
            return layers.Dense(features, self.dtype, self.use_bias, name=name)

        @jax.checkpoint  # keeps two arrays [b, t, f] for the gradient instead of five
        def gated(gate_btf, up_btf):
            return layers.ACTIVATIONS[self.activation](gate_btf) * up_btf

        h_btf = gated(dense(self.features, "gate")(x), dense(self.features, "up")(x))
        return dense(x.shape[-1], "down")(h_btf)


# --- the head --------------------------------------------------------------------------------


class TiedHead(nn.Module):
    """x [..., d] by the table [v, d] of the word embedding, [..., v]."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, table):
        return activations.rows(x.astype(self.dtype) @ table.astype(self.dtype).T)


def head(model):
    """(the head of a `CausalLM`, in whose call this is; what it is called with beside x)."""
    c = model.config
    if c.tied:
        table = model.variables["params"]["embeddings"]["word"]["embedding"]
        return TiedHead(model.dtype, name="head"), (table,)
    return layers.Dense(c.vocabulary, model.dtype, use_bias=False, name="head"), ()


def outputs(head, x_btd, batch, tables=(), *, cap=None, chunk=512, frozen=False):
    """What the module docstring says comes out, of the last layer's normed x.

    tables: further arguments of the module `head`. chunk: tokens, over the rows of a device, whose
    logits are held at a time, at most, when there are targets. frozen: nothing of the head and the
    tables moves; then their loss has a gradient for x alone.
    """
    if "targets" in batch:
        loss = _loss_of_frozen if frozen else _loss
        given = tables, batch.get("smoothing")
        return loss(head, x_btd, batch["targets"], given, cap, chunk * activations.parts())
    if "at" in batch:
        x_btd = jnp.take_along_axis(x_btd, batch["at"][..., None], axis=1)
    return _logits(head, x_btd, tables, cap)


def _logits(head, x, tables, cap):
    return capped(head(x, *tables).astype(jnp.float32), cap)


def _losses(head, x, targets, given, cap):
    tables, smoothing = given
    return _surprise(_logits(head, x, tables, cap), targets, smoothing)


def _loss(head, x_btd, targets_bt, given, cap, chunk):
    """float32 [b, t]: the negative log-likelihood of the targets, 0 where there is none.

    given: (the head's tables, the share of smoothing or None). So many tokens at a time, each of
    which is computed again for the gradient.
    """

    def of(head, x, targets, given):
        return _losses(head, x, targets, given, cap)

    return _by_chunks(of, head, x_btd, targets_bt, given, chunk)


def _loss_of_frozen(head, x_btd, targets_bt, given, cap, chunk):
    """The same of a head of which nothing moves. A token's loss hangs on its own x alone: so its
    slope is computed with it, while the logits are there, and nothing is computed again."""

    def of(head, x, targets, given):
        def losses_of(head, x):
            return _losses(head, x, targets, given, cap)

        losses, back = nn.vjp(losses_of, head, x, vjp_variables=False)
        return losses, back(jnp.ones_like(losses))[-1]

    still_btd = jax.lax.stop_gradient(x_btd)
    return _with_slopes(x_btd, *_by_chunks(of, head, still_btd, targets_bt, given, chunk))


@jax.custom_vjp
def _with_slopes(x_btd, losses_bt, slopes_btd):
    """The losses, whose gradient for x is `slopes`. Without a gradient these are not computed."""
    return losses_bt


_with_slopes.defvjp(
    lambda x, losses, slopes: (losses, slopes),
    lambda slopes, g_bt: (
        (g_bt[..., None] * slopes).astype(slopes.dtype),
        jnp.zeros_like(g_bt),
        jnp.zeros_like(slopes),
    ),
)


def _by_chunks(function, head, x_btd, targets_bt, given, chunk):
    """function(head, x, targets, given) -> arrays [b, columns, ...], of some columns at a time, put
    together; zeros where there is no target. The rows stay together, since they may lie on
    different devices.

    Columns with a target come first in each row: so only as many chunks are computed as the row
    with the most targets needs, half of them where half of the tokens are questions.
    """
    b, t = targets_bt.shape
    pieces = -(-b * t // chunk)
    columns = -(-t // pieces)
    order_bt = jnp.argsort(targets_bt < 0, axis=1, stable=True)

    def cut(array, empty):
        array = _columns(array, order_bt)
        around = ((0, 0), (0, pieces * columns - t), *((0, 0),) * (array.ndim - 2))
        array = jnp.pad(array, around, constant_values=empty)
        return array.reshape(b, pieces, columns, *array.shape[2:]).swapaxes(0, 1)

    most = (targets_bt >= 0).sum(1).max()

    def chunk_of(head, start, x, targets, given):
        shapes = jax.eval_shape(lambda: function(head, x, targets, given))

        def nothing(head, *arrays):
            return jax.tree.map(lambda made: jnp.zeros(made.shape, made.dtype), shapes)

        some = start < most
        return start + columns, nn.cond(some, function, nothing, head, x, targets, given)

    scan = nn.scan(
        # Around the choice: else each chunk keeps a table of its own for the gradient.
        nn.remat(chunk_of, prevent_cse=False),
        variable_broadcast=list(layers.STACKED),
        split_rngs=layers.STREAMS | {"params": False},
        in_axes=(0, 0, nn.broadcast),
    )
    found = scan(head, jnp.int32(0), cut(x_btd, 0), cut(targets_bt, -1), given)[1]
    back_bt = jnp.argsort(order_bt, axis=1)

    def joined(array):
        return _columns(array.swapaxes(0, 1).reshape(b, -1, *array.shape[3:]), back_bt)

    return jax.tree.map(joined, found)


def _columns(array, order_bt):
    """array [b, t, ...] with its columns in another order for each row."""
    return jnp.take_along_axis(array, jnp.expand_dims(order_bt, tuple(range(2, array.ndim))), 1)


def _surprise(logits, targets, smoothing=None):
    """-log softmax(logits [..., v]) at the targets [...]; 0 where they are -1. smoothing: the share
    of it that is the mean over all v instead."""
    # A sum under a mask: XLA makes one pass of it, forward and back, whichever axis is split.
    picked = jnp.arange(logits.shape[-1]) == targets[..., None]
    if smoothing is None:
        wanted = jnp.where(picked, logits, 0)
    else:
        wanted = (jnp.where(picked, 1 - smoothing, 0) + smoothing / logits.shape[-1]) * logits
    total = jax.nn.logsumexp(logits, -1) - wanted.sum(-1)
    return jnp.where(targets < 0, 0.0, total)
