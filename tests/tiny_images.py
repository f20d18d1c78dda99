"""Tiny models of images in directories as users have them, and batches for them.

As in tests/tiny.py, dimensions are unlike one another, and every part matters.
"""

import importlib
import json
import math
import pathlib

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bmft import models, tree
from bmft.errors import Mistake
from bmft.models import weights
from bmft.names import to_file

OUTPUTS = 5
# family -> (the model's file, its json, is the json written as config.json?)
RESNET = {
    "model_type": "resnet",
    "num_channels": 3,
    "embedding_size": 6,
    "hidden_sizes": [12, 20],
    "depths": [2, 1],
    "layer_type": "bottleneck",
    "hidden_act": "relu",
}
TORCHVISION = RESNET | {"model_type": "torchvision_resnet"}
VGG = {
    "model_type": "torchvision_vgg",
    "depths": [1, 2],
    "hidden_sizes": [4, 6],
    "batch_norm": False,
    "dense_sizes": [13, 11],
    "cells": 3,
    "last_pool": True,
    "ceil": False,
    "channels": "rgb",
}
FAMILIES = {
    "resnet": ("resnet", RESNET, True),
    "resnet_basic": ("resnet", RESNET | {"layer_type": "basic", "hidden_sizes": [6, 11]}, True),
    "torchvision": ("resnet", TORCHVISION, False),
    "resnext": ("resnet", TORCHVISION | {"inner_sizes": [6, 14], "groups": 2}, False),
    "wide": ("resnet", TORCHVISION | {"inner_sizes": [5, 8]}, False),
    "cifar": (
        "resnet",
        TORCHVISION
        | {"layer_type": "basic", "stem": "cifar", "embedding_size": 4, "hidden_sizes": [4, 10]}
        | {"shortcut": "pad", "head": "linear"},
        False,
    ),
    "vgg": ("vgg", VGG, False),
    "vgg_bn": ("vgg", VGG | {"batch_norm": True}, False),
    "vgg_features": ("vgg", VGG | {"dense_sizes": [], "cells": 0}, False),
}


def directory(folder, family, seed=0, **changes):
    """A model directory with random weights and running statistics."""
    name, settings, written = FAMILIES[family]
    settings = settings | changes
    file = importlib.import_module(f"bmft.models.{name}")
    config = file.configure(settings, OUTPUTS)
    made = jax.eval_shape(file.Classifier(config).init, jax.random.key(0), file.dummy(config))
    shapes = tree.flatten(tree.join(*made.values()))
    rng, names, tensors = np.random.default_rng(seed), file.names(config), {}
    for leaf in names.leaves:
        array = drawn(rng, leaf.path, shapes[leaf.path].shape)
        key = names.written(leaf) if written else leaf.file
        tensors[key] = np.ascontiguousarray(to_file(leaf.layout, array), np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    if written:
        (folder / "config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def drawn(rng, path, shape):
    """A leaf of a size at which neither the feature maps nor the logits vanish or grow."""
    last = path.rpartition("/")[2]
    if last == "kernel":
        return rng.normal(0, math.sqrt(2 / math.prod(shape[:-1])), shape)
    if last == "var":
        return rng.uniform(0.5, 1.5, shape)
    return rng.normal(0, 0.2, shape) + (last == "scale")


def batch(rows=4, size=(19, 22), seed=0, outputs=OUTPUTS):
    """Images of an odd height; the last row is padding."""
    rng = np.random.default_rng(seed)
    return {
        "images": rng.integers(0, 256, (rows, *size, 3)).astype(np.uint8),
        "labels": rng.integers(0, outputs, rows).astype(np.int32),
        "weights": (np.arange(rows) < rows - 1).astype(np.float32),
        "index": np.where(np.arange(rows) < rows - 1, np.arange(rows), -1).astype(np.int32),
    }


def loss(forward, batch, key):
    """Cross-entropy as (sum, weight), {} of a batch."""
    logits = jax.nn.log_softmax(forward(batch, train=True))
    each = -(logits * jax.nn.one_hot(batch["labels"], logits.shape[-1])).sum(-1)
    return ((each * batch["weights"]).sum(), batch["weights"].sum()), {}


def check_refused(folder, edit, says):
    """That a model whose tensors edit({name: array}) has changed is refused in one line."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(Mistake) as refused:
        weights.load(models.find(str(folder), outputs=OUTPUTS), jax.random.key(0))
    assert says in str(refused.value) and "\n" not in str(refused.value)


GOLDENS = pathlib.Path(__file__).resolve().parent / "goldens"


def check_golden(name):
    """That a model of tests/goldens/make_conv_goldens.py computes what torch did: its logits, and
    those of training with the statistics of the batch."""
    folder = GOLDENS / name
    path = folder if folder.is_dir() else folder.with_suffix(".safetensors")
    stored = np.load(GOLDENS / "conv.npz")
    model = models.find(str(path), outputs=OUTPUTS)
    loaded, images = weights.load(model, jax.random.key(0)), {"images": batch()["images"]}
    assert loaded.fresh == () and loaded.ignored == ()
    logits = jax.jit(model.module.apply)(loaded.variables(), images)
    np.testing.assert_allclose(logits, stored[name], atol=1e-5, rtol=1e-5)
    if not loaded.batch_stats:
        return
    changes = {"batch_norm": "update"} | ({"dropout": 0.0} if "vgg" in name else {})
    module = models.find(str(path), outputs=OUTPUTS, **changes).module
    apply = jax.jit(lambda v, b: module.apply(v, b, True, mutable=["batch_stats"]))
    logits, seen = apply(loaded.variables(), images)
    np.testing.assert_allclose(logits, stored[f"{name}/train"], atol=1e-4, rtol=1e-4)
    keys = {leaf.path: f"{name}/{model.names.prefix}{leaf.file}" for leaf in model.names.leaves}
    found = {keys[path]: leaf for path, leaf in tree.flatten(seen["batch_stats"]).items()}
    compared = [key for key in found if key in stored]
    assert len(compared) == 4
    for key in compared:
        np.testing.assert_allclose(found[key], stored[key], atol=1e-5, rtol=1e-4, err_msg=key)
