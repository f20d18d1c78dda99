"""The losses on every shape of a mesh, of devices and of processes, against those on one device.

    ./run.sh benchmarks/meshes.py [--output=FILE.json] [--tasks=causal_lm,...] [--steps=20]

Every task with LoRA on all linear layers and with all leaves moving, on models of two layers with
random weights: on eight devices of one process, and on two and four processes with a device each,
started by run.sh's own launcher, which make no rows but their own. The table gives, of each mesh
(data x fsdp x tensor), the largest difference of a step's loss from that of one device, relative to
it. Losses are compared, not parameters: Adam turns rounding into steps. One above 1e-5 is an error.
Three quarters of an hour on two cores that had other work to do.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AxisType
from safetensors.numpy import save_file

from bmft import errors, models, names, prepare, processes, sharding, tasks, tree
from bmft.config import read
from bmft.models import weights

BOUND = 1e-5
SHAPES = {  # by the number of processes
    1: ((8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (4, 2, 1), (1, 4, 2)),
    2: ((2, 1, 1), (1, 2, 1), (1, 1, 2)),
    4: ((4, 1, 1), (1, 4, 1), (1, 2, 2)),
}
ROWS, TOKENS, SIZE, VOCABULARY = 16, 12, 16, 64
ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "intermediate_size": 128,
    "hidden_act": "gelu",
    "max_position_embeddings": 16,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-5,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}
DECODER = {key: ENCODER[key] for key in list(ENCODER)[:5]} | {
    "num_key_value_heads": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
MODELS = {
    "text_classification": ENCODER | {"model_type": "bert"},
    "image_classification": ENCODER
    | {"model_type": "vit", "image_size": SIZE, "patch_size": 4, "num_channels": 3},
    "causal_lm": DECODER | {"model_type": "llama"},
    "preference": DECODER | {"model_type": "llama"},
}
OF_TASK = {"preference": {"full": ["--config.task.method=simpo"]}}  # DPO's reference must not move


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="meshes.json")
    parser.add_argument("--tasks", default=",".join(MODELS))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--within", help="of the processes that this program starts")
    given = parser.parse_args(argv)
    chosen = given.tasks.split(",")
    if given.within:
        compare(Path(given.within), chosen, given.steps)
        return 0
    jax.config.update("jax_num_cpu_devices", 8)
    print("task                  method  processes  mesh    largest difference", flush=True)
    with tempfile.TemporaryDirectory(prefix="bmft-meshes-") as folder:
        for task in chosen:
            directory(Path(folder) / task, MODELS[task], OUTPUTS[task])
        compare(Path(folder), chosen, given.steps)
        for count in list(SHAPES)[1:]:
            start(count, [f"--within={folder}", f"--tasks={given.tasks}", f"--steps={given.steps}"])
        rows = [row for count in SHAPES for row in load(Path(folder) / f"{count}.json")]
    Path(given.output).write_text(json.dumps(rows, indent=2) + "\n")
    above = [row for row in rows if not row["difference"] <= BOUND]
    for row in above:
        where = f"{row['task']}, {row['method']}, {row['processes']} processes, {row['mesh']}"
        print(f"error: {where}: {row['difference']:.1e} is above {BOUND}", file=sys.stderr)
    return 1 if above else 0


def start(count, argv):
    """This program as so many processes, which write `count`.json."""
    root = Path(__file__).resolve().parent.parent
    launch = [sys.executable, "-m", "bmft.launch", f"--processes={count}", "--", __file__, *argv]
    subprocess.run(launch, check=True, env=os.environ | {"PYTHONPATH": str(root)})


def compare(folder, chosen, steps):
    """The rows of the table for all meshes of as many processes as there are: into a file."""
    count, rows = jax.process_count(), []
    for task in chosen:
        for method in ("lora", "full"):
            file = folder / f"{task}-{method}.json"
            if count == 1:
                found = losses(task, method, (1, 1, 1), folder / task, steps)
                file.write_text(json.dumps(found.tolist()))
            one = np.array(load(file))
            for shape in SHAPES[count]:
                found = losses(task, method, shape, folder / task, steps)
                difference = float(np.max(np.abs(found - one) / np.abs(one)))
                mesh = "x".join(map(str, shape))
                rows.append({"task": task, "method": method, "processes": count, "mesh": mesh})
                rows[-1] |= {"difference": difference, "losses": found.tolist()}
                print(
                    f"{task:21s} {method:7s} {count:9d}  {mesh:6s} {difference:19.1e}", flush=True
                )
    if jax.process_index() == 0:
        (folder / f"{count}.json").write_text(json.dumps(rows))


def load(file):
    return json.loads(file.read_text())


def losses(task, method, shape, folder, steps):
    """float64 [steps]: the losses of a run on a mesh of this shape."""
    argv = [f"--config.model.name={folder}", f"--config.peft.methods={method}"]
    argv += [f"--config.task.name={task}", f"--config.train.steps={steps}"]
    argv += [f"--config.train.batch_size={ROWS}", "--config.optim.learning_rate=3e-3"]
    argv += ["--config.peft.lora.targets=all-linear"] if method == "lora" else []
    argv += OF_TASK.get(task, {}).get(method, [])
    config = read(argv, default="configs/base.py", groups=prepare.groups).config
    devices = jax.devices()[: np.prod(shape)]
    kinds = (AxisType.Auto,) * len(shape)
    mesh = jax.make_mesh(shape, sharding.AXES, axis_types=kinds, devices=devices)
    model = prepare.find_model(config, OUTPUTS[task])
    fit = prepare.fit(config, model, prepare.find_methods(config, model), mesh, steps)
    step = prepare.make_step(config, fit, loss_of(task, config))
    state, put, found = fit.state, sharding.put_batch(mesh), []
    for number in range(steps):
        state, metrics = step(state, fit.frozen, put(own_rows(BATCHES[task](number), mesh)))
        found.append(float(metrics["loss"]))
    return np.array(found)


def own_rows(batch, mesh):
    """The rows that a host would make by itself."""
    numbers, count = sharding.share(mesh)
    mine = np.arange(ROWS).reshape(count, -1)[list(numbers)].ravel()
    return {name: array[mine] for name, array in batch.items()}


def loss_of(task, config):
    """A task's loss, without any data."""
    make = tasks.get(task).make
    if task == "image_classification":
        return make({}, SIZE, labels=("a", "b", "c"), flip=True).loss
    if task == "text_classification":
        return make({}, labels=("a", "b", "c")).loss
    return make({}, method=config.task.method).loss if task == "preference" else make({}).loss


def directory(folder, settings, outputs):
    """Make a model directory with random weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    model = models.find(str(folder), outputs=outputs)
    rng, shapes, tensors = np.random.default_rng(0), tree.flatten(weights.shapes(model)), {}
    for leaf in model.names.leaves:
        for layer in model.names.layers_of(leaf.path):
            shape = shapes[leaf.path].shape[0 if layer is None else 1 :]
            array = rng.normal(0, 0.1, shape) + leaf.path.endswith("scale")
            array = names.to_file(leaf.layout, array)
            tensors[model.names.written(leaf).format(layer)] = np.ascontiguousarray(array, "f")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


# --- batches ---------------------------------------------------------------------------------


def packed(seed):
    """Two segments a row, of different lengths; the last row is padding."""
    rng = np.random.default_rng(seed)
    cut, end = (rng.integers(*ends, (ROWS, 1)) for ends in ((2, 6), (8, TOKENS + 1)))
    column = np.arange(TOKENS)
    segments = np.where(column < cut, 1, 2) * (column < end)
    segments[-1] = 0
    arrays = {
        "input_ids": rng.integers(3, VOCABULARY, (ROWS, TOKENS)) * (segments > 0),
        "segments": segments,
        "positions": np.where(column < cut, column, column - cut) * (segments > 0),
    }
    return {name: array.astype(np.int32) for name, array in arrays.items()}, cut


def texts(seed):
    batch, cut = packed(seed)
    rng = np.random.default_rng(seed)
    first = np.concatenate([np.zeros_like(cut), cut], 1).astype(np.int32)
    weights = np.ones((ROWS, 2), np.float32) * (batch["segments"][:, :1] > 0)
    labels = rng.integers(0, 3, (ROWS, 2)).astype(np.int32)
    about = {"first": first, "labels": labels, "weights": weights}
    return batch | about | {"token_types": np.zeros_like(batch["input_ids"])}


def dialogs(seed):
    """What is learned is all of a segment but its first token."""
    batch, cut = packed(seed)
    segments, ids = batch["segments"], batch["input_ids"]
    following = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    targets = np.full_like(ids, -1)
    targets[:, :-1] = np.where(following, ids[:, 1:], -1)
    return batch | {"targets": targets, "weights": np.float32(segments[:, [0, -1]] > 0)}


def pairs(seed):
    """Segments 1 and 2 are the chosen and the rejected answer of the one pair of a row."""
    batch = dialogs(seed)
    index = np.where(batch["segments"][:, :1] > 0, np.arange(ROWS)[:, None], -1)
    return batch | {"index": index.astype(np.int32), "weights": np.float32(index >= 0)}


def images(seed):
    rng = np.random.default_rng(seed)
    return {
        "images": rng.integers(0, 256, (ROWS, SIZE, SIZE, 3)).astype(np.uint8),
        "labels": rng.integers(0, 3, ROWS).astype(np.int32),
        "weights": (np.arange(ROWS) < ROWS - 1).astype(np.float32),
        "index": np.arange(ROWS, dtype=np.int32),
    }


OUTPUTS = {"text_classification": 3, "image_classification": 3}
OUTPUTS |= {"causal_lm": None, "preference": None}
BATCHES = {"text_classification": texts, "image_classification": images}
BATCHES |= {"causal_lm": dialogs, "preference": pairs}


if __name__ == "__main__":
    raise SystemExit(errors.command(processes.joined(main)))
