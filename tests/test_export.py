"""Adapter directories and merged models: what is written is read, and nothing wrong is.

What peft and transformers make of the same files: tests/test_goldens.py and tests/parity.
"""

import json

import cases
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from damage import change, is_refused, keep, pickled, remove, rename, retensor, rewrite
from safetensors import safe_open
from safetensors.numpy import load_file
from trained import LABELS, Trained

from bmft import export, models, peft, tree
from bmft.errors import Mistake
from bmft.models import weights
from bmft.peft import files, matching

PATTERNS = {
    "rank": 3,
    "alpha": 7.0,
    "rslora": True,
    "targets": ("all-linear",),
    "rank_pattern": ("layer.[01].*query=5", "layers.2.mlp.up=2"),
    "alpha_pattern": ("query=9", "layer.2.attention.self.value=0.5"),
}
PARTS = {
    "rank": 2,
    "alpha": 5.0,
    "targets": ("query", "mlp.down"),
    "bias": "lora_only",
    "layers_to_transform": (0, 2),
    "modules_to_save": ("LayerNorm", "layer.1"),
}
BIASES = {
    "targets": ("attention.output", "re:layers.1.mlp.up"),
    "bias": "all",
    "modules_to_save": ("pooler", "layers.2.mlp.down"),
}
SETTINGS = cases.settings() | {
    "lora": [{}, PATTERNS, PARTS, BIASES],
    "adapter": [
        {"kind": "houlsby", "reduction": 5},
        {"kind": "pfeiffer", "reduction": 5, "leave_out": (1,)},
        {"kind": "parallel", "reduction": 5},
    ],
    "bitfit": [{"variant": "query_intermediate"}],
    "ia3": [
        {},
        {
            "targets": ("re:layers.[01].attention.output", "key", "mlp.up", "pooler"),
            "feedforward": ("layers.1.attention.output", "mlp.up"),
            "modules_to_save": ("layers.2.attention",),
        },
    ],
    "norm_tuning": [{}, {"targets": ("layers.1.attention_norm", "embeddings.norm")}],
    "partial_tuning": [{"last": 2}],
}
# Those that PEFT has, too.
PEFTS = {name: layout.peft_type for name in peft.names() if (layout := files._layout(name))}
AS_LORA = ("lora_plus", "pissa")  # written as a LoRA: test_lora_family
NOT_ON_TEXT = ("conv_adapter", "visual_prompt")  # refused on BERT: test_conv_methods, test_vit
# A file holds what they compute: no ranks that a layer does not have, a prompt and no network.
AS_COMPUTED = ("loha", "lokr", "prefix_tuning", "p_tuning")
CASES = [
    *(
        ("bert", {name: group})
        for name in peft.names()
        if name not in (*NOT_ON_TEXT, *AS_LORA)
        for group in SETTINGS.get(name, [{}])
    ),
    ("roberta", {"lora": {"bias": "all", "targets": ("all-linear",)}}),
    ("distilbert", {"lora": {"bias": "lora_only", "layers_to_transform": (1,)}}),
    ("distilbert", {"lora": {"rank": 2, "learning_rate": 1e-3}, "bitfit": {}}),
    ("bert", {"lora": {}, "adapter": {"kind": "parallel"}, "linear_probe": {}}),
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """{family: (model, params)}"""
    found = {}
    for family in tiny.FAMILIES:
        folder = tiny.directory(tmp_path_factory.mktemp(family), family)
        model = models.find(str(folder), outputs=tiny.OUTPUTS)
        found[family] = model, weights.load(model, jax.random.key(0)).params
    return found


def same(one, other):
    one, other = tree.flatten(one), tree.flatten(other)
    assert set(one) == set(other)
    for path, leaf in one.items():
        np.testing.assert_array_equal(leaf, other[path], err_msg=path)


@pytest.mark.parametrize("case", range(len(CASES)))
def test_what_is_written_is_read(bases, tmp_path, case):
    family, groups = CASES[case]
    model, params = bases[family]
    trained = Trained(model, params, groups)
    trained.write(tmp_path)
    adapter = files.read(tmp_path, model, fingerprint="f" * 64)
    assert adapter.names == tuple(groups)
    assert adapter.labels == LABELS
    if set(groups) & set(AS_COMPUTED):
        variables = files.insert(adapter, {"params": params})
        trees = tree.split(variables, adapter.leaves.__contains__)
        about = {"base": "tiny", "fingerprint": "f" * 64}
        again = adapter.methods, adapter.groups, model, *trees
        files.write(tmp_path / "again", *again, **about)
        one, other = (files.tensors_of(folder)[0] for folder in (tmp_path, tmp_path / "again"))
        assert one.keys() == other.keys()
        for key, tensor in one.items():
            np.testing.assert_array_equal(tensor, other[key], err_msg=key)
        return
    same(files.insert(adapter, {"params": params}), trained.variables)
    card = files.card(tmp_path)
    assert (card.base, card.outputs, card.labels) == ("tiny", tiny.OUTPUTS, LABELS)
    own = "BMFT_" + "_".join(groups).upper()
    assert card.peft_type == (PEFTS.get(*groups, own) if len(groups) == 1 else own)
    # Written again from what was read, it is the same adapter.
    again = peft.build(model, adapter.names, adapter.groups)
    same(peft.constants(again), peft.constants(trained.methods))
    still = {path for path in tree.flatten(trained.frozen) if tree.under(path, peft.ADDED)}
    still -= set(tree.flatten(peft.constants(again)))
    assert set(adapter.leaves) == set(trained.claims) | still


def test_the_files_of_a_lora_adapter(bases, tmp_path):
    """What stands in them, in full."""
    model, params = bases["roberta"]
    group = {"rank": 2, "alpha": 5.0, "dropout": 0.1, "targets": ("key",), "bias": "lora_only"}
    Trained(model, params, {"lora": group}).write(tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    settings = {
        "alpha_pattern": {},
        "base_model_name_or_path": "tiny",
        "bias": "lora_only",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "lora_alpha": 5,
        "lora_dropout": 0.1,
        "modules_to_save": ["classifier"],
        "peft_type": "LORA",
        "r": 2,
        "rank_pattern": {},
        "target_modules": ["key"],
        "task_type": "SEQ_CLS",
        "use_dora": False,
        "use_rslora": False,
    }
    assert text == json.dumps(settings, indent=2) + "\n"  # sorted, as PEFT writes
    key = "base_model.model.roberta.encoder.layer.{}.attention.self.key."
    shapes = {key + "lora_A.weight": (2, 24), key + "lora_B.weight": (24, 2)}
    shapes[key + "base_layer.bias"] = (24,)
    wanted = {name.format(i): shape for name, shape in shapes.items() for i in range(3)}
    head = "base_model.model.classifier."
    wanted |= {f"{head}dense.weight": (24, 24), f"{head}dense.bias": (24,)}
    wanted |= {f"{head}out_proj.weight": (5, 24), f"{head}out_proj.bias": (5,)}
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {name: tensor.shape for name, tensor in tensors.items()} == wanted
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(np.float32)}
    with safe_open(tmp_path / "adapter_model.safetensors", framework="numpy") as file:
        about = {"format": "pt", "bmft_base_fingerprint": "f" * 64}
        assert file.metadata() == about | {"bmft_labels": json.dumps(LABELS)}


def test_the_files_of_several_methods(bases, tmp_path):
    groups = {"lora": {"rank": 2, "targets": ("key",), "learning_rate": 1.0}, "bitfit": {}}
    Trained(*bases["bert"], groups, fresh=("pooler/kernel",)).write(tmp_path, labels=None)
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == {
        "base_model_name_or_path": "tiny",
        "inference_mode": True,
        "task_type": "SEQ_CLS",
        "peft_type": "BMFT_LORA_BITFIT",
        "methods": ["lora", "bitfit"],
        "groups": {"lora": {"rank": 2, "targets": ["key"]}, "bitfit": {}},
        "fresh": ["pooler/kernel"],
    }
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors["peft/layers/attention/key/lora_a"].shape == (3, 24, 2)
    assert tensors["params/layers/mlp/up/bias"].shape == (3, 40)
    assert tensors["params/pooler/kernel"].shape == (24, 24)
    assert "params/pooler/bias" in tensors  # BitFit's
    assert files.read(tmp_path, bases["bert"][0]).labels is None


LAYER = "bert.encoder.layer.{}."
SPELLINGS = [
    ("bert", {}, {"target_modules": ["query", "value"], "layers_to_transform": None}),
    ("bert", {"targets": ("all-linear",)}, {"target_modules": ["dense", "key", "query", "value"]}),
    ("bert", {"targets": ("up",)}, {"target_modules": ["intermediate.dense"]}),
    ("bert", {"targets": ("pooler",)}, {"target_modules": ["pooler.dense"]}),
    (  # `output.dense` would also mean attention.output.dense
        "bert",
        {"targets": ("mlp.down",)},
        {"target_modules": [LAYER.format(i) + "output.dense" for i in range(3)]},
    ),
    (
        "bert",
        {
            "targets": ("re:layers.[12].attention.(query|key)", "mlp.up"),
            "layers_to_transform": (2,),
        },
        {"target_modules": ["intermediate.dense", "key", "query"], "layers_to_transform": [2]},
    ),
    (
        "bert",
        {"targets": ("layer.1.attention.self.query", "value")},
        {"target_modules": [LAYER.format(1) + "attention.self.query", "value"]},
    ),
    (  # layers_to_transform would cut the pooler off, were it not named whole
        "bert",
        {"targets": ("re:pooler|layers.0.attention.key",)},
        {"target_modules": ["bert.pooler.dense", "key"], "layers_to_transform": [0]},
    ),
    (
        "distilbert",
        {"targets": ("all-linear",)},
        {"modules_to_save": ["classifier", "pre_classifier"]},
    ),
    ("roberta", {"targets": ("all-linear",)}, {"modules_to_save": ["classifier"]}),
    ("bert", {"modules_to_save": ("classifier",)}, {"modules_to_save": ["classifier"]}),
    ("bert", {"modules_to_save": ("pooler",)}, {"modules_to_save": ["classifier", "pooler"]}),
    (  # their names, not ours
        "bert",
        {"modules_to_save": ("layers.1.mlp.up",)},
        {"modules_to_save": ["classifier", LAYER.format(1) + "intermediate.dense"]},
    ),
    (  # PEFT's rule knows no dots: `layer.1` alone would do, `1` would be any
        "distilbert",
        {"modules_to_save": ("layer.1.ffn",)},
        {"modules_to_save": ["classifier", "pre_classifier", "layer.1.ffn"]},
    ),
    ("bert", {"rank_pattern": ("query=4",)}, {"rank_pattern": {"query": 4}}),
    (  # our names are written as theirs
        "bert",
        {"rank_pattern": ("layers.1.attention.query=4",)},
        {"rank_pattern": {LAYER.format(1) + "attention.self.query": 4}},
    ),
    (  # JSON files are sorted, and the first match wins: here the order matters
        "bert",
        {"rank_pattern": ("layer.1.*query=2", ".*query=4")},
        {
            "rank_pattern": {
                LAYER.format(i) + "attention.self.query": rank for i, rank in enumerate((4, 2, 4))
            }
        },
    ),
    (
        "bert",
        {"alpha_pattern": ("value=0.5",)},
        {"alpha_pattern": {"value": 0.5}, "lora_alpha": 16},
    ),
]


@pytest.mark.parametrize("family, group, wanted", SPELLINGS)
def test_fields_that_mean_what_ours_do(bases, tmp_path, family, group, wanted):
    model, params = bases[family]
    trained = Trained(model, params, {"lora": group})
    trained.write(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {field: written[field] for field in wanted} == wanted
    same(files.insert(files.read(tmp_path, model), {"params": params}), trained.variables)


NOWHERE = dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
QUERY = LAYER + "attention.self.query"
MEANINGS = [
    ({"target_modules": ["query", "nowhere"]}, [QUERY.format(i) for i in range(3)]),
    ({"target_modules": r".*\.[02]\..*query"}, [QUERY.format(0), QUERY.format(2)]),
    ({"target_modules": ["query"], "layers_to_transform": 1}, [QUERY.format(1)]),
    ({"target_modules": ["query"], "layers_to_transform": [0, 7]}, [QUERY.format(0)]),
    ({"target_modules": ["query"], "layers_to_transform": []}, [QUERY.format(i) for i in range(3)]),
    (
        {"target_modules": ["query"], "layers_to_transform": [1], "layers_pattern": "layer"},
        [QUERY.format(1)],
    ),
    (
        {"target_modules": [QUERY.format(0), "pooler.dense"], "layers_to_transform": [1]},
        [QUERY.format(0)],
    ),
    (
        {"target_modules": ["query"], "exclude_modules": [QUERY.format(1)]},
        [QUERY.format(0), QUERY.format(2)],
    ),
    ({"target_modules": ["query"], "exclude_modules": r".*\.[01]\..*"}, [QUERY.format(2)]),
    (
        {"target_modules": ["query"], "modules_to_save": ["layer.0"]},
        [QUERY.format(1), QUERY.format(2)],
    ),
    ({"target_modules": ["pooler.dense", "classifier"]}, ["bert.pooler.dense"]),
]


@pytest.mark.parametrize("fields, wanted", MEANINGS)
def test_what_fields_of_peft_mean(bases, fields, wanted):
    names = bases["bert"][0].names
    fields = NOWHERE | {"modules_to_save": []} | fields
    fields["modules_to_save"] = [*fields["modules_to_save"], *matching.HEADS]
    assert sorted(matching.full_names(names, matching.targets(names, fields))) == wanted


def test_all_linear_is_every_dense_layer_but_the_head(bases):
    for family, layers in (("bert", 19), ("roberta", 18), ("distilbert", 18)):
        names = bases[family][0].names
        fields = NOWHERE | {"target_modules": "all-linear", "modules_to_save": matching.HEADS}
        assert len(matching.full_names(names, matching.targets(names, fields))) == layers


def test_modules_to_save_match_ends_of_names(bases):
    names = bases["distilbert"][0].names
    assert sorted(matching.saved(names, ["classifier"])) == ["classifier/dense", "classifier/out"]
    norms = matching.saved(names, ["layer_norm"])
    assert sorted(norms) == ["layers/attention_norm", "layers/mlp_norm"]
    assert matching.saved(names, ["score"]) == {}


# --- what is refused -------------------------------------------------------------------------


A = "base_model.model.bert.encoder.layer.1.attention.self.query.lora_A.weight"
REFUSED = [
    (remove("adapter_config.json"), "no adapter_config.json"),
    (remove("adapter_model.safetensors"), "no adapter_model.safetensors"),
    (pickled, "adapter_model.bin is a pickle, which is refused"),
    (keep(-10), "adapter_model.safetensors: "),
    (rewrite("adapter_model.safetensors", b""), "adapter_model.safetensors: "),
    (rewrite("adapter_config.json", b'{"r": '), "adapter_config.json: not JSON"),
    (rewrite("adapter_config.json", b"\xff\xfe"), "adapter_config.json: not JSON"),
    (rewrite("adapter_config.json", b"[1]"), "no peft_type"),
    (rewrite("adapter_config.json", b'{"config": "pfeiffer"}'), "AdapterHub"),
    (change(peft_type="LOAR"), "peft_type 'LOAR' is not known here; did you mean 'LORA'?"),
    (change(peft_type="BMFT_LORA"), "unknown field"),
    (change(task_type="TOKEN_CLS"), "task_type 'TOKEN_CLS'"),
    (change(use_dora=True), "self.query.lora_magnitude_vector'; 6 are missing"),
    (change(lora_bias=True), "'lora_bias' is true"),
    (change(use_qalora=True), "'use_qalora' is true"),
    (change(qalora_group_size=8), "'qalora_group_size' is 8"),
    (change(layer_replication=[[0, 2]]), "'layer_replication' is [[0, 2]]"),
    (change(target_parameters=["w"]), "'target_parameters'"),
    (change(trainable_token_indices=[0]), "word_embeddings.token_adapter.trainable_tokens_delta'"),
    (change(trainable_token_indices=[0, 0]), "peft.lora.trainable_token_indices names 0 twice"),
    (change(trainable_token_indices=["0"]), "field 'trainable_token_indices' cannot be"),
    (change(trainable_token_indices={"position_embeddings": [0]}), "is of 'position_embeddings':"),
    (change(trainable_token_indices={"embeddings": [0]}), "only the word embedding's are known"),
    (change(trainable_token_indices={"word_embeddings": 0}), "'word_embeddings' has no list"),
    (change(alora_invocation_tokens=[0]), "'alora_invocation_tokens'"),
    (change(arrow_config={"k": 1}), "'arrow_config'"),
    (change(use_bdlora={"k": 1}), "'use_bdlora'"),
    (change(field_of_next_year=0), "'field_of_next_year' is 0"),
    (change(init_lora_weights="pissa"), "init_lora_weights is 'pissa'"),
    (change(target_modules=None), "target_modules is null"),
    (change(target_modules=["quary"]), "match no module"),
    (change(target_modules=["LayerNorm"]), "'bert.embeddings.LayerNorm', which is no dense layer"),
    (
        change(target_modules=["output"]),
        "'bert.encoder.layer.0.attention.output', which is no dense",
    ),
    (change(target_modules="["), "target_modules: no regular expression"),
    (change(target_modules=[1]), "field 'target_modules' cannot be [1]"),
    (change(layers_to_transform="1"), "field 'layers_to_transform' cannot be \"1\""),
    (change(rank_pattern={"(": 2}), "rank_pattern: no regular expression"),
    (change(rank_pattern={"query": "two"}), "query=two"),
    (change(r="8"), "field 'r' cannot be \"8\""),
    (change(r=True), "field 'r' cannot be true"),
    (change(r=None), "field 'r' cannot be null"),
    (change(r=0), "rank is 0"),
    (change(r=4), "lora_A.weight' has shape [3, 24], the model needs [4, 24]"),
    (change(bias="some"), "did you mean"),
    (change(bias="all"), "no tensor 'base_model.model.bert.embeddings.LayerNorm.bias'"),
    (change(target_modules=["query"]), "self.value.lora_A.weight' has no place in the model"),
    (change(target_modules=["query", "value", "key"]), "no tensor 'base_model.model.bert"),
    (change(modules_to_save=["classifier", "pooler"]), "no tensor 'base_model.model.bert.pooler"),
    (retensor(lambda tensors: tensors.pop(A)), f"no tensor {A!r}"),
    (retensor(lambda tensors: tensors.update({"more": tensors[A]})), "tensor 'more' has no place"),
    (retensor(lambda tensors: tensors.update({A: tensors[A].T.copy()})), "shape [24, 3]"),
    (rename("base_model.model.", ""), "no tensor 'base_model.model.bert"),
    (rename("classifier", "score"), "no tensor 'base_model.model.classifier.bias'"),
]


@pytest.fixture(scope="module")
def lora(bases, tmp_path_factory):
    """The bytes of a good adapter: {file name: content}"""
    folder = tmp_path_factory.mktemp("lora")
    Trained(*bases["bert"], {"lora": {"rank": 3, "alpha": 7.0}}).write(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def put(contents, folder):
    for name, content in contents.items():
        (folder / name).write_bytes(content)


@pytest.mark.parametrize("mutate, says", REFUSED)
def test_what_is_refused(bases, lora, tmp_path, mutate, says):
    put(lora, tmp_path)
    mutate(tmp_path)
    is_refused(tmp_path, bases["bert"][0], says)


ACCEPTED = [
    change(use_dora=None, arrow_config={}, layer_replication=None, field_of_next_year=[]),
    change(megatron_core="megatron.core", qalora_group_size=16, peft_version="99"),
    change(target_modules=["value", "query", "elsewhere"], exclude_modules=["pooler"]),
    change(target_modules=r"bert\..*(query|value)", init_lora_weights="gaussian"),
    change(task_type=None, revision="main", auto_mapping={"base_model_class": "X"}),
    change(rank_pattern={"key": 9}, alpha_pattern={"up": 9}),  # they match no target
    change(modules_to_save=["classifier", "score", "classifier"]),
]


@pytest.mark.parametrize("mutate", ACCEPTED)
def test_what_makes_no_difference(bases, lora, tmp_path, mutate):
    model, params = bases["bert"]
    put(lora, tmp_path)
    want = files.insert(files.read(tmp_path, model), {"params": params})
    mutate(tmp_path)
    same(files.insert(files.read(tmp_path, model), {"params": params}), want)


def test_fields_that_a_file_leaves_out_have_pefts_defaults(bases, lora, tmp_path):
    model, params = bases["bert"]
    Trained(model, params, {"lora": {"rank": 8, "alpha": 8.0}}).write(tmp_path)
    path, kept = (
        tmp_path / "adapter_config.json",
        ("peft_type", "target_modules", "modules_to_save"),
    )
    written = json.loads(path.read_text())
    path.write_text(json.dumps({key: written[key] for key in kept}))
    group = files.read(tmp_path, model).groups["lora"]
    assert (group["rank"], group["alpha"], group["rslora"]) == (8, 8.0, False)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_files_in_16_bits(bases, lora, tmp_path, dtype):
    model, _ = bases["bert"]
    put(lora, tmp_path)
    full = files.read(tmp_path, model).leaves
    retensor(lambda tensors: tensors.update({k: t.astype(dtype) for k, t in tensors.items()}))(
        tmp_path
    )
    half = files.read(tmp_path, model).leaves
    for path, leaf in half.items():
        assert leaf.dtype == np.float32
        np.testing.assert_array_equal(leaf, full[path].astype(dtype).astype(np.float32))


def test_another_base_is_refused(bases, lora, tmp_path):
    put(lora, tmp_path)
    with pytest.raises(
        Mistake, match="trained on another base .'tiny'.*ffffffffffff, these aaaaaa"
    ):
        files.read(tmp_path, bases["bert"][0], fingerprint="a" * 64)
    with pytest.raises(Mistake, match="no tensor"):
        files.read(tmp_path, bases["roberta"][0])
    assert files.card(tmp_path).fingerprint == "f" * 64
    retensor(lambda tensors: None)(tmp_path)  # a file that is not ours says nothing of it
    files.read(tmp_path, bases["bert"][0], fingerprint="a" * 64)


def test_another_number_of_labels_is_refused(bases, lora, tmp_path):
    put(lora, tmp_path)
    model = models.find(str(bases["bert"][0].folder), outputs=2)
    with pytest.raises(
        Mistake, match=r"classifier.weight' has shape \[5, 24\], .* needs \[2, 24\]"
    ):
        files.read(tmp_path, model)


def test_no_leaf_stays_random(bases, lora, tmp_path):
    model, params = bases["bert"]
    put(lora, tmp_path)
    adapter = files.read(tmp_path, model)
    with pytest.raises(Mistake, match="has no pooler/kernel, and nor has the base"):
        files.insert(adapter, {"params": params}, fresh=("classifier/out/bias", "pooler/kernel"))
    trained = Trained(model, params, {"lora": {}}, fresh=("pooler/kernel", "pooler/bias"))
    trained.write(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["modules_to_save"] == ["classifier", "bert.pooler.dense"]
    again = files.insert(
        files.read(tmp_path, model), {"params": params}, fresh=("pooler/kernel", "pooler/bias")
    )
    same(again, trained.variables)


def test_layers_that_are_not_in_the_file_stay_the_bases(bases, tmp_path):
    model, params = bases["bert"]
    Trained(model, params, {"lora": PARTS}).write(tmp_path)
    adapter = files.read(tmp_path, model)
    assert adapter.rows["params/layers/attention/key/kernel"].tolist() == [False, True, False]
    assert "params/layers/attention_norm/scale" not in adapter.rows
    # A base in bfloat16 stays so where nothing moved.
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    variables = tree.flatten(files.insert(adapter, {"params": low}))
    assert variables["params/layers/mlp/up/kernel"].dtype == jnp.float32
    assert variables["params/embeddings/word/embedding"].dtype == jnp.bfloat16


OWN_REFUSED = [
    (change(methods=["lora", "bitfti"]), "did you mean 'bitfit'?"),
    (change(methods=[]), "is not that of methods ()"),
    (change(methods="lora"), "field 'methods' must be a list"),
    (change(groups=None), "field 'groups' must be a dict"),
    (change(groups={"lora": {"rnk": 2}, "bitfit": {}}), "no 'rnk'; did you mean 'rank'?"),
    (change(groups={"lora": {"rank": "2"}, "bitfit": {}}), "field 'groups'"),
    (change(groups={"lora": {"rank": 3}, "bitfit": {}}), "shape [3, 24, 2]"),
    (change(groups={"lora": {"rank": 2, "alpha": 3.0}, "bitfit": {}}), "lora_scale is not what"),
    (change(more=1), "unknown field 'more'"),
    (change(peft_type="BMFT_LORA"), "peft_type 'BMFT_LORA' is not that of methods"),
    (change(task_type="CAUSAL_LM"), "task_type 'CAUSAL_LM'"),
    (change(fresh=["poller/bias"]), "did you mean 'pooler/bias'?"),
    (
        retensor(lambda tensors: tensors.pop("params/layers/mlp/up/bias")),
        "no tensor 'params/layers/mlp/up",
    ),
    (rename("params/pooler", "params/poler"), "did you mean 'params/poler/bias'?"),
    (keep(-10), "adapter_model.safetensors: "),
]


@pytest.mark.parametrize("mutate, says", OWN_REFUSED)
def test_what_is_refused_of_our_own(bases, tmp_path, mutate, says):
    model, params = bases["bert"]
    Trained(model, params, {"lora": {"rank": 2}, "bitfit": {}}).write(tmp_path)
    mutate(tmp_path)
    is_refused(tmp_path, model, says)


# --- directories -----------------------------------------------------------------------------


class Tokenizer:
    def save_pretrained(self, folder):
        (folder / "tokenizer.json").write_text("{}")


def test_adapter_directory(bases, tmp_path):
    model, params = bases["bert"]
    folder = tmp_path / "run" / "adapter"
    for rank in (2, 3):  # a second export replaces the first, and only that
        trained = Trained(model, params, {"lora": {"rank": rank}})
        export.adapter(folder, trained.write, Tokenizer())
        same(files.insert(files.read(folder, model), {"params": params}), trained.variables)
        (folder / "notes.txt").write_text("mine")
    written = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "notes.txt"}
    assert {path.name for path in folder.iterdir()} == written
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]
    assert (folder / "notes.txt").read_text() == "mine"


def test_an_export_that_fails_changes_nothing(tmp_path):
    folder = tmp_path / "adapter"
    (folder / "below").mkdir(parents=True)
    (folder / "below" / "mine.txt").write_text("mine")

    def fail(partial):
        (partial / "below").mkdir()
        (partial / "below" / "new.txt").write_text("new")
        raise Mistake("no")

    with pytest.raises(Mistake, match="no"):
        export.adapter(folder, fail)
    assert [path.name for path in folder.rglob("*")] == ["below", "mine.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]

    def full(partial):
        raise OSError(28, "No space left on device")

    with pytest.raises(Mistake, match="cannot write .*adapter: No space left on device"):
        export.adapter(folder, full)
    with export.whole(folder) as partial:
        (partial / "below").mkdir()
        (partial / "below" / "new.txt").write_text("new")
    assert {path.name for path in folder.rglob("*.txt")} == {"mine.txt", "new.txt"}


def test_a_process_killed_between_two_names_loses_nothing(tmp_path):
    folder = tmp_path / "adapter"
    old, partial = tmp_path / ".adapter.old", tmp_path / ".adapter.partial"
    old.mkdir()
    partial.mkdir()
    (old / "mine.txt").write_text("mine")
    (partial / "half").write_text("")
    with export.whole(folder) as new:
        (new / "new.txt").write_text("new")
    assert {path.name for path in folder.iterdir()} == {"mine.txt", "new.txt"}
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_folder_that_cannot_be_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Mistake, match="cannot write .*file/adapter: "):
        export.adapter(tmp_path / "file" / "adapter", lambda folder: None)


@pytest.mark.parametrize(
    "family, groups",
    [("bert", {"lora": PATTERNS}), ("roberta", {"bitfit": {}}), ("distilbert", {"full": {}})],
)
def test_merged_model(bases, tmp_path, family, groups):
    model, params = bases[family]
    trained = Trained(model, params, groups)
    export.merged(
        tmp_path / "model",
        load=lambda: weights.load(model, jax.random.key(0)).params,
        merge=trained.merged,
        moving=trained.moving,
        names=model.names,
        settings=model.json,
        labels=LABELS,
        beside=Tokenizer(),
    )
    again = models.find(str(tmp_path / "model"), outputs=tiny.OUTPUTS)
    found = weights.load(again, jax.random.key(0))
    assert found.fresh == () and found.ignored == ()
    added = {name: trained.variables.get(name, {}) for name in ("peft", "peft_const")}
    want = tree.flatten(peft.merge(trained.methods, trained.variables["params"], added))
    for path, leaf in tree.flatten(found.params).items():
        np.testing.assert_allclose(leaf, want[path], atol=1e-6, err_msg=path)
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    name = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert"}[family]
    assert written["architectures"] == [name + "ForSequenceClassification"]
    assert written["id2label"] == {str(i): label for i, label in enumerate(LABELS)}
    assert written["label2id"] == {label: i for i, label in enumerate(LABELS)}
    assert written["problem_type"] == "single_label_classification"
    assert written["dtype"] == "float32"


def test_what_cannot_be_merged_is_refused(bases, tmp_path):
    model, params = bases["bert"]
    trained = Trained(model, params, {"adapter": {"kind": "parallel"}})
    with pytest.raises(Mistake, match="'adapter' cannot be merged"):
        export.merged(
            tmp_path / "model",
            load=lambda: params,
            merge=trained.merged,
            moving=trained.moving,
            names=model.names,
            settings=model.json,
            labels=None,
        )
    assert not (tmp_path / "model").exists()
