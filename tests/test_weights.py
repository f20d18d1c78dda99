"""Reading a model directory: what is there is read as it is, and what does not fit is refused."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding
from safetensors.numpy import load_file, save_file

from bmft import models, sharding, tree
from bmft.errors import Mistake
from bmft.models import weights

QUERY = "bert.encoder.layer.1.attention.self.query.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return tiny.directory(tmp_path_factory.mktemp("bert"))


@pytest.fixture
def folder(good, tmp_path):
    """A good directory to spoil."""
    for path in good.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def load(folder, outputs=tiny.OUTPUTS, **arguments):
    return weights.load(models.find(str(folder), outputs=outputs), jax.random.key(0), **arguments)


def change(folder, edit):
    """Writes the tensors again after edit(tensors), which changes them in place."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def settings(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_every_tensor_where_it_belongs(good):
    """Layers stacked, kernels turned round; nothing left over."""
    tensors, loaded = load_file(good / "model.safetensors"), load(good)
    assert loaded.fresh == () and loaded.ignored == ()
    layers = loaded.params["layers"]
    assert layers["mlp"]["up"]["kernel"].shape == (3, 24, 40)
    for layer in range(3):
        name = f"bert.encoder.layer.{layer}.intermediate.dense.weight"
        np.testing.assert_array_equal(layers["mlp"]["up"]["kernel"][layer], tensors[name].T)
    word = tensors["bert.embeddings.word_embeddings.weight"]
    np.testing.assert_array_equal(loaded.params["embeddings"]["word"]["embedding"], word)
    np.testing.assert_array_equal(
        loaded.params["classifier"]["out"]["kernel"], tensors["classifier.weight"].T
    )
    assert tree.count(loaded.params) == sum(tensor.size for tensor in tensors.values())


def test_dtypes_by_leaf(good):
    def dtype(path):
        return jnp.float32 if path.startswith("classifier") else jnp.bfloat16

    low, full = load(good, dtype=dtype).params, tree.flatten(load(good).params)
    for path, leaf in tree.flatten(low).items():
        assert leaf.dtype == dtype(path)
        np.testing.assert_array_equal(leaf, full[path].astype(dtype(path)))


def test_each_device_reads_its_part(good):
    mesh = jax.make_mesh((2, 2, 2), sharding.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)
    model = models.find(str(good), outputs=tiny.OUTPUTS)
    whole = tree.flatten(load(good).params)

    def lies(path, shape):
        axes = next(axes for pattern, axes in model.sharding if tree.match(pattern, path))
        axes = [a if a and n % 2 == 0 else None for a, n in zip(axes, shape, strict=False)]
        return NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))

    parts = tree.flatten(load(good, sharding=lies).params)
    kernel = parts["layers/mlp/up/kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(3, 12, 20)}
    for path, leaf in parts.items():
        np.testing.assert_array_equal(leaf, whole[path], err_msg=path)


def test_shards(folder):
    whole, tensors = load(folder).params, load_file(folder / "model.safetensors")
    os.remove(folder / "model.safetensors")
    names = sorted(tensors)
    where = {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-{i}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        where |= dict.fromkeys(part, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    for path, leaf in tree.flatten(load(folder).params).items():
        np.testing.assert_array_equal(leaf, tree.flatten(whole)[path])
    os.remove(folder / "model-1.safetensors")
    with pytest.raises(Mistake, match="model-1.safetensors"):
        load(folder)
    index.write_text("{}")
    with pytest.raises(Mistake, match="index.json: no index of shards"):
        load(folder)


def test_names_without_prefix_and_of_old(folder):
    whole = tree.flatten(load(folder).params)

    def edit(tensors):
        for name in list(tensors):
            new = name.removeprefix("bert.").replace("LayerNorm.weight", "LayerNorm.gamma")
            tensors[new.replace("LayerNorm.bias", "LayerNorm.beta")] = tensors.pop(name)

    change(folder, edit)
    for path, leaf in tree.flatten(load(folder).params).items():
        np.testing.assert_array_equal(leaf, whole[path], err_msg=path)


def test_another_head_is_left_and_a_new_one_made(folder):
    loaded = load(folder, outputs=2)
    assert set(loaded.fresh) == {"classifier/out/kernel", "classifier/out/bias"}
    assert set(loaded.ignored) == {"classifier.weight", "classifier.bias"}
    assert loaded.params["classifier"]["out"]["kernel"].shape == (24, 2)
    one, same = load(folder, outputs=2).params["classifier"]["out"]["kernel"], loaded.params
    np.testing.assert_array_equal(one, same["classifier"]["out"]["kernel"])  # by the key alone
    assert 0.01 < np.std(one) < 0.03


def test_what_a_masked_language_model_lacks_and_has(folder):
    def edit(tensors):
        for name in [name for name in tensors if "pooler" in name or "classifier" in name]:
            del tensors[name]
        tensors["cls.predictions.bias"] = np.zeros(53, np.float32)
        tensors["bert.embeddings.position_ids"] = np.arange(22)[None]

    change(folder, edit)
    loaded = load(folder)
    assert {path.partition("/")[0] for path in loaded.fresh} == {"pooler", "classifier"}
    assert set(loaded.ignored) == {"cls.predictions.bias", "embeddings.position_ids"}


REFUSED = [
    (lambda tensors: tensors.pop(QUERY), "tensor 'encoder.layer.1.attention.self.query.weight' is"),
    (
        lambda tensors: tensors.update({QUERY: tensors[QUERY][:, 1:].copy()}),
        f"tensor {QUERY!r} has shape [24, 23], the model needs [24, 24]",
    ),
    (
        lambda tensors: tensors.update({QUERY.replace(".1.", ".3."): tensors[QUERY]}),
        "no place for tensor 'encoder.layer.3.attention.self.query.weight'",
    ),
    (lambda tensors: tensors.update(strange=np.zeros(1)), "no place for tensor 'strange'"),
    (
        lambda tensors: tensors.update(strange=np.zeros(1), very=np.zeros(1), x=np.zeros(1)),
        "'strange' and 2 more",
    ),
]


@pytest.mark.parametrize("edit, says", REFUSED)
def test_tensors_that_do_not_fit(folder, edit, says):
    change(folder, edit)
    with pytest.raises(Mistake) as refused:
        load(folder)
    assert says in str(refused.value)
    assert str(folder) in str(refused.value)


def test_files_that_are_none(folder):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    for broken in (content[:-100], content[:50], b"", b"x" * 100):
        file.write_bytes(broken)
        with pytest.raises(Mistake, match="model.safetensors: "):
            load(folder)
    os.rename(file, folder / "pytorch_model.bin")
    with pytest.raises(Mistake, match="pickle"):
        load(folder)
    os.remove(folder / "pytorch_model.bin")
    with pytest.raises(Mistake, match="no model.safetensors"):
        load(folder)


CONFIGS = [
    (lambda folder: os.remove(folder / "config.json"), "no config.json"),
    (lambda folder: (folder / "config.json").write_text("{"), "config.json: not JSON"),
    (lambda folder: settings(folder, model_type="brt"), "did you mean 'bert'?"),
    (lambda folder: settings(folder, model_type=None), "no config.json with a model_type"),
    (lambda folder: settings(folder, hidden_act="gelo"), "did you mean 'gelu'?"),
    (lambda folder: settings(folder, position_embedding_type="relative_key"), "must be 'absolute'"),
    (lambda folder: settings(folder, is_decoder=True), "is_decoder must be false"),
    (lambda folder: settings(folder, intermediate_size=41), "has shape [40, 24], the model needs"),
    (lambda folder: settings(folder, num_hidden_layers=4), "layer.3"),
    (lambda folder: settings(folder, num_hidden_layers=2), "no place for tensor 'encoder.layer.2"),
]


@pytest.mark.parametrize("spoil, says", CONFIGS)
def test_configurations_that_do_not_fit(folder, spoil, says):
    spoil(folder)
    with pytest.raises(Mistake) as refused:
        load(folder)
    assert says in str(refused.value)


def test_directories_that_are_none(tmp_path):
    for name in (str(tmp_path / "nowhere"), "./nowhere", "a/b/c"):
        with pytest.raises(Mistake, match="there is no directory"):
            models.find(name, outputs=2)


def test_fingerprint_is_of_the_file(folder):
    model = models.find(str(folder), outputs=tiny.OUTPUTS)
    before = weights.fingerprint(model)
    assert before == weights.fingerprint(models.find(str(folder), outputs=2))
    change(folder, lambda tensors: tensors[QUERY].__setitem__((0, 0), 9.0))
    assert weights.fingerprint(model) != before
