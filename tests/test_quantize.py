"""Quantized bases: numbers against bitsandbytes', and models against the floats they stand for."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file

from bmft import layers, models, peft, quantize, sharding, train, tree
from bmft.errors import Mistake
from bmft.models import weights

GOLDEN = np.load(Path(__file__).parent / "goldens" / "nf4.npz")
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
KERNELS = sorted(
    f"layers/{module}/kernel"
    for module in (
        *("attention/query", "attention/key", "attention/value", "attention/output"),
        *("mlp/up", "mlp/down"),
    )
)


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(0, 0.05, shape).astype(np.float32)


# --- numbers


def test_the_maps_are_those_of_bitsandbytes():
    assert np.array_equal(quantize.NF4, GOLDEN["nf4"])
    assert np.array_equal(quantize.dynamic_map(), GOLDEN["dynamic"])


@pytest.mark.parametrize("name", ["plain", "groups", "odd"])
def test_nf4_is_that_of_bitsandbytes(name):
    kernel, stored = GOLDEN[f"{name}/kernel"], {}
    leaves = quantize.quantize("nf4", kernel)
    for ours, theirs in (("nf4", "codes"), ("nf4_absmax", "absmax")):
        assert leaves[ours].dtype == np.uint8
        assert np.array_equal(leaves[ours].ravel(), GOLDEN[f"{name}/{theirs}"])
    # Their mean of the absmax is summed in float32, and all that follows is off by its last bit.
    for ours, theirs in (("nf4_scale", "scale"), ("nf4_offset", "offset")):
        np.testing.assert_allclose(leaves[ours], GOLDEN[f"{name}/{theirs}"], rtol=1e-6)
    stored["numpy"] = quantize.kernel(leaves)
    stored["jax"] = tiny.hasty(quantize.kernel)(jax.tree.map(jnp.asarray, leaves))
    for values in stored.values():
        np.testing.assert_allclose(values.T, GOLDEN[f"{name}/values"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("how", quantize.SCHEMES)
def test_errors_are_within_half_a_step(how):
    kernel_oi = random(48, 192)
    kernel_oi[0] = 0
    leaves = quantize.quantize(how, kernel_oi)
    found = quantize.kernel(leaves).T
    block = 192 if how == "int8" else quantize.BLOCK[how]
    absmax = np.abs(kernel_oi.reshape(48, -1, block)).max(-1, keepdims=True)
    wrong = np.abs((found - kernel_oi).reshape(48, -1, block)) / np.maximum(absmax, 1e-9)
    # nf4: half of its widest gap, 0.304, and what the 8 bits of an absmax miss.
    assert wrong.max() <= {"nf4": 0.152 + 0.02, "int8": 0.5 / 127, "int4": 0.5 / 7 + 0.004}[how]
    assert not found[0].any()
    size = sum(leaf.nbytes for leaf in leaves.values()) / (2 * kernel_oi.size)
    assert size <= {"nf4": 0.267, "int8": 0.515, "int4": 0.282}[how]  # of bfloat16
    again = quantize.kernel({name: np.stack([leaf] * 2) for name, leaf in leaves.items()})
    assert np.array_equal(again, np.stack([found.T] * 2))


def test_inputs_are_whole_blocks():
    for how, inputs in (("nf4", 96), ("int4", 80)):
        with pytest.raises(Mistake, match=f"{how}.*a/kernel has {inputs} inputs, no whole blocks"):
            quantize.check(how, "a/kernel", inputs)
    quantize.check("int8", "a/kernel", 7)


# --- models


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.directory(tmp_path_factory.mktemp("bert"), **SIZES)


def load(folder, how, **options):
    model = models.find(str(folder), outputs=tiny.OUTPUTS)
    kernels = weights.quantized(model, how, lambda path: False)
    return model, weights.load(model, jax.random.key(0), quantized=kernels, **options)


@pytest.mark.parametrize("how", quantize.SCHEMES)
def test_kernels_of_the_stack_are_quantized_and_nothing_else(folder, how):
    model, loaded = load(folder, how)
    whole, file = (
        tree.flatten(load(folder, None)[1].params),
        load_file(folder / "model.safetensors"),
    )
    assert [path for path, *_ in quantize.described(loaded.quant)] == KERNELS
    assert sorted(set(whole) - set(tree.flatten(loaded.params))) == KERNELS
    for path, leaf in tree.flatten(loaded.params).items():
        assert np.array_equal(leaf, whole[path]), path
    values = tree.flatten(loaded.leaves())
    for path, shape, scheme, bits in quantize.described(loaded.quant):
        assert (shape, scheme) == (whole[path].shape, how)
        assert bits / 16 <= {"nf4": 0.27, "int8": 0.54, "int4": 0.29}[how]
        name = model.names.written(model.names.leaf(path))
        for layer in range(2):
            alone = quantize.kernel(quantize.quantize(how, file[name.format(layer)]))
            assert np.array_equal(values[path][layer], alone), path


def test_which_kernels_are_left(folder):
    model = models.find(str(folder), outputs=tiny.OUTPUTS)

    def left(how, *methods, **groups):
        built = peft.build(model, methods, groups)
        return sorted(
            weights.quantized(
                model, how, lambda path: any(method.moves(f"params/{path}") for method in built)
            )
        )

    assert left("nf4", "lora") == left("int8", "bitfit") == KERNELS
    assert left("int4", "full") == left("nf4", "partial_tuning") == []
    saved = {"modules_to_save": ("mlp.up",)}
    assert left("nf4", "lora", lora=saved) == [path for path in KERNELS if "up" not in path]
    with pytest.raises(Mistake, match=r"model.quantize: no 'nf5'.*nf4"):
        left("nf5", "lora")


# Methods of every kind, each on modules of its own: two groups are as good as a dozen models.
A = {
    "lora": {"rank": 3, "alpha": 7.0, "targets": ("query", "pooler")},
    "dora": {"rank": 2, "alpha": 5.0, "targets": ("key",)},
    "oft": {"blocks": 4, "targets": ("value",)},
    "boft": {"block_size": 8, "targets": ("attention.output",)},
    "vera": {"rank": 5, "d_initial": 0.7, "targets": ("mlp.up",)},
    "fourierft": {"n_frequency": 60, "scaling": 30.0, "targets": ("mlp.down",)},
}
B = {
    "loha": {"rank": 2, "alpha": 7.0, "targets": ("query",)},
    "lokr": {"rank": 3, "alpha": 7.0, "targets": ("key",)},
    "ia3": {"targets": ("value", "mlp.down"), "feedforward": ("mlp.down",)},
    "pissa": {"rank": 2, "alpha": 5.0, "targets": ("attention.output",)},
    "adalora": {"targets": ("mlp.up",)},
    "bitfit": {},
}
C = {"adapter": {"kind": "houlsby", "reduction": 4}, "prefix_tuning": {"tokens": 3}}


@pytest.mark.parametrize(("groups", "how"), [(A, "nf4"), (B, "int8"), (C, "int4")])
def test_methods_see_what_the_kernels_stand_for(folder, groups, how):
    """Outputs, gradients and what is merged are those of a float model with these kernels."""
    model, loaded = load(folder, how)
    methods = peft.build(model, tuple(groups), groups)
    attached, batch = peft.attach(methods, model), tiny.batch()
    if any(method.virtual_tokens for method in methods):
        batch = tiny.batch(virtual=peft.virtual_ids(methods, model))
    base = {"params": tree.map_with_path(lambda path, leaf: jnp.asarray(leaf), loaded.leaves())}
    add = tiny.hasty(attached.add)
    added = add(jax.random.key(1), loaded.variables())
    both = tree.flatten(added), tree.flatten(add(jax.random.key(1), base))
    for path, leaf in both[0].items():  # PiSSA's start too is of the dequantized kernels
        if "pissa" not in path and "attention/output/lora" not in path:
            np.testing.assert_allclose(leaf, both[1][path], rtol=1e-5, atol=1e-6, err_msg=path)
    added = _somewhere(added)
    claims = peft.claims(
        methods,
        [path for path in tree.flatten(loaded.variables() | added) if peft.may_move(path)],
        heads=model.heads,
    )

    def objective(moving, frozen):
        forward = train.bind(attached.apply, tree.join(moving, frozen))
        logits = forward(batch, train=False)
        return (logits**2).mean(), logits

    compute, found = tiny.hasty(jax.value_and_grad(objective, has_aux=True)), {}
    for name, variables in (("quantized", loaded.variables()), ("floats", base)):
        parts = tree.split(variables | added, lambda path: path in claims)
        (_, logits), grads = compute(*parts)
        found[name] = logits, tree.flatten(grads)
    of_quantized, of_floats = found["quantized"], found["floats"]
    np.testing.assert_allclose(of_quantized[0], of_floats[0], rtol=1e-4, atol=1e-5)
    assert not any(path.startswith("quant") for path in of_quantized[1])
    for path, grad in of_floats[1].items():
        size = float(abs(grad).max())
        np.testing.assert_allclose(
            of_quantized[1][path], grad, atol=1e-4 * size + 1e-7, err_msg=path
        )
    if groups is C:
        return
    merged = peft.merge(methods, base["params"], added)
    plain = tiny.hasty(model.module.apply)({"params": merged}, batch)
    np.testing.assert_allclose(plain, of_quantized[0], rtol=1e-3, atol=1e-4)


def _somewhere(added):
    """Added leaves that are not at their start, by a little."""

    def moved(path, leaf):
        if not path.startswith("peft/"):
            return leaf
        noise = random(*leaf.shape, seed=sum(path.encode()))
        return leaf + noise

    return tree.map_with_path(moved, added)
