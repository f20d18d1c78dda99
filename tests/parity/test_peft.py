"""Adapters both ways against Hugging Face PEFT 0.21.2: the same modules, scales and logits."""

import logging
import warnings

import examples
import hugging
import jax
import numpy as np
import peft as hf
import pytest
import scipy.stats
import torch
import transformers
from trained import LABELS, Trained

from bmft import models, names, peft, tree
from bmft.models import weights
from bmft.peft import files, matching

LENGTHS = (19, 3, 8, 14)
# Our module -> theirs
THEIRS = {
    "bert": {
        "query": "query",
        "value": "value",
        "up": "intermediate.dense",
        "down": "output.dense",
    },
    "distilbert": {"query": "q_lin", "value": "v_lin", "up": "lin1", "down": "lin2"},
}
THEIRS["roberta"] = THEIRS["bert"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """{family: (folder, our model, our params, apply(params, batch) compiled once)}"""
    found = {}
    for family in hugging.FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        hugging.random_model(hugging.CONFIGS[family]).save_pretrained(folder)
        model = models.find(str(folder), outputs=5)
        params = weights.load(model, jax.random.key(0)).params
        apply = jax.jit(lambda p, b, model=model: model.module.apply({"params": p}, b))
        found[family] = folder, model, params, apply
    return found


def base_of(folder, **arguments):
    """transformers' model in a folder."""
    auto = transformers.AutoModelForSequenceClassification
    return auto.from_pretrained(folder, **arguments).eval()


def batches(model):
    """(transformers' batch, ours with all in one row)"""
    chosen = examples.tokens(LENGTHS, 53, model.config.types)
    return examples.padded(chosen, model.config.pad_id), examples.packed(chosen)


def loaded_by_peft(base, folder):
    """PEFT's model of an adapter directory; no warning that it did not fit."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("error", RuntimeWarning)
        return hf.PeftModel.from_pretrained(base, folder).eval()


def lora_layers(model):
    """{module name: (rank, scale)} of a PEFT model."""
    return {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in model.named_modules()
        if isinstance(module, hf.tuners.lora.LoraLayer)
    }


def our_layers(methods, model):
    """{module name in transformers: (rank, scale)} of our LoRA."""
    found, constants = {}, tree.flatten(peft.constants(methods)["peft_const"])
    for path, mask in methods[0].files.sites.items():
        scale = np.asarray(constants[f"{path}/lora_scale"])
        for layer in matching.layers(mask):
            mine = scale[matching.at(layer)]
            found[model.names.called(path, layer)[1]] = (mine > 0).sum(), mine[0]
    return found


def same_layers(ours, theirs):
    assert set(ours) == set(theirs)
    for name, (rank, scale) in ours.items():
        assert rank == theirs[name][0], name
        assert scale == pytest.approx(theirs[name][1]), name


# --- ours, read by PEFT ----------------------------------------------------------------------

OURS = {
    "plain": {"rank": 3, "alpha": 7.0, "dropout": 0.1},
    "all-linear": {"rank": 3, "alpha": 7.0, "rslora": True, "targets": ("all-linear",)},
    "patterns": {
        "rank": 3,
        "alpha": 7.0,
        "rslora": True,
        "targets": ("query", "up", "down"),
        "rank_pattern": ("layers.[01].*up=5", "layers.2.attention.query=2", "down=4"),
        "alpha_pattern": ("layers.1.*=11", "query=2"),
    },
    "some layers": {
        "rank": 2,
        "alpha": 5.0,
        "targets": ("query", "down"),
        "layers_to_transform": (0, 2),
        "bias": "lora_only",
    },
    "layers by module": {
        "rank": 2,
        "alpha": 5.0,
        "targets": ("re:layers.[01].attention.query", "layer.2.attention", "up"),
        "bias": "all",
    },
    "saved": {
        "rank": 2,
        "alpha": 5.0,
        "targets": ("value", "up"),
        "bias": "all",
        "modules_to_save": ("layers.1", "embeddings.norm"),
    },
}


@pytest.mark.parametrize("family", hugging.FAMILIES)
@pytest.mark.parametrize("variant", OURS)
def test_ours_read_by_peft(bases, tmp_path, family, variant):
    folder, model, params, _ = bases[family]
    group = dict(OURS[variant])
    if variant == "layers by module":
        part = {"distilbert": "layer.2.attention.v_lin"}.get(family, "layer.2.attention.self.value")
        group["targets"] = (group["targets"][0], part, group["targets"][2])
    trained = Trained(model, params, {"lora": group}, size=0.1)
    trained.write(tmp_path)
    theirs = loaded_by_peft(base_of(folder), tmp_path)
    same_layers(our_layers(trained.methods, model), lora_layers(theirs))
    batch, packed = batches(model)
    ours = jax.jit(peft.attach(trained.methods, model).apply)(trained.variables, packed)[0]
    assert np.abs(ours - hugging.logits(base_of(folder), batch)).max() > 0.1
    np.testing.assert_allclose(hugging.logits(theirs, batch), ours, atol=1e-5)


@pytest.mark.parametrize("family", hugging.FAMILIES)
def test_merges_agree(bases, tmp_path, family):
    folder, model, params, _ = bases[family]
    trained = Trained(model, params, {"lora": OURS["patterns"]})
    trained.write(tmp_path)
    theirs = loaded_by_peft(base_of(folder), tmp_path).merge_and_unload().state_dict()
    added = {name: trained.variables[name] for name in ("peft", "peft_const")}
    merged = tree.flatten(peft.merge(trained.methods, trained.variables["params"], added))
    for leaf in model.names.leaves:
        for layer in model.names.layers_of(leaf.path):
            tensor = theirs[model.names.full(leaf).format(layer)].numpy()
            ours = merged[leaf.path][() if layer is None else layer]
            want = names.from_file(leaf.layout, tensor)
            np.testing.assert_allclose(ours, want, atol=1e-6)


def test_a_new_pooler_travels(bases, tmp_path):
    """What no base file had is in the adapter: PEFT then computes the same from the same base."""
    folder, model, params, _ = bases["bert"]
    trained = Trained(model, params, {"lora": {"rank": 2}}, fresh=("pooler/kernel", "pooler/bias"))
    trained.write(tmp_path)
    theirs = loaded_by_peft(base_of(folder), tmp_path)
    batch, packed = batches(model)
    ours = jax.jit(peft.attach(trained.methods, model).apply)(trained.variables, packed)[0]
    np.testing.assert_allclose(hugging.logits(theirs, batch), ours, atol=1e-5)


# --- PEFT's, read by us ----------------------------------------------------------------------

PEFTS = {
    "plain": {"r": 3, "lora_alpha": 7, "lora_dropout": 0.1, "target_modules": ["query", "value"]},
    "gaussian rslora": {
        "r": 4,
        "lora_alpha": 7,
        "use_rslora": True,
        "init_lora_weights": "gaussian",
        "target_modules": ["up"],
    },
    "patterns": {
        "r": 3,
        "lora_alpha": 7,
        "use_rslora": True,
        "target_modules": ["query", "down", "up"],
        "rank_pattern": {"layer.1.*": 5, "layer.2.*": 4, "query": 2},  # sorted, as the file is
        "alpha_pattern": {".*[02].*": 11, "up": 3},
    },
    "some layers": {
        "r": 2,
        "lora_alpha": 5,
        "target_modules": ["query", "down"],
        "layers_to_transform": [0, 2],
        "layers_pattern": "layer",
        "bias": "lora_only",
    },
    "excluded": {
        "r": 2,
        "lora_alpha": 5,
        "target_modules": ["value", "up"],
        "exclude_modules": r".*layer\.1\..*",
        "bias": "all",
    },
    "expression": {
        "r": 2,
        "lora_alpha": 5,
        "target_modules": r".*\.[12]\..*(lin|query|value|dense)",
    },
    "saved": {
        "r": 2,
        "lora_alpha": 5,
        "target_modules": ["query"],
        "modules_to_save": ["LayerNorm", "layer_norm", "down"],
        "bias": "all",
    },
}
# PEFT turns DistilBERT's pre_classifier into LoRA and then into a whole module: it cannot save it.
ALL_LINEAR = {"r": 3, "lora_alpha": 7, "target_modules": "all-linear"}
CASES = [(family, variant) for variant in PEFTS for family in hugging.FAMILIES]
CASES += [("bert", "all-linear"), ("roberta", "all-linear")]


def settings_for(family, variant):
    settings = dict((PEFTS | {"all-linear": ALL_LINEAR})[variant])
    for field in ("target_modules", "modules_to_save"):
        if isinstance(settings.get(field), list):
            settings[field] = [THEIRS[family].get(name, name) for name in settings[field]]
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = settings.get(field, {})
        settings[field] = {THEIRS[family].get(key, key): value for key, value in patterns.items()}
    return settings


def trained_by_peft(base, settings, batch, outputs=5):
    config = hf.LoraConfig(task_type="SEQ_CLS", **settings)
    return hugging.trained_by_peft(base, config, batch, outputs)


@pytest.mark.parametrize("family, variant", CASES)
def test_pefts_read_by_us(bases, tmp_path, family, variant):
    folder, model, params, apply = bases[family]
    batch, packed = batches(model)
    theirs = trained_by_peft(base_of(folder), settings_for(family, variant), batch)
    theirs.save_pretrained(tmp_path)
    want = hugging.logits(theirs, batch)
    assert np.abs(want - hugging.logits(base_of(folder), batch)).max() > 0.1
    adapter = files.read(tmp_path, model)
    same_layers(our_layers(adapter.methods, model), lora_layers(theirs))
    variables = files.insert(adapter, {"params": params})
    added = {name: variables[name] for name in ("peft", "peft_const")}
    merged = peft.merge(adapter.methods, variables["params"], added)
    np.testing.assert_allclose(apply(merged, packed)[0], want, atol=1e-5)
    # ... and written again, PEFT reads it.
    moving, frozen = tree.split(variables, lambda path: path in adapter.leaves)
    files.write(
        tmp_path / "again",
        adapter.methods,
        adapter.groups,
        model,
        moving,
        frozen,
        base="tiny",
        fingerprint="",
    )
    again = loaded_by_peft(base_of(folder), tmp_path / "again")
    np.testing.assert_allclose(hugging.logits(again, batch), want, atol=1e-6)


def test_what_peft_itself_cannot_run(bases):
    """all-linear on DistilBERT, which ours runs: listed here, to be noticed when PEFT can, too."""
    folder, model, _, _ = bases["distilbert"]
    with pytest.raises(TypeError, match="modules_to_save cannot be applied to .*lora"):
        trained_by_peft(base_of(folder), ALL_LINEAR, batches(model)[0])


@pytest.mark.parametrize(
    "settings, error",
    [
        ({"target_modules": ["word_embeddings"]}, TypeError),
        ({"target_modules": ["query"], "modules_to_save": ["word_embeddings"]}, ValueError),
    ],
)
def test_rows_of_an_embedding_that_is_trained_otherwise(bases, settings, error):
    """trainable_token_indices of it: PEFT cannot, and ours says so."""
    folder, model, _, _ = bases["bert"]
    settings = settings | {"trainable_token_indices": [3]}
    with pytest.raises(error, match="trainable_token_indices cannot be|wraps an unknown layer"):
        trained_by_peft(base_of(folder), settings, batches(model)[0])


def test_minilm(tmp_path):
    model = models.find("minilm", outputs=3)
    read = weights.load(model, jax.random.key(0))
    texts = ["so long, and thanks for all the fish!", "no", "Ünïcödé 12,345 " * 9]
    told = models.tokenizer(model)(texts)
    chosen = list(zip(told["input_ids"], told["token_type_ids"], strict=True))
    batch, packed = examples.padded(chosen), examples.packed(chosen)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    base = base_of(model.folder, num_labels=3)
    settings = {"r": 8, "lora_alpha": 16, "target_modules": ["query", "value"]}
    theirs = trained_by_peft(base, settings, batch, outputs=3)
    theirs.save_pretrained(tmp_path)
    adapter = files.read(tmp_path, model)
    variables = files.insert(adapter, read.variables(), read.fresh)
    apply = jax.jit(peft.attach(adapter.methods, model).apply)
    want = hugging.logits(theirs, batch)
    assert np.abs(want).max() > 0.1
    np.testing.assert_allclose(apply(variables, packed)[0], want, atol=1e-4)
    # and ours, read by PEFT
    group = {"rank": 8, "alpha": 16.0}
    trained = Trained(model, read.params, {"lora": group}, fresh=read.fresh, size=0.05)
    trained.write(tmp_path / "ours", labels=LABELS[:3])
    again = loaded_by_peft(base_of(model.folder, num_labels=3), tmp_path / "ours")
    ours = apply(trained.variables, packed)[0]
    np.testing.assert_allclose(hugging.logits(again, batch), ours, atol=1e-4)


def test_starts_are_drawn_alike(bases):
    """A uniform within ±1/sqrt(in), as PEFT's; B zero."""
    folder, model, params, _ = bases["bert"]
    config = {"r": 64, "target_modules": ["query", "intermediate.dense"]}
    torch.manual_seed(0)
    theirs = hf.get_peft_model(base_of(folder), hf.LoraConfig(task_type="SEQ_CLS", **config))
    methods = peft.build(model, ("lora",), {"lora": {"rank": 64, "targets": ("query", "up")}})
    added = jax.jit(peft.attach(methods, model).add)(jax.random.key(0), {"params": params})["peft"]
    for path, name in (("attention/query", ".self.query."), ("mlp/up", ".intermediate.dense.")):
        leaves = tree.flatten(added["layers"])
        ours = np.ravel(leaves[f"{path}/lora_a"])
        drawn = [
            weight.detach().numpy().ravel()
            for key, weight in theirs.named_parameters()
            if "lora_A" in key and name in key
        ]
        assert scipy.stats.ks_2samp(ours, np.concatenate(drawn)).pvalue > 1e-3
        bound = leaves[f"{path}/lora_a"].shape[1] ** -0.5
        assert 0.99 * bound < np.abs(ours).max() <= bound
        assert not np.any(leaves[f"{path}/lora_b"])
