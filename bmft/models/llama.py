"""Llama 2 and 3, SmolLM2, Mistral, Qwen 2 to 3, Gemma 1 to 3 (text): one stacked decoder.

Shapes: b rows of a batch, t tokens of a row, s keys, d width, f width inside the MLP, h heads, g of
keys and values, k width of a head, l layers, v vocabulary. The tree (kernels [in, out]):

    embeddings/word/embedding [v, d]
    layers/attention_norm/scale, layers/attention/{query,key,value,output}/{kernel,bias}
    layers/attention/{query_norm,key_norm}/scale [l, k]         Qwen 3, Gemma 3
    layers/mlp_norm/scale, layers/mlp/{gate,up,down}/{kernel,bias}
    layers/{attention_post_norm,mlp_post_norm}/scale            Gemma 2 and 3
    norm/scale, head/kernel [d, v]                              no head of its own where it is tied

What goes in and comes out: bmft.models.causal. Which of these parts there are, biases, windows,
rotary scalings and soft caps are as config.json says and transformers 5.23 computes.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from bmft import layers
from bmft.errors import Mistake, nearest
from bmft.models import causal, rotary
from bmft.models.attention import attend
from bmft.names import Leaf, Names

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
GEMMA = ("gemma", "gemma2", "gemma3_text")
NEWER_GEMMA = GEMMA[1:]


class Config(NamedTuple):
    """What config.json says, in our words."""

    family: str  # of FAMILIES
    vocabulary: int
    positions: int  # tokens of the longest text it was made for
    width: int
    depth: int
    heads: int
    kv_heads: int  # of keys and values
    head_dim: int
    mlp_width: int
    activation: str
    eps: float
    norm_offset: float  # what the norms' scales are counted from
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool  # a norm over each head of the queries and the keys
    post_norms: bool  # a norm of what attention and MLP give, too
    tied: bool  # the head is the table of the word embedding
    embedding_scale: float
    query_scale: float
    attention_cap: float | None
    logit_cap: float | None
    windows: tuple  # [l] a layer's window in tokens; None: it sees all
    turns: tuple  # [l] which of `ways` a layer's rotary embedding is
    ways: tuple  # see bmft.models.rotary
    attention_dropout: float
    pad_id: int | None

    @property
    def max_length(self):
        return self.positions


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
        x_btd = Embeddings(c, self.dtype, name="embeddings")(batch["input_ids"])
        cos, sin = rotary.Rotary(c.ways, name="rotary")(batch["positions"])
        sight = causal.sight(batch)._replace(cos=cos, sin=sin)
        windows = [causal.EVERYTHING if window is None else window for window in c.windows]
        x_btd, cache = layers.scan_layers(
            Block(c, train, self.dtype, name="layers"),
            (x_btd, batch.get("cache")),
            sight,
            (jnp.arange(c.depth), jnp.array(windows, jnp.int32), jnp.array(c.turns, jnp.int32)),
            depth=c.depth,
            unroll=self.unroll,
            remat=self.remat,
            frozen_below=self.frozen_below,
        )
        x_btd = causal.RMSNorm(c.eps, self.dtype, c.norm_offset, name="norm")(x_btd)
        head, tables = causal.head(self)
        about = {"chunk": self.chunk, "frozen": self.frozen_head}
        out = causal.outputs(head, x_btd, batch, tables, cap=c.logit_cap, **about)
        return out if cache is None else (out, cache)


class Embeddings(nn.Module):
    config: Config
    dtype: Any

    @nn.compact
    def __call__(self, ids):
        c = self.config
        return layers.Embed(c.vocabulary, c.width, self.dtype, c.embedding_scale, name="word")(ids)


class Block(nn.Module):
    config: Config
    train: bool
    dtype: Any

    @nn.compact
    def __call__(self, carry, sight, layer, window, turn):
        c, (x, cache) = self.config, carry

        def before(name):
            return causal.PreRMSNorm(c.width, c.eps, self.dtype, c.norm_offset, name=name)

        def after(name, h):
            if not c.post_norms:
                return h
            return causal.RMSNorm(c.eps, self.dtype, c.norm_offset, name=name)(h)

        attention_norm, mlp_norm = before("attention_norm"), before("mlp_norm")
        attention = Attention(c, self.train, self.dtype, name="attention")
        h, cache = attention(attention_norm.before(x), cache, sight, layer, window, turn)
        x = attention_norm(after("attention_post_norm", h), x)
        mlp = causal.GatedMLP(c.mlp_width, c.activation, self.dtype, c.mlp_bias, name="mlp")
        return mlp_norm(after("mlp_post_norm", mlp(mlp_norm.before(x))), x), cache


class Attention(nn.Module):
    """(what it adds to x [b, t, d], the cache), in a layer with this number, window and turn."""

    config: Config
    train: bool
    dtype: Any

    @nn.compact
    def __call__(self, x, cache, sight, layer, window, turn):
        c = self.config

        def heads_of(name, count):
            y = layers.Dense(count * c.head_dim, self.dtype, c.qkv_bias, name=name)(x)
            return y.reshape(*y.shape[:-1], count, c.head_dim)

        def turned(name, y_bthk):
            if c.qk_norm:
                norm = causal.RMSNorm(c.eps, self.dtype, c.norm_offset, name=f"{name}_norm")
                y_bthk = norm(y_bthk)
            return rotary.turn(y_bthk, sight.cos[turn], sight.sin[turn])

        q_bthk = turned("query", heads_of("query", c.heads))
        k_btgk = turned("key", heads_of("key", c.kv_heads))
        v_btgk = heads_of("value", c.kv_heads)
        cache, k_bsgk, v_bsgk = causal.remember(cache, layer, sight, k_btgk, v_btgk)
        mask_b1ts = causal.mask(sight, window)
        k_bsgk, v_bsgk, mask_b1ts = layers.KeysValues(name="keys_values")(k_bsgk, v_bsgk, mask_b1ts)
        about = {"scale": c.query_scale, "cap": c.attention_cap, "ahead": cache is not None}
        if self.train and c.attention_dropout:
            about["dropout"] = nn.Dropout(c.attention_dropout, deterministic=False)
        context = attend(q_bthk, k_bsgk, v_bsgk, mask_b1ts, **about)
        return layers.Dense(c.width, self.dtype, c.output_bias, name="output")(context), cache


dummy = causal.dummy


# --- config.json -----------------------------------------------------------------------------


def configure(json, outputs):
    """`Config` of a Hugging Face config.json (a dict), completed by transformers' rules.

    Raises Mistake for what this decoder does not compute. There is no number of outputs.
    """
    from transformers import CONFIG_MAPPING

    family = json["model_type"]
    try:
        json = CONFIG_MAPPING[family].from_dict(dict(json)).to_dict()
        config = _read(json, family)
    except KeyError as missing:
        raise Mistake(f"config.json lacks {missing}") from None
    if config.activation not in layers.ACTIVATIONS:
        known = nearest(config.activation, layers.ACTIVATIONS)
        raise Mistake(f"config.json: activation {config.activation!r} is not known; {known}")
    if config.heads % config.kv_heads:
        has = f"{config.heads} heads and {config.kv_heads} of keys and values"
        raise Mistake(f"config.json: {has}: the first must be a multiple of the second")
    if json.get("use_bidirectional_attention"):
        raise Mistake("config.json: use_bidirectional_attention must be false: tokens look back")
    return config


def _read(json, family):
    gemma, newer, depth = family in GEMMA, family in NEWER_GEMMA, json["num_hidden_layers"]
    head_dim = json.get("head_dim") or json["hidden_size"] // json["num_attention_heads"]
    # A file may hold fields of another family, which transformers passes over, and so do we.
    biased = family == "qwen2" or (family != "mistral" and json["attention_bias"])
    kinds = _layer_types(json, family)
    sliding = [kind == "sliding_attention" for kind in kinds]
    ways, turns = _ways(json, kinds, head_dim)
    return Config(
        family=family,
        vocabulary=json["vocab_size"],
        positions=json["max_position_embeddings"],
        width=json["hidden_size"],
        depth=depth,
        heads=json["num_attention_heads"],
        kv_heads=json["num_key_value_heads"],
        head_dim=head_dim,
        mlp_width=json["intermediate_size"],
        activation=json["hidden_activation" if newer else "hidden_act"],
        eps=json["rms_norm_eps"],
        norm_offset=1.0 if gemma else 0.0,
        qkv_bias=biased,
        output_bias=biased and family != "qwen2",
        mlp_bias=family == "llama" and json["mlp_bias"],
        qk_norm=family in ("qwen3", "gemma3_text"),
        post_norms=newer,
        tied=json["tie_word_embeddings"],
        embedding_scale=json["hidden_size"] ** 0.5 if gemma else 1.0,
        query_scale=(json["query_pre_attn_scalar"] if newer else head_dim) ** -0.5,
        # transformers' Gemma 3 has the field, and does not cap its scores.
        attention_cap=json["attn_logit_softcapping"] if family == "gemma2" else None,
        logit_cap=json["final_logit_softcapping"] if newer else None,
        windows=tuple(json["sliding_window"] if slides else None for slides in sliding),
        turns=turns,
        ways=ways,
        attention_dropout=json["attention_dropout"],
        pad_id=json.get("pad_token_id"),
    )


def _layer_types(json, family):
    """[l] of sliding_attention and full_attention."""
    depth = json["num_hidden_layers"]
    if family == "mistral":
        slides = json["sliding_window"] is not None
        return ["sliding_attention" if slides else "full_attention"] * depth
    kinds = json.get("layer_types") if family not in ("llama", "gemma") else None
    kinds = kinds or ["full_attention"] * depth
    unknown = set(kinds) - {"sliding_attention", "full_attention"}
    if unknown or len(kinds) != depth:
        raise Mistake(
            f"config.json: layer_types must be {depth} of sliding_attention and full_attention"
        )
    return kinds


def _ways(json, kinds, head_dim):
    """(the ways of turning, which of them each layer has)."""
    parameters, positions = json["rope_parameters"], json["max_position_embeddings"]
    if "full_attention" not in parameters:  # one for all
        return (rotary.way(parameters, head_dim, positions),), (0,) * len(kinds)
    names = sorted(set(kinds))
    ways = tuple(rotary.way(parameters[name], head_dim, positions) for name in names)
    return ways, tuple(names.index(kind) for kind in kinds)


# --- names -----------------------------------------------------------------------------------

# Our module -> theirs; the layer's prefix is added below.
_BLOCK = {
    "attention_norm": "input_layernorm",
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/output": "self_attn.o_proj",
    "attention/query_norm": "self_attn.q_norm",
    "attention/key_norm": "self_attn.k_norm",
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
    "mlp_post_norm": "post_feedforward_layernorm",
}


def names(config):
    """The names table of a `Config`."""
    block = dict(_BLOCK)
    if config.post_norms:
        block["mlp_norm"] = "pre_feedforward_layernorm"
    without = () if config.qk_norm else ("attention/query_norm", "attention/key_norm")
    without += () if config.post_norms else ("attention_post_norm", "mlp_post_norm")
    leaves = [Leaf("embeddings/word/embedding", "embed_tokens.weight")]
    for ours, theirs in block.items():
        if ours not in without:
            leaves += _module(config, f"layers/{ours}", f"layers.{{}}.{theirs}")
    leaves.append(Leaf("norm/scale", "norm.weight"))
    head = causal.head_leaf(config)
    leaves += [] if config.tied else [head]
    return Names(tuple(leaves), config.depth, "model.", head=head)


def _module(config, ours, theirs):
    """The leaves of a module, by its names."""
    if ours.endswith("norm"):
        return [Leaf(f"{ours}/scale", f"{theirs}.weight")]
    kernel = Leaf(f"{ours}/kernel", f"{theirs}.weight", "transpose")
    biased = config.mlp_bias if "/mlp/" in ours else config.qkv_bias
    biased = config.output_bias if ours.endswith("attention/output") else biased
    return [kernel, Leaf(f"{ours}/bias", f"{theirs}.bias")] if biased else [kernel]


# Tensors that files hold beside the decoder: buffers, a tied head's copy, heads of other tasks.
IGNORED = ("layers.{}.self_attn.rotary_emb.inv_freq", "lm_head.weight")
OTHER_HEADS = ("score.",)

# First match wins; a kernel is [l, in, out]. Axes of the mesh: bmft/sharding.py.
SHARDING = (
    ("embeddings/*/embedding", (None, "fsdp")),  # words rarely divide
    ("head/kernel", ("fsdp", None)),
    ("layers/attention/output/kernel", (None, "tensor", "fsdp")),
    ("layers/mlp/down/kernel", (None, "tensor", "fsdp")),
    ("layers/**/kernel", (None, "fsdp", "tensor")),
    ("**", ()),
)
