"""AdaLoRA in the step: the budget that is kept, what a run remembers, what is refused."""

import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
import tiny_images
import tiny_nets
from safetensors.numpy import load_file

import bmft
from bmft import peft, train, tree
from bmft.errors import Mistake, command
from bmft.peft import adalora
from experiments import glue_lora

STEPS = 9
GROUP = {
    "init_rank": 5,
    "target_rank": 2,
    "tinit": 2,
    "tfinal": 2,
    "delta_t": 2,
    "alpha": 40.0,
    "targets": ("query", "mlp.down", "pooler"),
}
MODULES = 3 + 3 + 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.directory(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def fitted(folder):
    return tiny.Fitted(folder, ("adalora",), {"adalora": GROUP})


def values(variables):
    """Every E, of all layers."""
    leaves = tree.flatten(variables["peft"])
    return [np.asarray(leaf) for path, leaf in leaves.items() if path.endswith("adalora_e")]


def left(variables):
    return sum(np.count_nonzero(leaf) for leaf in values(variables))


def course(fitted, accumulate=1, penalty=True):
    """The states after each step of a run, and its metrics."""
    tx = optax.adam(0.01)
    begin, after = peft.memory(fitted.methods, STEPS)
    term = peft.penalty(fitted.methods) if penalty else None
    step = tiny.hasty(
        train.make_step(
            fitted.apply, tiny.loss, tx, accumulate=accumulate, penalty=term, after=after
        )
    )
    moving = jax.tree.map(jnp.copy, fitted.moving)
    state = train.init_state(moving, tx, jax.random.key(0), begin=begin)
    state, states, metrics = jax.device_put(state, jax.devices()[0]), [], []
    for number in range(STEPS):
        state, numbers = step(state, fitted.frozen, tiny.batch(rows=8, seed=number))
        states.append(jax.device_get(state._replace(key=None)))
        metrics.append(jax.device_get(numbers))
    assert step._cache_size() == 1
    return states, metrics


@pytest.fixture(scope="module")
def whole(fitted):
    return course(fitted)


# --- the budget


def test_budgets_fall_with_the_third_power():
    plan = adalora.Plan(2, 5, 2, 2, 2, 0.85, 0.85)
    falling = [15 * left**3 / 5**3 for left in (4, 3, 2, 1, 0)]  # (5 - 2) a module
    assert adalora.budgets(plan, 5, STEPS).tolist() == [25, 25, 25, *(int(10 + f) for f in falling)]


def test_the_budget_is_kept_at_every_choice_and_at_the_end(whole):
    full, target = 5 * MODULES, 2 * MODULES
    met = STEPS - 2
    budgets = adalora.budgets(adalora.Plan(2, 5, 2, 2, 2, 0.85, 0.85), MODULES, STEPS)
    found = [left(state.moving) for state in whole[0]]
    assert found[:3] == [full] * 3  # of step 3 there is no choice
    assert found[3] == budgets[4] < full
    assert found[4] == full  # zeros grow back until the next choice
    assert found[5] == budgets[6]
    assert found[met - 1 :] == [target] * 3
    ranks = np.concatenate([np.count_nonzero(e, -1).ravel() for e in values(whole[0][-1].moving)])
    assert len(set(ranks)) > 1
    last, end = (tree.flatten(s.memory["adalora"]["kept"]) for s in (whole[0][-3], whole[0][-1]))
    for path, kept in last.items():
        assert np.array_equal(kept, end[path])
        at_end = tree.flatten(whole[0][-1].moving["peft"])[f"{path}/adalora_e"]
        assert np.array_equal(at_end != 0, kept)


def test_importance_is_of_the_whole_batch(fitted, whole):
    states, metrics = course(fitted, accumulate=4)
    for one, other in zip(metrics, whole[1], strict=True):
        for name in ("loss", "penalty", "grad_norm"):
            np.testing.assert_allclose(one[name], other[name], rtol=1e-4)
    for one, other in zip(states[:5], whole[0][:5], strict=True):
        own, others = (tree.flatten(state.memory["adalora"]) for state in (one, other))
        for path, leaf in own.items():
            if not path.startswith("kept"):
                np.testing.assert_allclose(leaf, others[path], rtol=0.02, atol=1e-7, err_msg=path)
    assert left(states[-1].moving) == 2 * MODULES


def test_penalty_is_beside_the_loss(fitted, whole):
    """The first loss is the same without it; the gradient is not."""
    states, metrics = course(fitted, penalty=False)
    assert "penalty" not in metrics[0]
    np.testing.assert_allclose(metrics[0]["loss"], whole[1][0]["loss"], rtol=1e-6)
    assert metrics[0]["grad_norm"] < whole[1][0]["grad_norm"]
    terms = [
        float(peft.penalty(fitted.methods)(state[0][-1].moving)) for state in (whole, (states,))
    ]
    assert terms[0] < terms[1]


def test_penalty_is_of_targets_alone(folder):
    group = GROUP | {"layers_to_transform": (0, 2), "targets": ("mlp.down",)}
    fitted = tiny.Fitted(folder, ("adalora",), {"adalora": group})
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda x: rng.normal(0, 1, x.shape), fitted.variables["peft"])
    leaves = tree.flatten(variables)
    a, b = (leaves[f"layers/mlp/down/adalora_{name}"] for name in "ab")
    one = np.eye(5)
    norms = [np.linalg.norm(a[i].T @ a[i] - one) for i in (0, 2)]
    norms += [np.linalg.norm(b[i] @ b[i].T - one) for i in (0, 2)]
    found = peft.penalty(fitted.methods)({"peft": variables})
    np.testing.assert_allclose(found, 0.5 * np.mean(norms), rtol=1e-5)


def test_penalty_has_a_gradient_where_all_is_orthogonal(fitted):
    def orthogonal(path, x):
        if path.endswith("adalora_e"):
            return x
        one = jnp.eye(*x.shape[-2:])
        return jnp.broadcast_to(one, x.shape)

    variables = {"peft": tree.map_with_path(orthogonal, fitted.variables["peft"])}
    term, slopes = tiny.hasty(jax.value_and_grad(peft.penalty(fitted.methods)))(variables)
    assert term < 1e-12
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(slopes))


# --- the choice


def after_one(fitted, grads, moving=None):
    """The moving leaves after the last choice, all gradients but the first step's left out."""
    begin, after = peft.memory(fitted.methods, STEPS)
    moving = moving or jax.tree.map(lambda x: x + 1.0, fitted.moving)
    memory, after = begin(moving), jax.jit(after)
    for step in (1, STEPS - 2):  # the last choice learns nothing new
        moving, memory = after(step, moving, grads, memory)
    return moving


def test_of_equals_just_as_many_fall_in_all_modules(fitted):
    moving = after_one(fitted, jax.tree.map(jnp.zeros_like, fitted.moving))
    assert left(moving) == 2 * MODULES
    for leaf in values(moving):
        assert (np.count_nonzero(leaf, -1) == 2).all()


def test_a_module_may_lose_all(fitted):
    """... where the gradients of the others are larger."""

    def grads(path, x):
        return jnp.full_like(x, 1e-3 if "query" in path else 1.0)

    moving = after_one(fitted, tree.map_with_path(grads, fitted.moving))
    assert left(moving) == 2 * MODULES
    leaves = tree.flatten(moving["peft"])
    assert not np.any(leaves["layers/attention/query/adalora_e"])


def test_worth_is_that_of_the_value_and_the_means_of_its_vectors(fitted):
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda x: np.float32(rng.normal(size=x.shape)), fitted.moving)
    ones = jax.tree.map(jnp.ones_like, fitted.moving)
    found, worth = after_one(fitted, grads, ones), {}
    for path, slope in tree.flatten(grads["peft"]).items():
        mean = 0.15 * np.abs(slope)
        worth[path] = mean * 0.15 * np.abs(np.abs(slope) - mean)
    modules = sorted({path.rpartition("/")[0] for path in worth})
    each = {}
    for module in modules:
        a, e, b = (worth[f"{module}/adalora_{name}"] for name in "aeb")
        each[module] = e + a.mean(-2) + b.mean(-1)
    least = np.sort(np.concatenate([one.ravel() for one in each.values()]))[3 * MODULES]
    for module in modules:
        e = np.asarray(tree.flatten(found["peft"])[f"{module}/adalora_e"])
        assert np.array_equal(e != 0, each[module] >= least * (1 - 1e-6)), module


def test_layers_that_are_no_target_stay(folder):
    group = GROUP | {"layers_to_transform": (0, 2), "targets": ("mlp.down",)}
    fitted = tiny.Fitted(folder, ("adalora",), {"adalora": group})
    moving = after_one(fitted, jax.tree.map(jnp.zeros_like, fitted.moving))
    ranks = np.count_nonzero(values(moving)[0], -1)
    assert ranks.tolist() == [2, 5, 2]  # the one in the middle never counts


# --- a run


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny.directory(folder / "model", hidden_dropout_prob=0.1)
    tiny.tokenizer(folder / "model")
    keys = {
        "model.name": folder / "model",
        "train.steps": 8,
        "train.batch_size": 12,
        "train.accumulate": 2,
        "eval.every": 4,
        "log.every": 2,
        "checkpoint.keep": 3,
        "export.best": False,
        "export.merged": True,
        "optim.learning_rate": 0.02,
        "peft.methods": "adalora",
        "peft.adalora.init_rank": 4,
        "peft.adalora.target_rank": 1,
        "peft.adalora.tinit": 1,
        "peft.adalora.tfinal": 2,
        "peft.adalora.dropout": 0.1,
    }
    given = [f"--config.{key}={value}" for key, value in keys.items()]
    return [*given, *tiny.data(folder / "data")]


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "finished"
    assert command(glue_lora.main, [*arguments, f"--workdir={workdir}"]) == 0
    return workdir


def manifest(workdir, step):
    file = workdir / "checkpoints" / str(step) / "manifest.json"
    return json.loads(file.read_text())["content"]


def test_the_memory_is_in_the_checkpoint(finished):
    leaves = manifest(finished, 4)["leaves"]
    memory = {path: math.prod(shape) for path, (shape, _) in leaves.items() if "memory/" in path}
    numbers = 2 * 3 * (24 * 4 + 4 + 4 * 24)  # query and value of three layers
    assert sum(memory.values()) == 2 * numbers + 2 * 3 * 4
    assert leaves["memory/adalora/kept/layers/attention/query"] == [[3, 4], "bool"]


def test_stopped_between_two_choices_and_continued_is_as_if_it_had_not_been(
    arguments, finished, tmp_path
):
    """As a run that was killed after step 4 is found."""
    workdir = tmp_path / "killed"
    shutil.copytree(finished, workdir)
    for name in ("adapter", "model", "checkpoints/8"):
        shutil.rmtree(workdir / name)
    (workdir / "report.json").unlink()
    assert command(glue_lora.main, [*arguments, f"--workdir={workdir}"]) == 0
    for name in ("adapter/adapter_model.safetensors", "model/model.safetensors"):
        one, other = (load_file(folder / name) for folder in (workdir, finished))
        assert one.keys() == other.keys()
        assert all(one[key].tobytes() == other[key].tobytes() for key in one)
    rows = [
        [
            {key: value for key, value in json.loads(line).items() if key != "time"}
            for line in (folder / "metrics.jsonl").read_text().splitlines()
        ]
        for folder in (workdir, finished)
    ]
    assert rows[0] == rows[1]
    assert "penalty" in rows[0][0]


def test_what_a_run_leaves(finished):
    about = json.loads((finished / "adapter" / "adapter_config.json").read_text())
    assert about["peft_type"] == "ADALORA"
    assert (about["init_r"], about["target_r"], about["tinit"], about["tfinal"]) == (4, 1, 1, 2)
    assert sum(map(sum, about["rank_pattern"].values())) == 6
    texts = ["w1 good w2", "bad w3", "w4 w5 w6 w7 good"]
    base = json.loads((finished / "config.json").read_text())["config"]["model"]["name"]
    found = bmft.load(finished).predict(texts)
    for where, over in ((finished / "adapter", base), (finished / "model", None)):
        for one, other in zip(bmft.load(where, base=over).predict(texts), found, strict=True):
            np.testing.assert_allclose(one["logits"], other["logits"], atol=1e-5)


# --- what is refused


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"tinit": 5, "tfinal": 4}, "peft.adalora.tinit=5 and peft.adalora.tfinal=4"),
        ({"tinit": 9, "tfinal": 0}, "or raise train.steps"),
        ({"target_rank": 6}, "peft.adalora.target_rank=6 is above peft.adalora.init_rank=5"),
    ],
)
def test_a_run_that_is_too_short_is_refused(folder, changes, says):
    fitted = tiny.Fitted(folder, ("adalora",), {"adalora": GROUP | changes})
    with pytest.raises(Mistake) as refused:
        peft.memory(fitted.methods, STEPS)
    assert says in str(refused.value)


def test_an_experiment_that_is_too_short_is_refused_before_it_loads(arguments, tmp_path, capsys):
    short = [a.replace("tinit=1", "tinit=6") for a in arguments]
    assert command(glue_lora.main, [*short, f"--workdir={tmp_path / 'short'}"]) == 2
    error = capsys.readouterr().err
    assert "peft.adalora.tinit=6 and peft.adalora.tfinal=2 leave none of 8 steps" in error


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"init_rank": 0}, "init_rank is 0"),
        ({"target_rank": 0}, "target_rank is 0"),
        ({"delta_t": 0}, "delta_t is 0"),
        ({"tinit": -1}, "tinit is -1"),
        ({"beta1": 1.0}, "beta1 is 1.0"),
        ({"beta2": 0.0}, "beta2 is 0.0"),
        ({"orthogonality": -0.1}, "orthogonality is -0.1"),
        ({"alpha": 0.0}, "alpha is 0.0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"targets": ("quary",)}, "did you mean 'query'"),
    ],
)
def test_what_is_refused(fitted, changes, says):
    with pytest.raises(Mistake) as refused:
        adalora.make(fitted.model, **GROUP | changes)
    assert says in str(refused.value)


def test_a_convolution_in_groups_is_refused(tmp_path):
    folder = tiny_images.directory(
        tmp_path, "resnext", depths=[1], hidden_sizes=[12], inner_sizes=[6]
    )
    with pytest.raises(Mistake, match=r"conv2 is a convolution in groups.*lora takes it"):
        tiny_nets.Fitted(folder, {"adalora": {"targets": ("conv2",)}})


@pytest.mark.parametrize(
    "pattern, says",
    [
        ({"a.b.lora_E": [True, False]}, r"'a.b.lora_E' has no list of 3 \(init_r\)"),
        ({"a.b.lora_E": [1, 0, 1]}, r"has no list of 3"),
        ({"a.c.lora_E": [True, False, True]}, r"names 'a.c.lora_E'; did you mean .*a.b.lora_A"),
        ({"a.b.lora_E": [True, True, True]}, r"keeps 3 of 'a.b.lora_E', .*lora_A is \[2, 4\]"),
    ],
)
def test_a_rank_pattern_that_does_not_fit_is_refused(pattern, says):
    shapes = {"A": (2, 4), "E": (2, 1), "B": (5, 2)}
    tensors = {f"base_model.model.a.b.lora_{m}": np.ones(shape) for m, shape in shapes.items()}
    fields = {"init_r": 3, "rank_pattern": {"a.b.lora_E": [True, False, True]}}
    full = adalora._unpack(fields, tensors)
    assert full["base_model.model.a.b.lora_B"].tolist() == [[1, 0, 1]] * 5
    _, packed = adalora._pack(fields, full)
    assert all(np.array_equal(packed[key], tensors[key]) for key in tensors)
    with pytest.raises(Mistake, match=says):
        adalora._unpack(fields | {"rank_pattern": pattern}, tensors)
