"""GPT-2 (Radford et al. 2019) as one stacked decoder.

Shapes: b rows of a batch, t tokens of a row, s keys, d width, f width inside the MLP, h heads,
k width of a head, l layers, v vocabulary, p positions. The tree (kernels [in, out], as the files
of this family have them, too: transformers' Conv1D):

    embeddings/{word [v, d],position [p, d]}/embedding
    layers/attention_norm/{scale,bias}, layers/mlp_norm/{scale,bias}
    layers/attention/{query_key_value,output}/{kernel,bias}     the first 3 d wide
    layers/mlp/{up,down}/{kernel,bias}
    norm/{scale,bias}, head/kernel [d, v]      no head of its own where it is tied

Queries, keys and values are one dense layer, as in transformers: what a method does to `c_attn`
(LoRA's one update of all three) is done to that. What goes in and comes out: bmft.models.causal.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from bmft import layers
from bmft.errors import Mistake, nearest
from bmft.models import causal
from bmft.models.attention import attend
from bmft.names import Leaf, Names

FAMILIES = ("gpt2",)


class Config(NamedTuple):
    """What config.json says, in our words."""

    family: str  # gpt2
    vocabulary: int
    positions: int  # rows of the position table
    width: int
    depth: int
    heads: int
    mlp_width: int
    activation: str
    eps: float
    scales: tuple  # [l] of the scores
    tied: bool  # the head is the table of the word embedding
    dropout: float  # of what attention and MLP give
    embedding_dropout: float
    attention_dropout: float
    pad_id: int | None

    @property
    def max_length(self):
        """Tokens of the longest example the position table holds."""
        return self.positions

    @property
    def kv_heads(self):
        return self.heads

    @property
    def head_dim(self):
        return self.width // self.heads


class CausalLM(nn.Module):
    """Logits float32, or losses, of the batches of bmft.models.causal.

    chunk: tokens, over the rows of a device, whose logits the loss holds at a time.
    """

    config: Config
    dtype: Any = jnp.float32
    remat: str = "none"
    unroll: int = 1
    frozen_below: int = 0  # the lowest layer in which something moves; see bmft.layers.scan_layers
    frozen_head: bool = False  # nothing of the head, or of the table that it is tied to, moves
    chunk: int = 512

    @nn.compact
    def __call__(self, batch, train=False):
        c = self.config
        embeddings = Embeddings(c, train, self.dtype, name="embeddings")
        x_btd, cache = layers.scan_layers(
            Block(c, train, self.dtype, name="layers"),
            (embeddings(batch["input_ids"], batch["positions"]), batch.get("cache")),
            causal.sight(batch),
            (jnp.arange(c.depth), jnp.array(c.scales, jnp.float32)),
            depth=c.depth,
            unroll=self.unroll,
            remat=self.remat,
            frozen_below=self.frozen_below,
        )
        x_btd = layers.LayerNorm(c.eps, self.dtype, name="norm")(x_btd)
        head, tables = causal.head(self)
        about = {"chunk": self.chunk, "frozen": self.frozen_head}
        out = causal.outputs(head, x_btd, batch, tables, **about)
        return out if cache is None else (out, cache)


class Embeddings(nn.Module):
    config: Config
    train: bool
    dtype: Any

    @nn.compact
    def __call__(self, ids, positions):
        c = self.config
        x = layers.Embed(c.vocabulary, c.width, self.dtype, name="word")(ids)
        x += layers.Embed(c.positions, c.width, self.dtype, name="position")(positions)
        return nn.Dropout(c.embedding_dropout, deterministic=not self.train)(x)


class Block(nn.Module):
    config: Config
    train: bool
    dtype: Any

    @nn.compact
    def __call__(self, carry, sight, layer, scale):
        c, (x, cache) = self.config, carry

        def drop(h):
            return nn.Dropout(c.dropout, deterministic=not self.train)(h)

        def norm(name):
            return layers.PreNorm(c.width, c.eps, self.dtype, name=name)

        attention_norm, mlp_norm = norm("attention_norm"), norm("mlp_norm")
        attention = Attention(c, self.train, self.dtype, name="attention")
        h, cache = attention(attention_norm.before(x), cache, sight, layer, scale)
        x = attention_norm(drop(h), x)
        mlp = layers.MLP(c.mlp_width, c.activation, self.dtype, name="mlp")
        return mlp_norm(drop(mlp(mlp_norm.before(x))), x), cache


class Attention(nn.Module):
    """(what it adds to x [b, t, d], the cache), in a layer with this number and scale."""

    config: Config
    train: bool
    dtype: Any

    @nn.compact
    def __call__(self, x, cache, sight, layer, scale):
        c = self.config
        fused = layers.Dense(3 * c.width, self.dtype, name="query_key_value")(x)
        parts = jnp.split(fused.reshape(*x.shape[:-1], 3 * c.heads, c.head_dim), 3, -2)
        q_bthk, k_bthk, v_bthk = parts
        cache, k_bshk, v_bshk = causal.remember(cache, layer, sight, k_bthk, v_bthk)
        mask_b1ts = causal.mask(sight, causal.EVERYTHING)
        k_bshk, v_bshk, mask_b1ts = layers.KeysValues(name="keys_values")(k_bshk, v_bshk, mask_b1ts)
        about = {"scale": scale, "ahead": cache is not None}
        if self.train and c.attention_dropout:
            about["dropout"] = nn.Dropout(c.attention_dropout, deterministic=False)
        context = attend(q_bthk, k_bshk, v_bshk, mask_b1ts, **about)
        return layers.Dense(c.width, self.dtype, name="output")(context), cache


dummy = causal.dummy


# --- config.json -----------------------------------------------------------------------------


def configure(json, outputs):
    """`Config` of a Hugging Face config.json (a dict).

    Raises Mistake for what this decoder does not compute. There is no number of outputs.
    """
    try:
        config = _read(json)
    except KeyError as missing:
        raise Mistake(f"config.json lacks {missing}") from None
    if config.activation not in layers.ACTIVATIONS:
        known = nearest(config.activation, layers.ACTIVATIONS)
        raise Mistake(f"config.json: activation {config.activation!r} is not known; {known}")
    if config.width % config.heads:
        raise Mistake(f"config.json: {config.heads} heads do not divide the width {config.width}")
    if json.get("add_cross_attention"):
        raise Mistake("config.json: add_cross_attention must be false: there is no encoder")
    return config


def _read(json):
    heads, width, depth = json["n_head"], json["n_embd"], json["n_layer"]
    scale = (width // heads) ** -0.5 if json["scale_attn_weights"] else 1.0
    by_layer = json["scale_attn_by_inverse_layer_idx"]
    return Config(
        family=json["model_type"],
        vocabulary=json["vocab_size"],
        positions=json["n_positions"],
        width=width,
        depth=depth,
        heads=heads,
        mlp_width=json.get("n_inner") or 4 * width,
        activation=json["activation_function"],
        eps=json["layer_norm_epsilon"],
        scales=tuple(scale / (layer + 1 if by_layer else 1) for layer in range(depth)),
        tied=json.get("tie_word_embeddings", True),
        dropout=json["resid_pdrop"],
        embedding_dropout=json["embd_pdrop"],
        attention_dropout=json["attn_pdrop"],
        pad_id=json.get("pad_token_id"),
    )


# --- names -----------------------------------------------------------------------------------

# Our module -> theirs.
_MODULES = {
    "layers/attention_norm": "h.{}.ln_1",
    "layers/attention/query_key_value": "h.{}.attn.c_attn",
    "layers/attention/output": "h.{}.attn.c_proj",
    "layers/mlp_norm": "h.{}.ln_2",
    "layers/mlp/up": "h.{}.mlp.c_fc",
    "layers/mlp/down": "h.{}.mlp.c_proj",
    "norm": "ln_f",
}


def names(config):
    """The names table of a `Config`. The kernels lie in the file as ours do; a head's does not."""
    leaves = [
        Leaf("embeddings/word/embedding", "wte.weight"),
        Leaf("embeddings/position/embedding", "wpe.weight"),
    ]
    for ours, theirs in _MODULES.items():
        weight = "scale" if ours.endswith("norm") else "kernel"
        leaves.append(Leaf(f"{ours}/{weight}", f"{theirs}.weight"))
        leaves.append(Leaf(f"{ours}/bias", f"{theirs}.bias"))
    head = causal.head_leaf(config)
    leaves += [] if config.tied else [head]
    return Names(tuple(leaves), config.depth, "transformer.", head=head)


# Tensors that files hold beside the decoder: masks, a tied head's copy, heads of other tasks.
IGNORED = ("h.{}.attn.bias", "h.{}.attn.masked_bias", "lm_head.weight")
OTHER_HEADS = ("score.", "multiple_choice_head.")

# First match wins; a kernel is [l, in, out]. Axes of the mesh: bmft/sharding.py.
SHARDING = (
    ("embeddings/*/embedding", (None, "fsdp")),  # words rarely divide
    ("head/kernel", ("fsdp", None)),
    ("layers/attention/query_key_value/kernel", (None, "fsdp", None)),  # three in one
    ("layers/attention/output/kernel", (None, "tensor", "fsdp")),
    ("layers/mlp/down/kernel", (None, "tensor", "fsdp")),
    ("layers/**/kernel", (None, "fsdp", "tensor")),
    ("**", ()),
)
