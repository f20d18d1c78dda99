"""Quantized bases: numbers against bitsandbytes', and models against the floats they stand for."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

from bmft import models, peft, quantize, tree
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
    kernel = GOLDEN[f"{name}/kernel"]
    leaves = quantize.quantize("nf4", kernel)
    for ours, theirs in (("nf4", "codes"), ("nf4_absmax", "absmax")):
        assert leaves[ours].dtype == np.uint8
        assert np.array_equal(leaves[ours].ravel(), GOLDEN[f"{name}/{theirs}"])
    # Their mean of the absmax is summed in float32, and all that follows is off by its last bit.
    for ours, theirs in (("nf4_scale", "scale"), ("nf4_offset", "offset")):
        np.testing.assert_allclose(leaves[ours], GOLDEN[f"{name}/{theirs}"], rtol=1e-6)
    values = quantize.kernel(leaves)
    np.testing.assert_allclose(values.T, GOLDEN[f"{name}/values"], rtol=1e-6, atol=1e-7)


def test_values_are_the_same_in_a_program():
    """Of all schemes at once, of two layers each."""
    stacks = []
    for how in quantize.SCHEMES:
        both = [quantize.quantize(how, random(6, 320, seed=seed)) for seed in (0, 1)]
        stacks.append({name: np.stack([one[name] for one in both]) for name in both[0]})
    made = tiny.hasty(lambda stacks: [quantize.kernel(leaves) for leaves in stacks])(stacks)
    for leaves, values in zip(stacks, made, strict=True):
        np.testing.assert_allclose(values, quantize.kernel(leaves), rtol=1e-6, atol=1e-7)


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


# Methods of every kind, each on modules of its own: three groups are as good as a dozen models.
A = {
    "lora": {"rank": 3, "alpha": 7.0, "targets": ("query", "pooler")},
    "loha": {"rank": 2, "alpha": 7.0, "targets": ("key",)},
    "oft": {"blocks": 4, "targets": ("value",)},
    "boft": {"block_size": 8, "targets": ("attention.output",)},
    "vera": {"rank": 5, "d_initial": 0.7, "targets": ("mlp.up",)},
    "fourierft": {"n_frequency": 60, "scaling": 30.0, "targets": ("mlp.down",)},
}
B = {
    "lokr": {"rank": 3, "alpha": 7.0, "targets": ("query",)},
    "dora": {"rank": 2, "alpha": 5.0, "targets": ("key", "mlp.up")},
    "ia3": {"targets": ("value", "mlp.down"), "feedforward": ("mlp.down",)},
}
C = {"pissa": {"rank": 2, "alpha": 5.0, "targets": ("attention.output",)}}  # not beside DoRA


@pytest.fixture(scope="module")
def plain(folder):
    """(params, batch) -> logits of the model alone."""
    model = models.find(str(folder), outputs=tiny.OUTPUTS)
    return tiny.hasty(lambda params, batch: model.module.apply({"params": params}, batch))


@pytest.mark.parametrize(("groups", "how"), [(A, "nf4"), (B, "int8"), (C, "int4")])
def test_methods_see_what_the_kernels_stand_for(folder, plain, groups, how):
    """Outputs are those of a float model with these kernels that the methods are merged into; of
    B gradients, too (through DoRA's own rule), are those on such a model."""
    model, loaded = load(folder, how)
    methods = peft.build(model, tuple(groups), groups)
    attached, batch, quantized = peft.attach(methods, model), tiny.batch(), loaded.variables()
    floats = {"params": jax.tree.map(jnp.asarray, loaded.leaves())}
    added = tiny.hasty(attached.add)(jax.random.key(1), quantized)
    _check_start(groups, added, floats["params"])
    added = _somewhere(added)
    compute = _with_gradients(methods, model, attached) if groups is B else attached.apply
    compute = tiny.hasty(compute)
    found, *grads = jax.tree.leaves(compute(quantized | added, batch))
    assert abs(found - plain(floats["params"], batch)).max() > 0.05
    merged = peft.merge(methods, floats["params"], added)
    np.testing.assert_allclose(plain(merged, batch), found, rtol=1e-3, atol=1e-4)
    if groups is not B:
        return
    wanted, *others = jax.tree.leaves(compute(floats | added, batch))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    assert len(grads) == len(others)
    for grad, other in zip(grads, others, strict=True):
        close = 1e-4 * float(abs(other).max())
        np.testing.assert_allclose(grad, other, rtol=0, atol=close)


def _check_start(groups, added, params):
    """Leaves that start from kernels start from these."""
    attention = [side["layers"]["attention"] for side in (added["peft"], params)]
    if "dora" in groups:
        own, kernels = (side["key"] for side in attention)
        lengths = np.linalg.norm(kernels["kernel"], axis=1)
        np.testing.assert_allclose(own["lora_magnitude"], lengths, rtol=1e-5)
    if "pissa" in groups:
        own, kernels = (side["output"] for side in attention)
        values = np.linalg.svd(np.asarray(kernels["kernel"]), compute_uv=False)[:, :2]
        scaled = 2.5 * np.linalg.norm(own["lora_a"], axis=1) * np.linalg.norm(own["lora_b"], axis=2)
        np.testing.assert_allclose(scaled, values, rtol=1e-4)


def _with_gradients(methods, model, attached):
    """variables, batch -> (logits, gradients of what moves)."""

    def compute(variables, batch):
        paths = [path for path in tree.flatten(variables) if peft.may_move(path)]
        claims = peft.claims(methods, paths, heads=model.heads)
        moving, frozen = tree.split(variables, lambda path: path in claims)

        def objective(moving):
            logits = attached.apply(tree.join(moving, frozen), batch)
            return (logits**2).mean(), logits

        grads, logits = jax.grad(objective, has_aux=True)(moving)
        return logits, grads

    return compute


def _somewhere(added):
    """Added leaves that are not at their start, by a little."""

    def moved(path, leaf):
        if not path.startswith("peft/"):
            return leaf
        noise = random(*leaf.shape, seed=sum(path.encode()))
        return leaf + noise

    return tree.map_with_path(moved, added)
