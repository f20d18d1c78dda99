"""Our logits are transformers' and peft's, as tests/goldens/make_goldens.py stored them."""

import pathlib
from functools import partial

import examples
import jax
import numpy as np
import pytest

from bmft import models, peft
from bmft.models import weights
from bmft.peft import files

FOLDER = pathlib.Path(__file__).resolve().parent / "goldens"
LOGITS = dict(np.load(FOLDER / "logits.npz"))
FAMILIES = ("bert", "roberta", "distilbert")
LENGTHS, VOCABULARY, OUTPUTS = (17, 5, 11, 2), 50, 5


@pytest.fixture(scope="module")
def loaded():
    """{family: (model, params, apply(params) -> logits of the examples), compiled once}"""
    found = {}
    for family in FAMILIES:
        model = models.find(str(FOLDER / family), outputs=OUTPUTS)
        read = weights.load(model, jax.random.key(0))
        assert read.fresh == () and read.ignored == ()
        apply = jax.jit(lambda p, b, model=model: model.module.apply({"params": p}, b))
        found[family] = model, read.params, partial(apply, b=batch(model))
    return found


def batch(model):
    return examples.both(examples.tokens(LENGTHS, VOCABULARY, model.config.types))


def close(logits, name):
    for way in examples.of_both(np.asarray(logits)):
        np.testing.assert_allclose(way, LOGITS[name], atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_models(loaded, family):
    _, params, apply = loaded[family]
    close(apply(params), family)


@pytest.mark.parametrize("name", sorted(set(LOGITS) - set(FAMILIES)))
def test_adapters_of_peft(loaded, name):
    family = name.partition("_")[0]
    model, params, apply = loaded[family]
    assert np.abs(LOGITS[name] - LOGITS[family]).max() > 0.1  # it was trained
    assert files.card(FOLDER / name).outputs == OUTPUTS
    adapter = files.read(FOLDER / name, model, fingerprint="of whatever base")
    assert adapter.names == ("lora",)
    variables = files.insert(adapter, {"params": params})
    merged = peft.merge(adapter.methods, variables["params"], variables)
    close(apply(merged), name)
    if name == "bert_patterns":
        close(jax.jit(peft.attach(adapter.methods, model).apply)(variables, batch(model)), name)


def test_minilm():
    golden = np.load(FOLDER / "minilm.npz")
    model = models.find("minilm", outputs=3)
    read = weights.load(model, jax.random.key(0))
    assert set(read.fresh) == {"classifier/out/kernel", "classifier/out/bias"}
    assert read.ignored == ("embeddings.position_ids",)
    params = read.params | {"classifier": {"out": {k: golden[k] for k in ("kernel", "bias")}}}
    told = models.tokenizer(model)(golden["texts"].tolist(), truncation=True, max_length=64)
    stored = [ids[:n].tolist() for ids, n in zip(golden["ids"], golden["lengths"], strict=True)]
    assert told["input_ids"] == stored
    batch = examples.packed([(ids, [0] * len(ids)) for ids in stored])
    logits = jax.jit(lambda batch: model.module.apply({"params": params}, batch))(batch)[0]
    np.testing.assert_allclose(logits, golden["logits"], atol=1e-4)
