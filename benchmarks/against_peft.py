"""bmft against transformers + peft (PyTorch) on the same machine, the same data, the same adapter.

    ./run.sh -m pip install -r requirements-parity.txt        once: torch, peft
    ./run.sh benchmarks/against_peft.py [--steps=200] [--seeds=3] [--output=FILE.json]

LoRA (rank 8, alpha 16, query and value) on minilm and tweets. Both sides start from the adapter and
head that bmft made, take the same batches in the same order (packed here, padded to the longest of
the batch there), and use the same AdamW, schedule, decay and clipping.

    losses     50 steps with dropout off: the largest difference of the two sides' losses
    accuracy   on the test split after `steps` steps with dropout on, by seed
    speed      examples/s of the training steps above, compilation left out
"""

import argparse
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

from bmft import evaluate, models, prepare, sharding, train
from bmft.config import read
from bmft.data import sources
from bmft.data.text import encode
from bmft.models import weights
from bmft.peft import files

EXACT_STEPS = 50


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", default="against_peft.json")
    options = parser.parse_args()
    sharding.use_all_cores(os.cpu_count())
    torch.set_num_threads(os.cpu_count())
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    exact = Pair(seed=0, steps=EXACT_STEPS, dropout=False)
    ours, theirs = exact.train_here(), exact.train_there()
    difference = float(np.abs(np.array(ours.losses) - np.array(theirs.losses)).max())
    rows = []
    for seed in range(options.seeds):
        pair = Pair(seed, options.steps, dropout=True)
        here, there = pair.train_here(), pair.train_there()
        rows.append(
            {
                "seed": seed,
                "bmft": pair.accuracy_here(here),
                "peft": pair.accuracy_there(there),
                "bmft_examples_per_second": here.speed,
                "peft_examples_per_second": there.speed,
            }
        )
    result = {
        "largest_loss_difference_50_steps": difference,
        "last_losses": [ours.losses[-1], theirs.losses[-1]],
        "steps": options.steps,
        "seeds": rows,
    }
    Path(options.output).write_text(json.dumps(result, indent=2) + "\n")
    show(result)


def show(result):
    difference = result["largest_loss_difference_50_steps"]
    print(f"\n50 steps, dropout off: losses differ by at most {difference:.1e}")
    if not result["seeds"]:
        return
    print(f"{result['steps']} steps of 32 tweets, dropout on, accuracy on the test split")
    print("seed    bmft   peft   examples/s: bmft   peft   ratio")
    for row in result["seeds"]:
        speeds = row["bmft_examples_per_second"], row["peft_examples_per_second"]
        print(
            f"{row['seed']:4}  {row['bmft']:.4f} {row['peft']:.4f}"
            f"{speeds[0]:17.0f} {speeds[1]:6.0f} {speeds[0] / speeds[1]:7.2f}"
        )
    for side in ("bmft", "peft"):
        values = [row[side] for row in result["seeds"]]
        print(f"{side}: mean {np.mean(values):.4f}, spread {np.std(values):.4f}")


class Trained:
    def __init__(self, model, losses, speed):
        self.model, self.losses, self.speed = model, losses, speed


class Pair:
    """One seed: data, adapter and settings that both sides share."""

    def __init__(self, seed, steps, dropout):
        self.folder = tempfile.TemporaryDirectory()
        changes = [f"--config.train.steps={steps}", f"--config.seed={seed}"]
        changes.append(f"--config.model.name={self.base(dropout)}")
        settings = read(changes, default="configs/glue_lora.py", groups=prepare.groups)
        self.config, self.steps = settings.config, steps
        self.mesh = sharding.mesh(self.config)
        self.tables = sources.load(self.config.data)
        self.task = prepare.find_task(self.config, self.tables)
        self.model = prepare.find_model(self.config, self.task.num_outputs)
        self.methods = prepare.find_methods(self.config, self.model)
        self.batches = prepare.batches(
            self.config, self.model, self.methods, self.task, self.tables, self.mesh
        )
        self.fit = prepare.fit(self.config, self.model, self.methods, self.mesh, steps)
        self.tokenizer = models.tokenizer(self.model)
        adapter = Path(self.folder.name) / "adapter"
        files.write(
            adapter, self.methods, {"lora": dict(self.config.peft.lora)}, self.model,
            jax.device_get(self.fit.state.moving), jax.device_get(self.fit.frozen),
            base="minilm", fingerprint=weights.fingerprint(self.model), labels=self.task.labels,
        )  # fmt: skip

    def base(self, dropout):
        """The model's folder, with the dropout of its config or without any."""
        source, folder = models.locate("minilm"), Path(self.folder.name) / "base"
        folder.mkdir()
        for file in source.iterdir():
            if file.is_file():
                (folder / file.name).symlink_to(file)
        settings = json.loads((source / "config.json").read_text())
        if not dropout:
            settings |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        (folder / "config.json").unlink()
        (folder / "config.json").write_text(json.dumps(settings))
        return folder

    def examples(self, step):
        """The examples of a step's batch, in the order of their slots."""
        index = np.asarray(self.batches["train"].at(step)["index"])
        return index[index >= 0]

    # --- here

    def train_here(self):
        step = prepare.make_step(self.config, self.fit, self.task.loss)
        state, losses, times = self.fit.state, [], []
        for number in range(self.steps):
            start = time.perf_counter()
            state, metrics = step(state, self.fit.frozen, self.batches["train"].at(number))
            losses.append(float(metrics["loss"]))
            times.append(time.perf_counter() - start)
        return Trained(state, losses, self.speed(times))

    def accuracy_here(self, trained):
        outputs_of = evaluate.make_outputs(self.fit.apply, self.task.outputs)
        variables = train.variables(trained.model, self.fit.frozen)
        outputs = evaluate.over_split(outputs_of, variables, self.batches["test"])
        targets = self.task.targets(self.tables["test"])
        return float((outputs["logits"].argmax(-1) == targets).mean())

    # --- there

    def train_there(self):
        torch.manual_seed(self.config.seed)
        base = transformers.AutoModelForSequenceClassification.from_pretrained(
            Path(self.folder.name) / "base", num_labels=self.task.num_outputs
        )
        adapter = Path(self.folder.name) / "adapter"
        model = hf_peft.PeftModel.from_pretrained(base, adapter, is_trainable=True).train()
        moving = {name: p for name, p in model.named_parameters() if p.requires_grad}
        decay = self.config.optim.weight_decay
        optimizer = torch.optim.AdamW(
            [
                {
                    "params": [p for n, p in moving.items() if "bias" not in n],
                    "weight_decay": decay,
                },
                {"params": [p for n, p in moving.items() if "bias" in n], "weight_decay": 0.0},
            ]
        )
        table, targets = self.tables["train"], self.task.targets(self.tables["train"])
        encoded = encode(table, self.tokenizer, self.config.data.max_length)
        losses, times = [], []
        for step in range(self.steps):
            rows = self.examples(step)
            start = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = float(self.fit.rate(step))
            logits = model(**padded(encoded, rows)).logits
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor(targets[rows]).long())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(moving.values(), self.config.optim.clip)
            optimizer.step()
            losses.append(loss.item())
            times.append(time.perf_counter() - start)
        return Trained(model, losses, self.speed(times))

    def accuracy_there(self, trained):
        model, table = trained.model.eval(), self.tables["test"]
        encoded = encode(table, self.tokenizer, self.config.data.max_length)
        order = np.argsort(encoded.lengths, kind="stable")
        right, targets = 0, self.task.targets(table)
        with torch.no_grad():
            for rows in np.array_split(order, len(order) // 64):
                predicted = model(**padded(encoded, rows)).logits.argmax(-1).numpy()
                right += (predicted == targets[rows]).sum()
        return float(right / len(order))

    def speed(self, times):
        """Examples a second; the first steps compile or warm up."""
        return self.config.train.batch_size / float(np.median(times[5:]))


def padded(encoded, rows):
    """The tokens of examples as torch's model takes them, padded to the longest."""
    lengths = encoded.lengths[rows]
    ids = np.zeros((len(rows), lengths.max()), np.int64)
    for row, (example, length) in enumerate(zip(rows, lengths, strict=True)):
        ids[row, :length] = encoded.tokens[encoded.offsets[example] :][:length]
    mask = np.arange(lengths.max()) < lengths[:, None]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask.astype(np.int64))}


if __name__ == "__main__":
    main()
