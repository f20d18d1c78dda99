"""Adapters that Hugging Face PEFT trained, of every method it has: our logits are the stored ones
(tests/goldens/make_catalogue.py)."""

import pathlib

import examples
import jax
import numpy as np
import pytest
import tiny

from bmft import models, peft
from bmft.models import weights
from bmft.peft import files

FOLDER = pathlib.Path(__file__).resolve().parent / "goldens"
LOGITS = dict(np.load(FOLDER / "catalogue.npz"))
FAMILIES = ("bert", "distilbert")
LENGTHS, VOCABULARY, OUTPUTS = (13, 5, 9, 2), 50, 5


@pytest.fixture(scope="module")
def loaded():
    found = {}
    for family in FAMILIES:
        model = models.find(str(FOLDER / family), outputs=OUTPUTS)
        found[family] = model, weights.load(model, jax.random.key(0)).variables()
    return found


@pytest.mark.parametrize("name", sorted(LOGITS))
def test_adapters_of_peft(loaded, name):
    family, _, case = name.partition("-")
    model, base = loaded[family]
    adapter = files.read(FOLDER / "catalogue" / name, model)
    variables = files.insert(adapter, base)
    chosen = examples.tokens(LENGTHS, VOCABULARY, model.config.types)
    batch = examples.both(chosen, peft.virtual_ids(adapter.methods, model))
    apply = tiny.hasty(peft.attach(adapter.methods, model).apply)
    for way in examples.of_both(np.asarray(apply(variables, batch))):
        np.testing.assert_allclose(way, LOGITS[name], atol=1e-5)
    if all(method.merge for method in adapter.methods if method.hook):
        merged = peft.merge(adapter.methods, variables["params"], variables)
        logits = examples.of_both(tiny.plain(model.module, merged, batch))[0]
        np.testing.assert_allclose(logits, LOGITS[name], atol=1e-5)
