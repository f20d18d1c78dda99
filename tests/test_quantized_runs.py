"""Quantized bases in shards, in memory, and from an experiment's run to its predictions."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_vit
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file

import bmft
from bmft import layers, models, quantize, sharding, tree
from bmft.errors import Mistake
from bmft.models import weights
from experiments import glue_lora

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert") / "model"
    tiny.directory(folder, **SIZES)
    return tiny.tokenizer(folder)


def mesh_of(data=1, fsdp=1, tensor=1):
    devices = np.array(jax.devices()[: data * fsdp * tensor]).reshape(data, fsdp, tensor)
    return jax.sharding.Mesh(devices, sharding.AXES)


# --- shards


RULES = (
    ("layers/down/kernel", (None, "tensor", "fsdp")),
    ("layers/up/kernel", (None, "fsdp", "tensor")),
    ("**", ()),
)
LIES = [  # a leaf of a kernel [3, 256, 64] or [3, 64, 256], and how it lies
    ("up/nf4", (3, 256, 32), P(None, ("tensor", "fsdp"), None)),
    ("up/nf4_absmax", (3, 256, 1), P(None, ("tensor", "fsdp"), None)),
    ("up/nf4_scale", (3, 1), P()),
    ("up/nf4_offset", (3,), P()),
    ("up/int8_scale", (3, 256), P(None, ("tensor", "fsdp"))),
    ("down/nf4", (3, 64, 128), P(None, "fsdp", "tensor")),
    ("down/nf4_absmax", (3, 64, 4), P(None, "fsdp", "tensor")),
    ("down/int4_scale", (3, 64, 8), P(None, "fsdp", "tensor")),
    ("down/int8_scale", (3, 64), P(None, "fsdp")),
    ("other/nf4", (3, 64, 128), P()),
]


@pytest.mark.parametrize(("leaf", "shape", "spec"), LIES, ids=[leaf for leaf, *_ in LIES])
def test_leaves_lie_as_their_kernel(leaf, shape, spec):
    rule = sharding.of_leaf(mesh_of(fsdp=2, tensor=2), RULES)
    assert rule(f"quant/layers/{leaf}", shape).spec == spec


def test_no_block_is_parted():
    rule = sharding.of_leaf(mesh_of(tensor=4), RULES)
    rule("quant/layers/down/nf4", (3, 64, 96))  # 192 inputs are three blocks
    with pytest.raises(Mistake, match=r"tensor=4 does not divide 3 of quant/layers/down/nf4_abs"):
        rule("quant/layers/down/nf4_absmax", (3, 64, 3))
    with pytest.raises(Mistake, match=r"fsdp=4 does not divide 2 of quant/layers/up/nf4"):
        sharding.of_leaf(mesh_of(fsdp=4, tensor=2), RULES)("quant/layers/up/nf4", (3, 4, 32))


def test_shards_are_those_of_one_device(folder):
    model = models.find(str(folder), outputs=2)
    kernels = weights.quantized(model, "int4", lambda path: False)
    rule = sharding.of_leaf(mesh_of(fsdp=2, tensor=2), model.sharding)
    key = jax.random.key(0)
    parts = weights.load(model, key, quantized=kernels, sharding=rule)
    alone = weights.load(model, key, quantized=kernels)
    for path, leaf in tree.flatten(parts.quant).items():
        assert np.array_equal(leaf, tree.flatten(alone.quant)[path]), path
    codes = parts.quant["layers"]["mlp"]["down"]["int4"]
    assert {shard.data.shape for shard in codes.addressable_shards} == {(2, 32, 32)}
    again = weights.load(model, key, quantized=kernels, shared=alone)
    assert again.quant["layers"]["mlp"]["up"]["int4"] is alone.quant["layers"]["mlp"]["up"]["int4"]


def test_parts_of_one_tensor_are_kernels_by_themselves(tmp_path):
    """timm has queries, keys and values in one tensor."""
    tiny_vit.directory(tmp_path, "timm")
    model = models.find(str(tmp_path), outputs=tiny_vit.OUTPUTS)
    kernels = weights.quantized(model, "int8", lambda path: False)
    whole = tree.flatten(weights.load(model, jax.random.key(0)).params)
    loaded = weights.load(model, jax.random.key(0), quantized=kernels)
    assert len(kernels) == 6
    for path, kernel in tree.flatten(loaded.leaves()).items():
        wanted = np.asarray(whole[path])
        if path in kernels:
            layers = [quantize.quantize("int8", layer.T) for layer in wanted]
            wanted = np.stack([quantize.kernel(leaves) for leaves in layers])
        assert np.array_equal(kernel, wanted), path


# --- memory


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, broadcast):
        return jnp.tanh(layers.Dense(256, use_bias=False, name="dense")(x))


class Deep(nn.Module):
    @nn.compact
    def __call__(self, x):
        return layers.scan_layers(Layer(name="layers"), x, None, depth=16)


def test_few_layers_are_floats_at_a_time():
    """Also without remat: what the backward pass keeps of a layer is not its float kernel."""
    rng = np.random.default_rng(0)
    stack = [quantize.quantize("nf4", rng.normal(0, 0.1, (256, 256))) for _ in range(16)]
    leaves = {name: np.stack([one[name] for one in stack]) for name in stack[0]}
    variables = {"quant": {"layers": {"dense": leaves}}}
    gradient = tiny.hasty(jax.grad(lambda x, variables: Deep().apply(variables, x).sum()))
    compiled = gradient.lower(jnp.ones((2, 256)), variables).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 5 * 256 * 256 * 4


# --- a run


def test_a_run_is_restored_and_merges(folder, tmp_path, capsys):
    arguments = [
        *(f"--config.model.name={folder}", "--config.model.quantize=nf4"),
        *("--config.train.batch_size=16", "--config.optim.learning_rate=0.02"),
        *("--config.checkpoint.every=2", "--config.log.tensorboard=false"),
        *(f"--workdir={tmp_path / 'run'}", *tiny.data(tmp_path / "data")),
    ]
    arguments += ["--config.train.steps=2"]
    glue_lora.main(arguments)
    shown = capsys.readouterr().out
    assert "65,536 numbers of 6 stacks of kernels are quantized" in shown
    glue_lora.main([*arguments, "--config.export.merged=true"])  # restores the state
    assert "model: float32, merged into what nf4 makes of the base: 6 stacks" in (
        capsys.readouterr().out
    )
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    model = models.find(str(folder), outputs=2)
    lora = 2 * 2 * 8 * (64 + 64)
    assert report["total_params"] == tree.count(weights.shapes(model)) + lora + 2 * 2 * 8

    loaded = bmft.load(tmp_path / "run")._variables  # the base as it was trained on
    kernels = quantize.restored({}, jax.tree.map(np.asarray, loaded["quant"]))
    kernels = tree.flatten(kernels)
    assert "quant" not in bmft.load(tmp_path / "run" / "adapter")._variables
    _check_merged(kernels, tmp_path / "run", folder)


def _check_merged(kernels, run, folder):
    """What the file of the merged model holds: to the bit what the kernels stand for where there is
    no LoRA, and that with the adapter's update where there is."""
    merged, base, adapter = (
        load_file(where)
        for where in (
            run / "model" / "model.safetensors",
            folder / "model.safetensors",
            run / "adapter" / "adapter_model.safetensors",
        )
    )
    told = json.loads((run / "adapter" / "adapter_config.json").read_text())
    ours = {"attention.self.key": "attention/key", "output.dense": "mlp/down"}
    for theirs, path in (ours | {"attention.self.query": "attention/query"}).items():
        name = f"encoder.layer.1.{theirs}"
        stands_for = kernels[f"layers/{path}/kernel"][1].T
        of_file = quantize.kernel(quantize.quantize("nf4", base[f"bert.{name}.weight"])).T
        np.testing.assert_array_equal(stands_for, of_file)
        found = merged[f"bert.{name}.weight"]
        if theirs in ours:
            np.testing.assert_array_equal(found, stands_for)
            continue
        a, b = (adapter[f"base_model.model.bert.{name}.lora_{x}.weight"] for x in "AB")
        update = b @ a * (told["lora_alpha"] / told["r"])
        assert abs(update).max() > 1e-3
        np.testing.assert_allclose(found, stands_for + update, atol=1e-6)


def test_what_cannot_be_quantized(folder):
    model = models.find(str(folder), outputs=2)
    no_stack = model._replace(names=model.names._replace(leaves=model.names.leaves[:3]))
    with pytest.raises(Mistake, match=r"model.quantize='int8'.*no stack of dense layers"):
        weights.quantized(no_stack, "int8", lambda path: False)
