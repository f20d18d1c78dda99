"""Adapter directories that are damaged, or not what they say: each is refused, in one line that
names the file and what is wrong with it. More on LoRA and our own layout: tests/test_export.py."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny
from damage import (
    CONFIG,
    TENSORS,
    as_folder,
    change,
    is_refused,
    keep,
    leave_out,
    pickled,
    remove,
    retensor,
    rewrite,
)
from trained import Trained

from bmft import models
from bmft.models import weights
from bmft.peft import files

GROUPS = {
    "lora": {"rank": 3, "alpha": 7.0, "modules_to_save": ("pooler",)},
    "ia3": {"targets": ("key", "mlp.down")},
    "norm_tuning": {},
    "oft": {"block_size": 8, "bias": "oft_only"},
    "boft": {"block_size": 4, "factors": 2},
    "own": {"lora": {"rank": 2}, "bitfit": {}},
}
PEFTS = tuple(GROUPS)[:-1]
LAYOUTS = {name: files._layout(name) for name in PEFTS}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return models.find(str(tiny.directory(tmp_path_factory.mktemp("bert"))), outputs=tiny.OUTPUTS)


@pytest.fixture(scope="module")
def good(model, tmp_path_factory):
    """{method: {file name: bytes}} of adapters with nothing wrong."""
    params, found = weights.load(model, jax.random.key(0)).params, {}
    for name, group in GROUPS.items():
        folder = tmp_path_factory.mktemp(name)
        Trained(model, params, group if name == "own" else {name: group}).write(folder)
        found[name] = {path.name: path.read_bytes() for path in folder.iterdir()}
    return found


def put(contents, folder):
    for name, content in contents.items():
        (folder / name).write_bytes(content)


def test_they_are_read_as_they_are(model, good, tmp_path):
    for name, contents in good.items():
        put(contents, tmp_path)
        files.read(tmp_path, model, fingerprint="f" * 64)
        files.card(tmp_path)
        assert json.loads(contents[CONFIG])["peft_type"] in (
            "BMFT_LORA_BITFIT",
            name in LAYOUTS and LAYOUTS[name].peft_type,
        )


# --- files -----------------------------------------------------------------------------------


def header(text):
    """A file of tensors that is a header and no more."""
    return rewrite(TENSORS, len(text).to_bytes(8, "little") + text)


def claim(dtype, size):
    """One tensor of a type that NumPy may not have."""
    about = {"x": {"dtype": dtype, "shape": [8], "data_offsets": [0, size]}}
    text = json.dumps(about).encode()
    return rewrite(TENSORS, len(text).to_bytes(8, "little") + text + bytes(size))


def longer(folder):
    path = folder / TENSORS
    path.write_bytes(path.read_bytes() + b"more")


FILES = [
    (remove(CONFIG), "it has no adapter_config.json"),
    (as_folder(CONFIG), "it has no adapter_config.json"),
    (rewrite(CONFIG, b""), "adapter_config.json: not JSON"),
    (rewrite(CONFIG, b'{"peft_type": "LORA"'), "adapter_config.json: not JSON"),
    (rewrite(CONFIG, b'{"peft_type": "LORA", "r": NaN}'), "not JSON: NaN is no number"),
    (rewrite(CONFIG, b"[" * 100_000), "adapter_config.json: not JSON"),
    (rewrite(CONFIG, b'{"r": ' + b"9" * 5000 + b"}"), "adapter_config.json: not JSON"),
    (rewrite(CONFIG, "{}".encode("utf-16")), "adapter_config.json: not JSON"),
    (rewrite(CONFIG, b"[]"), "adapter_config.json: no peft_type"),
    (rewrite(CONFIG, b'[{"peft_type": "LORA"}]'), "adapter_config.json: no peft_type"),
    (rewrite(CONFIG, b"null"), "adapter_config.json: no peft_type"),
    (rewrite(CONFIG, b'"LORA"'), "adapter_config.json: no peft_type"),
    (rewrite(CONFIG, b'{"peft_type": ["LORA"]}'), "adapter_config.json: no peft_type"),
    (rewrite(CONFIG, b'{"config": {"reduction_factor": 16}}'), "no adapter.safetensors"),
    (remove(TENSORS), "no adapter_model.safetensors"),
    (as_folder(TENSORS), "no adapter_model.safetensors"),
    (pickled, "adapter_model.bin is a pickle, which is refused"),
    *((keep(size), "adapter_model.safetensors: ") for size in (0, 1, 7, 8, 100, -4, -1000)),
    (longer, "adapter_model.safetensors: "),
    (rewrite(TENSORS, b"\xff" * 64), "adapter_model.safetensors: "),
    (rewrite(TENSORS, b"\x80\x02}q\x00."), "adapter_model.safetensors: "),
    (header(b"{}"), "adapter_model.safetensors: no tensor"),
    (header(b"[1, 2]  "), "adapter_model.safetensors: "),
    (header(b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'), "safetensors: "),
    (claim("F99", 32), "adapter_model.safetensors: "),
    (claim("C64", 64), "adapter_model.safetensors: tensor 'x' "),
    (claim("F4", 4), "adapter_model.safetensors: tensor 'x' "),
    (claim("F32", 32), "adapter_model.safetensors: no tensor"),
    (
        retensor(lambda tensors: None, {files.LABELS_KEY: "good, bad"}),
        "bmft_labels in the metadata",
    ),
    (retensor(lambda tensors: None, {files.LABELS_KEY: "3"}), "bmft_labels in the"),
    (retensor(lambda tensors: None, {files.LABELS_KEY: "[1, 2]"}), "bmft_labels in the"),
]


@pytest.mark.parametrize("number", range(len(FILES)))
def test_damaged_files(model, good, tmp_path, number):
    mutate, says = FILES[number]
    put(good[list(GROUPS)[number % len(GROUPS)]], tmp_path)  # of each method in turn
    mutate(tmp_path)
    is_refused(tmp_path, model, says)


def test_no_directory(model, tmp_path):
    is_refused(tmp_path / "nowhere", model, "no adapter directory")


# --- fields ----------------------------------------------------------------------------------

ALL = [
    (change(peft_type=""), "peft_type '' is not known here"),
    (change(peft_type="PREFIX\nTUNING"), "is not known here"),
    (change(peft_type="BMFT_LOAR"), "field"),
    (change(task_type="CAUSAL_LM"), "task_type 'CAUSAL_LM'"),
    (change(task_type=["SEQ_CLS"]), "task_type ['SEQ_CLS']"),
    (change(of_next_year={"x": 1}), "field 'of_next_year' is {\"x\": 1}"),
    (change(target_modules=None), "target_modules is null"),
    (leave_out("target_modules"), "target_modules is null"),
    (change(target_modules=[]), "match no module of the model"),
    (change(target_modules=["no_such_layer"]), "match no module of the model"),
    (change(target_modules="(no|such"), "target_modules: no regular expression"),
    (change(target_modules=["word_embeddings"]), "bert.embeddings.word_embeddings"),
    (change(exclude_modules=".*"), "match no module of the model"),
    (change(exclude_modules="*"), "exclude_modules: no regular expression"),
]


@pytest.mark.parametrize("name", PEFTS)
@pytest.mark.parametrize("number", range(len(ALL)))
def test_damaged_fields(model, good, tmp_path, name, number):
    put(good[name], tmp_path)
    ALL[number][0](tmp_path)
    is_refused(tmp_path, model, ALL[number][1])


def is_of(value, types):
    """May a field of these types have a value of this kind?"""
    origins = [getattr(kind, "__origin__", kind) for kind in types]
    return type(value) in origins or (float in origins and type(value) is int)


@pytest.mark.parametrize("name", PEFTS)
def test_fields_of_a_wrong_type(model, good, tmp_path, name):
    put(good[name], tmp_path)
    for field, (types, _) in (LAYOUTS[name].fields | files.WHERE).items():
        for wrong in ([1.5], {"a": {}}, 1.5, 2, "x", True):
            if not is_of(wrong, types) or type(wrong) is list:  # there is no list of numbers
                (tmp_path / CONFIG).write_bytes(good[name][CONFIG])
                change(**{field: wrong})(tmp_path)
                is_refused(tmp_path, model, f"field {field!r} cannot be {json.dumps(wrong)}")


OF_METHODS = [
    ("lora", change(peft_type="IA3"), "'bias'"),
    ("ia3", change(peft_type="LORA"), "'feedforward_modules'"),
    ("norm_tuning", change(peft_type="LORA"), "target_modules means"),
    ("oft", change(peft_type="BOFT"), "field 'eps' is 6e-05"),
    ("lora", change(r=-3), "rank is -3"),
    ("lora", change(r=0), "rank is 0"),
    ("lora", change(r=10**6), "the model needs [1000000, 24]"),
    ("lora", change(lora_alpha=0), "alpha is 0"),
    ("lora", change(lora_alpha=-2.5), "alpha is -2.5"),
    ("lora", change(lora_dropout=1), "dropout is 1"),
    ("lora", change(bias="oft_only"), "bias"),
    ("lora", change(rank_pattern={"query": 0}), "query=0"),
    ("lora", change(rank_pattern={"query": None}), "query=None"),
    ("lora", change(alpha_pattern={"*": 2}), "alpha_pattern: no regular expression"),
    ("lora", change(layers_to_transform=[3]), "match no module"),
    ("lora", change(layers_to_transform=[-1]), "match no module"),
    ("lora", change(layers_to_transform=[1], layers_pattern="("), "layers_pattern: no regular"),
    ("lora", change(init_lora_weights="olora"), "init_lora_weights is 'olora'"),
    ("ia3", change(feedforward_modules=None), "feedforward_modules is null"),
    ("ia3", change(feedforward_modules="("), "feedforward_modules: no regular expression"),
    ("ia3", change(feedforward_modules=["key"]), "ia3_l' has shape"),
    ("norm_tuning", change(target_modules=["query"]), "which is no norm"),
    ("oft", change(r=3), "blocks is 3 and peft.oft.block_size is 8"),
    ("oft", change(r=-1, oft_block_size=0), "blocks is -1"),
    ("oft", change(oft_block_size=-8), "block_size is -8"),
    ("oft", change(oft_block_size=7), "block_size is 7, which does not part the 24 inputs"),
    ("oft", change(oft_block_size=48), "block_size is 48, which does not part the 24 inputs"),
    ("oft", change(oft_block_size=4), "has shape [3, 28], the model needs [6, 6]"),
    ("oft", change(block_share=True), "has shape [3, 28], the model needs [1, 28]"),
    ("oft", change(num_cayley_neumann_terms=1), "terms is 1"),
    ("oft", change(coft=True, eps=0), "eps is 0"),
    ("oft", change(bias="lora_only"), "no 'lora_only'; did you mean 'oft_only'?"),
    ("oft", change(peft_version="0.17.1"), "peft_version '0.17.1'"),
    ("oft", leave_out("peft_version"), "peft_version ''"),
    ("boft", change(boft_n_butterfly_factor=0), "factors is 0"),
    ("boft", change(boft_n_butterfly_factor=9), "by 9 factors; the nearest that does is none"),
    ("boft", change(boft_n_butterfly_factor=1), "has shape [2, 6, 4, 4], the model needs [1, 6"),
    ("boft", change(boft_dropout=-0.1), "dropout is -0.1"),
    ("own", change(methods=[["lora"], "bitfit"]), "field 'methods' must be a list of texts"),
    ("own", change(fresh=[[]]), "field 'fresh' must be a list of texts"),
    ("own", change(groups={"lora": 3, "bitfit": {}}), "field 'groups': 'lora' must be a dict"),
    ("own", change(groups={"lora": {"rank": 2.5}}), "rank is 2.5; needs a whole number"),
    ("own", change(groups={"lora": {"rank": True}}), "rank is True; needs a whole number"),
    ("own", change(groups={"lora": {"alpha": 10**400}}), "needs a number"),
    ("own", change(groups={"lora": {"targets": "query"}}), "needs texts separated by commas"),
    ("own", change(peft_type="BMFT_"), "is not that of methods"),
    ("own", leave_out("fresh"), "field 'fresh' must be a list"),
]


@pytest.mark.parametrize("number", range(len(OF_METHODS)))
def test_damaged_fields_of_a_method(model, good, tmp_path, number):
    name, mutate, says = OF_METHODS[number]
    put(good[name], tmp_path)
    mutate(tmp_path)
    is_refused(tmp_path, model, says)


# --- tensors ---------------------------------------------------------------------------------


def first(tensors):
    """The key of one of the method's own tensors."""
    own = ("lora_A", "ia3_l", "ln_tuning_layers.weight", "oft_R", "boft_R", "lora_a")
    return next(key for key in sorted(tensors) if any(part in key for part in own))


def replace(make):
    def edit(tensors):
        key = first(tensors)
        tensors[key] = np.ascontiguousarray(make(tensors[key]))

    return retensor(edit)


def put_in(number):
    def make(tensor):
        flat = tensor.copy()
        flat.flat[-1] = number
        return flat

    return replace(make)


def in_a_module(tensors):
    for key in list(tensors):
        tensors[f"module.{key}"] = tensors.pop(key)


TENSOR = [
    (retensor(lambda tensors: tensors.pop(first(tensors))), "no tensor '"),
    (retensor(lambda tensors: tensors.update(more=np.ones(3, np.float32))), "tensor 'more' has no"),
    (retensor(lambda tensors: tensors.clear()), "no tensor '"),
    (retensor(in_a_module), "no tensor '"),
    (replace(lambda tensor: tensor[..., None]), "has shape "),
    (replace(lambda tensor: tensor[:-1]), "has shape "),
    (replace(lambda tensor: tensor.reshape(-1)[:1].reshape(())), "has shape "),
    (replace(lambda tensor: tensor.astype(np.int64)), "is of int64, and no floating point numbers"),
    (replace(lambda tensor: tensor > 0), "is of bool, and no floating point numbers"),
    (replace(lambda tensor: np.frombuffer(b"pickle", np.uint8)), "is of uint8, and no"),
    (put_in(np.nan), "has numbers that are not finite"),
    (put_in(-np.inf), "has numbers that are not finite"),
    (replace(lambda tensor: np.full_like(tensor, np.nan, ml_dtypes.bfloat16)), "not finite"),
]


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("number", range(len(TENSOR)))
def test_damaged_tensors(model, good, tmp_path, name, number):
    put(good[name], tmp_path)
    mutate, says = TENSOR[number]
    mutate(tmp_path)
    is_refused(tmp_path, model, says)


@pytest.mark.parametrize("name", GROUPS)
def test_another_base(model, good, tmp_path, name):
    put(good[name], tmp_path)
    is_refused(tmp_path, model, "trained on another base ('tiny')", fingerprint="a" * 64)
    smaller = models.find(str(model.folder), outputs=3)
    is_refused(tmp_path, smaller, "has shape [")


def test_a_head_without_numbers_has_no_outputs(good, tmp_path):
    put(good["lora"], tmp_path)
    head = {"base_model.model.classifier.bias": np.zeros((), np.float32)}
    retensor(lambda tensors: tensors.update(head))(tmp_path)
    assert files.card(tmp_path).outputs is None
