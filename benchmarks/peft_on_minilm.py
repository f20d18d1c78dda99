"""Logits of each method on minilm, ours and Hugging Face PEFT's, for adapters of either.

    ./run.sh -m pip install -r requirements-parity.txt
    ./run.sh benchmarks/peft_on_minilm.py [--methods=lora,dora] [--output=FILE.json]

For each case of tests/cases/: PEFT trains three steps on minilm and saves, we read it; and what we
write of leaves that are not as they started, PEFT loads. Largest absolute difference of the logits
of four examples, packed in one row and one a row; the goal is 1e-4.
"""

import argparse
import json
import sys
import tempfile
import warnings
from pathlib import Path

import jax
import numpy as np
import peft as hf
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests" / "parity"), str(ROOT / "tests")]

import cases  # noqa: E402
import examples  # noqa: E402
import hugging  # noqa: E402
from trained import Trained  # noqa: E402

from bmft import models, peft  # noqa: E402
from bmft.models import weights  # noqa: E402
from bmft.peft import files  # noqa: E402

LENGTHS, OUTPUTS = (13, 3, 48, 10), 5
OF_TINY = ("token_dim", "num_attention_heads")  # PEFT finds them by itself in a BERT


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", help="names of cases; all where it is not given")
    parser.add_argument("--output", default="peft_on_minilm.json")
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()  # of a head that is new
    model = models.find("minilm", outputs=OUTPUTS)
    base = weights.load(model, jax.random.key(0)).variables()
    base["params"]["classifier"]["out"] = head_of(plain())  # token rows come without one
    known = {name: of for name, of in cases.catalogue().items() if "bert" in of[1].families}
    rows = []
    print("case                       size of logits   PEFT's read here   ours read by PEFT")
    for name in given.methods.split(",") if given.methods else known:
        method, case = known[name]
        size, read, written = compare(model, base, method, case)
        rows.append({"case": name, "size": size, "read": read, "written": written})
        print(f"{name:26} {size:14.2f} {read:18.1e} {written:19.1e}", flush=True)
    worst = max(max(row["read"], row["written"]) for row in rows)
    print(f"largest difference {worst:.1e}")
    Path(given.output).write_text(json.dumps(rows, indent=2) + "\n")


def compare(model, base, method, case):
    """(largest logit, largest difference of PEFT's adapter here, of ours there)"""
    chosen = examples.tokens(LENGTHS, model.config.vocabulary, model.config.types)
    batch = examples.padded(chosen, model.config.pad_id)
    settings = {key: value for key, value in case.settings.items() if key not in OF_TINY}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = trained_by_peft(getattr(hf, case.config)(task_type="SEQ_CLS", **settings), batch)
        theirs.save_pretrained(folder)
        want = hugging.logits(theirs, batch)
        adapter = files.read(folder, model)
        ours = outputs(adapter.methods, model, files.insert(adapter, base), chosen)
        read = max(float(abs(way - want).max()) for way in ours)
    with tempfile.TemporaryDirectory() as folder:
        trained = Trained(model, base["params"], {method: case.group}, size=0.02)
        trained.write(folder)
        loaded = hf.PeftModel.from_pretrained(plain(), folder).eval()
        want_of_ours = hugging.logits(loaded, batch)
        ours = outputs(trained.methods, model, trained.variables, chosen)
        written = max(float(abs(way - want_of_ours).max()) for way in ours)
    return float(abs(want).max()), read, written


def head_of(theirs):
    """The head of their model, as ours."""
    kernel, bias = (leaf.detach().numpy() for leaf in theirs.classifier.parameters())
    return {"kernel": kernel.T, "bias": bias}


def plain():
    torch.manual_seed(0)
    auto = transformers.AutoModelForSequenceClassification
    return auto.from_pretrained(models.find("minilm", outputs=OUTPUTS).folder, num_labels=OUTPUTS)


def trained_by_peft(config, batch):
    adapted = hf.get_peft_model(plain(), config).train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], 1e-2)
    batch = {key: torch.tensor(np.asarray(value)) for key, value in batch.items()}
    for _ in range(3):
        optimizer.zero_grad()
        adapted(**batch, labels=torch.arange(len(LENGTHS)) % OUTPUTS).loss.backward()
        optimizer.step()
    return adapted.eval()


def outputs(methods, model, variables, chosen):
    """Our logits [n, outputs], packed and one a row."""
    apply = jax.jit(peft.attach(methods, model).apply)
    batch = examples.both(chosen, peft.virtual_ids(methods, model))
    return examples.of_both(np.asarray(apply(variables, batch)))


if __name__ == "__main__":
    main()
