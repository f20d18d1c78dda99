"""A run of the loop on a toy problem: tests import it, or start it as a program and kill it.

    python tests/loop_toy.py WORKDIR '{"train.steps": 40}' '{"sleep": 0.01, "kill": "step 7"}'

A small network learns a random function; its first layer is frozen but for a low-rank update, and
dropout is on, so that a wrong key shows. `kill` names a moment: `step 7`, `evaluation 20` (by the
state's step), `seal 20` (Orbax is done, the manifest is not written); "victim": which one of
several processes is killed, if it is not the first. `mistake` and `fault` name a step, too.

Several processes hold the state of one, and split the rows of each batch.
"""

import json
import os
import pathlib
import signal
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import FrozenConfigDict

from bmft import checkpoint, errors, evaluate, loop, processes, sharding
from bmft.run import open_run
from configs import base

FINGERPRINT = "toy"
LABELS = {
    "params/head/bias": "head",
    "params/head/kernel": "head",
    "peft/layer/lora_a": "lora",
    "peft/layer/lora_b": "lora",
}


class State(NamedTuple):
    step: Any
    key: Any
    moving: Any
    opt: Any
    stats: Any


def make_config(**overrides):
    """The base config with small figures, and `{"train.steps": 40}` and the like on top."""
    config = base.get_config()
    config.train.steps = 40
    config.train.batch_size = 8
    config.log.every = 5
    config.log.tensorboard = False
    config.eval.every = 10
    config.update_from_flattened_dict(overrides)
    return FrozenConfigDict(config)


class Batches:
    """`at(step)` is a function of the step alone; the last of an epoch is smaller."""

    steps_per_epoch = 16
    padding_share = 0.25
    tokens_per_step = 30.0

    def __init__(self, sizes=(8,)):
        self.sizes = sizes

    def at(self, step):
        random = np.random.default_rng([1, step])
        size = self.sizes[step % len(self.sizes)]
        inputs = random.normal(size=(size, 6)).astype(np.float32)
        weights = np.ones(size, np.float32)
        if step % self.steps_per_epoch == self.steps_per_epoch - 1:
            weights[size // 2 :] = 0
        return {"inputs": inputs, "labels": np.sin(inputs.sum(1)), "weights": weights}


TX = optax.adamw(1e-2)


def first_state():
    keys = jax.random.split(jax.random.key(0), 2)
    head = {"kernel": jax.random.normal(keys[0], (16,)), "bias": jnp.zeros(())}
    layer = {"lora_a": jax.random.normal(keys[1], (6, 2)), "lora_b": jnp.zeros((2, 16))}
    moving = {"params": {"head": head}, "peft": {"layer": layer}}
    return State(jnp.int32(0), jax.random.key(7), moving, TX.init(moving), {})


def make_frozen():
    return {"params": {"layer": {"kernel": jax.random.normal(jax.random.key(1), (6, 16))}}}


def predict(moving, frozen, inputs, keep=1.0):
    head, added = moving["params"]["head"], moving["peft"]["layer"]
    hidden = inputs @ frozen["params"]["layer"]["kernel"]
    hidden += inputs @ added["lora_a"] @ added["lora_b"]
    return (jnp.tanh(hidden) * keep) @ head["kernel"] + head["bias"]


def plain_step(state, frozen, batch):
    def loss(moving):
        keep = jax.random.bernoulli(jax.random.fold_in(state.key, state.step), 0.9, (16,))
        errors = (predict(moving, frozen, batch["inputs"], keep) - batch["labels"]) ** 2
        return (errors * batch["weights"]).sum() / batch["weights"].sum()

    value, grads = jax.value_and_grad(loss)(state.moving)
    updates, opt = TX.update(grads, state.opt, state.moving)
    norms = jnp.stack([jnp.linalg.norm(leaf) for leaf in jax.tree.leaves(grads)])
    metrics = {"loss": value, "weight": batch["weights"].sum()}
    metrics |= {"grad_norm": jnp.linalg.norm(norms), "grad_norms": norms}
    moving = optax.apply_updates(state.moving, updates)
    return State(state.step + 1, state.key, moving, opt, {}), metrics


step = jax.jit(plain_step, donate_argnums=0)


@jax.jit
def errors_of(moving, frozen, batch):
    return jnp.abs(predict(moving, frozen, batch["inputs"]) - batch["labels"])


def assess(state, frozen, split, stop, batches=None):
    found = []
    for number in range(3):
        if stop():
            return None
        batch = (batches or Batches()).at((10_000 if split == "validation" else 20_000) + number)
        found.append(np.asarray(evaluate.gather(errors_of(state.moving, frozen, batch))))
    found = np.concatenate(found)
    return {"loss": float((found**2).mean()), "within": float((found < 0.5).mean())}


def train(workdir, config, **replaced):
    """One session of a run, to its report; arguments of `loop.run` can be replaced. -> Outcome."""
    run = open_run(config, workdir, "toy", FINGERPRINT)
    usual = {
        "state": first_state(),
        "frozen": make_frozen(),
        "step": step,
        "batches": Batches(),
        "evaluate": assess,
        "metric": ("loss", "min"),
        "labels": LABELS,
        "fingerprint": FINGERPRINT,
    }
    outcome = loop.run(config, run, **(usual | replaced))
    run.finish({**outcome.report, "trainable_params": 61, "total_params": 157})
    return outcome


def leaves(state):
    """The bits of every leaf, by path."""
    data = state._replace(key=jax.random.key_data(state.key))
    flat, _ = jax.tree_util.tree_flatten_with_path(data)
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes().hex() for path, leaf in flat}


class Shared:
    """`Batches`, of which each process makes its own rows, and the devices share them."""

    def __init__(self, mesh):
        self._put = sharding.put_batch(mesh)

    def __getattr__(self, name):
        return getattr(Batches, name)

    def at(self, step):
        count, here = jax.process_count(), jax.process_index()
        return self._put({k: np.split(v, count)[here] for k, v in Batches().at(step).items()})


def on_all_devices():
    """Arguments for `train` that lay the toy over all devices of all processes."""
    mesh = sharding.mesh(base.get_config())
    # device_put takes no typed key to devices of other processes.
    spread = jax.jit(
        lambda: (first_state(), make_frozen()), out_shardings=sharding.replicated(mesh)
    )
    state, frozen = spread()
    return {"state": state, "frozen": frozen, "batches": Shared(mesh)}


def main(argv):
    """A session as a program: the leaves it ends with are in leaves.json."""
    workdir, overrides, options = argv[0], json.loads(argv[1]), json.loads(argv[2])
    is_victim = jax.process_index() == options.get("victim", 0)

    def happens(what, kind, at):
        return is_victim and options.get(what) == f"{kind} {int(at)}"

    def die(kind, at):
        if happens("kill", kind, at):
            os.kill(os.getpid(), signal.SIGKILL)

    def slow_step(state, frozen, batch):
        time.sleep(options.get("sleep", 0.0))
        die("step", state.step)
        if happens("mistake", "step", state.step):
            raise errors.Mistake("the toy's own mistake")
        if happens("fault", "step", state.step):
            raise ZeroDivisionError("the toy's own fault")
        if happens("terminate", "step", state.step):
            os.kill(os.getpid(), signal.SIGTERM)
        return step(state, frozen, batch)

    laid = on_all_devices() if jax.process_count() > 1 else {}

    def slow_assess(state, frozen, split, stop):
        time.sleep(options.get("sleep", 0.0))
        die("evaluation", state.step)
        return assess(state, frozen, split, stop, laid.get("batches"))

    seal = checkpoint.Checkpoints._seal

    def deadly_seal(self, at, content):
        die("seal", at)
        seal(self, at, content)

    checkpoint.Checkpoints._seal = deadly_seal
    if limit := options.get("file_size"):  # the system refuses to write more
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if is_victim:
        overrides |= options.get("victim's", {})
    config = make_config(**overrides)
    outcome = train(workdir, config, step=slow_step, evaluate=slow_assess, **laid)
    if jax.process_index() == 0:
        pathlib.Path(workdir, "leaves.json").write_text(json.dumps(leaves(outcome.state)))


if __name__ == "__main__":
    sys.exit(errors.command(processes.joined(main)))
