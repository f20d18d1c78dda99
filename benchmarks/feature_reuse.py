"""Time of an epoch of a linear probe with its features kept on disk, and computed every time.

    ./run.sh benchmarks/feature_reuse.py [--size=32] [--output=FILE.json]

vgg16_hed on digits, as experiments/image_classification.py has it. Both sides make the same steps
on the same batches; the first epoch of each (compilation, and computing the features) is left out.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from bmft import prepare, prepare_images, sharding
from bmft.config import read

EPOCHS = {"computed": 1, "kept": 5}  # measured, after the first


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--output", default="feature_reuse.json")
    options = parser.parse_args()
    sharding.use_all_cores(os.cpu_count())
    with tempfile.TemporaryDirectory() as cache:
        result = {kind: epoch_seconds(kind, options.size, cache) for kind in EPOCHS}
    (computed, losses), (kept, others) = result["computed"], result["kept"]
    found = {
        "seconds_per_epoch": {"computed": computed, "kept": kept},
        "ratio": computed / kept,
        "largest_loss_difference": float(np.abs(np.array(losses) - np.array(others)).max()),
    }
    Path(options.output).write_text(json.dumps(found, indent=2) + "\n")
    print(f"\nan epoch of a linear probe, {options.size} x {options.size} pixels")
    print(f"features computed {computed:8.2f} s")
    print(f"features kept     {kept:8.2f} s   {found['ratio']:.1f} times faster")
    print(f"losses of the first epoch differ by at most {found['largest_loss_difference']:.1e}")


def epoch_seconds(kind, size, cache):
    """(seconds an epoch, losses of the first epoch)"""
    config = read(
        [
            *("--config=configs/digits_vgg.py:probe", f"--config.task.image_size={size}"),
            *(f"--config.data.cache={cache}", "--config.train.epochs=10"),
            f"--config.train.reuse_features={str(kind == 'kept').lower()}",
        ],
        default="configs/digits_vgg.py",
        groups=prepare_images.groups,
    ).config
    mesh = sharding.mesh(config)
    problem = prepare_images.find(config)
    batches = prepare_images.batches(config, problem, mesh)
    fit = prepare.fit(config, problem.model, problem.methods, mesh, 1000)
    fit, batches = prepare_images.reuse_features(config, fit, batches, problem, mesh)
    step, steps = (
        prepare.make_step(config, fit, problem.task.loss),
        batches["train"].steps_per_epoch,
    )
    state, losses = fit.state, []
    for number in range(steps):
        state, metrics = step(state, fit.frozen, batches["train"].at(number))
        losses.append(float(metrics["loss"]))
    start = time.perf_counter()
    for number in range(steps, steps * (1 + EPOCHS[kind])):
        state, metrics = step(state, fit.frozen, batches["train"].at(number))
    jax.block_until_ready(state)
    return (time.perf_counter() - start) / EPOCHS[kind], losses


if __name__ == "__main__":
    main()
