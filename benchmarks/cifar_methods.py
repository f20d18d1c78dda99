"""Accuracy of the methods on images that a CIFAR ResNet-20 was not trained on, mean of seeds.

    ./run.sh benchmarks/cifar_methods.py --data=DIR [--seeds=3] [--epochs=2] [--output=FILE.json]

DIR holds checkpoints/resnet20_cifar10.safetensors (91.7 % on CIFAR-10's test images) and
images/cifar10_small.npz: 6,000 training and 1,000 test images of CIFAR-10 that went through JPEG,
on which the same weights give 80.4 %. Every method runs as experiments/image_classification.py,
config cifar_resnet:resnet20, at the learning rate below; a tenth of train is held out and names
the best checkpoint. Runs under --runs that are finished are not run again.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
BEFORE = 0.804  # benchmarks/cifar_checkpoints.py
# method: its settings. Rates are the best in validation accuracy of those tried with one seed:
# probe 1e-4, 1e-3, 1e-2; norms and biases 1e-3, 3e-3, 1e-2 (biases: 1e-3 as good as 3e-3); conv
# adapter 1e-3, 4e-3, 1e-2; LoRA 1e-3, 4e-3, 1e-2; full 2e-4, 1e-3, 3e-3.
METHODS = {
    "probe": ("linear_probe", 1e-2),
    "BatchNorm only": ("norm_tuning", 3e-3),
    "BitFit": ("bitfit", 3e-3),
    "conv adapter": ("conv_adapter", 1e-2),
    "conv LoRA": ("lora", 4e-3),
    "full": ("full", 1e-3),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="folder with checkpoints/ and images/")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--runs", default="runs/cifar")
    parser.add_argument("--output", default="cifar_methods.json")
    options = parser.parse_args()
    results = {}
    for seed in range(options.seeds):
        for name in options.methods.split(","):
            workdir = Path(options.runs) / f"{name.replace(' ', '-')}-{seed}"
            if not (workdir / "report.json").is_file():
                run = command(name, Path(options.data), workdir, seed, options.epochs)
                subprocess.run(run, check=True)
            results.setdefault(name, []).append(json.loads((workdir / "report.json").read_text()))
    Path(options.output).write_text(json.dumps(results, indent=2) + "\n")
    show(results)


def show(results):
    print(f"\nbefore: {BEFORE:.3f} (no training)")
    print("method           test accuracy   spread   moving numbers     share")
    for name, reports in results.items():
        scores = np.array([report["metrics"]["test"]["accuracy"] for report in reports])
        moving, total = reports[0]["trainable_params"], reports[0]["total_params"]
        print(
            f"{name:15} {scores.mean():14.4f} {scores.std(ddof=len(scores) > 1):8.4f}"
            f" {moving:16,} {moving / total:9.2%}"
        )


def command(name, data, workdir, seed, epochs):
    method, rate = METHODS[name]
    return [
        *(sys.executable, str(ROOT / "experiments" / "image_classification.py")),
        *(f"--workdir={workdir}", "--config=configs/cifar_resnet.py:resnet20"),
        f"--config.model.name={data}/checkpoints/resnet20_cifar10.safetensors",
        f"--config.data.train={data}/images/cifar10_small.npz",
        *(f"--config.peft.methods={method}", f"--config.optim.learning_rate={rate}"),
        *(f"--config.train.epochs={epochs}", f"--config.seed={seed}"),
        *("--config.log.tensorboard=False", "--config.eval.batch_size=200"),
    ]


if __name__ == "__main__":
    main()
