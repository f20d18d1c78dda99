"""Every method that Hugging Face PEFT 0.21.2 has, both ways: the same logits, of examples packed in
one row and one a row. What is tested of each stands in tests/cases/; the other families of a case
are tested by stored adapters (tests/test_catalogue.py)."""

import warnings

import cases
import examples
import hugging
import jax
import numpy as np
import peft as hf
import pytest
import transformers
from trained import Trained

from bmft import models, peft, tree
from bmft.models import weights
from bmft.peft import files

LENGTHS = (13, 3, 8, 10)
CATALOGUE = cases.catalogue()
EACH = [(name, case.families[0]) for name, (_, case) in CATALOGUE.items()]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """{family: (folder, our model, our variables)}"""
    found = {}
    for family in hugging.FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        hugging.random_model(hugging.CONFIGS[family]).save_pretrained(folder)
        model = models.find(str(folder), outputs=5)
        found[family] = folder, model, weights.load(model, jax.random.key(0)).variables()
    return found


def base_of(folder):
    auto = transformers.AutoModelForSequenceClassification
    return auto.from_pretrained(folder).eval()


def batches(model):
    """(transformers' batch, ours: all in one row, and one a row)"""
    chosen = examples.tokens(LENGTHS, 53, model.config.types)
    return examples.padded(chosen, model.config.pad_id), chosen


def outputs(methods, model, variables, chosen):
    """Our logits [n, outputs], packed and one a row."""
    apply = jax.jit(peft.attach(methods, model).apply)
    batch = examples.both(chosen, peft.virtual_ids(methods, model))
    return examples.of_both(np.asarray(apply(variables, batch)))


def loaded_by_peft(folder, base):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("error", RuntimeWarning)
        warnings.filterwarnings("ignore", "Unsupported layer type .*LayerNorm")
        return hf.PeftModel.from_pretrained(base, folder).eval()


@pytest.mark.parametrize("name, family", EACH)
def test_pefts_read_by_us(bases, tmp_path, name, family):
    folder, model, base = bases[family]
    method, case = CATALOGUE[name]
    batch, chosen = batches(model)
    settings = cases.for_family(case.settings, family)
    config = getattr(hf, case.config)(task_type="SEQ_CLS", **settings)
    theirs = hugging.trained_by_peft(base_of(folder), config, batch)
    theirs.save_pretrained(tmp_path / "theirs")
    want = hugging.logits(theirs, batch)
    assert np.abs(want - hugging.logits(base_of(folder), batch)).max() > 0.1
    adapter = files.read(tmp_path / "theirs", model)
    assert adapter.names == (method,)
    variables = files.insert(adapter, base)
    for ours in outputs(adapter.methods, model, variables, chosen):
        np.testing.assert_allclose(ours, want, atol=case.tolerance)
    # ... and written again, PEFT reads it.
    moving, frozen = tree.split(variables, lambda path: path in adapter.leaves)
    told = {"base": "tiny", "fingerprint": ""}
    again = adapter.methods, adapter.groups, model, moving, frozen
    files.write(tmp_path / "again", *again, **told)
    again = loaded_by_peft(tmp_path / "again", base_of(folder))
    np.testing.assert_allclose(hugging.logits(again, batch), want, atol=case.tolerance)


@pytest.mark.parametrize("name, family", EACH)
def test_ours_read_by_peft(bases, tmp_path, name, family):
    folder, model, base = bases[family]
    method, case = CATALOGUE[name]
    trained = Trained(model, base["params"], {method: case.group}, size=0.1)
    trained.write(tmp_path)
    batch, chosen = batches(model)
    theirs = hugging.logits(loaded_by_peft(tmp_path, base_of(folder)), batch)
    assert np.abs(theirs - hugging.logits(base_of(folder), batch)).max() > 0.1
    for ours in outputs(trained.methods, model, trained.variables, chosen):
        np.testing.assert_allclose(ours, theirs, atol=case.tolerance)
