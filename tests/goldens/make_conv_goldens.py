"""Makes what tests/test_resnet.py and tests/test_vgg.py compare with:
python tests/goldens/make_conv_goldens.py

Needs requirements-parity.txt. Tiny random convolutional nets, of transformers and of plain torch
modules with torchvision's names, with their logits for the images of tests/tiny_images.py, as they
are and in training mode, and the statistics of the batch that torch then reports. Weights are
rounded to 16 bits, which keeps the files small, before anything is computed with them, in 32 bits.
"""

import json
import pathlib
import sys

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

FOLDER = pathlib.Path(__file__).resolve().parent
TESTS = FOLDER.parent
sys.path[:0] = [str(TESTS), str(TESTS / "parity"), str(TESTS.parent)]

import nets  # noqa: E402
import tiny_images  # noqa: E402

CONFIG = transformers.ResNetConfig(
    embedding_size=6, hidden_sizes=[12, 20, 28], depths=[2, 1, 2], num_labels=5
)
MODELS = {
    "resnet": lambda: transformers.ResNetForImageClassification(CONFIG),
    "resnext": lambda: nets.resnet("resnext"),
    "cifar_resnet": lambda: nets.cifar(1),
    "vgg": nets.vgg,
    "vgg_bn": lambda: nets.vgg(norm=True),
}


def write(name, model):
    """A directory as transformers writes it, or one file as torchvision's are."""
    kept = {key: t for key, t in model.state_dict().items() if not key.endswith("tracked")}
    tensors = {key: tensor.half().contiguous() for key, tensor in kept.items()}
    if not hasattr(model, "config"):
        save_file(tensors, FOLDER / f"{name}.safetensors")
        return
    folder = FOLDER / name
    folder.mkdir(exist_ok=True)
    settings = model.config.to_dict() | {
        "dtype": "float16",
        "architectures": [type(model).__name__],
    }
    (folder / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def in_training(model):
    """Logits without dropout, and the batch's statistics in the first norm and the last."""
    for module in model.train().modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0  # the running statistics are then the batch's
    found = nets.logits(model, tiny_images.batch()["images"])
    state = model.state_dict()
    running = [key for key in state if "running" in key]
    return found, {key: state[key].numpy() for key in (*running[:2], *running[-2:])}


def main():
    arrays = {}
    for seed, (name, make) in enumerate(MODELS.items()):
        model = nets.fill(make(), seed, np.float16)
        write(name, model)
        arrays[name] = nets.logits(model, tiny_images.batch()["images"])
        arrays[f"{name}/train"], statistics = in_training(model)
        arrays |= {f"{name}/{key}": array for key, array in statistics.items()}
    np.savez_compressed(FOLDER / "conv.npz", **arrays)


if __name__ == "__main__":
    main()
