"""PiSSA and LoRA+ against Hugging Face PEFT 0.21.2: steps of training from the same base, what is
written, and the optimizer's groups. What PEFT writes of embeddings. DoRA: test_both_ways.py."""

import warnings

import examples
import hugging
import jax
import numpy as np
import optax
import peft as hf
import pytest
import torch
import transformers
from peft.optimizers import create_loraplus_optimizer
from trained import Trained

from bmft import models, optim, peft, train, tree
from bmft.config import read
from bmft.errors import Mistake
from bmft.models import weights
from bmft.peft import files, matching, reading
from bmft.prepare import groups

LENGTHS = (13, 3, 8, 10)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """(folder, our model, our variables)"""
    folder = tmp_path_factory.mktemp("bert")
    hugging.random_model(hugging.CONFIGS["bert"]).save_pretrained(folder)
    model = models.find(str(folder), outputs=5)
    return folder, model, weights.load(model, jax.random.key(0)).variables()


def base_of(folder):
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()


def batches():
    chosen = examples.tokens(LENGTHS, 53, 2)
    return examples.padded(chosen), examples.packed(chosen)


def cross_entropy(forward, batch, key):
    logits = jax.nn.log_softmax(forward(batch, train=True)[0])
    picked = -logits[np.arange(len(LENGTHS)), np.arange(len(LENGTHS)) % 5]
    return (picked.sum(), float(len(LENGTHS))), {}


def stepped(model, variables, method, tx, steps):
    """All variables after some of our training steps."""
    methods = peft.build(model, tuple(method), method)
    add, apply = peft.attach(methods, model)
    variables = variables | jax.jit(add)(jax.random.key(1), variables)
    paths = [path for path in tree.flatten(variables) if peft.may_move(path)]
    claims = peft.claims(methods, paths, heads=model.heads)
    moving, frozen = tree.split(variables, lambda path: path in claims)
    step = train.make_step(apply, cross_entropy, tx)
    state = train.init_state(jax.tree.map(np.array, moving), tx, jax.random.key(0))
    for _ in range(steps):
        state, _ = step(state, frozen, batches()[1])
    return methods, apply, state, frozen


OPTIMIZERS = {
    "sgd": (lambda p: torch.optim.SGD(p, 0.05), optax.sgd(0.05)),
    "adamw": (
        lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1),
        optax.adamw(1e-2, weight_decay=0.1),
    ),
}
PISSA = {
    "r": 3,
    "lora_alpha": 7,
    "use_rslora": True,
    "target_modules": ["query", "intermediate.dense", "output.dense"],
}
OURS = {"rank": 3, "alpha": 7.0, "rslora": True, "targets": ("query", "up", "output.dense")}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pissa_trains_as_pefts_and_is_written_as_a_lora(bert, tmp_path, name):
    """Decay is in it, so that factors and not only their product have to be the same."""
    folder, model, base = bert
    config = hf.LoraConfig(task_type="SEQ_CLS", init_lora_weights="pissa", **PISSA)
    theirs = hf.get_peft_model(base_of(folder), config).eval()  # no dropout
    batch = {key: torch.tensor(np.asarray(value)) for key, value in batches()[0].items()}
    torchs, ours = OPTIMIZERS[name]
    optimizer = torchs([p for p in theirs.parameters() if p.requires_grad])
    start = hugging.logits(theirs, batches()[0])
    np.testing.assert_allclose(start, hugging.logits(base_of(folder), batches()[0]), atol=2e-5)
    for _ in range(2):
        optimizer.zero_grad()
        labels = torch.arange(len(LENGTHS)) % 5
        theirs(**batch, labels=labels).loss.backward()
        optimizer.step()
    model = model._replace(module=model.module.clone(config=without_dropout(model.config)))
    methods, apply, state, frozen = stepped(model, base, {"pissa": OURS}, ours, 2)
    want = hugging.logits(theirs, batches()[0])
    assert np.abs(want - start).max() > 0.05
    variables = train.variables(state, frozen)
    got = jax.jit(apply)(variables, batches()[1])[0]
    np.testing.assert_allclose(got, want, atol=1e-4)
    for path, leaf in tree.flatten(base["params"]).items():  # the base is as it was
        if not path.startswith("classifier"):
            assert np.array_equal(leaf, tree.flatten(frozen["params"])[path]), path
    # As PEFT's own conversion: a LoRA on the plain base, which PEFT and we compute alike.
    written = tmp_path / "pissa"
    told = {"base": "tiny", "fingerprint": "f" * 64}
    files.write(written, methods, {"pissa": OURS}, model, state.moving, frozen, **told)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        plain = hf.PeftModel.from_pretrained(base_of(folder), written).eval()
    assert plain.peft_config["default"].r == 6
    np.testing.assert_allclose(hugging.logits(plain, batches()[0]), got, atol=2e-5)
    adapter = files.read(written, model, fingerprint="f" * 64)
    assert adapter.names == ("lora",)
    again = jax.jit(peft.attach(adapter.methods, model).apply)
    again = again(files.insert(adapter, base), batches()[1])[0]
    np.testing.assert_allclose(again, got, atol=2e-5)


def without_dropout(config):
    return config._replace(dropout=0.0, attention_dropout=0.0, head_dropout=0.0)


def test_lora_plus_has_the_groups_of_pefts(bert):
    """The same learning rate and decay for every leaf of a layer, biases among them."""
    folder, model, base = bert
    settings = {"r": 3, "target_modules": ["query", "output.dense"], "bias": "lora_only"}
    theirs = hf.get_peft_model(base_of(folder), hf.LoraConfig(task_type="SEQ_CLS", **settings))
    about = {"lr": 0.01, "loraplus_lr_ratio": 4.0, "loraplus_weight_decay": 0.3}
    made = create_loraplus_optimizer(theirs, torch.optim.AdamW, **about)
    names = {id(p): name for name, p in theirs.named_parameters()}
    want = {
        names[id(p)].replace(".default", "").replace(".base_layer", ""): (
            g["lr"],
            g["weight_decay"],
        )
        for g in made.param_groups
        for p in g["params"]
        if "classifier" not in names[id(p)]  # our head has a rate of its own
    }
    method, targets = "--config.peft.methods=lora_plus", "--config.peft.lora_plus.targets=query"
    argv = [method, f"{targets},output.dense", "--config.peft.lora_plus.ratio=4"]
    argv += ["--config.peft.lora_plus.learning_rate=0.01", "--config.peft.lora_plus.rank=3"]
    argv += ["--config.peft.lora_plus.weight_decay=0.3", "--config.peft.lora_plus.bias=lora_only"]
    config = read(argv, default="configs/glue_lora.py", groups=groups).config
    methods = peft.build(model, ("lora_plus",), {"lora_plus": dict(config.peft.lora_plus)})
    added = jax.jit(peft.attach(methods, model).add)(jax.random.key(0), base)
    paths = [path for path in tree.flatten(base | added) if peft.may_move(path)]
    labels = peft.claims(methods, paths, heads=model.heads)
    rates = optim.rates(config, labels.values())
    decayed = tree.flatten(optim.decayed(tree.unflatten(labels)))
    got = {}
    for path, mask in methods[0].files.sites.items():
        for layer in matching.layers(mask):
            module = "base_model.model." + model.names.called(path, layer)[1]
            for ours, theirs in (("lora_a", "lora_A.weight"), ("lora_b", "lora_B.weight")):
                rate, decay = rates[labels[f"peft/{path}/{ours}"]]
                got[f"{module}.{theirs}"] = rate, decay if decayed[f"peft/{path}/{ours}"] else 0.0
            rate, decay = rates[labels[f"params/{path}/bias"]]
            got[f"{module}.bias"] = rate, decay if decayed[f"params/{path}/bias"] else 0.0
    assert got == want
    assert len({rate for rate, _ in got.values()}) == 2


def test_lora_plus_is_read_by_peft_as_lora(bert, tmp_path):
    folder, model, base = bert
    group = {"rank": 3, "alpha": 7.0, "targets": ("query", "up")}
    trained = Trained(model, base["params"], {"lora_plus": group}, size=0.1)
    trained.write(tmp_path)
    theirs = hf.PeftModel.from_pretrained(base_of(folder), tmp_path).eval()
    got = jax.jit(peft.attach(trained.methods, model).apply)(trained.variables, batches()[1])[0]
    np.testing.assert_allclose(hugging.logits(theirs, batches()[0]), got, atol=1e-5)
    assert files.read(tmp_path, model).names == ("lora",)


@pytest.mark.parametrize("targets", [["word_embeddings", "query"], ["query"]])
def test_embeddings_that_peft_repeats(bert, tmp_path, targets):
    """save_embedding_layers: the base's own table may be in a file, another one may not."""
    folder, model, base = bert
    config = hf.LoraConfig(task_type="SEQ_CLS", r=3, target_modules=targets)
    theirs = hf.get_peft_model(base_of(folder), config)
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            weight += 0.1 * ("lora_" in name)
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    inside = ".base_layer" if len(targets) > 1 else ""
    key = f"base_model.model.bert.embeddings.word_embeddings{inside}.weight"
    assert key in reading.tensors(tmp_path / files.TENSORS)
    adapter = files.read(tmp_path, model)
    apply = jax.jit(peft.attach(adapter.methods, model).apply)
    got = apply(files.insert(adapter, base), batches()[1])[0]
    np.testing.assert_allclose(got, hugging.logits(theirs.eval(), batches()[0]), atol=1e-5)
    other = tree.map_with_path(lambda path, x: x + path.endswith("word/embedding"), base)
    with pytest.raises(Mistake, match=r"its embeddings/word/embedding is not the base's"):
        files.insert(adapter, other)
