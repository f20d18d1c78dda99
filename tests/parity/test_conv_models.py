"""ResNets and VGGs against PyTorch: transformers' and plain modules with torchvision's names."""

import json

import h5py
import jax
import jax.numpy as jnp
import nets
import numpy as np
import pytest
import tiny_images
import torch
import transformers
from safetensors.torch import save_file

from bmft import models, tree
from bmft.models import resnet, vgg, weights
from bmft.names import to_file

HUGGING = {
    "embedding_size": 6,
    "hidden_sizes": [12, 20, 28],
    "depths": [2, 1, 2],
    "num_labels": 5,
}
BASIC = {"layer_type": "basic", "hidden_sizes": [6, 8, 11]}
PLAIN = {
    **{name: lambda name=name: nets.resnet(name) for name in nets.RESNETS},
    "cifar": nets.cifar,
    "vgg": nets.vgg,
    "vgg_bn": lambda: nets.vgg(norm=True),
    "vgg_features": lambda: nets.vgg(dense=()),
}
IMAGES = tiny_images.batch()["images"]


def saved(theirs, folder):
    """A torch module in a file, with torchvision's names alone."""
    save_file(theirs.state_dict(), folder / "model.safetensors")
    return folder


def read(folder, **found):
    model = models.find(str(folder), outputs=5, **found)
    loaded = weights.load(model, jax.random.key(0))
    assert loaded.fresh == ()
    assert all(name.endswith("num_batches_tracked") for name in loaded.ignored)
    return model, loaded.variables()


def logits(model, variables, images=IMAGES):
    apply = jax.jit(lambda variables, images: model.module.apply(variables, {"images": images}))
    return np.asarray(apply(variables, images))


def close(ours, theirs, atol=1e-5):
    assert np.abs(theirs).max() > 0.1
    np.testing.assert_allclose(ours, theirs, atol=atol, rtol=1e-5)


@pytest.mark.parametrize("name", PLAIN)
def test_torchvision(tmp_path, name):
    """Feature maps of odd sizes, smaller than fc1's and larger, and of no multiple of them."""
    theirs = nets.fill(PLAIN[name]())
    model, variables = read(saved(theirs, tmp_path))
    for size in ((19, 22), (33, 41), (8, 9)):
        images = tiny_images.batch(size=size)["images"]
        close(logits(model, variables, images), nets.logits(theirs, images))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"downsample_in_first_stage": True},
        {"downsample_in_bottleneck": True},
        BASIC,
        {**BASIC, "downsample_in_first_stage": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("headed", [True, False])
def test_transformers(tmp_path, changes, headed):
    config = transformers.ResNetConfig(**HUGGING | changes)
    theirs = nets.fill(transformers.ResNetForImageClassification(config))
    (theirs if headed else theirs.resnet).save_pretrained(tmp_path)
    if headed:
        close(logits(*read(tmp_path)), nets.logits(theirs, IMAGES))
        return
    model = models.find(str(tmp_path), outputs=5)  # the backbone alone: no prefix, no head
    loaded = weights.load(model, jax.random.key(0))
    assert set(loaded.fresh) == {"classifier/out/kernel", "classifier/out/bias"}
    loaded.params["classifier"]["out"]["kernel"] *= 30  # large enough to matter
    head = loaded.params["classifier"]["out"]["kernel"]
    with torch.no_grad():
        theirs.classifier[1].weight.copy_(torch.tensor(np.asarray(head).T))
        theirs.classifier[1].bias.zero_()
    close(logits(model, loaded.variables()), nets.logits(theirs, IMAGES))


def test_the_standard_of_a_preprocessor(tmp_path):
    """What preprocessor_config.json says is what transformers' image processor computes."""
    theirs = nets.fill(
        transformers.ResNetForImageClassification(transformers.ResNetConfig(**HUGGING))
    )
    theirs.save_pretrained(tmp_path)
    images = tiny_images.batch(size=(24, 24))["images"]
    for about in (
        {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.6, 0.8]},
        {"do_normalize": False},
        {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [0.7] * 3},
        {"do_rescale": False, "image_mean": [100, 90, 80], "image_std": [50, 60, 70]},
    ):
        about = {"size": {"shortest_edge": 24}, "crop_pct": 1.0, "do_resize": False} | about
        processor = transformers.ConvNextImageProcessor(**about)
        processor.save_pretrained(tmp_path)
        pixels = processor(list(images), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            want = theirs(pixels.float()).logits.numpy()
        model, variables = read(tmp_path)
        assert model.config.size == 24
        close(logits(model, variables, images), want, atol=1e-4)


TRAINED = {**PLAIN, "huggingface": None}
del TRAINED["vgg"], TRAINED["vgg_features"]  # no BatchNorm


def trained(name, folder):
    """(torch's model in training mode, without dropout; ours)"""
    if name == "huggingface":
        theirs = transformers.ResNetForImageClassification(transformers.ResNetConfig(**HUGGING))
        nets.fill(theirs).save_pretrained(folder)
    else:
        theirs = nets.fill(PLAIN[name]())
        saved(theirs, folder)
    for module in theirs.train().modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0  # the running statistics are then the batch's
    changes = {"dropout": 0.0} if name.startswith("vgg") else {}
    return theirs, *read(folder, batch_norm="update", **changes)


def our_tree(model, tensors):
    """{our path: array} of torch's {name: array}."""
    found = {}
    for leaf in model.names.leaves:
        name = leaf.file if leaf.file in tensors else model.names.written(leaf)
        found[leaf.path] = name
    return {path: np.asarray(tensors[name]) for path, name in found.items() if name in tensors}


def same(model, ours, theirs, atol):
    theirs, ours = our_tree(model, theirs), tree.flatten(ours)
    assert set(theirs) == set(ours)
    for path, leaf in ours.items():
        array = to_file(model.names.leaf(path).layout, np.asarray(leaf))
        np.testing.assert_allclose(array, theirs[path], atol=atol, rtol=1e-4, err_msg=path)


@pytest.mark.parametrize("name", TRAINED)
def test_training_mode(tmp_path, name):
    """The batch's statistics normalise, and are reported with the unbiased variance."""
    theirs, model, variables = trained(name, tmp_path)
    images = tiny_images.batch(size=(33, 36))["images"]
    want = nets.logits(theirs, images)
    assert np.abs(want - nets.logits(theirs.eval(), images)).max() > 0.01
    ours, seen = model.module.apply(
        variables, {"images": images}, True, mutable=["batch_stats"], rngs={}
    )
    close(ours, want, atol=1e-4)
    running = {key: t for key, t in theirs.state_dict().items() if "running" in key}
    same(model, seen["batch_stats"], running, atol=1e-5)


@pytest.mark.parametrize("name", ["huggingface", "resnext", "cifar", "vgg_bn"])
@pytest.mark.parametrize("remat", ["none", "block"])
def test_gradients(tmp_path, name, remat):
    """Of the cross-entropy, through the batch's statistics."""
    theirs, model, variables = trained(name, tmp_path)
    model = model._replace(module=model.module.clone(remat=remat))
    batch = tiny_images.batch(size=(33, 36))
    found = theirs(nets.standardized(batch["images"]))
    each = torch.nn.functional.cross_entropy(
        getattr(found, "logits", found), torch.tensor(batch["labels"]).long(), reduction="none"
    )
    real = torch.tensor(batch["weights"])
    ((each * real).sum() / real.sum()).backward()

    def objective(params):
        def forward(batch, *, train):
            state = {"params": params, "batch_stats": variables["batch_stats"]}
            return model.module.apply(state, batch, train, mutable=["batch_stats"])[0]

        (total, weight), _ = tiny_images.loss(forward, batch, None)
        return total / weight

    ours = jax.jit(jax.grad(objective))(variables["params"])
    gradients = {key: p.grad.numpy() for key, p in theirs.named_parameters()}
    assert max(np.abs(g).max() for g in gradients.values()) > 0.1
    same(model, ours, gradients, atol=1e-4)


@pytest.mark.parametrize("name", ["resnet", "resnet_basic", "wide", "resnext", "cifar", "vgg_bn"])
def test_written_models(tmp_path, name):
    """Names and config.json of what we write: transformers loads it where it has such models; we
    read back what it has not."""
    theirs = nets.fill(PLAIN[name]())
    model, variables = read(saved(theirs, tmp_path), mean=(0.1, 0.2, 0.3))
    file = vgg if name.startswith("vgg") else resnet
    settings = json.loads(json.dumps(file.written_config(model.config, model.json)))
    assert (settings["model_type"] == "resnet") == name.startswith("resnet")
    leaves, tensors = tree.flatten(tree.join(*variables.values())), {}
    for leaf in model.names.leaves:
        array = to_file(leaf.written_layout or leaf.layout, np.asarray(leaves[leaf.path]))
        tensors[model.names.written(leaf)] = torch.tensor(np.ascontiguousarray(array))
    config = file.configure(settings, 5)
    assert config.mean == (0.1, 0.2, 0.3)
    if settings["model_type"] != "resnet":
        assert config == model.config
        assert set(tensors) == {k for k in theirs.state_dict() if not k.endswith("tracked")}
        return
    assert config == model.config._replace(family="resnet", head="fc")
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(settings | {"num_labels": 5}))
    loaded, told = transformers.AutoModelForImageClassification.from_pretrained(
        folder, output_loading_info=True
    )
    assert not told["unexpected_keys"] and not told["mismatched_keys"]
    assert all(key.endswith("num_batches_tracked") for key in told["missing_keys"])
    standard = {"mean": (0.1, 0.2, 0.3)}
    close(nets.logits(loaded.eval(), IMAGES, **standard), logits(model, variables))
    close(logits(*read(folder)), logits(model, variables))


def test_hed():
    """VGG-16's convolutions with Keras's pooling, which keeps the last of an odd feature map."""
    model = models.find("vgg16_hed", outputs=3)
    loaded = weights.load(model, jax.random.key(0))
    assert set(loaded.fresh) == {"classifier/out/kernel", "classifier/out/bias"}
    assert {name.partition("/")[0] for name in loaded.ignored} == {
        *(f"dsn{i}" for i in range(1, 6)),
        "fuse",
    }
    images = tiny_images.batch(2, (37, 50))["images"]
    x = torch.tensor(images[..., ::-1].astype(np.float32))
    x = (x - torch.tensor([104.00699, 116.66877, 122.67892])).permute(0, 3, 1, 2)
    with h5py.File(model.folder) as file:
        for block, depth in enumerate((2, 2, 3, 3, 3), start=1):
            if block > 1:
                x = torch.nn.functional.max_pool2d(x, 2, 2, ceil_mode=True)
            for i in range(depth):
                place = file[f"block{block}/layers/conv2d{f'_{i}' if i else ''}/vars"]
                kernel, bias = (torch.tensor(place[j][()]) for j in "01")
                x = torch.relu(torch.conv2d(x, kernel.permute(3, 2, 0, 1), bias, padding=1))
    batch = {"images": jnp.asarray(images)}
    _, seen = model.module.apply(loaded.variables(), batch, capture_intermediates=True)
    ours = seen["intermediates"]["blocks"]["4"]["__call__"][0]
    assert ours.shape == (2, 3, 4, 512)
    want = x.permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(ours, want, atol=1e-4 * np.abs(want).max())
