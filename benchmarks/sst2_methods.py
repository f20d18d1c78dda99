"""SST-2 dev accuracy and speed of the methods on minilm, one epoch each.

    ./run.sh benchmarks/sst2_methods.py --data=DIR [--methods=lora,bitfit] [--output=FILE.json]

DIR holds train.tsv and dev.tsv of SST-2 (GLUE's files: columns sentence and label). Every method
runs as experiments/glue_lora.py, batch 128, linear schedule, at the learning rate below; runs under
--runs that are finished are not run again. On two CPU cores about an hour.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# method: its settings beside the experiment's. Rates are usual ones for a model of this size; none
# was searched for.
METHODS = {
    "lora": ["--config.peft.methods=lora", "--config.optim.learning_rate=3e-3"],
    "bitfit": ["--config.peft.methods=bitfit", "--config.optim.learning_rate=4e-3"],
    "houlsby": ["--config.peft.methods=adapter", "--config.optim.learning_rate=1.5e-3"],
    "linear_probe": ["--config.peft.methods=linear_probe", "--config.optim.learning_rate=2e-2"],
    "full": ["--config.peft.methods=full", "--config.optim.learning_rate=2e-4"],
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="folder with train.tsv and dev.tsv")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--runs", default="runs/sst2")
    parser.add_argument("--output", default="sst2_methods.json")
    options = parser.parse_args()
    results = {}
    for name in options.methods.split(","):
        workdir = Path(options.runs) / name
        if not (workdir / "report.json").is_file():
            subprocess.run(command(name, Path(options.data), workdir), check=True)
        results[name] = json.loads((workdir / "report.json").read_text())
    Path(options.output).write_text(json.dumps(results, indent=2) + "\n")
    print("\nmethod         accuracy   moving numbers   share    examples/s   minutes")
    for name, report in results.items():
        moving, total = report["trainable_params"], report["total_params"]
        print(
            f"{name:13} {report['metrics']['validation']['accuracy']:9.4f} {moving:16,}"
            f" {moving / total:7.2%} {report['examples_per_second']:13.0f}"
            f" {report['wall_seconds'] / 60:9.1f}"
        )


def command(name, data, workdir):
    return [
        *(sys.executable, str(ROOT / "experiments" / "glue_lora.py"), f"--workdir={workdir}"),
        *("--config.data.name=files", "--config.data.text=sentence", "--config.train.epochs=1"),
        *(f"--config.data.train={data}/train.tsv", f"--config.data.validation={data}/dev.tsv"),
        *("--config.train.batch_size=128", "--config.eval.every=none"),  # five times a run
        *METHODS[name],
    ]


if __name__ == "__main__":
    main()
