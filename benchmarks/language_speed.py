"""Training tokens a second of smollm2 with LoRA, here and in transformers + peft (PyTorch).

    ./run.sh -m pip install -r requirements-parity.txt
    ./run.sh benchmarks/language_speed.py [--targets=query,value] [--pairs=10] [--output=FILE.json]
        [--data=FILE.jsonl --format=NAME --examples=16]

LoRA of rank 8, float32, the same weights, adapter, batches, AdamW, schedule and clipping on both
sides; attention there as it comes (sdpa). Each side is a process of its own, as it is for those who
use it. They take turns, a step each, `pairs` of them after two that do not count (compilation).
Tokens a second are medians, the ratio that of the pairs.

    full rows      4 rows of 512 tokens of running text, all of them learned
    real lengths   `examples` a step of the repository's instructions or of the file, the answers
                   learned: packed here, padded to the longest of the batch there. What is counted
                   are the examples' tokens, not padding
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import peft as hf_peft
import torch
import transformers
from smollm2_on_torch import in_torch

from bmft import models, prepare, sharding, writing
from bmft.config import read
from bmft.data import dialog_sources
from bmft.models import weights
from bmft.peft import files

ROWS, TOKENS, WARM = 4, 512, 2


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", default="query,value")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--data")
    parser.add_argument("--format")
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--output", default="language_speed.json")
    options = parser.parse_args()
    found = {name: race(name, options) for name in KINDS}
    about = {"targets": options.targets, "pairs": options.pairs, "data": options.data}
    Path(options.output).write_text(json.dumps(about | found, indent=2) + "\n")
    show(options, found)


def settings(options):
    """The config: that of the default language run, but for what is asked for."""
    argv = [f"--config.peft.lora.targets={options.targets}", "--config.data.max_length=512"]
    argv += [f"--config.train.steps={2 * (WARM + options.pairs)}", "--config.optim.warmup=0"]
    argv += [f"--config.train.batch_size={options.examples}"]
    if options.data:
        argv += ["--config.data.name=files", f"--config.data.train={options.data}"]
    if options.format:
        argv += [f"--config.data.format={options.format}"]
    return read(argv, default="configs/instruct_lora.py", groups=groups).config


def groups(config):
    return prepare.groups(config) | {"data": dialog_sources.KEYS, "generate": writing.KEYS}


def show(options, found):
    print(f"\nLoRA rank 8 on {options.targets}, {options.pairs} pairs of steps")
    print("               tokens/s: bmft     peft   ratio   of it learned   first losses")
    for name, row in found.items():
        speeds = f"{row['bmft']:10.1f} {row['peft']:8.1f} {row['ratio']:7.3f}"
        losses = " ".join(f"{loss:.6f}" for loss in row["first_losses"])
        print(f"{name:18} {speeds} {row['learned']:15.1%}   {losses}")
    for name, row in found.items():
        print(f"{name}: losses of all steps differ by at most {row['largest_loss_difference']:.1e}")


# --- batches: step -> (ours, theirs, tokens, tokens that are learned) ------------------------


def full_rows(sides):
    """All examples one behind the other, cut into rows."""
    encoded = sides.task.encode(
        sides.tables["train"], sides.tokenizer, sides.config.data.max_length
    )
    count = ROWS * TOKENS
    stream = np.resize(encoded.tokens, -(-len(encoded.tokens) // count) * count)
    steps = stream.reshape(-1, ROWS, TOKENS).astype(np.int32)
    put = sharding.put_batch(sides.mesh)

    def at(step):
        ids = steps[step % len(steps)]
        ours = {
            "input_ids": ids,
            "segments": np.ones_like(ids),
            "positions": np.tile(np.arange(TOKENS, dtype=np.int32), (ROWS, 1)),
            "targets": np.pad(ids[:, 1:], ((0, 0), (0, 1)), constant_values=-1),
            "weights": np.ones((ROWS, 1), np.float32),
        }
        ids = torch.tensor(ids, dtype=torch.int64)
        return put(ours), {"input_ids": ids, "labels": ids}, count, count - ROWS

    return at


def real_lengths(sides):
    """The same examples in each step, packed and padded."""
    config, table = sides.config, sides.tables["train"]
    given = (config, sides.model, sides.methods, sides.task, sides.tables, sides.mesh)
    batches = prepare.batches(*given)
    encoded = sides.task.encode(table, sides.tokenizer, config.data.max_length)

    def at(step):
        ours = batches["train"].at(step)
        index = np.asarray(ours["index"])
        rows = index[index >= 0]
        theirs = padded(encoded, rows)
        learned = int((np.asarray(ours["targets"]) >= 0).sum())
        return ours, theirs, int(encoded.lengths[rows].sum()), learned

    return at


def padded(encoded, rows):
    """Examples as transformers takes them, padded to the longest."""
    longest = encoded.lengths[rows].max()
    ids, mask = np.zeros((2, len(rows), longest), np.int64)
    labels = np.full_like(ids, -100)
    for row, example in enumerate(rows):
        own = slice(*encoded.offsets[example : example + 2])
        here = row, slice(0, own.stop - own.start)
        ids[here], mask[here] = encoded.tokens[own], 1
        labels[here] = np.where(encoded.learned[own], encoded.tokens[own], -100)
    arrays = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: torch.tensor(array) for name, array in arrays.items()}


# --- the two sides ---------------------------------------------------------------------------


def race(kind, options):
    """What is printed of one kind of batches: the sides' steps, turn by turn."""
    context = multiprocessing.get_context("spawn")
    sides = []
    for take in (steps_here, steps_there):
        pipe, end = context.Pipe()
        process = context.Process(target=serve, args=(end, take, kind, options), daemon=True)
        process.start()
        end.close()  # or one that dies leaves us waiting
        sides.append((process, pipe))
    print(f"{kind}: loss and seconds of both", flush=True)
    times, losses, counts = [], [], []
    for number in range(WARM + options.pairs):
        rows = []
        for _, pipe in sides:
            pipe.send(number)
            rows.append(pipe.recv())
        times.append([row[0] for row in rows])
        losses.append([row[1] for row in rows])
        counts.append(rows[0][2:])
        print(f"{number}: loss {losses[-1]}, seconds {times[-1]}", flush=True)
    for process, pipe in sides:
        pipe.send(None)
        process.join()
    return summary(*(np.array(rows) for rows in (times[WARM:], counts[WARM:], losses)))


def serve(pipe, take, kind, options):
    """The steps of one side, in a process of its own, as they are asked for by their number."""
    sharding.use_all_cores(os.cpu_count())
    sides = Sides(options)
    batch_at, step = KINDS[kind](sides), take(sides)
    while (number := pipe.recv()) is not None:
        *batches, tokens, learned = batch_at(number)
        start = time.perf_counter()
        loss = step(*batches, number)
        pipe.send((time.perf_counter() - start, loss, tokens, learned))


class Sides:
    """Model, data and settings of both, and ours as a run begins with it."""

    def __init__(self, options):
        self.config = settings(options)
        self.tables = dialog_sources.load(self.config.data, splits=("train",))
        self.task = prepare.find_task(self.config, self.tables)
        self.mesh = sharding.mesh(self.config)
        self.model = prepare.find_model(self.config, None)
        self.tokenizer = models.tokenizer(self.model)
        self.methods = prepare.find_methods(self.config, self.model)
        steps = self.config.train.steps
        self.fit = prepare.fit(self.config, self.model, self.methods, self.mesh, steps)


def steps_here(sides):
    """(our batch, theirs, number) -> the loss of a step of ours."""
    fit, state = sides.fit, sides.fit.state
    step = prepare.make_step(sides.config, fit, sides.task.loss)

    def take(batch, other, number):
        nonlocal state
        state, metrics = step(state, fit.frozen, batch)
        return float(metrics["loss"])

    return take


def steps_there(sides):
    """(our batch, theirs, number) -> the loss of a step of transformers + peft, from our adapter,
    with AdamW as bmft/optim.py has it."""
    torch.set_num_threads(os.cpu_count())
    transformers.logging.set_verbosity_error()
    rates = [float(sides.fit.rate(number)) for number in range(sides.config.train.steps)]
    model, optim = adapted(sides), sides.config.optim
    sides.fit = None  # our copy of the model
    moving = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(moving, weight_decay=optim.weight_decay)

    def take(batch, other, number):
        for group in optimizer.param_groups:
            group["lr"] = rates[number]
        loss = model(**other).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(moving, optim.clip)
        optimizer.step()
        return loss.item()

    return take


def adapted(sides):
    """transformers' model with our adapter, as it starts."""
    fit, groups = sides.fit, {"lora": dict(sides.config.peft.lora)}
    with tempfile.TemporaryDirectory() as folder:
        files.write(
            folder, sides.methods, groups, sides.model,
            jax.device_get(fit.state.moving), jax.device_get(fit.frozen),
            base="smollm2", fingerprint=weights.fingerprint(sides.model),
        )  # fmt: skip
        base = in_torch(sides.model, fit.loaded)
        base.config.use_cache = False
        return hf_peft.PeftModel.from_pretrained(base, folder, is_trainable=True).train()


def summary(times, counts, losses):
    """times [n, 2] of ours and theirs, counts [n, 2] of tokens and learned ones, losses [m, 2]."""
    ours, theirs = np.median(counts[:, :1] / times, axis=0)
    return {
        "bmft": float(ours),
        "peft": float(theirs),
        "ratio": float(np.median(times[:, 1] / times[:, 0])),
        "learned": float(counts[:, 1].sum() / counts[:, 0].sum()),
        "first_losses": losses[0].tolist(),
        "largest_loss_difference": float(np.abs(losses[:, 0] - losses[:, 1]).max()),
        "seconds": times.tolist(),
    }


KINDS = {"full rows": full_rows, "real lengths": real_lengths}


if __name__ == "__main__":
    main()
