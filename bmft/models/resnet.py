"""ResNets: He et al. 2015 (arXiv:1512.03385), with the stride in a bottleneck's 3x3 ("v1.5") or in
its first 1x1; wide ones (Zagoruyko and Komodakis 2016, arXiv:1605.07146), ResNeXts (Xie et al.
2016, arXiv:1611.05431), and those for CIFAR, whose shortcuts have no parameters.

Feature maps are [b, y, x, channels]. The tree (kernels [kh, kw, in/groups, out]):

    stem/conv/kernel, stem/norm/{scale,bias}
    stages/0/blocks/1/conv1/kernel, .../norm1/{scale,bias}     and conv2, norm2; conv3, norm3
    stages/1/blocks/0/shortcut/conv/kernel, .../shortcut/norm/{scale,bias}
    classifier/out/{kernel,bias}

with {mean,var} of each norm in the collection batch_stats. The pieces are the stem and the stages.
Files are transformers' (`encoder.stages.0.layers.1.layer.0.convolution`) or named as torchvision,
timm and the CIFAR repositories name them (`layer1.1.conv1`); see `recognize`.
"""

import re
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from bmft import layers
from bmft.errors import Mistake
from bmft.models import vision
from bmft.names import Leaf, Names

OURS = "torchvision_resnet"  # model_type of what has torchvision's names
FAMILIES = ("resnet", OURS)
REDUCTION = 4  # of a bottleneck, in transformers


class Config(NamedTuple):
    """What config.json or the shapes of the tensors say."""

    family: str  # of FAMILIES: whose names the file has
    outputs: int  # of the head
    stem: str  # imagenet: 7x7 of stride 2 and max pooling; cifar: 3x3
    stem_width: int
    block: str  # basic, bottleneck
    depths: tuple  # blocks of each stage
    widths: tuple  # channels that each stage gives
    inner: tuple  # channels of its 3x3 convolutions
    strides: tuple  # of its first block
    stride_in: str  # which convolution of a bottleneck has the stride: 3x3, 1x1
    groups: int  # of the 3x3 convolutions of bottlenecks
    shortcut: str  # where the size changes: downsample or shortcut, as the file calls it; pad
    head: str  # what a torchvision_resnet's file calls it: fc, linear
    size: int  # this and the rest: see bmft.models.vision
    mean: tuple
    std: tuple
    standardize: str
    resample: str
    eps: float = 1e-5
    batch_norm: str = "frozen"  # frozen, update, reset

    depth = 1  # of a stack: there is none

    @property
    def steady(self):
        """See bmft.models.vision."""
        return pieces(self)

    @property
    def in_transformers(self):
        """Can a ResNetConfig of transformers say this?"""
        reduction = REDUCTION if self.block == "bottleneck" else 1
        inner = tuple(width // reduction for width in self.widths)
        strides = self.strides[1:] == (2,) * (len(self.strides) - 1) and self.strides[0] in (1, 2)
        plain = self.stem == "imagenet" and self.shortcut != "pad" and self.groups == 1
        return plain and strides and inner == self.inner


class Classifier(nn.Module):
    """Logits float32 [b, outputs] of batch["images"]: uint8, or float in [0, 1], [b, y, x, 3].

    begin: the first pieces that are left out: batch["features"] is what they would give.
    end: only so many are computed, and the feature map behind them is returned; behind the last
    its mean [b, channels], which is all that the head reads.
    """

    config: Config
    dtype: Any = jnp.float32
    remat: str = "none"
    unroll: int = 1  # there is no stack
    frozen_below: int = 0  # without one, nothing below what moves is differentiated anyway
    begin: int = 0
    end: int | None = None

    @nn.compact
    def __call__(self, batch, train=False):
        c = self.config
        about = c, train and c.batch_norm != "frozen", self.dtype
        block = layers.rematerialised(Block, self.remat)
        stages = vision.Level(name="stages")
        if self.begin:
            x_byxc = batch["features"]
        else:
            x_byxc = vision.standardize(batch["images"], c.standardize, c.mean, c.std)
        for piece in range(self.begin, pieces(c) if self.end is None else self.end):
            if piece == 0:
                x_byxc = Stem(*about, name="stem")(x_byxc)
                continue
            for i in range(c.depths[piece - 1]):
                make = partial(block, *about, piece - 1, 1 if i else c.strides[piece - 1])
                x_byxc = stages(x_byxc, make, str(piece - 1), "blocks", str(i))
        if self.begin == pieces(c):
            x_bc = x_byxc
        elif self.end is None or self.end == pieces(c):
            x_bc = x_byxc.astype(jnp.float32).mean((1, 2))
        else:
            return x_byxc
        if self.end is not None:
            return x_bc
        return vision.Head(c.outputs, self.dtype, name="classifier")(x_bc).astype(jnp.float32)


class Stem(nn.Module):
    config: Config
    batch_norm: bool  # normalise by the batch
    dtype: Any

    @nn.compact
    def __call__(self, x):
        c = self.config
        side, stride = (7, 2) if c.stem == "imagenet" else (3, 1)
        x = _conv(c.stem_width, side, self.dtype, "conv", stride)(x)
        x = layers.BatchNorm(c.eps, self.batch_norm, self.dtype, name="norm")(x)
        x = jax.nn.relu(x)
        return layers.max_pool(x, 3, 2, padding=1) if c.stem == "imagenet" else x


class Block(layers.FeatureBlock):
    """relu(shortcut(x) + convolutions(x)): two of 3x3, or 1x1, 3x3 and 1x1"""

    config: Config
    batch_norm: bool
    dtype: Any
    number: int  # of its stage
    stride: int

    @nn.compact
    def __call__(self, x):
        c = self.config
        width, inner = c.widths[self.number], c.inner[self.number]

        def normed(i, h, features, side, stride=1, groups=1):
            h = _conv(features, side, self.dtype, f"conv{i}", stride, groups)(h)
            return layers.BatchNorm(c.eps, self.batch_norm, self.dtype, name=f"norm{i}")(h)

        if c.block == "basic":
            h = jax.nn.relu(normed(1, x, inner, 3, self.stride))
            h = normed(2, h, width, 3)
        else:
            first, second = (self.stride, 1) if c.stride_in == "1x1" else (1, self.stride)
            h = jax.nn.relu(normed(1, x, inner, 1, first))
            h = jax.nn.relu(normed(2, h, inner, 3, second, c.groups))
            h = normed(3, h, width, 1)
        if changes(x.shape[-1], width, self.stride):
            x = Shortcut(c, self.batch_norm, self.dtype, width, self.stride, name="shortcut")(x)
        return jax.nn.relu(h + x)


class Shortcut(nn.Module):
    """x brought to the width and size of what it is added to: by a 1x1 convolution, or (option A)
    by leaving out rows and columns and adding empty channels on either side."""

    config: Config
    batch_norm: bool
    dtype: Any
    width: int
    stride: int

    @nn.compact
    def __call__(self, x):
        if self.config.shortcut == "pad":
            missing = self.width - x.shape[-1]
            x = x[:, :: self.stride, :: self.stride].astype(self.dtype)
            return jnp.pad(x, ((0, 0),) * 3 + ((missing // 2, missing - missing // 2),))
        x = _conv(self.width, 1, self.dtype, "conv", self.stride)(x)
        return layers.BatchNorm(self.config.eps, self.batch_norm, self.dtype, name="norm")(x)


def _conv(features, side, dtype, name, stride=1, groups=1):
    """A square convolution that keeps the size but for its stride."""
    return layers.Conv(
        features,
        (side, side),
        (stride, stride),
        ((side // 2,) * 2,) * 2,
        groups=groups,
        dtype=dtype,
        use_bias=False,
        name=name,
    )


def changes(before, after, stride):
    """Does a block change the feature map's size or width, so that it has a shortcut?"""
    return stride != 1 or before != after


def pieces(config):
    """How many there are before the head: the stem and the stages."""
    return 1 + len(config.depths)


def configure(json, outputs):
    """`Config` of transformers' config.json, or of what `recognize` gave, timm's with it.

    Raises Mistake for what is not computed here and no shape would tell.
    """
    _check_variant(json)
    try:
        widths, stem = tuple(json["hidden_sizes"]), json.get("stem", "imagenet")
        reduction = REDUCTION if json["layer_type"] == "bottleneck" else 1
        first = 2 if json.get("downsample_in_first_stage") else 1
        size = 224 if stem == "imagenet" else 32
        return Config(
            family=json["model_type"],
            outputs=outputs,
            stem=stem,
            stem_width=json["embedding_size"],
            block=json["layer_type"],
            depths=tuple(json["depths"]),
            widths=widths,
            inner=tuple(json.get("inner_sizes", [width // reduction for width in widths])),
            strides=(first, *(2,) * (len(widths) - 1)),
            stride_in="1x1" if json.get("downsample_in_bottleneck") else "3x3",
            groups=json.get("groups", 1),
            shortcut=json.get("shortcut", "downsample"),
            head=json.get("head", "fc"),
            **vision.read(json, size=size, **vision.IMAGENET),
        )
    except KeyError as missing:
        raise Mistake(f"config.json lacks {missing}") from None


# timm's names of architectures that have the tensors of a ResNet and compute what it does; others
# (resnetaa50, resnetblur50) differ by layers that have none.
KNOWN = r"([a-z]+_)?(wide_)?res(net|next)\d+(_\d+|_\d+x\d+d|_v1b)?"


def _check_variant(json):
    if json["model_type"] == "resnet":
        for key, known in (("hidden_act", "relu"), ("num_channels", 3)):
            if json.get(key) != known:
                raise Mistake(f"config.json: {key} must be {known!r}, not {json.get(key)!r}")
    architecture = json.get("architecture")
    if architecture and not re.fullmatch(KNOWN, architecture):
        raise Mistake(
            f"config.json: architecture {architecture!r} is not computed here; of the ResNets "
            "there are resnet50, wide_resnet50_2, resnext50_32x4d and the like"
        )


def recognize(shapes):
    """The json of a ResNet with tensors named as torchvision names them, by {name: shape}; None.

    Raises Mistake, naming the tensor, for a stem that is not computed. Blocks that differ from
    torchvision's (squeeze and excitation, ...) are for the strict loading to find.
    """
    first = r"layer(\d+)\.(\d+)\.conv1\.weight"
    blocks = [
        tuple(map(int, found.groups())) for name in shapes if (found := re.match(first, name))
    ]
    if (1, 0) not in blocks:
        return None
    stages = range(1, 1 + max(stage for stage, _ in blocks))
    block = "bottleneck" if "layer1.0.conv3.weight" in shapes else "basic"
    last = "conv3" if block == "bottleneck" else "conv2"
    stem = _stem(shapes)
    try:
        inner = [shapes[f"layer{stage}.0.conv1.weight"][0] for stage in stages]
        second = shapes["layer1.0.conv2.weight"]
        return stem | {
            "model_type": OURS,
            "layer_type": block,
            "depths": [sum(at[0] == stage for at in blocks) for stage in stages],
            "hidden_sizes": [shapes[f"layer{stage}.0.{last}.weight"][0] for stage in stages],
            "inner_sizes": inner,
            "groups": inner[0] // second[1] if block == "bottleneck" else 1,
            "shortcut": _shortcut(shapes, stem["stem"] == "cifar" and block == "basic"),
            "head": "linear" if "linear.weight" in shapes else "fc",
        }
    except KeyError as missing:
        raise Mistake(f"tensor {missing} is missing: not a ResNet's") from None


def _shortcut(shapes, may_pad):
    """What the file calls its shortcuts; pad where it has none and may do without."""
    for kind in ("downsample", "shortcut"):
        if any(re.match(rf"layer\d+\.0\.{kind}\.", name) for name in shapes):
            return kind
    return "pad" if may_pad else "downsample"


def _stem(shapes):
    if "conv1.weight" not in shapes:
        others = [name for name in shapes if name.startswith("conv1.")]
        found = f"tensor {others[0]!r}" if others else "no tensor 'conv1.weight'"
        raise Mistake(f"{found}: of the stems of ResNets, one convolution of 7x7 or 3x3 is known")
    width, _, *side = shapes["conv1.weight"]
    stems = {(7, 7): "imagenet", (3, 3): "cifar"}
    if tuple(side) not in stems:
        raise Mistake(f"tensor 'conv1.weight' is a stem of {side}; known: 7x7 and 3x3")
    return {"stem": stems[tuple(side)], "embedding_size": width}


def written_config(config, json):
    """The fields of config.json, beside the labels, of a model written by `names(config)`."""
    fields = {
        "model_type": "resnet" if config.in_transformers else OURS,
        "num_channels": 3,
        "embedding_size": config.stem_width,
        "hidden_sizes": list(config.widths),
        "depths": list(config.depths),
        "layer_type": config.block,
        "hidden_act": "relu",
        "downsample_in_first_stage": config.strides[0] == 2,
        "downsample_in_bottleneck": config.stride_in == "1x1",
        **vision.write(config),
    }
    if config.in_transformers:
        return (json if config.family == "resnet" else {}) | fields
    return fields | {
        "stem": config.stem,
        "inner_sizes": list(config.inner),
        "groups": config.groups,
        "shortcut": config.shortcut,
        "head": config.head,
    }


def _modules(config):
    """(our module, transformers' without its prefix, torchvision's), but for the head."""
    yield "stem/conv", "embedder.embedder.convolution", "conv1"
    yield "stem/norm", "embedder.embedder.normalization", "bn1"
    before = config.stem_width
    for stage, depth in enumerate(config.depths):
        for block in range(depth):
            ours = f"stages/{stage}/blocks/{block}"
            hugging, torch = f"encoder.stages.{stage}.layers.{block}", f"layer{stage + 1}.{block}"
            for i in range(2 if config.block == "basic" else 3):
                conv = f"{hugging}.layer.{i}"
                yield f"{ours}/conv{i + 1}", f"{conv}.convolution", f"{torch}.conv{i + 1}"
                yield f"{ours}/norm{i + 1}", f"{conv}.normalization", f"{torch}.bn{i + 1}"
            stride, after = 1 if block else config.strides[stage], config.widths[stage]
            if config.shortcut != "pad" and changes(before, after, stride):
                ours, hugging = f"{ours}/shortcut", f"{hugging}.shortcut"
                torch = f"{torch}.{config.shortcut}"
                yield f"{ours}/conv", f"{hugging}.convolution", f"{torch}.0"
                yield f"{ours}/norm", f"{hugging}.normalization", f"{torch}.1"
            before = after


def names(config):
    """The names table of a `Config`. What transformers can express is written with its names."""
    of_transformers, leaves = config.family == "resnet", []
    head = "classifier/out", "classifier.1", config.head
    for ours, hugging, torch in (*_modules(config), head):
        top = ours == head[0]
        full = hugging if top else f"resnet.{hugging}"
        spellings = (full, torch) if config.in_transformers else (torch,)
        last = ours.rpartition("/")[2]
        parts = vision.DENSE if top else vision.CONV if "conv" in last else vision.NORM
        for part, theirs, layout in parts:
            leaves.append(
                Leaf(
                    f"{ours}/{part}",
                    f"{hugging if of_transformers else torch}.{theirs}",
                    layout,
                    top,
                    written=f"{spellings[0]}.{theirs}",
                    modules=tuple(f"{module}.{theirs}" for module in spellings),
                )
            )
    stages = ("stem", *(f"stages/{i}" for i in range(len(config.depths))))
    return Names(tuple(leaves), 0, "resnet." if of_transformers else "", stages)


IGNORED = OTHER_HEADS = ()
SHARDING = (("**", ()),)  # small beside their feature maps: every device holds them whole


def dummy(config):
    """A batch of the smallest shape, for shapes and for adding a method's leaves."""
    return {"images": jnp.zeros((1, 32, 32, 3))}
