"""The memory of a DoRA step against that of a LoRA step of the same targets.

    ./run.sh benchmarks/dora_memory.py [--output=FILE.json] [--remat=none,block]

minilm, rank 8, 32 rows of 64 tokens, one device. Megabytes of temporaries as XLA plans them for
the compiled training step: what is kept for the gradient, and what is made on the way.
"""

import argparse
import json
from pathlib import Path

from work import batch

from bmft import prepare, sharding, train
from bmft.config import read
from bmft.tasks import text_classification

TARGETS = ("query,value", "all-linear")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="dora_memory.json")
    parser.add_argument("--remat", default="none,block")
    given = parser.parse_args()
    sharding.use_all_cores(1)
    rows = []
    for remat in given.remat.split(","):
        for targets in TARGETS:
            lora, dora = (temporaries(name, targets, remat) for name in ("lora", "dora"))
            found = {"lora": lora, "dora": dora, "ratio": dora / lora}
            rows.append({"targets": targets, "remat": remat} | found)
    Path(given.output).write_text(json.dumps(rows, indent=2) + "\n")
    print("\ntargets       remat   LoRA MB   DoRA MB   DoRA / LoRA")
    for row in rows:
        sizes = f"{row['lora'] / 1e6:9.1f} {row['dora'] / 1e6:9.1f} {row['ratio']:13.3f}"
        print(f"{row['targets']:13s} {row['remat']:6s} {sizes}")


def temporaries(method, targets, remat):
    """Bytes of the training step."""
    argv = [f"--config.peft.methods={method}", f"--config.peft.{method}.targets={targets}"]
    argv += ["--config.train.steps=10", "--config.mesh.data=1", f"--config.model.remat={remat}"]
    config = read(argv, default="configs/glue_lora.py", groups=prepare.groups).config
    mesh = sharding.mesh(config)
    model = prepare.find_model(config, 3)
    fit = prepare.fit(config, model, prepare.find_methods(config, model), mesh, steps=10)
    step = train.make_step(fit.apply, text_classification.cross_entropy(), fit.tx)
    compiled = step.lower(fit.state, fit.frozen, batch()).compile()
    return compiled.memory_analysis().temp_size_in_bytes


if __name__ == "__main__":
    main()
