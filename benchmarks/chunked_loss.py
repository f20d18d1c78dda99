"""The memory of a training step whose loss holds some tokens' logits at a time, or those of all.

    ./run.sh benchmarks/chunked_loss.py [--rows=4] [--tokens=512] [--output=FILE.json]

smollm2 (49,152 words) with LoRA of rank 8 on query and value, blocks recomputed (remat), 4 rows of
512 tokens, float32, one device. Megabytes of temporaries as XLA plans them for the compiled step.

    frozen head    as it is with LoRA: the loss keeps its gradient, not logits
    moving head    as it is if the head, or the embedding that it is tied to, moves: the logits are
                   computed again
"""

import argparse
import json
from pathlib import Path

import jax
import numpy as np
from language_speed import groups

from bmft import peft, prepare, sharding
from bmft.config import read
from bmft.tasks import causal_lm


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--output", default="chunked_loss.json")
    options = parser.parse_args()
    sharding.use_all_cores(1)
    argv = ["--config.train.steps=10", "--config.model.remat=block"]
    argv += ["--config.peft.lora.targets=query,value"]
    config = read(argv, default="configs/instruct_lora.py", groups=groups).config
    model, mesh = prepare.find_model(config, None), sharding.mesh(config)
    methods = prepare.find_methods(config, model)
    fit = prepare.fit(config, model, methods, mesh, steps=10)
    whole = batch(options.rows, options.tokens)
    rows = []
    for frozen in (True, False):
        sizes = {}
        for chunk in (model.module.chunk, options.rows * options.tokens):
            module = fit.module.clone(frozen_head=frozen, chunk=chunk)
            apply = peft.attach(methods, model._replace(module=module)).apply
            step = prepare.make_step(config, fit._replace(apply=apply), causal_lm.loss())
            compiled = step.lower(fit.state, fit.frozen, whole).compile()
            sizes[chunk] = compiled.memory_analysis().temp_size_in_bytes
        chunked, unchunked = sizes.values()
        found = {"frozen_head": frozen, "chunk": model.module.chunk, "chunked": chunked}
        rows.append(found | {"unchunked": unchunked, "ratio": chunked / unchunked})
    Path(options.output).write_text(json.dumps(rows, indent=2) + "\n")
    print(f"\nMB of temporaries   {model.module.chunk} tokens at a time    all   ratio")
    for row in rows:
        name = "frozen head" if row["frozen_head"] else "moving head"
        sizes = f"{row['chunked'] / 1e6:24.1f} {row['unchunked'] / 1e6:6.1f}"
        print(f"{name:19s} {sizes} {row['ratio']:7.3f}")


def batch(rows, tokens):
    """The shapes of a batch of full rows."""
    of_tokens = jax.ShapeDtypeStruct((rows, tokens), np.int32)
    names = ("input_ids", "segments", "positions", "targets")
    weights = jax.ShapeDtypeStruct((rows, 1), np.float32)
    return dict.fromkeys(names, of_tokens) | {"weights": weights}


if __name__ == "__main__":
    main()
