"""AdaLoRA against Hugging Face PEFT 0.21.2 while ranks fall: the allocator on the same numbers, a
training of both, and adapters that lost triplets, both ways."""

import warnings

import examples
import hugging
import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft as hf
import pytest
import test_both_ways as ways
import torch
from trained import Trained

from bmft import models, peft, train, tree
from bmft.models import weights
from bmft.peft import adalora, files

STEPS = 12
THEIRS = {
    "init_r": 5,
    "target_r": 2,
    "tinit": 1,
    "tfinal": 3,
    "deltaT": 2,
    "beta1": 0.8,
    "beta2": 0.7,
    "orth_reg_weight": 0.3,
    "lora_alpha": 30,
    "total_step": STEPS,
    "target_modules": ["query", "output.dense"],
}
OURS = {
    **{ours: THEIRS[theirs] for theirs, ours in adalora.PLAN.items()},
    "orthogonality": 0.3,
    "alpha": 30.0,
    "targets": ("query", "attention.output", "mlp.down"),
}
MODULES = 9


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(folder, our model, our variables)"""
    folder = tmp_path_factory.mktemp("bert")
    config = hugging.CONFIGS["bert"]
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    hugging.random_model(type(config)(**config.to_dict() | quiet)).save_pretrained(folder)
    model = models.find(str(folder), outputs=5)
    return folder, model, weights.load(model, jax.random.key(0)).variables()


def theirs_on(folder):
    torch.manual_seed(0)
    config = hf.AdaLoraConfig(task_type="SEQ_CLS", **THEIRS)
    return hf.get_peft_model(ways.base_of(folder), config).train()


def ours_of(model, named):
    """{path: array}, stacked as ours, of {PEFT's name of a leaf: tensor}."""
    found = {}
    for path, theirs in model.names.modules("dense").items():
        for letter in "AEB":
            keys = [
                f"base_model.model.{theirs.format(layer)}.lora_{letter}.default"
                for layer in model.names.layers_of(path)
            ]
            if keys[0] in named:
                stacked = np.stack([named[key].detach().numpy().astype(np.float32) for key in keys])
                stacked = stacked[..., 0] if letter == "E" else stacked.swapaxes(-1, -2)
                found[f"{path}/adalora_{letter.lower()}"] = stacked
    return found


def added(model, named):
    return {"peft": tree.unflatten(ours_of(model, named))}


def test_the_allocator_step_by_step(base):
    """The same leaves and gradients in both: importances, what falls, and when."""
    folder, model, _ = base
    theirs, rng = theirs_on(folder), np.random.default_rng(0)
    leaves = {n: p for n, p in theirs.named_parameters() if ".lora_" in n}
    begin, after = peft.memory(peft.build(model, ("adalora",), {"adalora": OURS}), STEPS)
    memory, after = begin(added(model, leaves)), jax.jit(after)
    allocator, fell = theirs.base_model.rankallocator, []
    for step in range(1, STEPS + 1):
        for leaf in leaves.values():
            leaf.data += torch.tensor(rng.normal(0, 0.1, leaf.shape), dtype=torch.float32)
            size = rng.uniform(0.1, 2)
            leaf.grad = torch.tensor(rng.normal(0, size, leaf.shape), dtype=torch.float32)
        grads = added(model, {name: leaf.grad for name, leaf in leaves.items()})
        moving, memory = after(step, added(model, leaves), grads, memory)
        theirs.base_model.update_and_allocate(step)
        want = ours_of(model, leaves)
        for path, leaf in tree.flatten(moving["peft"]).items():
            np.testing.assert_array_equal(leaf, want[path], err_msg=f"step {step}, {path}")
        fell.append(sum((w == 0).sum() for path, w in want.items() if path.endswith("_e")))
        if step < STEPS - THEIRS["tfinal"]:
            for name, kept in (
                ("importance", allocator.exp_avg_ipt),
                ("deviation", allocator.exp_avg_unc),
            ):
                kept = {f"base_model.model.{key}": value for key, value in kept.items()}
                want, found = ours_of(model, kept), tree.flatten(memory["adalora"][name])
                assert found.keys() == want.keys()
                for path, leaf in found.items():
                    np.testing.assert_allclose(leaf, want[path], rtol=1e-4, atol=1e-7)
    pattern = theirs.peft_config["default"].rank_pattern
    assert sum(map(sum, pattern.values())) == 2 * MODULES
    met, every = STEPS - 3, [3 * MODULES] * 4
    assert fell[met - 1 :] == every
    assert [bool(n) for n in fell[: met - 1]] == [False, True] * ((met - 1) // 2)


def trained(base, steps=STEPS):
    """PEFT's model after its own training with AdamW; the losses."""
    folder, model, _ = base
    theirs = theirs_on(folder)
    batch, _ = ways.batches(model)
    batch = {key: torch.tensor(np.asarray(value)) for key, value in batch.items()}
    labels, losses = torch.arange(len(batch["input_ids"])) % 5, []
    moving = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(moving, 1e-2, weight_decay=0.0)
    for step in range(1, steps + 1):
        loss = theirs(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return theirs.eval(), losses


@pytest.fixture(scope="module")
def fallen(base):
    return trained(base)


def test_both_train_alike(base, fallen, tmp_path):
    """From PEFT's start: the same losses with the penalty, the same ranks, the same logits."""
    folder, model, loaded = base
    theirs_on(folder).save_pretrained(tmp_path)
    adapter = files.read(tmp_path, model)
    variables = files.insert(adapter, loaded)
    moving, frozen = tree.split(variables, lambda path: path in adapter.leaves)
    assert tree.count(moving["peft"]) == 5 * (6 * (24 + 1 + 24) + 3 * (40 + 1 + 24))
    batch, chosen = ways.batches(model)

    def loss(forward, batch, key):
        logits = jax.nn.log_softmax(examples.of_both(forward(batch, train=True))[1])
        picked = logits[jnp.arange(len(logits)), jnp.arange(len(logits)) % 5]
        return (-picked.sum(), jnp.float32(len(logits))), {}

    methods = peft.build(model, ("adalora",), {"adalora": OURS})
    begin, after = peft.memory(methods, STEPS)
    tx, apply = optax.adamw(1e-2, weight_decay=0.0), peft.attach(methods, model).apply
    step = train.make_step(apply, loss, tx, penalty=peft.penalty(methods), after=after)
    state, losses = train.init_state(moving, tx, jax.random.key(0), begin=begin), []
    for _ in range(STEPS):
        state, metrics = step(state, frozen, examples.both(chosen))
        losses.append(float(metrics["loss"] + metrics["penalty"]))
    np.testing.assert_allclose(losses, fallen[1], rtol=1e-4)
    want = ours_of(model, dict(fallen[0].named_parameters()))
    found = tree.flatten(state.moving["peft"])
    for path, leaf in found.items():
        if path.endswith("_e"):
            assert np.array_equal(leaf != 0, want[path] != 0), path
        np.testing.assert_allclose(leaf, want[path], atol=1e-3, err_msg=path)
    ours = apply(train.variables(state, frozen), examples.both(chosen))
    np.testing.assert_allclose(
        examples.of_both(ours)[0], hugging.logits(fallen[0], batch), atol=0.01
    )


def loaded_by_peft(folder, base):
    """Without what PEFT says of its own adapters as well: that rank_pattern, which LoRA's code
    reads otherwise, matches no module, and that a tensor of rank 0 has lost its rows."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("error", RuntimeWarning)
        warnings.filterwarnings("ignore", "The following rank_pattern keys did not match")
        warnings.filterwarnings("ignore", ".*have invalid shape")
        return hf.PeftModel.from_pretrained(base, folder).eval()


@pytest.mark.filterwarnings("ignore:.*have invalid shape")
@pytest.mark.parametrize("kind", ["at the end", "on the way", "without one"])
def test_pefts_that_lost_triplets_read_by_us(base, fallen, tmp_path, kind):
    """... and written again, PEFT reads it. PEFT itself saves what has no rank, if with a word."""
    folder, model, loaded = base
    batch, chosen = ways.batches(model)
    theirs = fallen[0] if kind == "at the end" else trained(base, 6)[0]
    if kind == "without one":
        name = "bert.encoder.layer.1.attention.self.query.lora_E"
        pattern = theirs.peft_config["default"].rank_pattern
        pattern[next(key for key in pattern if key.startswith(name))] = [False] * 5
        theirs.base_model.rankallocator.mask_using_rank_pattern(theirs.base_model.model, pattern)
    want = hugging.logits(theirs, batch)
    assert np.abs(want - hugging.logits(ways.base_of(folder), batch)).max() > 0.1
    theirs.save_pretrained(tmp_path / "theirs")
    adapter = files.read(tmp_path / "theirs", model)
    variables = files.insert(adapter, loaded)
    for ours in ways.outputs(adapter.methods, model, variables, chosen):
        np.testing.assert_allclose(ours, want, atol=1e-5)
    moving, frozen = tree.split(variables, lambda path: path in adapter.leaves)
    again = adapter.methods, adapter.groups, model, moving, frozen
    files.write(tmp_path / "again", *again, base="tiny", fingerprint="")
    found = loaded_by_peft(tmp_path / "again", ways.base_of(folder))
    np.testing.assert_allclose(hugging.logits(found, batch), want, atol=1e-5)
    ranks = {n: len(p) for n, p in found.named_parameters() if "lora_E" in n}
    assert len(ranks) == MODULES
    if kind == "at the end":
        assert sum(ranks.values()) == 2 * MODULES
    if kind == "without one":
        assert 0 in ranks.values()


def test_ours_that_lost_triplets_read_by_peft(base, tmp_path):
    folder, model, loaded = base
    trained = Trained(model, loaded["params"], {"adalora": OURS}, size=0.1)
    rng = np.random.default_rng(1)

    def fall(path, leaf):
        return leaf * (rng.uniform(size=leaf.shape) < 0.5) if path.endswith("adalora_e") else leaf

    trained.moving = tree.map_with_path(fall, trained.moving)
    trained.moving["peft"]["layers"]["mlp"]["down"]["adalora_e"][1] = 0
    trained.write(tmp_path)
    batch, chosen = ways.batches(model)
    theirs = hugging.logits(loaded_by_peft(tmp_path, ways.base_of(folder)), batch)
    variables = tree.join(trained.moving, trained.frozen)
    for ours in ways.outputs(trained.methods, model, variables, chosen):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    read = files.insert(files.read(tmp_path, model), loaded)
    for ours in ways.outputs(trained.methods, model, read, chosen):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
