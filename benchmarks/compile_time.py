"""How long a step takes to compile, by the number of layers.

    ./run.sh benchmarks/compile_time.py [--output=FILE.json] [--layers=2,80] [--times=3]

A small llama with LoRA on all linear layers, on a mesh of 2 x 2 x 2 devices of one CPU: tracing and
XLA's work, the shortest of so many times. The layers are one scanned block, whatever their number.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import jax
from meshes import BATCHES, MODELS, directory, loss_of

from bmft import prepare, sharding
from bmft.config import read

TASK, SHAPE = "causal_lm", (2, 2, 2)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="compile_time.json")
    parser.add_argument("--layers", default="2,80")
    parser.add_argument("--times", type=int, default=3)
    given = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 8)
    rows = []
    print("layers   trace s   compile s   of the first")
    with tempfile.TemporaryDirectory() as folder:
        for depth in map(int, given.layers.split(",")):
            settings = MODELS[TASK] | {"num_hidden_layers": depth}
            model = directory(Path(folder) / str(depth), settings, None)
            trace, compiling = seconds(model, given.times)
            rows.append({"layers": depth, "trace": trace, "compile": compiling})
            ratio = (trace + compiling) / (rows[0]["trace"] + rows[0]["compile"])
            print(f"{depth:6d} {trace:9.2f} {compiling:11.2f} {ratio:14.2f}", flush=True)
    Path(given.output).write_text(json.dumps(rows, indent=2) + "\n")


def seconds(folder, times):
    """(tracing, compiling): the shortest of so many times."""
    argv = [f"--config.model.name={folder}", "--config.peft.methods=lora"]
    argv += ["--config.peft.lora.targets=all-linear", f"--config.task.name={TASK}"]
    argv += ["--config.train.steps=10"]
    argv += [f"--config.mesh.{axis}={n}" for axis, n in zip(sharding.AXES, SHAPE, strict=True)]
    config = read(argv, default="configs/base.py", groups=prepare.groups).config
    mesh, model = sharding.mesh(config), prepare.find_model(config, None)
    fit = prepare.fit(config, model, prepare.find_methods(config, model), mesh, 10)
    batch, found = sharding.put_batch(mesh)(BATCHES[TASK](0)), []
    for _ in range(times):
        step = prepare.make_step(config, fit, loss_of(TASK, config))  # another one: traced anew
        begun = time.perf_counter()
        lowered = step.lower(fit.state, fit.frozen, batch)
        traced = time.perf_counter()
        lowered.compile()
        found.append((traced - begun, time.perf_counter() - traced))
    return tuple(map(min, zip(*found, strict=True)))


if __name__ == "__main__":
    main()
