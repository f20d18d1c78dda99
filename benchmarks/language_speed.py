"""Training tokens a second of smollm2 with LoRA, here and in transformers + peft (PyTorch).

    ./run.sh -m pip install -r requirements-parity.txt
    ./run.sh benchmarks/language_speed.py [--targets=query,value] [--pairs=10] [--output=FILE.json]
        [--data=FILE.jsonl --format=NAME --examples=16]

LoRA of rank 8, float32, the same weights, adapter, batches, AdamW, schedule and clipping on both
sides; attention there as it comes (sdpa). The sides take turns, a step each, `pairs` of them after
two that do not count (compilation). Tokens a second are medians, the ratio that of the pairs.

    full rows      4 rows of 512 tokens of running text, all of them learned
    real lengths   `examples` a step of the repository's instructions or of the file, the answers
                   learned: packed here, padded to the longest of the batch there. What is counted
                   are the examples' tokens, not padding
"""

import argparse
import gc
import json
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
    sharding.use_all_cores(os.cpu_count())
    torch.set_num_threads(os.cpu_count())
    transformers.logging.set_verbosity_error()
    config = settings(options)
    tables = dialog_sources.load(config.data, splits=("train",))
    sides = Sides(config, prepare.find_task(config, tables))
    found = {
        "full rows": sides.race(full_rows(sides, tables), options.pairs),
        "real lengths": sides.race(real_lengths(sides, tables), options.pairs),
    }
    about = {"targets": options.targets, "pairs": options.pairs, "data": config.data.name}
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


def full_rows(sides, tables):
    """All examples one behind the other, cut into rows."""
    encoded = sides.task.encode(tables["train"], sides.tokenizer, sides.config.data.max_length)
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


def real_lengths(sides, tables):
    """The same examples in each step, packed and padded."""
    config, table = sides.config, tables["train"]
    batches = prepare.batches(config, sides.model, sides.methods, sides.task, tables, sides.mesh)
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


class Sides:
    """Model and settings of both."""

    def __init__(self, config, task):
        self.config, self.task = config, task
        self.mesh = sharding.mesh(config)
        self.model = prepare.find_model(config, None)
        self.tokenizer = models.tokenizer(self.model)
        self.methods = prepare.find_methods(config, self.model)
        self.base = prepare.load(self.model, jax.random.key(0), self.mesh, self.methods)

    def race(self, batch_at, pairs):
        """What is printed of one kind of batches."""
        gc.collect()  # the models of the race before
        fit = prepare.fit(
            self.config, self.model, self.methods, self.mesh, self.config.train.steps, self.base
        )
        step = prepare.make_step(self.config, fit, self.task.loss)
        theirs = Theirs(self.adapted(fit), self.config.optim)
        state, losses, times, counts = fit.state, [], [], []
        for number in range(WARM + pairs):
            ours, other, tokens, learned = batch_at(number)
            start = time.perf_counter()
            state, metrics = step(state, fit.frozen, ours)
            here = float(metrics["loss"])
            middle = time.perf_counter()
            there = theirs.step(other, float(fit.rate(number)))
            times.append((middle - start, time.perf_counter() - middle))
            losses.append((here, there))
            counts.append((tokens, learned))
            print(f"{number}: loss {here:.6f} {there:.6f}, seconds {times[-1]}", flush=True)
        return summary(*(np.array(rows) for rows in (times[WARM:], counts[WARM:], losses)))

    def adapted(self, fit):
        """transformers' model with our adapter, as it starts."""
        with tempfile.TemporaryDirectory() as folder:
            files.write(
                folder, self.methods, {"lora": dict(self.config.peft.lora)}, self.model,
                jax.device_get(fit.state.moving), jax.device_get(fit.frozen),
                base="smollm2", fingerprint=weights.fingerprint(self.model),
            )  # fmt: skip
            base = in_torch(self.model, self.base)
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


class Theirs:
    """A model of transformers + peft and its optimizer, as bmft/optim.py has them."""

    def __init__(self, model, optim):
        self.model, self.clip = model, optim.clip
        self.moving = [weight for weight in model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self.moving, weight_decay=optim.weight_decay)

    def step(self, batch, rate):
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self.model(**batch).loss
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.moving, self.clip)
        self.optimizer.step()
        return loss.item()


if __name__ == "__main__":
    main()
