"""Accuracy of the two CIFAR ResNets as their files have them, before any training.

    ./run.sh benchmarks/cifar_checkpoints.py --data=DIR [--output=FILE.json]

DIR holds checkpoints/resnet20_cifar10.safetensors and resnet56_cifar10.safetensors (of
akamaster/pytorch_resnet_cifar10), images/cifar10_lossless500.npz (500 training images, exact
pixels; x, y) and images/cifar10_small.npz (JPEG copies; test_x, test_y). PyTorch gives 100 % of the
first; 80.4 % and 82.5 % of the second.
"""

import argparse
import json
import sys
from pathlib import Path

import jax
import numpy as np

from bmft import errors, models
from bmft.errors import Mistake
from bmft.models import weights

CHECKPOINTS = ("resnet20_cifar10", "resnet56_cifar10")
IMAGES = {"cifar10_lossless500": ("x", "y"), "cifar10_small": ("test_x", "test_y")}
ROWS = 250


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="folder with checkpoints/ and images/")
    parser.add_argument("--output", default="cifar_checkpoints.json")
    options = parser.parse_args(argv)
    data, result = Path(options.data), {}
    sets = {name: images(data / "images" / f"{name}.npz", *keys) for name, keys in IMAGES.items()}
    for name in CHECKPOINTS:
        predict = classifier(existing(data / "checkpoints" / f"{name}.safetensors"))
        result[name] = {of: accuracy(predict, *arrays) for of, arrays in sets.items()}
    Path(options.output).write_text(json.dumps(result, indent=2) + "\n")
    print("\ncheckpoint         " + "".join(f"{of:>22}" for of in IMAGES))
    for name, accuracies in result.items():
        print(f"{name:19}" + "".join(f"{accuracies[of]:22.2%}" for of in IMAGES))


def existing(path):
    if not path.is_file():
        raise Mistake(f"--data: there is no {str(path)!r}")
    return path


def images(path, x, y):
    """(uint8 [n, 32, 32, 3], int [n]) of a file."""
    with np.load(existing(path)) as arrays:
        return arrays[x], arrays[y]


def classifier(path):
    """predict(images) -> classes"""
    model = models.find(str(path), outputs=10)
    variables = weights.load(model, jax.random.key(0)).variables()

    @jax.jit
    def predict(images):
        return model.module.apply(variables, {"images": images}).argmax(-1)

    return predict


def accuracy(predict, x, y):
    found = [predict(x[i : i + ROWS]) for i in range(0, len(x), ROWS)]
    return float(np.mean(np.concatenate(found) == y))


if __name__ == "__main__":
    sys.exit(errors.command(main))
