"""What image models share: how a checkpoint wants its images, levels of the tree, names of leaves.

The fields that the Configs of image models have in common:

    size         pixels a side of the images that it was trained on
    mean, std    3 floats each: of RGB in [0, 1], subtracted and divided by
    standardize  see `standardize` below
    resample     bilinear or bicubic: how images are brought to size
    steady       a property: of how many first pieces nothing is dropped at random in training

They stand in config.json under `pretrained_cfg` (timm's, and what we write) or in
preprocessor_config.json (transformers); else they are what is usual for the architecture.
"""

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from bmft import layers
from bmft.errors import Mistake, nearest
from bmft.models import PREPROCESSOR

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
# Leaves of a module: (our name, torch's, how torch's lies).
BIAS = (("bias", "bias", "same"),)
CONV = (("kernel", "weight", "conv"),)
DENSE = (("kernel", "weight", "transpose"), *BIAS)
NORM = (
    ("scale", "weight", "same"),
    *BIAS,
    ("mean", "running_mean", "same"),
    ("var", "running_var", "same"),
)
RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers, which transformers writes


def standardize(images, how, mean, std):
    """float32 [b, y, x, 3] of images: uint8, or float in [0, 1].

    how: `model` or `dataset`: less `mean` [3], over `std` [3]; `image`: each image less its own
    mean, over its own standard deviation, which is at least 1/sqrt of its numbers, so that an even
    image is no division by zero.
    """
    if images.dtype == jnp.uint8:
        images = images.astype(jnp.float32) / 255
    if how != "image":
        return (images - jnp.array(mean)) / jnp.array(std)
    centred = images - images.mean((1, 2, 3), keepdims=True)
    deviation = images.std((1, 2, 3), keepdims=True)
    return centred / jnp.maximum(deviation, math.prod(images.shape[1:]) ** -0.5)


class Level(nn.Module):
    """A level of the tree that computes nothing itself: level(x, make, "0", "blocks", "1") is what
    the module that make(name=) makes gives for x, with its leaves at 0/blocks/1 below this one."""

    @nn.compact
    def __call__(self, x, make, name, *below):
        return Level(name=name)(x, make, *below) if below else make(name=name)(x)


class Head(nn.Module):
    """A dense layer on what a backbone gives, [b, width] -> [b, outputs]"""

    outputs: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        return layers.Dense(self.outputs, self.dtype, name="out")(x)


def read(json, *, size, mean, std, resample="bilinear"):
    """{field: value} of a model's json; the arguments are the architecture's defaults.

    Raises Mistake for means that are not of three channels, and other ways of resampling.
    """
    usual = {"size": size, "mean": mean, "std": std, "resample": resample}
    if PREPROCESSOR in json and "pretrained_cfg" not in json:
        found = usual | _of_transformers(json[PREPROCESSOR], usual)
    else:
        found = usual | _of_timm(json.get("pretrained_cfg", {}))
    for name in ("mean", "std"):
        if len(found[name]) != 3:
            raise Mistake(f"images: {name} is {list(found[name])}, not three numbers for RGB")
        found[name] = tuple(map(float, found[name]))
    if found["resample"] not in RESAMPLE.values():
        near = nearest(found["resample"], RESAMPLE.values())
        raise Mistake(f"images: cannot resample {found['resample']!r}; {near}")
    return found | {"standardize": json.get("standardize", "model")}


def write(config):
    """Fields of a config.json from which `read` gives those of `config` again."""
    cfg = {
        "input_size": [3, config.size, config.size],
        "mean": list(config.mean),
        "std": list(config.std),
        "interpolation": config.resample,
    }
    return {"pretrained_cfg": cfg, "standardize": config.standardize}


def _of_transformers(preprocessor, usual):
    """What a preprocessor_config.json says."""
    mean = preprocessor.get("image_mean", usual["mean"])
    std = preprocessor.get("image_std", usual["std"])
    if not preprocessor.get("do_normalize", True):
        mean, std = (0.0,) * 3, (1.0,) * 3
    # Theirs are of bytes times the factor, ours of bytes / 255.
    factor = preprocessor.get("rescale_factor", 1 / 255)
    one = 255 * factor if preprocessor.get("do_rescale", True) else 255
    if abs(one - 1) > 1e-6:
        mean, std = [m / one for m in mean], [s / one for s in std]
    found = {"mean": mean, "std": std}
    side = preprocessor.get("crop_size") if preprocessor.get("do_center_crop") else None
    side = side or preprocessor.get("size")
    if isinstance(side, dict):
        side = side.get("shortest_edge", side.get("height"))
    if side is not None:
        found["size"] = side
    if "resample" in preprocessor:
        found["resample"] = RESAMPLE.get(preprocessor["resample"], preprocessor["resample"])
    return found


def _of_timm(cfg):
    """What a pretrained_cfg says."""
    found = {name: cfg[name] for name in ("mean", "std") if name in cfg}
    if "input_size" in cfg:
        found["size"] = cfg["input_size"][-1]
    if "interpolation" in cfg:
        found["resample"] = cfg["interpolation"]
    return found
