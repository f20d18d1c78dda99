"""AdapterHub's directories: our logits of adapters that its package trained are the stored ones
(tests/goldens/make_adapterhub.py), what we write is what it writes, the rest is refused."""

import json
import pathlib
import shutil

import examples
import jax
import numpy as np
import pytest
import tiny
from damage import remove, rewrite
from safetensors.numpy import load_file, save_file
from trained import LABELS, Trained

from bmft import adapters, models, peft, predict, tree
from bmft.errors import Mistake, command
from bmft.models import weights
from bmft.peft import adapterhub, files

GOLDENS = pathlib.Path(__file__).resolve().parent / "goldens"
LOGITS = dict(np.load(GOLDENS / "adapterhub.npz"))
FAMILIES = ("bert", "roberta", "distilbert", "xlm-roberta")
OUTPUTS, LENGTHS, VOCABULARY = 5, (13, 5, 9, 2), 50
NAMES = ("adapter_config.json", "adapter.safetensors", "head_config.json", "model_head.safetensors")
SETTINGS, TENSORS, HEAD_SETTINGS, HEAD = NAMES


@pytest.fixture(scope="module")
def loaded():
    """{family: (model, variables of the base)}"""
    found = {}
    for family in FAMILIES:
        model = models.find(str(GOLDENS / family), outputs=OUTPUTS)
        found[family] = model, weights.load(model, jax.random.key(0)).variables()
    return found


def family_of(name):
    return name.rpartition("-")[0]


def golden(name):
    return GOLDENS / "adapterhub" / name


def equal(one, other):
    assert set(one) == set(other)
    for path, leaf in one.items():
        np.testing.assert_array_equal(leaf, other[path], err_msg=path)


def rewritten(adapter, model, folder, **told):
    """A read adapter, written again and read again."""
    told = {"base": "base", "fingerprint": "f" * 64} | told
    adapterhub.write(folder, adapter, model, **told)
    return files.read(folder, model, fingerprint="f" * 64)


# --- what the package trained ----------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(LOGITS))
def test_adapters_of_adapterhub(loaded, tmp_path, name):
    """The logits, packed and one a row; and the files again, by us."""
    model, base = loaded[family_of(name)]
    adapter = files.read(golden(name), model)
    variables = files.insert(adapter, base)
    batch = examples.both(examples.tokens(LENGTHS, VOCABULARY, model.config.types))
    logits = tiny.hasty(peft.attach(adapter.methods, model).apply)(variables, batch)
    for way in examples.of_both(np.asarray(logits)):
        np.testing.assert_allclose(way, LOGITS[name], atol=1e-5)
    again = rewritten(adapter, model, tmp_path, base=str(GOLDENS / model.name), name="golden")
    assert (again.names, again.groups, again.labels) == (
        ("adapter",),
        adapter.groups,
        adapter.labels,
    )
    equal(again.leaves, adapter.leaves)


def of_both(name, folder, file):
    """(theirs, ours) of a file in a golden directory and in a folder."""
    read = load_file if file.endswith("safetensors") else lambda file: json.loads(file.read_text())
    return read(golden(name) / file), read(folder / file)


@pytest.mark.parametrize("name", sorted(LOGITS))
def test_what_is_written_is_what_the_package_writes(loaded, tmp_path, name):
    model = loaded[family_of(name)][0]
    adapter = files.read(golden(name), model)
    rewritten(adapter, model, tmp_path, base=f"tests/goldens/{model.folder.name}", name="golden")
    equal(*of_both(name, tmp_path, TENSORS))
    theirs, ours = of_both(name, tmp_path, SETTINGS)
    assert set(ours) == set(theirs) and set(ours["config"]) == set(theirs["config"])
    assert {field for field in ours if ours[field] != theirs[field]} <= {"config", "model_class"}
    # What does not matter, or is spelt otherwise: layers of one size by layer, capital letters.
    spelt = {"dropout", "reduction_factor", "non_linearity"}
    theirs, ours = theirs["config"], ours["config"]
    assert {field for field in ours if ours[field] != theirs[field]} <= spelt
    theirs, ours = of_both(name, tmp_path, HEAD_SETTINGS)
    if theirs["model_class"] == ours["model_class"]:  # a head may be said in two ways
        assert ours == theirs
        equal(*of_both(name, tmp_path, HEAD))
    else:
        assert theirs["model_class"].endswith("AdapterModel") and name != "bert-seq_bn"


def test_the_card_and_the_command_show_it(capsys):
    for name, labels in (("bert-seq_bn", "class {}"), ("roberta-par_bn", "LABEL_{}")):
        card = files.card(golden(name))
        assert card.labels == tuple(labels.format(i) for i in range(OUTPUTS))
        assert (card.outputs, card.fingerprint, card.peft_type) == (OUTPUTS, None, adapterhub.NAME)
        assert card.base == f"tests/goldens/{family_of(name)}"
    assert command(adapters.main, ["show", str(golden("bert-seq_bn"))]) == 0
    out = capsys.readouterr().out
    assert "heads.golden.4" in out and "bert.encoder.layer.{}.output.adapters.golden" in out


# --- what we write ---------------------------------------------------------------------------

GROUPS = {
    "bert": {"kind": "houlsby", "norms": False, "leave_out": (0,), "nonlinearity": "swish"},
    "roberta": {"kind": "pfeiffer", "reduction": 5, "scaling": 0.5},
    "distilbert": {"kind": "parallel", "leave_out": (0, 2), "init": None},
    "xlm-roberta": {"kind": "parallel", "reduction": 3},
}


def trained(model, base, groups, fresh=(), labels=LABELS):
    """A `files.Adapter` whose leaves are random, and all variables."""
    made = Trained(model, base["params"], groups, fresh)
    flat = tree.flatten(made.moving)
    return files.Adapter(
        made.methods, tuple(groups), groups, flat, {}, labels, None, {}
    ), made.variables


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_is_read(loaded, tmp_path, family):
    model, base = loaded[family]
    for fresh in ((), ("pooler/kernel", "pooler/bias")) if family == "bert" else ((),):
        for labels in (LABELS, None):
            given, variables = trained(model, base, {"adapter": GROUPS[family]}, fresh, labels)
            shutil.rmtree(tmp_path)
            again = rewritten(given, model, tmp_path)
            assert again.labels == files.card(tmp_path).labels == labels
            equal(again.leaves, given.leaves)
            inserted = tree.flatten(files.insert(again, base, fresh))
            equal(inserted, tree.flatten(variables))
    with pytest.raises(Mistake, match="was trained on another base"):
        files.read(tmp_path, model, fingerprint="a" * 64)


def test_layers_left_out_are_the_base(loaded):
    """With all but one layer left out, and that one's adapter at zero, the model is the base."""
    model, base = loaded["bert"]
    adapter, variables = trained(model, base, {"adapter": {"kind": "houlsby", "leave_out": (0, 2)}})
    apply = jax.jit(peft.attach(adapter.methods, model).apply, static_argnames="adapter")
    flat = tree.flatten(variables) | tree.flatten({"params": base["params"]})
    for path, leaf in flat.items():
        if path.startswith("peft/"):
            flat[path] = np.asarray([np.ones_like(leaf[0]), 0 * leaf[1], np.ones_like(leaf[2])])
    batch = examples.packed(examples.tokens(LENGTHS, VOCABULARY, model.config.types))
    found, want = (apply(tree.unflatten(flat), batch, adapter=a) for a in (True, False))
    np.testing.assert_array_equal(found, want)
    for left_out, says in (((3,), "no layer 3; there are 0 to 2"), ((0, 1, 2), "no layer is left")):
        with pytest.raises(Mistake, match=says):
            peft.build(model, ("adapter",), {"adapter": {"leave_out": left_out}})


def test_convert_there_and_back(loaded, capsys, tmp_path):
    """The command, and what a directory of AdapterHub's predicts, and one of ours."""
    source, base = golden("distilbert-par_bn"), str(tmp_path / "base")
    tiny.tokenizer(shutil.copytree(GOLDENS / "distilbert", base))
    there, back = str(tmp_path / "there"), str(tmp_path / "back")
    for to, one, other in (("bmft", source, there), ("adapterhub", there, back)):
        argv = ["convert", "--to", to, "--adapter", str(one), "--base", base, "--output", other]
        assert command(adapters.main, argv) == 0
        assert "differ by 0.0e+00" in capsys.readouterr().out
    assert files.card(there).peft_type == "BMFT_ADAPTER"
    renamed = load_file(source / TENSORS)
    renamed = {key.replace(".golden.", ".bmft."): leaf for key, leaf in renamed.items()}
    equal(load_file(f"{back}/{TENSORS}"), renamed)
    model = loaded["distilbert"][0]
    assert files.read(there, model).groups == files.read(source, model).groups
    for argv in (["--to", "adapterhub", "--rank", "2"], [], ["--to", "peft"]):
        full = ["convert", *argv, "--adapter", str(source), "--output", str(tmp_path / "x")]
        assert command(adapters.main, full) == 2
        assert capsys.readouterr().err.count("\n") == 1
    answers = [predict.load(one, base=base).predict(["good w1", "bad"]) for one in (source, back)]
    assert answers[0] == answers[1] and answers[0][0]["label"].startswith("LABEL_")


NO_PLACE = [
    ({"adapter": {}}, "no place for params/embeddings/norm/bias, which moved; peft.adapter.norms"),
    ({"lora": {}}, "of the method adapter alone, not of lora"),
    ({"adapter": {"norms": False}, "bitfit": {}}, "alone, not of adapter \\+ bitfit"),
]


def test_what_adapterhub_has_no_place_for(loaded, tmp_path):
    model, base = loaded["bert"]
    about = {"base": "base", "fingerprint": "f" * 64}
    for groups, says in NO_PLACE:
        adapter, _ = trained(model, base, groups)
        with pytest.raises(Mistake, match=says):
            adapterhub.write(tmp_path / "out", adapter, model, **about)
    adapter, _ = trained(model, base, {"adapter": {"norms": False}})
    camembert = model._replace(json=model.json | {"model_type": "camembert"})
    for given, changes, says in (
        (camembert, {}, "adapters of camembert"),
        (model, {"labels": ("a",) * 5}, "labels of one name"),
    ):
        with pytest.raises(Mistake, match=says):
            adapterhub.write(tmp_path / "out", adapter._replace(**changes), given, **about)
    with pytest.raises(Mistake, match="a text without dots"):
        adapterhub.write(tmp_path / "out", adapter, model, **about, name="a.b")
    assert not (tmp_path / "out").exists()


# --- what is refused -------------------------------------------------------------------------


def config(file=SETTINGS, **fields):
    """Fields of `config` with other values."""

    def mutate(folder):
        path = folder / file
        told = json.loads(path.read_text())
        told["config"] = told["config"] | fields
        path.write_text(json.dumps(told))

    return mutate


def top(file, **fields):
    def mutate(folder):
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return mutate


def edit(file, make):
    def mutate(folder):
        tensors = load_file(folder / file)
        make(tensors)
        save_file(tensors, folder / file)

    return mutate


def pickled(file, name):
    return lambda folder: (folder / file).rename(folder / name)


def poison(tensors):
    tensors[min(tensors)][0] = np.nan


def shorten(tensors):
    key = min(tensors)
    tensors[key] = np.ascontiguousarray(tensors[key][:-1])


def more(tensors):
    tensors["more"] = np.ones(3, np.float32)


def headless(folder):
    remove(HEAD_SETTINGS)(folder)


REFUSED = [
    (remove(TENSORS), "no adapter.safetensors"),
    (pickled(TENSORS, "pytorch_adapter.bin"), "pytorch_adapter.bin is a pickle, which is refused"),
    (rewrite(TENSORS, b"\x80\x02}q\x00."), "adapter.safetensors: "),
    (edit(TENSORS, lambda tensors: tensors.pop(min(tensors))), "no tensor 'bert.encoder.layer.0"),
    (edit(TENSORS, more), "tensor 'more' has no place"),
    (edit(TENSORS, shorten), "has shape [2], the model needs [3]"),
    (edit(TENSORS, poison), "has numbers that are not finite"),
    (top(SETTINGS, model_type="roberta"), 'model_type is "roberta"; '),
    (top(SETTINGS, hidden_size=768), "hidden_size is 768; "),
    (top(SETTINGS, name=None), "name is null; needs a text"),
    (top(SETTINGS, name="other"), "no tensor 'bert.encoder.layer.0.output.adapters.other."),
    (top(SETTINGS, config={"architecture": "lora", "r": 8}), 'architecture is "lora"; only bottle'),
    (top(SETTINGS, config={}), "config.mh_adapter is null; needs true or false"),
    (config(mh_adapter=True), "config.mh_adapter is true; with such is_parallel and"),
    (config(output_adapter=False), "config.output_adapter is false; "),
    (config(original_ln_before=False), "config.mh_adapter is false; "),
    (config(residual_before_ln="post_add"), 'config.residual_before_ln is "post_add"; '),
    (config(residual_before_ln=False), "config.residual_before_ln is false; "),
    (config(original_ln_after=False), "config.original_ln_after is false; only true"),
    (config(ln_before=True), "config.ln_before is true; only false"),
    (config(ln_after=True), "config.ln_after is true; only false"),
    (config(use_gating=True), "config.use_gating is true; only false"),
    (config(phm_layer=True), "config.phm_layer is true; only false"),
    (config(inv_adapter="nice"), 'config.inv_adapter is "nice"; only null'),
    (config(invertible_adapter={"block_type": "nice"}), "config.invertible_adapter is {"),
    (config(of_next_year=3), "config.of_next_year is 3; which is not known"),
    (config(scaling="learned"), 'config.scaling is "learned"; needs a number'),
    (config(scaling=10**400), "; it must be finite"),
    (config(non_linearity="leakyrelu"), 'config.non_linearity is "leakyrelu"; '),
    (config(non_linearity=None), "config.non_linearity is null; needs a text"),
    (config(init_weights="xavier"), 'config.init_weights is "xavier"; '),
    (config(leave_out=[True]), "config.leave_out is [true]; needs a list of layers"),
    (config(leave_out=[7]), "peft.adapter.leave_out: no layer 7"),
    (config(leave_out=[0, 1, 2]), "peft.adapter.leave_out: no layer is left"),
    (config(leave_out=[1]), "output.adapters.golden.adapter_down.0.bias' has no place"),
    (config(reduction_factor=0.5), "config.reduction_factor is 0.5; needs a number of 1 or more"),
    (config(reduction_factor={"1": 8}), "config.reduction_factor is {"),
    (config(reduction_factor={"1": 2, "default": 8}), "only adapters of one size"),
    (config(reduction_factor=2.5), "no whole number leaves 9 of 24"),
    (config(reduction_factor=10**400), "has shape [3, 24], the model needs [1, 24]"),
    (headless, "no head_config.json beside the tensors of a head"),
    (remove(HEAD), "no model_head.safetensors"),
    (pickled(HEAD, "pytorch_model_head.bin"), "pytorch_model_head.bin is a pickle, which is"),
    (rewrite(HEAD_SETTINGS, b"[1"), "head_config.json: not JSON"),
    (rewrite(HEAD_SETTINGS, b"[1]"), "head_config.json: no fields of a head"),
    (edit(HEAD, lambda tensors: tensors.pop(max(tensors))), "model_head.safetensors: no tensor"),
    (edit(HEAD, more), "model_head.safetensors: tensor 'more' has no place"),
    (edit(HEAD, shorten), "model_head.safetensors: tensor 'heads.golden.1.bias' has shape [23]"),
    (edit(HEAD, poison), "model_head.safetensors: tensor 'heads.golden.1.bias' has numbers that"),
    (top(HEAD_SETTINGS, model_class="BertForTokenClassification"), "model_class is "),
    (top(HEAD_SETTINGS, hidden_size=12), "head_config.json: hidden_size is 12"),
    (top(HEAD_SETTINGS, config=None), "BertAdapterModel are known here"),
    (config(HEAD_SETTINGS, head_type="tagging"), 'config.head_type is "tagging"'),
    (config(HEAD_SETTINGS, bias=False), "config.bias is false"),
    (config(HEAD_SETTINGS, layer_norm=True), "config.layer_norm is true"),
    (config(HEAD_SETTINGS, layers=3), "is another function than the head of "),
    (
        config(HEAD_SETTINGS, layers=1),
        "layers 1, activation_function null, use_pooler false is",
    ),
    (config(HEAD_SETTINGS, use_pooler=True), "use_pooler true is another function than the head"),
    (config(HEAD_SETTINGS, activation_function="relu"), 'activation_function "relu", use_pooler'),
    (config(HEAD_SETTINGS, label2id={"a": 0, "b": 2}), "label2id does not number labels"),
    (config(HEAD_SETTINGS, label2id={"a": 0, "b": 1}), "label2id has 2 labels for 5 outputs"),
]


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_refused(loaded, tmp_path, number):
    """In one line that names the file and what is wrong; looking at the card is nothing worse."""
    mutate, says = REFUSED[number]
    shutil.copytree(golden("bert-seq_bn"), tmp_path, dirs_exist_ok=True)
    mutate(tmp_path)
    with pytest.raises(Mistake) as refused:
        files.read(tmp_path, loaded["bert"][0])
    assert says in str(refused.value) and str(tmp_path) in str(refused.value)
    assert "\n" not in str(refused.value)
    try:
        files.card(tmp_path)
    except Mistake as mistake:
        assert str(tmp_path) in str(mistake) and "\n" not in str(mistake)


def test_what_says_the_same_is_read(loaded, tmp_path):
    """Fields of training alone, old names of activations, keys of a model without a head."""
    shutil.copytree(golden("bert-seq_bn"), tmp_path, dirs_exist_ok=True)
    model = loaded["bert"][0]
    want = files.read(tmp_path, model)
    of_training = {"dropout": 0.5, "cross_adapter": True, "stochastic_depth": 0.1, "phm_dim": 2}
    config(**of_training, init_weights_seed=3, reduction_factor=8.0)(tmp_path)

    def bare(tensors):
        for key in list(tensors):
            tensors[key.removeprefix("bert.")] = tensors.pop(key)

    edit(TENSORS, bare)(tmp_path)
    found = files.read(tmp_path, model)
    equal(found.leaves, want.leaves)
    assert found.groups["adapter"] == want.groups["adapter"] | {"reduction": 8}
    for old, new in (("gelu", "gelu_new"), ("gelu_orig", "gelu")):
        path = tmp_path / SETTINGS
        told = json.loads(path.read_text())
        told.pop("version", None)
        path.write_text(json.dumps(told))
        config(non_linearity=old)(tmp_path)
        assert files.read(tmp_path, model).groups["adapter"]["nonlinearity"] == new
    for name in (HEAD_SETTINGS, HEAD):
        remove(name)(tmp_path)
    assert files.card(tmp_path).outputs is None
    assert not any(path.startswith("params/") for path in files.read(tmp_path, model).leaves)
