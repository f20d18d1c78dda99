"""The step, the optimizers and the mesh: what must not depend on how the work is cut up."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from bmft import optim, prepare, sharding, train, tree
from bmft.errors import Mistake
from bmft.models import weights
from configs import base


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tiny.directory(tmp_path_factory.mktemp("model"))
    return tiny.Fitted(folder, ("lora",), {"lora": {"rank": 3, "alpha": 7.0}})


def started(fitted, tx):
    moving = jax.tree.map(jnp.copy, fitted.moving)
    state = train.init_state(moving, tx, jax.random.key(0))
    return jax.device_put(state, jax.devices()[0])


def losses(fitted, steps=3, **options):
    """Losses and moving leaves of a few steps of Adam."""
    tx = optax.adam(0.01)
    step, state = (
        tiny.hasty(train.make_step(fitted.apply, tiny.loss, tx, **options)),
        started(fitted, tx),
    )
    found = []
    for number in range(steps):
        state, metrics = step(state, fitted.frozen, tiny.batch(rows=8, seed=number))
        found.append(float(metrics["loss"]))
    return found, state


def test_parts_of_a_batch_add_up_to_it(fitted):
    """Weights differ from part to part: a mean of means would not do."""
    whole, _ = losses(fitted)
    parts, _ = losses(fitted, accumulate=4)
    np.testing.assert_allclose(parts, whole, rtol=2e-6)
    assert len(set(whole)) == 3


def test_one_compilation_however_many_steps(fitted):
    tx = optax.adam(0.01)
    step, state = tiny.hasty(train.make_step(fitted.apply, tiny.loss, tx)), started(fitted, tx)
    for number in range(3):
        state, metrics = step(state, fitted.frozen, tiny.batch(seed=number))
    assert step._cache_size() == 1
    assert int(state.step) == 3
    assert metrics["grad_norms"].shape == (len(fitted.claims),)
    np.testing.assert_allclose(
        np.linalg.norm(metrics["grad_norms"]), metrics["grad_norm"], rtol=1e-5
    )


def test_gradient_taker_is_an_argument(fitted):
    def doubled(function, has_aux):
        take = jax.value_and_grad(function, has_aux=has_aux)

        def both(moving):
            value, grads = take(moving)
            return value, jax.tree.map(lambda x: 2 * x, grads)

        return both

    tx = optax.sgd(0.0)
    plain, twice = (
        tiny.hasty(train.make_step(fitted.apply, tiny.loss, tx, **option))
        for option in ({}, {"grad": doubled})
    )
    norms = [
        float(step(started(fitted, tx), fitted.frozen, tiny.batch())[1]["grad_norm"])
        for step in (plain, twice)
    ]
    np.testing.assert_allclose(norms[1], 2 * norms[0], rtol=1e-5)


@pytest.mark.parametrize("option", [{"remat": "block"}, {"remat": "dots_saveable", "unroll": 3}])
def test_remat_and_unroll_change_nothing(fitted, option):
    other = tiny.Fitted(fitted.model.folder, ("lora",), fitted.groups, **option)
    np.testing.assert_allclose(losses(other, 2)[0], losses(fitted, 2)[0], rtol=1e-5)


# --- mesh


def mesh_of(**sizes):
    return sharding.mesh(ConfigDict({"mesh": {"data": 1, "fsdp": 1, "tensor": 1} | sizes}))


def test_one_axis_takes_the_rest():
    assert mesh_of(data=-1, fsdp=2).shape == {"data": 4, "fsdp": 2, "tensor": 1}
    assert sharding.rows(mesh_of(data=-1, fsdp=2)) == 8


@pytest.mark.parametrize("sizes", [{"data": 3}, {"data": -1, "fsdp": -1}, {"data": 0}, {"data": 4}])
def test_a_mesh_that_does_not_fit_is_refused(sizes):
    with pytest.raises(Mistake, match="mesh: data="):
        mesh_of(**sizes)


def test_leaves_follow_the_first_rule():
    rule = sharding.of_leaf(
        mesh_of(fsdp=4, tensor=2), (("a/*", ("fsdp",)), ("**/b", (None, "tensor")))
    )
    assert rule("a/b", (8, 3)).spec == P("fsdp")
    assert rule("c/d/b", (3, 4)).spec == P(None, "tensor")
    with pytest.raises(Mistake, match=r"fsdp=4 does not divide 6 of a/b \[6, 3\]"):
        rule("a/b", (6, 3))
    with pytest.raises(Mistake, match="no sharding rule for c/d"):
        rule("c/d", (3,))


def test_weights_are_read_into_their_shards(fitted):
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    rules = sharding.of_leaf(mesh, fitted.model.sharding)
    loaded = weights.load(fitted.model, jax.random.key(0), sharding=rules)
    kernel = loaded.params["layers"]["mlp"]["up"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(3, 12, 20)}
    for path, leaf in tree.flatten(loaded.params).items():
        assert np.array_equal(leaf, tree.flatten(fitted.loaded.params)[path]), path


def test_frozen_leaves_are_stored_as_asked(fitted):
    mesh, key = mesh_of(data=-1), jax.random.key(0)
    stored = prepare.load(fitted.model, key, mesh, fitted.methods, storage="bfloat16")
    for path, leaf in tree.flatten(stored.params).items():
        moves = path.startswith(("classifier/", "pooler/"))
        assert leaf.dtype == (jnp.float32 if moves else jnp.bfloat16), path
    assert fitted.model.module.dtype == jnp.float32


# --- optimizers


def optim_config(**changes):
    config = base.get_config()
    config.peft.lora = {}
    config.optim.update(changes)
    return config


LABELS = {"params/a/bias": "head", "params/a/kernel": "head", "peft/a/lora_a": "lora"}


def leaves(value=1.0):
    return tree.unflatten({path: jnp.full((2, 3), value) for path in LABELS})


def updated(config, grads=0.0, steps=10, rows=None):
    """The leaves after one step with all gradients `grads`."""
    tx, _ = optim.make(config, LABELS, steps, rows)
    updates, _ = tx.update(leaves(grads), tx.init(leaves()), leaves())
    return {
        p: np.asarray(x) for p, x in tree.flatten(optax.apply_updates(leaves(), updates)).items()
    }


def constant(**changes):
    return optim_config(schedule="constant", warmup=0.0, learning_rate=0.1, **changes)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "adafactor"])
def test_decay_never_touches_biases(name):
    after = updated(constant(name=name, weight_decay=0.5))
    assert (after["params/a/bias"] == 1).all()
    assert (after["params/a/kernel"] < 1).all()
    assert (after["peft/a/lora_a"] < 1).all()


def test_adamw_is_torchs():
    """torch.optim.AdamW(lr=0.1, weight_decay=0.5), one step from 1 with gradient 0.02."""
    after = updated(constant(weight_decay=0.5), grads=0.02)
    np.testing.assert_allclose(after["params/a/kernel"], 0.85, rtol=1e-5)
    np.testing.assert_allclose(after["params/a/bias"], 0.9, rtol=1e-5)


def test_labels_have_rates_and_decays_of_their_own():
    config = constant(weight_decay=0.5, head_learning_rate=0.2)
    config.peft.lora = {"learning_rate": 0.01, "weight_decay": 0.0}
    after = updated(config, grads=0.02)
    np.testing.assert_allclose(after["peft/a/lora_a"], 0.99, rtol=1e-5)
    np.testing.assert_allclose(after["params/a/kernel"], 1 - 0.2 - 0.1, rtol=1e-5)


def test_clipping_is_by_the_global_norm():
    grads = 7.0
    norm = grads * np.sqrt(18)
    after = updated(constant(name="sgd", beta1=0.0, weight_decay=0.0, clip=0.5), grads=grads)
    np.testing.assert_allclose(after["params/a/bias"], 1 - 0.1 * grads * 0.5 / norm, rtol=1e-5)


def test_rows_that_do_not_move_stay_to_the_bit():
    rows = {"params/a/kernel": np.array([True, False])}
    after = updated(constant(weight_decay=0.5), grads=0.3, rows=rows)["params/a/kernel"]
    assert (after[1] == 1).all()
    assert (after[0] < 0.9).all()


def test_schedules():
    def at(name, *steps, warmup=0.2):
        rate = optim.schedule(optim_config(schedule=name, warmup=warmup), 1.0, 100)
        return [round(float(rate(step)), 4) for step in steps]

    assert at("constant", 0, 9, 19, 20, 99) == [0.05, 0.5, 1.0, 1.0, 1.0]
    assert at("linear", 0, 19, 20, 60, 100) == [0.05, 1.0, 1.0, 0.5, 0.0]
    assert at("cosine", 19, 20, 60, 100) == [1.0, 1.0, 0.5, 0.0]
    assert at("linear", 0, 50, 100, warmup=0.0) == [1.0, 0.5, 0.0]


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(Mistake, match="did you mean 'adamw'"):
        optim.make(optim_config(name="adam"), LABELS, 10)
    with pytest.raises(Mistake, match="did you mean 'linear'"):
        optim.make(optim_config(schedule="liner"), LABELS, 10)


def test_state_lies_where_its_leaves_lie():
    mesh = mesh_of(fsdp=8)
    split = jax.NamedSharding(mesh, P("fsdp"))
    moving = {"params": {"a": {"kernel": jax.device_put(jnp.ones((8, 2)), split)}}}
    tx, _ = optim.make(constant(), {"params/a/kernel": "head"}, 10)
    state = train.init_state(moving, tx, jax.random.key(0))
    where = train.shardings(state, sharding.replicated(mesh))
    big = [s for s, x in zip(jax.tree.leaves(where), jax.tree.leaves(state), strict=True) if x.ndim]
    assert [s.spec for s in big] == [P("fsdp")] * 3  # the leaf, and Adam's two moments
