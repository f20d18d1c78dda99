"""Our models against transformers (PyTorch, float32): files in, logits, merged models out."""

import json

import examples
import hugging
import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from trained import LABELS, Trained

from bmft import export, models, peft, tree
from bmft.models import weights

LENGTHS = (19, 3, 8, 14)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """{model_type: (transformers' model, its folder)}, made when asked for."""
    made = {}

    def get(model_type):
        if model_type not in made:
            theirs = hugging.random_model(hugging.CONFIGS[model_type])
            folder = tmp_path_factory.mktemp(model_type)
            theirs.save_pretrained(folder)
            made[model_type] = theirs, folder
        return made[model_type]

    return get


@pytest.fixture(scope="module")
def apply():
    """apply(model, params, batch) -> logits; compiled once a family."""
    compiled = {}

    def call(model, params, batch):
        key = model.config, model.module.dtype
        if key not in compiled:
            compiled[key] = jax.jit(lambda p, b: model.module.apply({"params": p}, b))
        return np.asarray(compiled[key](params, batch))

    return call


def read(folder, outputs=5, **expected):
    model = models.find(str(folder), outputs=outputs)
    loaded = weights.load(model, jax.random.key(0))
    for field, want in expected.items():
        assert set(getattr(loaded, field)) == set(want), field
    return model, loaded.params


def batches(model):
    """(transformers' batch, ours packed and then an example a row)"""
    chosen = examples.tokens(LENGTHS, 53, model.config.types)
    return examples.padded(chosen, model.config.pad_id), examples.both(chosen)


def close(ours, want, atol=1e-5):
    for way in examples.of_both(np.asarray(ours)):
        np.testing.assert_allclose(way, want, atol=atol)


@pytest.mark.parametrize("model_type", hugging.CONFIGS)
def test_logits(saved, apply, model_type):
    theirs, folder = saved(model_type)
    model, params = read(folder, fresh=(), ignored=())
    batch, ours = batches(model)
    close(apply(model, params, ours), hugging.logits(theirs, batch))


@pytest.mark.parametrize("activation", ["gelu_new", "relu", "silu"])
def test_activations(tmp_path, apply, activation):
    config = transformers.BertConfig(**hugging.BERT | {"num_hidden_layers": 1})
    config.hidden_act = activation
    theirs = hugging.random_model(config)
    theirs.save_pretrained(tmp_path)
    model, params = read(tmp_path)
    batch, ours = batches(model)
    close(apply(model, params, ours), hugging.logits(theirs, batch))


@pytest.mark.parametrize("family", hugging.FAMILIES)
def test_shards(saved, tmp_path, family):
    theirs, folder = saved(family)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    same_leaves(read(tmp_path, fresh=(), ignored=())[1], read(folder)[1])


HEADS = {
    "bert": ("out",),
    "roberta": ("dense", "out"),
    "distilbert": ("dense", "out"),
}


def head(family):
    return [f"classifier/{name}/{leaf}" for name in HEADS[family] for leaf in ("kernel", "bias")]


@pytest.mark.parametrize("family", hugging.FAMILIES)
def test_the_encoder_alone(saved, tmp_path, family):
    """Its file has no prefix and no head, as minilm's."""
    theirs, folder = saved(family)
    theirs.base_model.save_pretrained(tmp_path)
    assert not any(key.startswith(family) for key in load_file(tmp_path / "model.safetensors"))
    model, params = read(tmp_path, fresh=head(family), ignored=())
    same_leaves(params, read(folder)[1], but=head(family))


def same_leaves(one, other, but=()):
    one, other = tree.flatten(one), tree.flatten(other)
    for path, leaf in one.items():
        if path not in but:
            np.testing.assert_array_equal(leaf, other[path], err_msg=path)


MASKED = {
    "bert": transformers.BertForMaskedLM,
    "roberta": transformers.RobertaForMaskedLM,
    "distilbert": transformers.DistilBertForMaskedLM,
}


@pytest.mark.parametrize("family", hugging.FAMILIES)
def test_masked_language_models(tmp_path, apply, family):
    """They have no pooler, and a head of another task, which is left."""
    config = hugging.CONFIGS[family]
    hugging.random_model(config, MASKED[family]).save_pretrained(tmp_path)
    pooler = ["pooler/kernel", "pooler/bias"] if family == "bert" else []
    model, params = read(tmp_path, fresh=head(family) + pooler)
    # With our new leaves, made large enough to matter, transformers computes the same.
    params["classifier"] = jax.tree.map(lambda leaf: 30 * leaf, params["classifier"])
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    theirs.load_state_dict(our_tensors(model, params, head(family) + pooler), strict=False)
    batch, ours = batches(model)
    close(apply(model, params, ours), hugging.logits(theirs, batch))


def our_tensors(model, params, paths):
    """{name in transformers: tensor} of leaves outside the stack."""
    found = {}
    for path in paths:
        leaf, array = model.names.leaf(path), np.array(tree.flatten(params)[path])
        found[model.names.full(leaf)] = torch.tensor(array.T if array.ndim == 2 else array)
    return found


@pytest.mark.parametrize(
    "kind",
    [
        transformers.BertForQuestionAnswering,
        transformers.BertForTokenClassification,
        transformers.BertForPreTraining,
        transformers.RobertaForTokenClassification,
        transformers.RobertaForQuestionAnswering,
        transformers.DistilBertForTokenClassification,
        transformers.DistilBertForQuestionAnswering,
    ],
)
def test_heads_of_other_tasks(tmp_path, kind):
    family = kind.config_class.model_type
    config = kind.config_class(**hugging.CONFIGS[family].to_dict() | {"id2label": {0: "A", 1: "B"}})
    hugging.random_model(config, kind).save_pretrained(tmp_path)
    _, params = read(tmp_path)
    assert params["classifier"]["out"]["kernel"].shape == (24, 5)


def test_a_file_in_bfloat16(saved, tmp_path, apply):
    theirs, _ = saved("bert")
    low = hugging.random_model(hugging.CONFIGS["bert"]).bfloat16()
    low.save_pretrained(tmp_path)
    model, params = read(tmp_path, fresh=(), ignored=())
    batch, ours = batches(model)
    want = hugging.logits(low.float(), batch)
    assert np.abs(want - hugging.logits(theirs, batch)).max() > 1e-3  # it was rounded
    close(apply(model, params, ours), want)


def test_old_names_of_norms(saved, tmp_path):
    """bert-base-uncased's file says gamma and beta, and keeps its position ids."""
    theirs, folder = saved("bert")
    tensors = load_file(folder / "model.safetensors")
    for key in list(tensors):
        new = key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("Norm.bias", "Norm.beta")
        tensors[new] = tensors.pop(key)
    tensors["bert.embeddings.position_ids"] = torch.arange(22)[None]
    theirs.config.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    _, params = read(tmp_path, fresh=(), ignored=["embeddings.position_ids"])
    same_leaves(params, read(folder)[1])


def test_minilm(apply):
    model = models.find("minilm", outputs=3)
    params = weights.load(model, jax.random.key(0)).params
    params["classifier"] = jax.tree.map(lambda leaf: 30 * leaf, params["classifier"])
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        model.folder, num_labels=3
    ).eval()
    theirs.load_state_dict(our_tensors(model, params, head("bert")), strict=False)
    texts = ["so long, and thanks for all the fish!", "no", "Ünïcödé 12,345 " * 9]
    told = models.tokenizer(model)(texts)
    chosen = list(zip(told["input_ids"], told["token_type_ids"], strict=True))
    want = hugging.logits(theirs, examples.padded(chosen))
    assert np.abs(want).max() > 0.1
    close(apply(model, params, examples.both(chosen)), want, atol=1e-4)


@pytest.mark.parametrize("family", hugging.FAMILIES)
@pytest.mark.parametrize(
    "groups",
    [
        {"lora": {"rank": 3, "alpha": 7.0, "targets": ("all-linear",), "bias": "all"}},
        {"lora": {"rank": 3, "layers_to_transform": (0, 2), "rslora": True}, "bitfit": {}},
        {"full": {}},
    ],
    ids="+".join,
)
def test_merged_models(saved, tmp_path, family, groups):
    theirs, folder = saved(family)
    model, params = read(folder)
    trained = Trained(model, params, groups, size=0.1)
    export.merged(
        tmp_path,
        load=lambda: params,
        merge=trained.merged,
        moving=trained.moving,
        names=model.names,
        settings=model.json,
        labels=LABELS,
    )
    auto = transformers.AutoModelForSequenceClassification
    merged, told = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(merged) is type(theirs)
    assert merged.dtype == torch.float32
    assert merged.config.id2label == dict(enumerate(LABELS))
    assert merged.config.label2id == {label: i for i, label in enumerate(LABELS)}
    assert merged.config.num_labels == len(LABELS)
    assert merged.config.problem_type == "single_label_classification"
    batch, ours = batches(model)
    want = hugging.logits(merged.eval(), batch)
    assert np.abs(want - hugging.logits(theirs, batch)).max() > 0.1
    close(jax.jit(peft.attach(trained.methods, model).apply)(trained.variables, ours), want)


def test_merged_regression(tmp_path):
    config = transformers.BertConfig(**hugging.BERT | {"num_labels": 1})
    hugging.random_model(config).save_pretrained(tmp_path / "base")
    model, params = read(tmp_path / "base", outputs=1)
    trained = Trained(model, params, {"linear_probe": {}})
    export.merged(
        tmp_path / "model",
        load=lambda: params,
        merge=trained.merged,
        moving=trained.moving,
        names=model.names,
        settings=model.json | {"torch_dtype": "bfloat16", "dtype": "bfloat16"},
        labels=None,
    )
    auto = transformers.AutoModelForSequenceClassification
    merged = auto.from_pretrained(tmp_path / "model")
    assert (merged.config.num_labels, merged.config.problem_type) == (1, "regression")
    assert merged.dtype == torch.float32
    weight = trained.variables["params"]["classifier"]["out"]["kernel"].T
    np.testing.assert_array_equal(merged.classifier.weight.detach().numpy(), weight)
    assert "torch_dtype" not in json.loads((tmp_path / "model" / "config.json").read_text())
