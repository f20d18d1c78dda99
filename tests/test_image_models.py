"""What the models of images have in common, each family that tests/tiny_images.py knows."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_images
from safetensors.numpy import load_file

from bmft import models, tree
from bmft.errors import Mistake
from bmft.models import tensors, vision, weights

FAMILIES = ("resnet", "cifar", "vgg", "vgg_bn")
NORMED = ("resnet", "cifar", "vgg_bn")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{family: its folder}, made when asked for."""
    made = {}

    def get(family):
        if family not in made:
            made[family] = tiny_images.directory(tmp_path_factory.mktemp(family), family)
        return made[family]

    return get


@pytest.fixture(scope="module")
def loaded(folders):
    """loaded(family) -> (model, variables, logits of tiny_images.batch()), made when asked for."""
    made = {}

    def get(family):
        if family not in made:
            model = models.find(str(folders(family)), outputs=tiny_images.OUTPUTS)
            variables = weights.load(model, jax.random.key(0)).variables()
            logits = jax.jit(model.module.apply)(variables, tiny_images.batch())
            made[family] = model, variables, np.asarray(logits)
        return made[family]

    return get


def file_of(family):
    return importlib.import_module(f"bmft.models.{tiny_images.FAMILIES[family][0]}")


@pytest.mark.parametrize("family", FAMILIES)
def test_piece_by_piece(loaded, family):
    """Each piece takes what the one before gave; begun anywhere, the rest gives the logits."""
    model, variables, logits = loaded(family)
    count, batch = file_of(family).pieces(model.config), tiny_images.batch()
    assert len(model.names.stages) == count
    assert np.ptp(logits, axis=0).min() > 0.01  # the images differ
    for piece in range(count):
        module = model.module.clone(begin=piece, end=piece + 1)
        features = jax.jit(module.apply)(variables, batch)
        batch = {"features": features}
        if piece == 1:
            rest = model.module.clone(begin=2)
            np.testing.assert_allclose(jax.jit(rest.apply)(variables, batch), logits, atol=1e-5)
            begun = model.module.clone(end=2)
            np.testing.assert_allclose(
                jax.jit(begun.apply)(variables, tiny_images.batch()), features, atol=1e-5
            )
    last = model.module.clone(begin=count)
    np.testing.assert_allclose(jax.jit(last.apply)(variables, batch), logits, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_steady_pieces_drop_nothing(loaded, family):
    """As many as the Config says, and no fewer: those that features may be kept of."""
    model, variables, _ = loaded(family)
    batch, steady = tiny_images.batch(), model.config.steady

    def run(end, train):
        apply = model.module.clone(end=end).apply
        return apply(variables, batch, train, rngs={"dropout": jax.random.key(0)})

    np.testing.assert_array_equal(run(steady, True), run(steady, False))
    if steady < file_of(family).pieces(model.config):
        assert np.abs(run(steady + 1, True) - run(steady + 1, False)).max() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_leaves_of_a_piece_decide_it_alone(loaded, family):
    """names.stages says where they are: with other leaves before it, a piece gives the same."""
    model, variables, _ = loaded(family)
    for piece, stage in enumerate(model.names.stages):
        if piece == 0:
            continue
        module = model.module.clone(begin=piece, end=piece + 1)
        features = model.module.clone(end=piece).apply
        shape = jax.eval_shape(features, variables, tiny_images.batch(2)).shape
        only, _ = tree.split(variables, lambda path, at=stage: f"/{at}/" in path)
        jax.eval_shape(module.apply, only, {"features": jnp.zeros(shape)})


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_and_numbers(loaded, family):
    model, variables, logits = loaded(family)
    images = tiny_images.batch()["images"].astype(np.float32) / 255
    found = jax.jit(model.module.apply)(variables, {"images": images})
    np.testing.assert_allclose(found, logits, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16(loaded, family):
    model, variables, logits = loaded(family)
    module = model.module.clone(dtype=jnp.bfloat16)
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables["params"])
    found = jax.jit(module.apply)(variables | {"params": low}, tiny_images.batch())
    assert found.dtype == jnp.float32
    off = np.abs(found - logits).max()
    assert 0 < off < 0.05 * np.abs(logits).max()
    features = module.clone(end=2)
    assert jax.eval_shape(features.apply, variables, tiny_images.batch()).dtype == jnp.bfloat16


def objective(module, variables, batch):
    """loss(params) in training, by the batch's statistics"""

    def of(params):
        def forward(batch, *, train):
            state = variables | {"params": params}
            streams = {"dropout": jax.random.key(0)}
            return module.apply(state, batch, train, mutable=["batch_stats"], rngs=streams)[0]

        (total, weight), _ = tiny_images.loss(forward, batch, None)
        return total / weight

    return of


@pytest.mark.parametrize("family", ["cifar", "vgg_bn"])
def test_rematerialised(folders, loaded, family):
    """The same gradients, and blocks that are computed anew for them; dropout draws the same."""
    _, variables, _ = loaded(family)
    found = {}
    for remat in ("none", "block"):
        model = models.find(str(folders(family)), outputs=5, remat=remat, batch_norm="update")
        gradient = jax.grad(objective(model.module, variables, tiny_images.batch()))
        program = str(jax.make_jaxpr(gradient)(variables["params"]))
        assert ("checkpoint" in program or "remat" in program) == (remat == "block")
        found[remat] = tree.flatten(tiny.hasty(gradient)(variables["params"]))
    for path, leaf in found["none"].items():
        np.testing.assert_allclose(leaf, found["block"][path], atol=1e-5, rtol=1e-4, err_msg=path)
    assert all(np.abs(leaf).max() > 0 for leaf in found["none"].values())


@pytest.mark.parametrize("family", NORMED)
def test_batch_norm_policies(folders, loaded, family):
    """Frozen, training is as evaluation, and nothing moves; otherwise it goes by the batch."""
    _, variables, logits = loaded(family)
    before = tree.flatten(variables["batch_stats"])
    for policy in ("frozen", "update", "reset"):
        changes = {"batch_norm": policy} | ({"dropout": 0.0} if "vgg" in family else {})
        module = models.find(str(folders(family)), outputs=5, **changes).module
        apply = jax.jit(lambda v, b, m=module: m.apply(v, b, True, mutable=["batch_stats"]))
        found, seen = apply(variables, tiny_images.batch())
        reported = tree.flatten(seen["batch_stats"])
        moved = [path for path in before if np.abs(reported[path] - before[path]).max() > 1e-3]
        if policy == "frozen":
            np.testing.assert_allclose(found, logits, atol=1e-5)
            assert moved == []
        else:
            assert np.abs(found - logits).max() > 0.1
            assert set(moved) == set(reported) == set(before)


def test_whose_file_it_is(folders, tmp_path):
    """Each file is recognised by one architecture, and no file of a language model by any."""
    for family, (file, settings, _) in tiny_images.FAMILIES.items():
        if settings["model_type"] == "resnet":
            continue  # transformers' own: config.json says so
        shapes = shapes_of(folders(family))
        known = {other.__name__ for other in models._files() if said(other, shapes)}
        assert known == {f"bmft.models.{file}"}
        found = models.find(str(folders(family)), outputs=5)
        assert found.json["model_type"] == settings["model_type"]
    for folder in (tiny.directory(tmp_path / "bert"), folders("resnet")):
        shapes = shapes_of(folder)
        assert not [other for other in models._files() if said(other, shapes)]
    densenet = {"features.conv0.weight": (64, 3, 7, 7), "classifier.weight": (10, 64)}
    alexnet = {"features.0.weight": (64, 3, 11, 11), "features.0.bias": (64,)}
    squeezenet = {"features.0.weight": (64, 3, 3, 3), "features.3.squeeze.weight": (16, 64, 1, 1)}
    for shapes in (densenet, alexnet, squeezenet):
        assert not [other for other in models._files() if said(other, shapes)]


def shapes_of(folder):
    return {name: tensor.shape for name, tensor in tensors.index(folder).items()}


def said(file, shapes):
    return hasattr(file, "recognize") and file.recognize(shapes)


def test_one_file_is_a_directory(folders):
    folder = folders("vgg_bn")
    file = folder / "model.safetensors"
    one, other = (models.find(str(path), outputs=5) for path in (folder, file))
    assert one.config == other.config
    loaded = weights.load(other, jax.random.key(0))
    kernel = loaded.params["blocks"]["0"]["units"]["0"]["conv"]["kernel"]
    tensor = load_file(file)["features.0.weight"]
    np.testing.assert_array_equal(kernel, tensor.transpose(2, 3, 1, 0))


# --- how a checkpoint wants its images -------------------------------------------------------

USUAL = {"size": 224, "mean": (0.1, 0.2, 0.3), "std": (1.0, 2.0, 3.0)}
STANDARDS = [
    ({}, {}),
    ({"_preprocessor": {"size": 160}}, {"size": 160}),
    ({"_preprocessor": {"size": {"shortest_edge": 96}, "resample": 3}}, {"size": 96}),
    ({"_preprocessor": {"size": {"height": 64, "width": 64}}}, {"size": 64}),
    (
        {
            "_preprocessor": {
                "size": {"shortest_edge": 256},
                "crop_size": {"height": 200, "width": 200},
                "do_center_crop": True,
            }
        },
        {"size": 200},
    ),
    ({"_preprocessor": {"image_mean": [0.5] * 3}}, {"mean": (0.5,) * 3}),
    ({"_preprocessor": {"do_normalize": False}}, {"mean": (0.0,) * 3, "std": (1.0,) * 3}),
    (
        {"_preprocessor": {"do_rescale": False, "image_mean": [51] * 3, "image_std": [255] * 3}},
        {"mean": (0.2,) * 3, "std": (1.0,) * 3},
    ),
    ({"pretrained_cfg": {"std": [0.5] * 3, "input_size": [3, 32, 32]}}, {"size": 32}),
    ({"standardize": "image"}, {"standardize": "image"}),
]


@pytest.mark.parametrize("json, says", STANDARDS)
def test_standards(json, says):
    found = vision.read(json, **USUAL)
    assert set(found) == {"size", "mean", "std", "standardize", "resample"}
    assert found["resample"] == ("bicubic" if "resample" in str(json) else "bilinear")
    for field, want in ({"standardize": "model"} | USUAL | says).items():
        if field == "std" and "pretrained_cfg" in json:
            want = (0.5,) * 3
        assert found[field] == pytest.approx(want) if field in ("mean", "std") else want


def test_standards_that_are_none():
    with pytest.raises(Mistake, match=r"mean is \[0.5\], not three numbers"):
        vision.read({"_preprocessor": {"image_mean": [0.5]}}, **USUAL)
    with pytest.raises(Mistake, match="cannot resample 'bicubik'; did you mean 'bicubic'"):
        vision.read({"pretrained_cfg": {"interpolation": "bicubik"}}, **USUAL)
    with pytest.raises(Mistake, match="cannot resample 4"):
        vision.read({"_preprocessor": {"resample": 4}}, **USUAL)


def test_written_standards_are_read(folders):
    changes = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "size": 40, "standardize": "image"}
    config = models.find(str(folders("vgg")), outputs=5, resample="bicubic", **changes).config
    assert vision.read(vision.write(config), **USUAL) == changes | {"resample": "bicubic"}
