"""BERT, RoBERTa and DistilBERT as one stacked encoder with each family's classification head.

Shapes: b packed rows, t tokens of a row, e examples of a row, d width, f width inside the MLP,
l layers, c outputs. The tree (kernels [in, out], a stack of layers in front):

    embeddings/{word,position,type}/embedding, embeddings/norm/{scale,bias}
    layers/attention/{query,key,value,output}/{kernel,bias}, layers/attention_norm/{scale,bias}
    layers/mlp/{up,down}/{kernel,bias}, layers/mlp_norm/{scale,bias}
    pooler/{kernel,bias}             BERT only: the pretrained dense layer on the first token
    classifier/...                   the head: one dense layer (BERT) or two

The families differ in their names, in position offsets, token types, and where dropout and the
activation of the head lie: `Config` says how.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from bmft import layers
from bmft.errors import Mistake, nearest
from bmft.names import Leaf, Names

# model_type in config.json -> the family that computes it.
FAMILIES = {
    "bert": "bert",
    "roberta": "roberta",
    "xlm-roberta": "roberta",
    "camembert": "roberta",
    "distilbert": "distilbert",
}


class Config(NamedTuple):
    """What a family's config.json says, in our words."""

    family: str  # bert, roberta, distilbert
    outputs: int  # of the head
    vocabulary: int
    positions: int  # rows of the position table
    first_position: int  # RoBERTa counts from padding_idx + 1
    types: int  # token types; 0: none
    width: int
    depth: int
    heads: int
    mlp_width: int
    activation: str
    eps: float
    dropout: float
    attention_dropout: float
    head_dropout: float
    pad_id: int

    @property
    def max_length(self):
        """Tokens of the longest example the position table holds."""
        return self.positions - self.first_position


class Classifier(nn.Module):
    """Logits [b, e, c] (float32) of packed rows; see `bmft.data.batches` for the batch.

    batch: input_ids, segments, positions, token_types int32 [b, t]; first int32 [b, e], the column
    of each example's first token.
    """

    config: Config
    dtype: Any = jnp.float32
    remat: str = "none"
    unroll: int = 1
    frozen_below: int = 0  # the lowest layer in which something moves; see bmft.layers.scan_layers

    @nn.compact
    def __call__(self, batch, train=False):
        c = self.config
        x_btd = Embeddings(c, train, self.dtype, name="embeddings")(
            batch["input_ids"], batch["positions"], batch["token_types"]
        )
        segments = batch["segments"]
        mask_b1ts = segments[:, None, :, None] == segments[:, None, None, :]
        x_btd = layers.scan_layers(
            Block(c, train, self.dtype, name="layers"),
            x_btd,
            mask_b1ts,
            depth=c.depth,
            unroll=self.unroll,
            remat=self.remat,
            frozen_below=self.frozen_below,
        )
        x_bed = jnp.take_along_axis(x_btd, batch["first"][..., None], axis=1)
        if c.family == "bert":
            x_bed = jnp.tanh(layers.Dense(c.width, self.dtype, name="pooler")(x_bed))
        return Head(c, train, self.dtype, name="classifier")(x_bed).astype(jnp.float32)


class Embeddings(nn.Module):
    config: Config
    train: bool
    dtype: Any

    @nn.compact
    def __call__(self, ids, positions, types):
        c = self.config
        x = layers.Embed(c.vocabulary, c.width, self.dtype, name="word")(ids)
        positions = positions + c.first_position
        x += layers.Embed(c.positions, c.width, self.dtype, name="position")(positions)
        if c.types:
            x += layers.Embed(c.types, c.width, self.dtype, name="type")(types)
        x = layers.LayerNorm(c.eps, self.dtype, name="norm")(x)
        return nn.Dropout(c.dropout, deterministic=not self.train)(x)


class Block(nn.Module):
    config: Config
    train: bool
    dtype: Any

    @nn.compact
    def __call__(self, x, mask):
        c = self.config

        def drop(h):
            return nn.Dropout(c.dropout, deterministic=not self.train)(h)

        attention = layers.Attention(
            c.heads, c.attention_dropout, self.train, self.dtype, name="attention"
        )
        h = attention(x, mask)
        if c.family != "distilbert":  # DistilBERT has no dropout after the attention's projection
            h = drop(h)
        x = layers.Residual(c.eps, self.dtype, name="attention_norm")(h, x)
        h = drop(layers.MLP(c.mlp_width, c.activation, self.dtype, name="mlp")(x))
        return layers.Residual(c.eps, self.dtype, name="mlp_norm")(h, x)


class Head(nn.Module):
    config: Config
    train: bool
    dtype: Any

    @nn.compact
    def __call__(self, x):
        c = self.config

        def drop(h):
            return nn.Dropout(c.head_dropout, deterministic=not self.train)(h)

        if c.family == "bert":
            return layers.Dense(c.outputs, self.dtype, name="out")(drop(x))
        if c.family == "roberta":
            h = jnp.tanh(layers.Dense(c.width, self.dtype, name="dense")(drop(x)))
        else:
            h = jax.nn.relu(layers.Dense(c.width, self.dtype, name="dense")(x))
        return layers.Dense(c.outputs, self.dtype, name="out")(drop(h))


def configure(json, outputs):
    """`Config` of a Hugging Face config.json (a dict) and the number of outputs.

    Raises Mistake for what this encoder does not compute (relative positions, other activations).
    """
    family = FAMILIES[json["model_type"]]
    read = _distilbert if family == "distilbert" else _bert
    try:
        config = read(json, family, outputs)
    except KeyError as missing:
        raise Mistake(f"config.json lacks {missing}") from None
    if config.activation not in layers.ACTIVATIONS:
        known = nearest(config.activation, layers.ACTIVATIONS)
        raise Mistake(f"config.json: activation {config.activation!r} is not known; {known}")
    if json.get("position_embedding_type", "absolute") != "absolute":
        raise Mistake("config.json: position_embedding_type must be 'absolute'")
    if json.get("is_decoder"):
        raise Mistake("config.json: is_decoder must be false: this model is an encoder")
    return config


def _bert(json, family, outputs):
    head_dropout = json.get("classifier_dropout")
    pad_id = json.get("pad_token_id", 0)
    return Config(
        family=family,
        outputs=outputs,
        vocabulary=json["vocab_size"],
        positions=json["max_position_embeddings"],
        first_position=pad_id + 1 if family == "roberta" else 0,
        types=json["type_vocab_size"],
        width=json["hidden_size"],
        depth=json["num_hidden_layers"],
        heads=json["num_attention_heads"],
        mlp_width=json["intermediate_size"],
        activation=json["hidden_act"],
        eps=json["layer_norm_eps"],
        dropout=json["hidden_dropout_prob"],
        attention_dropout=json["attention_probs_dropout_prob"],
        head_dropout=json["hidden_dropout_prob"] if head_dropout is None else head_dropout,
        pad_id=pad_id,
    )


def _distilbert(json, family, outputs):
    return Config(
        family=family,
        outputs=outputs,
        vocabulary=json["vocab_size"],
        positions=json["max_position_embeddings"],
        first_position=0,
        types=0,
        width=json["dim"],
        depth=json["n_layers"],
        heads=json["n_heads"],
        mlp_width=json["hidden_dim"],
        activation=json["activation"],
        eps=1e-12,
        dropout=json["dropout"],
        attention_dropout=json["attention_dropout"],
        head_dropout=json["seq_classif_dropout"],
        pad_id=json.get("pad_token_id", 0),
    )


# Our module -> theirs; the layer's prefix is added below.
_BERT_BLOCK = {
    "attention/query": "attention.self.query",
    "attention/key": "attention.self.key",
    "attention/value": "attention.self.value",
    "attention/output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp/up": "intermediate.dense",
    "mlp/down": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
_DISTILBERT_BLOCK = {
    "attention/query": "attention.q_lin",
    "attention/key": "attention.k_lin",
    "attention/value": "attention.v_lin",
    "attention/output": "attention.out_lin",
    "attention_norm": "sa_layer_norm",
    "mlp/up": "ffn.lin1",
    "mlp/down": "ffn.lin2",
    "mlp_norm": "output_layer_norm",
}
_HEADS = {
    "bert": {"classifier/out": "classifier"},
    "roberta": {"classifier/dense": "classifier.dense", "classifier/out": "classifier.out_proj"},
    "distilbert": {"classifier/dense": "pre_classifier", "classifier/out": "classifier"},
}


def names(config):
    """The names table of a `Config`."""
    block, stack = _BERT_BLOCK, "encoder.layer.{}."
    if config.family == "distilbert":
        block, stack = _DISTILBERT_BLOCK, "transformer.layer.{}."
    modules = {"embeddings/norm": "embeddings.LayerNorm"}
    modules |= {f"layers/{ours}": stack + theirs for ours, theirs in block.items()}
    if config.family == "bert":
        modules["pooler"] = "pooler.dense"
    tables = {"word": "word_embeddings", "position": "position_embeddings"}
    if config.types:
        tables["type"] = "token_type_embeddings"
    leaves = [
        Leaf(f"embeddings/{ours}/embedding", f"embeddings.{theirs}.weight", "same")
        for ours, theirs in tables.items()
    ]
    heads = _HEADS[config.family]
    for ours, theirs in (modules | heads).items():
        norm = ours.endswith("norm")
        weight, layout = ("scale", "same") if norm else ("kernel", "transpose")
        leaves.append(Leaf(f"{ours}/{weight}", f"{theirs}.weight", layout, ours in heads))
        leaves.append(Leaf(f"{ours}/bias", f"{theirs}.bias", "same", ours in heads))
    return Names(tuple(leaves), config.depth, config.family + ".")


# Tensors that files hold beside the encoder: buffers, and heads of other tasks.
IGNORED = ("embeddings.position_ids", "embeddings.token_type_ids")
OTHER_HEADS = (
    *("cls.", "lm_head.", "qa_outputs.", "classifier."),  # a token classifier's, in RoBERTa
    *("vocab_transform.", "vocab_layer_norm.", "vocab_projector."),
    "pooler.",  # RoBERTa's files have one; its classifier reads the first token itself
)

# First match wins; a kernel is [l, in, out]. Axes of the mesh: bmft/sharding.py.
SHARDING = (
    ("embeddings/*/embedding", (None, "fsdp")),  # words rarely divide
    ("layers/attention/output/kernel", (None, "tensor", "fsdp")),
    ("layers/mlp/down/kernel", (None, "tensor", "fsdp")),
    ("layers/**/kernel", (None, "fsdp", "tensor")),
    ("**", ()),
)


def dummy(config):
    """A batch of the smallest shape, for shapes and for adding a method's leaves."""
    ids = jnp.zeros((1, 2), jnp.int32)
    tokens = dict.fromkeys(("input_ids", "positions", "token_types"), ids)
    return tokens | {"segments": ids + 1, "first": jnp.zeros((1, 1), jnp.int32)}
