"""smollm2 here and in transformers (PyTorch, float32): its logits, and the texts it goes on with.

    ./run.sh -m pip install -r requirements-parity.txt
    ./run.sh benchmarks/smollm2_on_torch.py [--output=FILE.json]

The weights are ours, read from GGUF, in a LlamaForCausalLM. Twenty questions of the repository's
own set, with the chat template, and how they are answered there.

    logits    of questions with their answers, packed in rows here, one at a time there: the
              largest absolute difference; the goal is 1e-3
    greedy    48 tokens after each question: one at a time there; here one at a time, and in batches
              of questions of different lengths. Texts that are equal token for token; of one that
              is not, the two highest logits (theirs) where it parts lie `gap` apart
"""

import argparse
import json
from pathlib import Path

import jax
import numpy as np
import torch
import transformers

from bmft import export, generate, models, peft, tree
from bmft.data import chat, dialog_sources, dialog_text
from bmft.data.dialogs import Turn
from bmft.models import weights

PROMPTS, TOKENS, ROW = 20, 48, 512
ROWS = (1, 5, 20)  # prompts at a time, here


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="smollm2_on_torch.json")
    output = parser.parse_args().output
    model = models.find("smollm2")
    loaded = weights.load(model, jax.random.key(0))
    theirs = in_torch(model, loaded).eval()
    texts, prompts = texts_and_prompts(models.tokenizer(model))
    apply = peft.attach((), model).apply
    result = logits(apply, loaded.variables(), theirs, texts)
    print(f"\nlogits of {result['tokens']} tokens, of sizes up to {result['size']:.1f}", end=": ")
    print(f"largest difference {result['difference']:.1e}")
    want = [continued(theirs, ids) for ids in prompts]
    lengths = [len(ids) for ids in prompts]
    print(f"greedy, {TOKENS} tokens after {len(prompts)} prompts of {min(lengths)} to", end=" ")
    print(f"{max(lengths)} tokens\nprompts at a time   equal   gaps where they part")
    result["greedy"] = []
    for rows in ROWS:
        generator = generate.Generator(apply, loaded.variables(), model, tokens=TOKENS)
        ours = []
        for start in range(0, len(prompts), rows):
            *_, made = generator(prompts[start : start + rows])
            ours += made
        gaps = [
            gap(theirs, ids, one, other)
            for ids, one, other in zip(prompts, ours, want, strict=True)
            if one != other
        ]
        result["greedy"].append({"rows": rows, "equal": len(prompts) - len(gaps), "gaps": gaps})
        shown = " ".join(f"{size:.1e}" for size in gaps)
        print(f"{rows:17} {len(prompts) - len(gaps):7}   {shown}", flush=True)
    Path(output).write_text(json.dumps(result, indent=2) + "\n")


def in_torch(model, loaded):
    """transformers' model with the weights `loaded` of ours."""
    settings = models.written_json(model)
    kind = transformers.CONFIG_MAPPING[settings["model_type"]]
    theirs = transformers.AutoModelForCausalLM.from_config(kind.from_dict(settings))
    tensors = export.tensors(model.names, tree.flatten(loaded.leaves()))
    tensors = {name: torch.tensor(array) for name, array in tensors.items()}
    told = theirs.load_state_dict(tensors, strict=False)
    tied = ["lm_head.weight"] if model.config.tied else []
    assert (told.missing_keys, told.unexpected_keys) == (tied, []), told
    theirs.tie_weights()
    return theirs.float()


def texts_and_prompts(tokenizer):
    """Ids of questions with their answers, and without: spread over the set."""
    lines = dialog_sources.OWN.read_text(encoding="utf-8").splitlines()
    texts, prompts = [], []
    for line in map(json.loads, lines[:: len(lines) // PROMPTS][:PROMPTS]):
        turns = (Turn("user", line["instruction"]),)
        prompts.append(dialog_text.prompt(tokenizer, turns, chat.Style("chat")))
        texts.append(prompts[-1] + tokenizer(line["output"])["input_ids"])
    return texts, prompts


def logits(apply, variables, theirs, texts):
    """How far the logits of the texts lie apart."""
    rows, row = [], []
    for ids in texts:
        if sum(map(len, row)) + len(ids) > ROW:
            rows, row = [*rows, row], []
        row = [*row, ids]
    rows, worst, size, count = [*rows, row], 0.0, 0.0, 0
    apply = jax.jit(apply)
    for row in rows:
        ours = np.asarray(apply(variables, packed(row)))[0]
        ends = np.cumsum([len(ids) for ids in row])
        for ids, own in zip(row, np.split(ours, ends), strict=False):
            with torch.no_grad():
                want = theirs(torch.tensor([ids])).logits[0].numpy()
            worst, size = (
                max(worst, float(abs(own - want).max())),
                max(size, float(abs(want).max())),
            )
            count += len(ids)
    return {"tokens": count, "size": size, "difference": worst}


def packed(row):
    """A batch of one row."""
    batch = {name: np.zeros((1, ROW), np.int32) for name in ("input_ids", "segments", "positions")}
    start = 0
    for number, ids in enumerate(row, 1):
        place = 0, slice(start, start + len(ids))
        batch["input_ids"][place], batch["segments"][place] = ids, number
        batch["positions"][place] = range(len(ids))
        start += len(ids)
    return batch


def continued(theirs, ids):
    """transformers' greedy continuation of one prompt."""
    ids_bt = torch.tensor([ids])
    how = transformers.GenerationConfig(do_sample=False, max_new_tokens=TOKENS)  # and no end
    made = theirs.generate(ids_bt, how, attention_mask=torch.ones_like(ids_bt))
    return made[0, len(ids) :].tolist()


def gap(theirs, ids, one, other):
    """How far apart the two highest logits lie behind what both texts begin with."""
    same = next(at for at, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
    with torch.no_grad():
        highest = theirs(torch.tensor([ids + one[:same]])).logits[0, -1].topk(2).values
    return float(highest[0] - highest[1])


if __name__ == "__main__":
    main()
