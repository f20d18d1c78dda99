"""Vision Transformers (Dosovitskiy et al. 2020, arXiv:2010.11929): a stacked pre-norm encoder of
patches, read at the class token, or at the mean of the patches (timm's global_pool="avg").

Shapes: b images, y x patches, t = 1 + y x tokens (the class token first), d width, f width inside
the MLP, p pixels a side of a patch, g patches a side of the position table. The tree:

    embeddings/patch/{kernel [p, p, 3, d],bias}, embeddings/class [1, 1, d]
    embeddings/position [1, 1 + g g, d]     of the checkpoint's own size; see `positions`
    layers/attention_norm/{scale,bias}, layers/attention/{query,key,value,output}/{kernel,bias}
    layers/mlp_norm/{scale,bias}, layers/mlp/{up,down}/{kernel,bias}
    norm/{scale,bias}, classifier/out/{kernel,bias}

The pieces are the embeddings and the layers. Files are transformers' or timm's
(bmft.models.vit_timm).
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from bmft import layers
from bmft.errors import Mistake, nearest
from bmft.models import vision, vit_timm
from bmft.names import Leaf, Names

FAMILIES = ("vit", vit_timm.MODEL_TYPE)
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


class Config(NamedTuple):
    """What config.json or the shapes of the tensors say."""

    family: str  # of FAMILIES: whose names the file has
    outputs: int  # of the head
    patch: int
    grid: int  # patches a side of the position table
    width: int
    depth: int
    heads: int
    mlp_width: int
    activation: str
    eps: float
    qkv_bias: bool
    pooled: bool  # the head reads the mean of the patches, not the class token
    dropout: float
    attention_dropout: float
    size: int  # this and the rest: see bmft.models.vision
    mean: tuple
    std: tuple
    standardize: str
    resample: str

    @property
    def steady(self):
        """See bmft.models.vision."""
        return 0 if self.dropout or self.attention_dropout else pieces(self)


class Classifier(nn.Module):
    """Logits float32 [b, outputs] of batch["images"]: uint8, or float in [0, 1], [b, height, width,
    3], each side a multiple of the patch, or Mistake.

    begin: the first pieces that are left out: batch["features"] is what they would give.
    end: only so many are computed, and what comes out is returned: the tokens [b, t, d], or behind
    the last piece [b, d], what the head reads of them.
    """

    config: Config
    dtype: Any = jnp.float32
    remat: str = "none"
    unroll: int = 1
    frozen_below: int = 0  # the lowest layer in which something moves; see bmft.layers.scan_layers
    begin: int = 0
    end: int | None = None

    @nn.compact
    def __call__(self, batch, train=False):
        c, last = self.config, pieces(self.config)
        x = batch["features"].astype(self.dtype) if self.begin else self._embedded(batch, train)
        if self.begin < last:
            x = layers.scan_layers(
                Block(c, train, self.dtype, name="layers"),
                x,
                None,
                depth=c.depth,
                unroll=self.unroll,
                remat=self.remat,
                frozen_below=self.frozen_below,
                begin=max(self.begin - 1, 0),
                end=(last if self.end is None else self.end) - 1,
            )
            if self.end is not None and self.end < last:
                return x
            x = Readout(c.pooled, name="readout")(x)
        if self.end is not None:
            return x
        # The norm is of each token, so it may as well come after the choice of the class token.
        x_bd = layers.LayerNorm(c.eps, self.dtype, name="norm")(x)
        return vision.Head(c.outputs, self.dtype, name="classifier")(x_bd).astype(jnp.float32)

    def _embedded(self, batch, train):
        c = self.config
        images = vision.standardize(batch["images"], c.standardize, c.mean, c.std)
        return Embeddings(c, train, self.dtype, name="embeddings")(images)


class Embeddings(nn.Module):
    """Tokens [b, 1 + y x, d] of images [b, height, width, 3]: the class token, then the patches."""

    config: Config
    train: bool
    dtype: Any

    @nn.compact
    def __call__(self, images):
        c = self.config
        (b, height, width), sides = images.shape[:3], (c.patch, c.patch)
        if height % c.patch or width % c.patch:
            raise Mistake(
                f"images of {height} x {width} pixels: both must be multiples of the patch, "
                f"{c.patch}, for example {max(round(height / c.patch), 1) * c.patch}"
            )
        conv = layers.Conv(c.width, sides, strides=sides, dtype=self.dtype, name="patch")
        x_byxd = conv(images)
        normal = nn.initializers.normal(0.02)
        first = layers.param(self, "class", normal, (1, 1, c.width)).astype(self.dtype)
        table = layers.param(self, "position", normal, (1, 1 + c.grid**2, c.width))
        x = x_byxd.reshape(b, -1, c.width)
        x = jnp.concatenate([jnp.broadcast_to(first, (b, 1, c.width)), x], 1)
        x += positions(table, *x_byxd.shape[1:3]).astype(self.dtype)
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

        def norm(name):
            return layers.PreNorm(c.width, c.eps, self.dtype, name=name)

        attention = layers.Attention(
            c.heads, c.attention_dropout, self.train, self.dtype, c.qkv_bias, name="attention"
        )
        mlp = layers.MLP(c.mlp_width, c.activation, self.dtype, name="mlp")
        attention_norm, mlp_norm = norm("attention_norm"), norm("mlp_norm")
        x = attention_norm(drop(attention(attention_norm.before(x), mask)), x)
        return mlp_norm(drop(mlp(mlp_norm.before(x))), x)


class Readout(nn.Module):
    """What the head reads of tokens [b, t, d]: the class token, or the mean of the patches; [b, d].

    Methods that put in tokens of their own take them out again around this call.
    """

    pooled: bool

    @nn.compact
    def __call__(self, x):
        return x[:, 1:].astype(jnp.float32).mean(1) if self.pooled else x[:, 0]


def positions(table, y, x):
    """The position table [1, 1 + g g, d] for an image of y x patches: [1, 1 + y x, d].

    The class token's row stays; the others are interpolated as torch's bicubic interpolation does
    it (align_corners=False, no antialiasing), which is what transformers'
    interpolate_pos_encoding=True computes. timm's own resampling antialiases.
    """
    g = math.isqrt(table.shape[1] - 1)
    if (y, x) == (g, g):
        return table
    grid_ijd = table[0, 1:].astype(jnp.float32).reshape(g, g, -1)
    down, across = bicubic(g, y), bicubic(g, x)
    patches_yxd = jnp.einsum("yi,xj,ijd->yxd", down, across, grid_ijd, precision="highest")
    return jnp.concatenate([table[:, :1], patches_yxd.reshape(1, y * x, -1)], 1)


def bicubic(count, wanted):
    """float32 [wanted, count]: the matrix that makes `wanted` numbers of `count` in a row, by Keys'
    kernel (1981) with a = -0.75, the first and the last repeated beyond the ends."""
    place = (np.arange(wanted) + 0.5) * count / wanted - 0.5
    left = np.floor(place).astype(int)
    matrix = np.zeros((wanted, count))
    for source in (left - 1, left, left + 1, left + 2):
        inside = np.clip(source, 0, count - 1)
        np.add.at(matrix, (np.arange(wanted), inside), _keys(np.abs(place - source)))
    return matrix.astype(np.float32)


def _keys(distance, a=-0.75):
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = a * (((distance - 5) * distance + 8) * distance - 4)
    return np.where(distance <= 1, near, far)


def pieces(config):
    """How many there are before the head: the embeddings and the layers."""
    return 1 + config.depth


def dummy(config):
    """A batch of the smallest shape, for shapes and for adding a method's leaves."""
    return {"images": jnp.zeros((1, config.patch, config.patch, 3))}


# --- config.json -----------------------------------------------------------------------------


recognize = vit_timm.recognize


def configure(json, outputs):
    """`Config` of a config.json, or of what `recognize` gave, and the number of outputs.

    Raises Mistake for what this encoder does not compute.
    """
    usual = HALF
    if json["model_type"] == vit_timm.MODEL_TYPE:
        json, usual = json | vit_timm.checked(json), HALF | {"resample": "bicubic"}
    try:
        size, patch = _side(json, "image_size"), _side(json, "patch_size")
        config = Config(
            family=json["model_type"],
            outputs=outputs,
            patch=patch,
            grid=size // patch,
            width=json["hidden_size"],
            depth=json["num_hidden_layers"],
            heads=json["num_attention_heads"],
            mlp_width=json["intermediate_size"],
            activation=json["hidden_act"],
            eps=json["layer_norm_eps"],
            qkv_bias=json["qkv_bias"],
            pooled=json.get("pooled", False),
            dropout=json["hidden_dropout_prob"],
            attention_dropout=json["attention_probs_dropout_prob"],
            # A preprocessor's size may be what images are brought to before they are cropped.
            **vision.read(json, size=size, **usual)
            | ({} if "pretrained_cfg" in json else {"size": size}),
        )
    except KeyError as missing:
        raise Mistake(f"config.json lacks {missing}") from None
    if config.activation not in layers.ACTIVATIONS:
        known = nearest(config.activation, layers.ACTIVATIONS)
        raise Mistake(f"config.json: activation {config.activation!r} is not known; {known}")
    if config.width % config.heads:
        raise Mistake(f"config.json: {config.heads} heads do not divide the width {config.width}")
    if json.get("num_channels", 3) != 3:
        raise Mistake(f"config.json: num_channels is {json['num_channels']}; images here have 3")
    return config


def _side(json, field):
    """A number of pixels that may be written [height, width]."""
    sides = json[field] if isinstance(json[field], (list, tuple)) else [json[field]]
    if len(set(sides)) != 1:
        raise Mistake(f"config.json: {field} is {json[field]}; only squares are computed here")
    return sides[0]


def written_config(config, json):
    """The fields of config.json, beside the labels, of a model written by `names(config)`.

    A model with timm's tensors that reads the class token is written for transformers; a pooled
    one, which its ViTForImageClassification is not, with timm's names and fields as it was read.
    """
    fields = {
        "model_type": vit_timm.MODEL_TYPE if config.pooled else "vit",
        "image_size": config.grid * config.patch,
        "patch_size": config.patch,
        "num_channels": 3,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_width,
        "hidden_act": config.activation,
        "layer_norm_eps": config.eps,
        "qkv_bias": config.qkv_bias,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        **vision.write(config),
    }
    if config.pooled:
        return {key: json[key] for key in vit_timm.KEYS if key in json} | fields | {"pooled": True}
    return (json if config.family == "vit" else {}) | fields


# --- names -----------------------------------------------------------------------------------

# Our module: in transformers' files (and its 4.x modules), its 5.x modules, timm's files.
_OUTER = {
    "embeddings/patch": ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
    "norm": ("layernorm", "norm"),
    "classifier/out": ("classifier", "head"),
}
_INNER = {
    "attention_norm": ("layernorm_before", "layernorm_before", "norm1"),
    "attention/query": ("attention.attention.query", "attention.q_proj", "attn.qkv"),
    "attention/key": ("attention.attention.key", "attention.k_proj", "attn.qkv"),
    "attention/value": ("attention.attention.value", "attention.v_proj", "attn.qkv"),
    "attention/output": ("attention.output.dense", "attention.o_proj", "attn.proj"),
    "mlp_norm": ("layernorm_after", "layernorm_after", "norm2"),
    "mlp/up": ("intermediate.dense", "mlp.fc1", "mlp.fc1"),
    "mlp/down": ("output.dense", "mlp.fc2", "mlp.fc2"),
}
_FUSED = ("attention/query", "attention/key", "attention/value")


def names(config):
    """The names table of a `Config`.

    transformers 5 calls its modules otherwise than it calls the tensors in its files, which have
    the names of 4.x. Adapters of either are read, and written by the newer.
    """
    timm = config.family == vit_timm.MODEL_TYPE
    leaves = [
        _leaf(config, f"embeddings/{ours}", f"embeddings.{theirs}", timms)
        for ours, theirs, timms in (
            ("class", "cls_token", "cls_token"),
            ("position", "position_embeddings", "pos_embed"),
        )
    ]
    for ours, (theirs, timms) in _OUTER.items():
        timms = "fc_norm" if ours == "norm" and config.pooled else timms
        kernel = "conv" if ours == "embeddings/patch" else "transpose"
        leaves += _pair(config, ours, theirs, timms, kernel)
    for ours, (theirs, newest, timms) in _INNER.items():
        theirs, newest = f"encoder.layer.{{}}.{theirs}", f"layers.{{}}.{newest}"
        part = (_FUSED.index(ours), 3) if timm and ours in _FUSED else None
        pair = _pair(config, f"layers/{ours}", theirs, f"blocks.{{}}.{timms}", part=part)
        if ours in _FUSED and not config.qkv_bias:
            del pair[1]
        for leaf, end in zip(pair, ("weight", "bias"), strict=False):
            modules = (f"vit.{newest}.{end}", f"vit.{theirs}.{end}")
            leaves.append(leaf._replace(modules=modules))
    return Names(tuple(leaves), config.depth, "" if timm else "vit.")


def _pair(config, ours, theirs, timms, kernel="transpose", part=None):
    """The two leaves of a module, by its names."""
    norm = ours.endswith("norm")
    weight, layout = ("scale", "same") if norm else ("kernel", kernel)
    return [
        _leaf(config, f"{ours}/{weight}", f"{theirs}.weight", f"{timms}.weight", layout, part),
        _leaf(config, f"{ours}/bias", f"{theirs}.bias", f"{timms}.bias", "same", part),
    ]


def _leaf(config, ours, theirs, timms, layout="same", part=None):
    top = ours.startswith("classifier/")
    if config.family == "vit":
        return Leaf(ours, theirs, layout, top)
    written = theirs if top else f"vit.{theirs}"
    return Leaf(ours, timms, layout, top, part, timms if config.pooled else written)


# Tensors that files hold beside the encoder: the pooler of an encoder alone (the head reads the
# token itself), and what masked image modelling adds.
IGNORED = ("embeddings.mask_token",)
OTHER_HEADS = ("pooler.", "decoder.")

# First match wins; a kernel is [l, in, out]. Axes of the mesh: bmft/sharding.py.
SHARDING = (
    ("layers/attention/output/kernel", (None, "tensor", "fsdp")),
    ("layers/mlp/down/kernel", (None, "tensor", "fsdp")),
    ("layers/**/kernel", (None, "fsdp", "tensor")),
    ("**", ()),
)
