"""Tiny ViTs in directories as transformers and timm write them, and batches of images for them.

As in tests/tiny.py, dimensions are unlike one another, and every part matters.
"""

import json

import jax
import numpy as np
from safetensors.numpy import save_file

from bmft import tree
from bmft.models import vit
from bmft.names import to_file

OUTPUTS = 5
HUGGINGFACE = {
    "model_type": "vit",
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "layer_norm_eps": 1e-12,
    "image_size": 20,
    "patch_size": 4,
    "num_channels": 3,
    "qkv_bias": True,
}
TIMM = HUGGINGFACE | {"model_type": "timm_vit", "layer_norm_eps": 1e-6, "pooled": False}
DIALECTS = {"vit": HUGGINGFACE, "timm": TIMM, "pooled": TIMM | {"pooled": True}}
# What timm itself writes beside such tensors.
TIMMS = {
    "architecture": "vit_small_patch16_224",
    "num_classes": OUTPUTS,
    "model_args": {"num_heads": 3},
    "pretrained_cfg": {
        "input_size": [3, 20, 20],
        "mean": [0.4, 0.5, 0.6],
        "std": [0.2, 0.3, 0.25],
        "interpolation": "bicubic",
    },
}


def directory(folder, dialect="vit", seed=0, **changes):
    """A model directory with random weights of a size that makes every part matter."""
    settings = DIALECTS[dialect] | changes
    config = vit.configure(settings, OUTPUTS)
    made = jax.eval_shape(vit.Classifier(config).init, jax.random.key(0), vit.dummy(config))
    shapes, names = tree.flatten(made["params"]), vit.names(config)
    rng, tensors = np.random.default_rng(seed), {}
    for leaf in names.leaves:
        for layer in names.layers_of(leaf.path):
            shape = shapes[leaf.path].shape[0 if layer is None else 1 :]
            array = rng.normal(0, 0.2, shape) + leaf.path.endswith("scale")
            array = np.ascontiguousarray(to_file(leaf.layout, array), np.float32)
            key = (leaf.file if dialect != "vit" else names.written(leaf)).format(layer)
            tensors.setdefault(key, []).append(array)  # timm's queries, keys and values are one
    tensors = {key: np.concatenate(parts) for key, parts in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    pool = {"global_pool": "avg" if dialect == "pooled" else "token"}
    written = settings if dialect == "vit" else TIMMS | pool
    (folder / "config.json").write_text(json.dumps(written))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def batch(rows=4, size=(20, 20), seed=0, outputs=OUTPUTS):
    """Images; the last row is padding."""
    rng = np.random.default_rng(seed)
    return {
        "images": rng.random((rows, *size, 3)).astype(np.float32),
        "labels": rng.integers(0, outputs, rows).astype(np.int32),
        "weights": (np.arange(rows) < rows - 1).astype(np.float32),
    }


def task_loss(forward, batch, key):
    """Cross-entropy as (sum, weight), {} of a batch."""
    logits = jax.nn.log_softmax(forward(batch, train=True))
    each = -(logits * jax.nn.one_hot(batch["labels"], logits.shape[-1])).sum(-1)
    return ((each * batch["weights"]).sum(), batch["weights"].sum()), {}


def loss(module, variables, batch):
    """The same of a module without methods, the sum alone."""
    return task_loss(lambda batch, train: module.apply(variables, batch), batch, None)[0][0]
