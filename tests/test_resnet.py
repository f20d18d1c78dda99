"""ResNets: the tree, the published ones, what files say of themselves, what is refused.

What all image models have in common is in tests/test_image_models.py.
"""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_images
from safetensors.numpy import load_file, save_file

from bmft import layers, models, names, tree
from bmft.errors import Mistake
from bmft.models import resnet, weights


@pytest.mark.parametrize("name", ["resnet", "resnext", "cifar_resnet"])
def test_goldens(name):
    tiny_images.check_golden(name)


def test_tree(tmp_path):
    """The whole tree of a small one: every leaf, its shape and its name in the file."""
    folder = tiny_images.directory(tmp_path, "torchvision", depths=[1, 2])
    model = models.find(str(folder), outputs=5)
    variables = weights.load(model, jax.random.key(0)).variables()
    assert {path: leaf.shape for path, leaf in tree.flatten(variables["params"]).items()} == {
        "stem/conv/kernel": (7, 7, 3, 6),
        **norm("stem/norm", 6),
        **block("stages/0/blocks/0", 6, 3, 12),
        **block("stages/1/blocks/0", 12, 5, 20),
        **block("stages/1/blocks/1", 20, 5, 20),
        "classifier/out/kernel": (20, 5),
        "classifier/out/bias": (5,),
    }
    statistics = tree.flatten(variables["batch_stats"])
    scales = {path for path in tree.flatten(variables["params"]) if path.endswith("/scale")}
    assert set(statistics) == {
        scale.replace("scale", last) for scale in scales for last in ("mean", "var")
    }
    tensors, leaves = load_file(folder / "model.safetensors"), tree.flatten(variables["params"])
    same(leaves["stages/1/blocks/0/conv2/kernel"], tensors["layer2.0.conv2.weight"], (2, 3, 1, 0))
    same(
        leaves["stages/1/blocks/0/shortcut/conv/kernel"],
        tensors["layer2.0.downsample.0.weight"],
        (2, 3, 1, 0),
    )
    same(statistics["stages/0/blocks/0/norm3/var"], tensors["layer1.0.bn3.running_var"], (0,))
    assert resnet.pieces(model.config) == len(model.names.stages) == 3
    assert model.names.stages == ("stem", "stages/0", "stages/1")


def same(ours, theirs, axes):
    np.testing.assert_array_equal(ours, theirs.transpose(axes))


def norm(path, width):
    return {f"{path}/scale": (width,), f"{path}/bias": (width,)}


def block(path, before, inner, after):
    found = {
        f"{path}/conv1/kernel": (1, 1, before, inner),
        f"{path}/conv2/kernel": (3, 3, inner, inner),
        f"{path}/conv3/kernel": (1, 1, inner, after),
        **norm(f"{path}/norm1", inner),
        **norm(f"{path}/norm2", inner),
        **norm(f"{path}/norm3", after),
    }
    if before == after:
        return found
    shortcut = {f"{path}/shortcut/conv/kernel": (1, 1, before, after)}
    return found | shortcut | norm(f"{path}/shortcut/norm", after)


# --- the published ones ----------------------------------------------------------------------


def torchvision_shapes(depths, *, bottleneck, width=64, groups=1):
    """{tensor: shape} of torchvision's ResNets: `width` of a group, per 64 channels of a stage."""
    shapes, before = {"conv1.weight": (64, 3, 7, 7), **norms("bn1", 64)}, 64
    for stage, depth in enumerate(depths):
        planes = 64 * 2**stage
        inner, after = planes, planes
        if bottleneck:
            inner, after = planes * width // 64 * groups, planes * 4
        for i in range(depth):
            at = f"layer{stage + 1}.{i}"
            convs = [(inner, before, 3, 3), (after, inner, 3, 3)]
            if bottleneck:
                convs = [
                    (inner, before, 1, 1),
                    (inner, inner // groups, 3, 3),
                    (after, inner, 1, 1),
                ]
            for number, shape in enumerate(convs, start=1):
                shapes[f"{at}.conv{number}.weight"] = shape
                shapes |= norms(f"{at}.bn{number}", shape[0])
            if before != after or (stage and not i):
                shapes[f"{at}.downsample.0.weight"] = (after, before, 1, 1)
                shapes |= norms(f"{at}.downsample.1", after)
            before = after
    return shapes | {"fc.weight": (1000, before), "fc.bias": (1000,)}


def norms(name, width):
    ends = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{end}": (width,) for end in ends} | {f"{name}.num_batches_tracked": ()}


def cifar_shapes(depth):
    shapes, before = {"conv1.weight": (16, 3, 3, 3), **norms("bn1", 16)}, 16
    for stage, width in enumerate((16, 32, 64)):
        for i in range(depth):
            for number in (1, 2):
                shape = (width, before, 3, 3)
                shapes[f"layer{stage + 1}.{i}.conv{number}.weight"] = shape
                shapes |= norms(f"layer{stage + 1}.{i}.bn{number}", width)
                before = width
    return shapes | {"linear.weight": (10, 64), "linear.bias": (10,)}


# Sizes as torchvision's documentation and He et al.'s reimplementation for CIFAR list them.
PUBLISHED = {
    "resnet18": (torchvision_shapes((2, 2, 2, 2), bottleneck=False), 11_689_512),
    "resnet34": (torchvision_shapes((3, 4, 6, 3), bottleneck=False), 21_797_672),
    "resnet50": (torchvision_shapes((3, 4, 6, 3), bottleneck=True), 25_557_032),
    "resnet101": (torchvision_shapes((3, 4, 23, 3), bottleneck=True), 44_549_160),
    "resnet152": (torchvision_shapes((3, 8, 36, 3), bottleneck=True), 60_192_808),
    "wide_resnet50_2": (
        torchvision_shapes((3, 4, 6, 3), bottleneck=True, width=128),
        68_883_240,
    ),
    "resnext50_32x4d": (
        torchvision_shapes((3, 4, 6, 3), bottleneck=True, width=4, groups=32),
        25_028_904,
    ),
    "resnext101_32x8d": (
        torchvision_shapes((3, 4, 23, 3), bottleneck=True, width=8, groups=32),
        88_791_336,
    ),
    **{
        f"cifar{6 * depth + 2}": (cifar_shapes(depth), size)
        for depth, size in ((3, 269_722), (5, 464_154), (7, 658_586), (9, 853_018), (18, 1_727_962))
    },
}


def moving(shapes):
    """How many numbers are trained."""
    return sum(math.prod(s) for name, s in shapes.items() if "running" not in name and s)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published(name):
    """They are recognised by their shapes; our leaves are their tensors, turned round."""
    shapes, size = PUBLISHED[name]
    assert moving(shapes) == size
    config = resnet.configure(resnet.recognize(shapes), 10 if "cifar" in name else 1000)
    assert config.in_transformers == name.startswith("resnet")
    module = resnet.Classifier(config)
    made = jax.eval_shape(module.init, jax.random.key(0), resnet.dummy(config))
    ours = tree.flatten(tree.join(*made.values()))
    table = resnet.names(config)
    assert {leaf.path for leaf in table.leaves} == set(ours)
    theirs = {name: shape for name, shape in shapes.items() if "tracked" not in name}
    assert theirs == {
        leaf.file: names.in_file(leaf.layout, ours[leaf.path].shape) for leaf in table.leaves
    }


def test_the_stride(tmp_path):
    """Of a bottleneck: in its 3x3, or in its first 1x1; the file cannot tell, config.json does."""
    folder, logits = tiny_images.directory(tmp_path, "resnet"), []
    for first in (False, True):
        settings = tiny_images.RESNET | {"downsample_in_bottleneck": first}
        (folder / "config.json").write_text(json.dumps(settings))
        model = models.find(str(folder), outputs=5)
        assert model.config.stride_in == ("1x1" if first else "3x3")
        variables = weights.load(model, jax.random.key(0)).variables()
        logits.append(model.module.apply(variables, tiny_images.batch(2)))
    assert np.abs(logits[0] - logits[1]).max() > 0.01


def test_option_a():
    """Every second row and column, and empty channels: half before, half behind."""
    config = resnet.configure(tiny_images.FAMILIES["cifar"][1], 5)
    x = jnp.arange(1.0, 31.0).reshape(1, 5, 3, 2)
    shortcut = resnet.Shortcut(config, False, jnp.float32, 6, 2)
    y = shortcut.apply({}, x)
    np.testing.assert_array_equal(y[..., 2:4], x[:, ::2, ::2])
    assert y.shape == (1, 3, 2, 6)
    assert not y[..., :2].any() and not y[..., 4:].any()


def test_blocks_are_what_adapters_attach_to(tmp_path):
    import flax.linen as nn

    seen = []

    def spy(call, args, kwargs, context):
        if context.method_name == "__call__" and isinstance(context.module, layers.FeatureBlock):
            seen.append("/".join(context.module.path))
        return call(*args, **kwargs)

    folder = tiny_images.directory(tmp_path, "torchvision")
    for remat in ("none", "block"):
        model = models.find(str(folder), outputs=5, remat=remat)
        variables = weights.load(model, jax.random.key(0)).variables()
        with nn.intercept_methods(spy):
            jax.eval_shape(model.module.apply, variables, tiny_images.batch(1))
    blocks = [f"stages/{i}/blocks/{j}" for i, depth in enumerate((2, 1)) for j in range(depth)]
    assert seen == blocks * 2


# --- names -----------------------------------------------------------------------------------


def test_names_of_both_worlds(tmp_path):
    """What transformers has is written with its names, whatever was read; targets know both."""
    read = {}
    for family in ("resnet", "torchvision"):
        model = models.find(str(tiny_images.directory(tmp_path / family, family)), outputs=5)
        read[family] = [model.names.written(leaf) for leaf in model.names.leaves]
        for entry in ("layer2.0.conv1", "encoder.stages.1.layers.0.layer.0.convolution"):
            assert set(names.target(model.names, [entry], kinds=("conv",))) == {
                "stages/1/blocks/0/conv1"
            }
        everything = names.target(model.names, ["all-conv"], kinds=("conv",))
        assert len(everything) == 1 + 3 * 3 + 2
        assert set(names.target(model.names, ["classifier.1"])) == {"classifier/out"}
    assert read["resnet"] == read["torchvision"]
    tensors = load_file(tmp_path / "resnet" / "model.safetensors")
    assert sorted(read["resnet"]) == sorted(tensors)


@pytest.mark.parametrize("family", ["resnext", "wide", "cifar"])
def test_what_transformers_lacks_is_written_as_read(tmp_path, family):
    model = models.find(str(tiny_images.directory(tmp_path, family)), outputs=5)
    written = [model.names.written(leaf) for leaf in model.names.leaves]
    assert sorted(written) == sorted(load_file(tmp_path / "model.safetensors"))
    settings = json.loads(json.dumps(resnet.written_config(model.config, model.json)))
    assert settings["model_type"] == "torchvision_resnet"
    assert resnet.configure(settings, 5) == model.config


def test_with_transformers_prefix_and_without(tmp_path):
    folder = tiny_images.directory(tmp_path, "resnet")
    whole = weights.load(models.find(str(folder), outputs=5), jax.random.key(0)).variables()
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("resnet."): tensor for name, tensor in tensors.items()}
    del bare["classifier.1.weight"], bare["classifier.1.bias"]
    save_file(bare, folder / "model.safetensors")
    loaded = weights.load(models.find(str(folder), outputs=5), jax.random.key(0))
    assert set(loaded.fresh) == {"classifier/out/kernel", "classifier/out/bias"}
    leaves = tree.flatten(loaded.variables())
    for path, leaf in tree.flatten(whole).items():
        if "classifier" not in path:
            np.testing.assert_array_equal(leaf, leaves[path], err_msg=path)


def test_one_file_and_shortcuts_of_another_name(tmp_path):
    """Some CIFAR repositories project, and say `shortcut`."""
    folder = tiny_images.directory(tmp_path, "cifar", shortcut="shortcut")
    file = folder / "model.safetensors"
    assert "layer2.0.shortcut.1.running_var" in load_file(file)
    model = models.find(str(file), outputs=5)
    assert model.config.shortcut == "shortcut" and model.config.head == "linear"
    assert weights.load(model, jax.random.key(0)).fresh == ()


# --- what is refused -------------------------------------------------------------------------


def add(name, *shape):
    return lambda tensors: tensors.update({name: np.zeros(shape, np.float32)})


def move(old, new):
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def drop(*parts):
    def edit(tensors):
        for name in [name for name in tensors if any(part in name for part in parts)]:
            del tensors[name]

    return edit


FILES = {
    "deep stem": (move("conv1.weight", "conv1.0.weight"), "tensor 'conv1.0.weight'"),
    "no stem": (drop("conv1"), "not"),
    "stem of 5x5": (lambda t: add("conv1.weight", 6, 3, 5, 5)(t), "'conv1.weight' is a stem of"),
    "grey": (add("conv1.weight", 6, 1, 7, 7), "has shape [6, 1, 7, 7], the model needs [6, 3, 7"),
    "squeeze": (add("layer1.0.se.fc1.weight", 2, 12, 1, 1), "'layer1.0.se.fc1.weight'"),
    "group norm": (drop("running"), "tensor 'bn1.running_mean' is missing"),
    "no shortcuts": (drop("downsample"), "'layer1.0.downsample.0.weight' is missing"),
    "pooled shortcut": (
        move("layer2.0.downsample.0.weight", "layer2.0.downsample.2.weight"),
        "'layer2.0.downsample.0.weight' is missing",
    ),
    "no second convolution": (drop("layer1.0.conv2"), "'layer1.0.conv2.weight' is missing"),
    "other groups": (add("layer2.0.conv2.weight", 5, 1, 3, 3), "'layer2.0.conv2.weight' has shape"),
    "no bottleneck": (drop("layer2.0.conv3"), "tensor 'layer2.0.conv3.weight' is missing"),
    "a stage missing": (
        move("layer2.0.conv1.weight", "layer3.0.conv1.weight"),
        "tensor 'layer2.0.conv1.weight' is missing",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_do_not_fit(tmp_path, case):
    edit, says = FILES[case]
    tiny_images.check_refused(tiny_images.directory(tmp_path, "torchvision"), edit, says)


CONFIGS = [
    ({"hidden_act": "silu"}, "hidden_act must be 'relu', not 'silu'"),
    ({"layer_type": "bottlenek"}, "layer_type=bottlenek is not one of basic,bottleneck"),
    ({"num_channels": 1}, "num_channels must be 3, not 1"),
    ({"hidden_sizes": [12, 24]}, "has shape [5, 12, 1, 1], the model needs [6, 12, 1, 1]"),
    ({"depths": [2, 2]}, "tensor 'encoder.stages.1.layers.1.layer.0.convolution.weight'"),
]


@pytest.mark.parametrize("changes, says", CONFIGS)
def test_configurations_that_do_not_fit(tmp_path, changes, says):
    folder = tiny_images.directory(tmp_path, "resnet")
    (folder / "config.json").write_text(json.dumps(tiny_images.RESNET | changes))
    with pytest.raises(Mistake) as refused:
        weights.load(models.find(str(folder), outputs=5), jax.random.key(0))
    assert says in str(refused.value)


TIMM = {
    "num_classes": 5,
    "pretrained_cfg": {
        "input_size": [3, 160, 160],
        "mean": [0.5, 0.4, 0.3],
        "std": [0.1, 0.2, 0.3],
        "interpolation": "bicubic",
    },
}


def test_files_of_timm(tmp_path):
    """Its config.json has no model_type; some of its variants have layers without tensors."""
    folder = tiny_images.directory(tmp_path, "torchvision")
    for name in ("resnet50", "wide_resnet50_2", "resnext50_32x4d", "tv_resnet34"):
        (folder / "config.json").write_text(json.dumps(TIMM | {"architecture": name}))
        config = models.find(str(folder), outputs=5).config
        assert (config.size, config.resample) == (160, "bicubic")
        assert (config.mean, config.std) == ((0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
    for name in ("resnetaa50", "resnetblur50", "resnet50d", "seresnet50", "resnet50_gn"):
        (folder / "config.json").write_text(json.dumps(TIMM | {"architecture": name}))
        with pytest.raises(Mistake, match=f"architecture '{name}' is not computed here"):
            models.find(str(folder), outputs=5)
