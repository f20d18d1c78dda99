"""Makes what tests/test_catalogue.py compares with: python tests/goldens/make_catalogue.py [NAME]

Needs requirements-parity.txt. An adapter that PEFT trained for each case of tests/cases/ on the
tiny models of make_goldens.py, and its logits. With names of cases, only those are made anew.
"""

import pathlib
import shutil
import sys

import numpy as np
import peft
import torch

FOLDER = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER.parent), str(FOLDER.parents[1])]

import butterfly  # noqa: E402
import cases  # noqa: E402
import examples  # noqa: E402
import make_goldens  # noqa: E402

LENGTHS = (13, 5, 9, 2)


def batch_of(config):
    types = getattr(config, "type_vocab_size", 0)
    chosen = examples.tokens(LENGTHS, config.vocab_size, types)
    batch = examples.padded(chosen, config.pad_token_id)
    if config.model_type == "distilbert":
        del batch["token_type_ids"]
    return {key: torch.tensor(value) for key, value in batch.items()}


def make(name, family, case):
    """Some steps of PEFT's own training."""
    torch.manual_seed(0)
    config = make_goldens.MODELS[family]
    base = make_goldens.random_model(config, list(make_goldens.MODELS).index(family))
    settings = cases.for_family(case.settings, family)
    model = peft.get_peft_model(base, getattr(peft, case.config)(task_type="SEQ_CLS", **settings))
    batch, labels = batch_of(config), torch.tensor([0, 4, 2, 1])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-2)
    model.train()
    for _ in range(6):
        optimizer.zero_grad()
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
    folder = FOLDER / "catalogue" / f"{family}-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    with torch.no_grad():
        return model.eval()(**batch).logits.numpy()


def main(wanted):
    butterfly.install()
    file, catalogue = FOLDER / "catalogue.npz", cases.catalogue()
    logits = dict(np.load(file)) if wanted and file.exists() else {}
    for name, (_, case) in catalogue.items():
        if case.golden and (not wanted or name in wanted):
            for family in case.families:
                logits[f"{family}-{name}"] = make(name, family, case)
    np.savez(file, **logits)


if __name__ == "__main__":
    main(sys.argv[1:])
