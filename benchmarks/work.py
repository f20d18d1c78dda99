"""The operations of a LoRA step against what cannot be saved: forward, input gradient, adapter.

    ./run.sh benchmarks/work.py [--output=FILE.json]

minilm with LoRA (rank 8, query and value), 32 rows of 64 tokens, one device. Operations are those
XLA counts in the compiled program; the layers are fully unrolled, as it counts a loop's body once.

    step       loss, gradients of what moves, AdamW: the step that trains
    floor      the base's forward and the gradient of its embedded input, compiled, and the
               adapter's own products by formula: 6 operations a token and number of A and B
               (forward, input gradient, gradient of the number itself)
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bmft import peft, prepare, sharding, train, tree
from bmft.config import read
from bmft.tasks import text_classification

ROWS, TOKENS, EXAMPLES = 32, 64, 4


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="work.json")
    output = parser.parse_args().output
    argv = ["--config.train.steps=10", "--config.mesh.data=1", "--config.model.unroll=6"]
    config = read(argv, default="configs/glue_lora.py", groups=prepare.groups).config
    sharding.use_all_cores(1)
    mesh = sharding.mesh(config)
    model = prepare.find_model(config, 3)
    fit = prepare.fit(config, model, prepare.find_methods(config, model), mesh, steps=10)
    loss = text_classification.cross_entropy()
    step = prepare.make_step(config, fit, loss)
    counted = operations(step, fit.state, fit.frozen, batch())
    base = operations(*input_gradient(model, fit, loss))
    numbers = tree.count(fit.state.moving["peft"])
    adapter = 6 * ROWS * TOKENS * numbers
    result = {"step": counted, "forward_and_input_gradient": base, "adapter": adapter}
    result["ratio"] = counted / (base + adapter)
    Path(output).write_text(json.dumps(result, indent=2) + "\n")
    print("\nGFLOP          step   forward + input gradient   adapter   step / floor")
    print(f"{counted / 1e9:18.2f} {base / 1e9:26.2f} {adapter / 1e9:9.2f} {result['ratio']:14.3f}")


def operations(function, *args):
    return function.lower(*args).compile().cost_analysis()["flops"]


def input_gradient(model, fit, loss):
    """Forward and the gradient of the embedded input of the base, with nothing else moving."""

    def hook(module, call, *args):
        out = call(*args)
        if peft.path_of(module) != "embeddings":
            return out
        return out + module.get_variable("peft", "probe")

    apply = peft.attach((peft.Method("probe", lambda path: None, hook),), model).apply
    probe = jnp.zeros((ROWS, TOKENS, model.config.width))
    params = tree.join(fit.state.moving["params"], fit.frozen["params"])

    @jax.jit
    def gradient(probe, params, batch):
        def objective(probe):
            variables = {"params": params, "peft": {"embeddings": {"probe": probe}}}
            (total, weight), _ = loss(train.bind(apply, variables, jax.random.key(0)), batch, None)
            return total / weight

        return jax.value_and_grad(objective)(probe)

    return gradient, probe, params, batch()


def batch():
    rng = np.random.default_rng(0)
    width = TOKENS // EXAMPLES
    whole = {
        "input_ids": rng.integers(1000, 2000, (ROWS, TOKENS)),
        "segments": np.tile(np.repeat(np.arange(1, EXAMPLES + 1), width), (ROWS, 1)),
        "positions": np.tile(np.arange(width), (ROWS, EXAMPLES)),
        "token_types": np.zeros((ROWS, TOKENS)),
        "first": np.tile(np.arange(0, TOKENS, width), (ROWS, 1)),
        "labels": rng.integers(0, 3, (ROWS, EXAMPLES)),
    }
    whole = {name: array.astype(np.int32) for name, array in whole.items()}
    return whole | {"weights": np.ones((ROWS, EXAMPLES), np.float32)}


if __name__ == "__main__":
    main()
