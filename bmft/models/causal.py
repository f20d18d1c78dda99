"""What causal language models share: who sees whom, the cache, grouped attention, norms without a
mean, the gated MLP, and the head with its loss in chunks.

Shapes: b rows of a batch, t tokens of a row, s keys (tokens, or columns of the cache), d width,
f width inside the MLP, h heads, g heads of keys and values (h is a multiple), k width of a head,
l layers, v vocabulary, e chosen columns. A batch:

    input_ids, segments, positions   int32 [b, t]; segments 0: nothing lies there
    targets                          int32 [b, t], -1: none; then the loss is what comes out
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


def attend(q_bthk, k_bsgk, v_bsgk, mask_b1ts, *, scale, cap=None, drop=lambda weights: weights):
    """[b, t, h k]: each head's mean of the values, by the softmax over the keys that are seen.

    cap: scores lie softly between -cap and cap. drop: dropout of the weights.
    """
    b, t, h, k = q_bthk.shape
    g = k_bsgk.shape[2]
    q_btgrk = (q_bthk * scale).astype(q_bthk.dtype).reshape(b, t, g, h // g, k)
    scores = jnp.einsum("btgrk,bsgk->bgrts", q_btgrk, k_bsgk).astype(jnp.float32)
    scores = jnp.where(mask_b1ts[:, None], capped(scores, cap), jnp.finfo(jnp.float32).min)
    weights = drop(jax.nn.softmax(scores).astype(q_bthk.dtype))
    return jnp.einsum("bgrts,bsgk->btgrk", weights, v_bsgk).reshape(b, t, h * k)


def capped(x, cap):
    return x if cap is None else cap * jnp.tanh(x / cap)


# --- norms and MLP ---------------------------------------------------------------------------


def _normalise(module, x):
    """x [..., d] over its root mean square, by the scale of `module`, in float32."""
    x = x.astype(jnp.float32)
    x *= jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + module.eps)
    scale = layers.param(module, "scale", _start(module.offset), x.shape[-1:])
    return (x * (module.offset + scale.astype(jnp.float32))).astype(module.dtype)


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

        h_btf = layers.ACTIVATIONS[self.activation](dense(self.features, "gate")(x))
        return dense(x.shape[-1], "down")(h_btf * dense(self.features, "up")(x))


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


def outputs(head, x_btd, batch, tables=(), *, cap=None, chunk=512):
    """What the module docstring says comes out, of the last layer's normed x.

    tables: further arguments of the module `head`. chunk: tokens, over the rows of a device, whose
    logits are held at a time when there are targets.
    """
    if "targets" in batch:
        columns = max(chunk * activations.parts() // len(x_btd), 1)
        return _loss(head, x_btd, batch["targets"], tables, cap, columns)
    if "at" in batch:
        x_btd = jnp.take_along_axis(x_btd, batch["at"][..., None], axis=1)
    return _logits(head, x_btd, tables, cap)


def _logits(head, x, tables, cap):
    return capped(head(x, *tables).astype(jnp.float32), cap)


def _loss(head, x_btd, targets_bt, tables, cap, columns):
    """float32 [b, t]: the negative log-likelihood of the targets, 0 where there is none.

    So many columns at a time, each of which is computed again for the gradient. The rows stay
    together, since they may lie on different devices.
    """
    b, t = targets_bt.shape
    more = -t % columns
    x_btd = jnp.pad(x_btd, ((0, 0), (0, more), (0, 0)))
    targets_bt = jnp.pad(targets_bt, ((0, 0), (0, more)), constant_values=-1)

    def chunk(head, carry, x, targets, tables):
        return carry, _surprise(_logits(head, x, tables, cap), targets)

    scan = nn.scan(
        nn.remat(chunk, prevent_cse=False),
        variable_broadcast=list(layers.STACKED),
        split_rngs=layers.STREAMS | {"params": False},
        in_axes=(0, 0, nn.broadcast),
    )
    pieces = (
        array.reshape(b, -1, columns, *array.shape[2:]).swapaxes(0, 1)
        for array in (x_btd, targets_bt)
    )
    each_cbt = scan(head, (), *pieces, tables)[1]
    return each_cbt.swapaxes(0, 1).reshape(b, -1)[:, :t]


def _surprise(logits, targets):
    """-log softmax(logits [..., v]) at the targets [...]; 0 where they are -1."""
    # A sum under a mask: XLA makes one pass of it, forward and back, whichever axis is split.
    picked = jnp.arange(logits.shape[-1]) == targets[..., None]
    total = jax.nn.logsumexp(logits, -1) - jnp.where(picked, logits, 0).sum(-1)
    return jnp.where(targets < 0, 0.0, total)
