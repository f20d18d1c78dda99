"""LoRA on convolutions: whatever the geometry, the merged kernel computes what the update does.

A net here is a row of unlike convolutions, each with an image of its own, so that one program
computes them all. What is merged is computed by NumPy, from the definition of a convolution.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from bmft import layers, peft, tree
from bmft.errors import Mistake
from bmft.names import Leaf, Names
from bmft.peft import convolution


class Case(NamedTuple):
    """A convolution, its input and the rank of its update."""

    size: tuple  # of the image
    channels: int
    features: int
    kernel: tuple
    strides: tuple = (1, 1)
    padding: tuple = ((0, 0), (0, 0))
    dilation: tuple = (1, 1)
    groups: int = 1
    rank: int = 2


def drawn(rng):
    """A case in which every number is its own, and the kernel fits the image."""
    while True:
        pair = lambda high: tuple(int(n) for n in rng.integers(1, high, 2))  # noqa: E731
        groups = int(rng.choice([1, 1, 2, 3]))
        case = Case(
            size=pair(10),
            channels=groups * int(rng.integers(1, 4)),
            features=groups * int(rng.integers(1, 4)),
            kernel=pair(6),
            strides=pair(4),
            padding=tuple(tuple(int(n) for n in rng.integers(0, 4, 2)) for _ in range(2)),
            dilation=pair(4),
            groups=groups,
            rank=groups * int(rng.integers(1, 4)),
        )
        sides = zip(case.size, case.padding, case.kernel, case.dilation, strict=True)
        if all(n + sum(pad) > (k - 1) * d for n, pad, k, d in sides):
            return case


class Net(nn.Module):
    cases: tuple
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, batch, train=False):
        outputs = []
        for i, c in enumerate(self.cases):
            about = c.kernel, c.strides, c.padding, c.dilation, c.groups, self.dtype, i % 2 == 0
            outputs.append(layers.Conv(c.features, *about, name=f"conv{i}")(batch[f"x{i}"]))
        return outputs


class Model(NamedTuple):
    """What methods see of a model."""

    module: Any
    names: Names
    dummy: dict
    name: str = "net"
    heads: tuple = ()


def model_of(cases, seed=0):
    rng = np.random.default_rng(seed)
    batch = {
        f"x{i}": rng.normal(size=(2, *case.size, case.channels)).astype(np.float32)
        for i, case in enumerate(cases)
    }
    leaves = (Leaf(f"conv{i}/kernel", f"conv{i}.weight", "conv") for i in range(len(cases)))
    return Model(Net(tuple(cases)), Names(tuple(leaves), 0, ""), batch)


def adapted(model, **group):
    """(methods, variables, apply): LoRA with random factors of such a size that outputs stay so."""
    ranks = tuple(f"conv{i}={case.rank}" for i, case in enumerate(model.module.cases))
    group = {"targets": ("all-conv",), "alpha": 5.0, "rank_pattern": ranks} | group
    methods = peft.build(model, ("lora",), {"lora": group})
    add, apply = peft.attach(methods, model)

    rng, base = np.random.default_rng(1), {}
    for i, case in enumerate(model.module.cases):
        shape = (*case.kernel, case.channels // case.groups, case.features)
        base[f"params/conv{i}/kernel"] = normal(rng, shape)
        if i % 2 == 0:
            base[f"params/conv{i}/bias"] = normal(rng, shape[-1:])
    base = tree.unflatten(base)
    shapes = jax.eval_shape(add, jax.random.key(0), base)["peft"]
    own = tree.map_with_path(lambda path, leaf: normal(rng, leaf.shape), shapes)
    constants = jax.device_get(peft.constants(methods))  # as an export has them: NumPy merges
    return methods, base | {"peft": own} | constants, apply


def normal(rng, shape):
    return rng.normal(0, np.prod(shape[:-1]) ** -0.5, shape).astype(np.float32)


def convolved(x, params, case):
    """The convolution of a case, in float64."""
    kernel, bias = np.float64(params["kernel"]), params.get("bias", 0)
    x = np.pad(np.float64(x), ((0, 0), *case.padding, (0, 0)))
    spans = [(k - 1) * d for k, d in zip(case.kernel, case.dilation, strict=True)]
    h, w = (
        (x.shape[1] - spans[0] - 1) // case.strides[0],
        (x.shape[2] - spans[1] - 1) // case.strides[1],
    )
    out = 0
    for u, v in np.ndindex(case.kernel):
        top, left = u * case.dilation[0], v * case.dilation[1]
        seen = x[:, top : top + h * case.strides[0] + 1 : case.strides[0]]
        seen = seen[:, :, left : left + w * case.strides[1] + 1 : case.strides[1]]
        parts = zip(
            np.split(seen, case.groups, -1), np.split(kernel[u, v], case.groups, -1), strict=True
        )
        out = out + np.concatenate([part @ weights for part, weights in parts], -1)
    return out + bias


@pytest.mark.parametrize("seed", range(8))
def test_merged_is_unmerged_for_any_geometry(seed):
    """25 drawn convolutions a seed, 200 in all; alpha is unlike any rank."""
    rng = np.random.default_rng(seed)
    cases = [drawn(rng) for _ in range(25)]
    model = model_of(cases, seed)
    methods, variables, apply = adapted(model, rslora=bool(seed % 2))
    added = {name: variables[name] for name in ("peft", "peft_const")}
    merged = peft.merge(methods, variables["params"], added)
    unmerged = tiny.hasty(apply)(variables, model.dummy)  # compiling is all of the time
    moved = 0
    for i, (case, got) in enumerate(zip(cases, jax.device_get(unmerged), strict=True)):
        x, name = model.dummy[f"x{i}"], f"conv{i}"
        want = convolved(x, merged[name], case)
        assert got.shape == want.shape, case
        np.testing.assert_allclose(got, want, atol=1e-5, err_msg=str(case))
        moved += np.abs(got - convolved(x, variables["params"][name], case)).max() > 1e-3
    assert moved >= 20  # some kernels see nothing but padding


def test_the_update_is_that_of_its_definition():
    """Against a plain sum, in float64: y[o] = sum over r of B[r, o] scale[r] (A_r * x)."""
    case = Case((5, 4), 4, 6, (3, 2), (2, 1), ((1, 0), (0, 2)), (1, 2), groups=2, rank=4)
    methods, variables, apply = adapted(model_of([case]), alpha=3.0)
    leaves = {path: np.float64(leaf) for path, leaf in tree.flatten(variables["peft"]).items()}
    a, b = leaves["conv0/lora_a"], leaves["conv0/lora_b"]
    assert a.shape == (3, 2, 2, 4)
    assert b.shape == (1, 1, 2, 6)
    x = np.float64(model_of([case]).dummy["x0"])
    x = np.pad(x, ((0, 0), *case.padding, (0, 0)))
    scale, (h, w) = 3.0 / 4, (2, 4)
    update = np.zeros((2, h, w, 6))
    for o in range(6):
        group = o // 3
        for r in range(2):
            for i, j, u, v, c in np.ndindex(h, w, 3, 2, 2):
                seen = x[:, 2 * i + u, j + 2 * v, 2 * group + c]
                at = 2 * group + r
                update[:, i, j, o] += scale * b[0, 0, r, o] * a[u, v, c, at] * seen
    model = model_of([case])
    difference = apply(variables, model.dummy)[0] - apply(variables, model.dummy, adapter=False)[0]
    np.testing.assert_allclose(difference, update, atol=1e-5)


def test_an_update_as_peft_groups_it_does_not_merge():
    case = Case((5, 4), 4, 6, (3, 3), groups=2, rank=4)
    model = model_of([case])
    methods, variables, apply = adapted(model, grouped=False)
    shapes = {path: leaf.shape for path, leaf in tree.flatten(variables["peft"]).items()}
    assert shapes == {"conv0/lora_a": (3, 3, 4, 4), "conv0/lora_b": (1, 1, 2, 6)}
    apply(variables, model.dummy)
    added = {name: variables[name] for name in ("peft", "peft_const")}
    with pytest.raises(Mistake, match="cannot be merged .* conv0 is a convolution in groups of 2"):
        peft.merge(methods, variables["params"], added)
    plain = model_of([case._replace(groups=1)])  # where there are no groups, it is the same
    methods, variables, _ = adapted(plain, grouped=False)
    added = {name: variables[name] for name in ("peft", "peft_const")}
    peft.merge(methods, variables["params"], added)


def test_a_rank_that_is_no_multiple_of_the_groups_is_refused():
    model = model_of([Case((5, 5), 4, 4, (1, 1), groups=4, rank=6)])
    says = "conv0 is a convolution in 4 groups, and rank 6 is no multiple of them; try 8"
    with pytest.raises(Mistake, match=says):
        adapted(model)
    model = model_of([Case((5, 5), 4, 4, (1, 1), groups=4, rank=8)])
    assert adapted(model)[1]["peft"]["conv0"]["lora_b"].shape == (1, 1, 2, 4)


def test_the_start_counts_the_kernel():
    """A uniform in ±1/sqrt(in kh kw), of the channels that a group reads; B zero."""
    case = Case((5, 5), 6, 8, (3, 5), groups=2, rank=400)
    model = model_of([case])
    methods = peft.build(model, ("lora",), {"lora": {"targets": ("conv0",), "rank": 400}})
    base = model.module.init(jax.random.key(0), model.dummy)
    leaves = peft.attach(methods, model).add(jax.random.key(1), base)["peft"]["conv0"]
    bound = (3 * 3 * 5) ** -0.5
    assert 0.99 * bound < np.abs(leaves["lora_a"]).max() <= bound
    assert abs(leaves["lora_a"].std() - bound / 3**0.5) < 0.01 * bound
    assert not np.any(leaves["lora_b"])


def test_dropout_meets_the_input_of_the_update_alone():
    model = model_of([Case((6, 6), 3, 4, (3, 3), rank=2)])
    methods, variables, _ = adapted(model, dropout=0.5)
    apply = peft.attach(methods, model).apply
    still = apply(variables, model.dummy, train=False, key=jax.random.key(0))[0]
    one, two = (apply(variables, model.dummy, train=True, key=jax.random.key(k))[0] for k in (0, 1))
    assert np.abs(one - still).max() > 1e-3 and np.abs(one - two).max() > 1e-3
    zero = tree.map_with_path(lambda path, x: x * (not path.endswith("lora_b")), variables)
    base = apply(variables, model.dummy, adapter=False)[0]
    dropped = apply(zero, model.dummy, train=True, key=jax.random.key(0))[0]
    np.testing.assert_array_equal(base, dropped)


def test_low_precision_base_with_float32_leaves():
    model = model_of([Case((6, 6), 3, 4, (3, 3), rank=2)])
    model = model._replace(module=model.module.clone(dtype=jnp.bfloat16))
    _, variables, apply = adapted(model)
    out = apply(variables, model.dummy)[0]
    assert out.dtype == jnp.bfloat16
    want = adapted(model_of(model.module.cases))[2](variables, model.dummy)[0]
    assert 0 < np.abs(out.astype(np.float32) - want).max() < 0.05


@pytest.mark.parametrize(
    "changes, grouped, known",
    [
        ({}, True, True),
        ({"strides": (2, 3), "padding": ((1, 1), (0, 2))}, True, True),
        ({"dilation": (1, 2)}, True, False),
        ({"dilation": (1, 2)}, False, False),
        ({"groups": 2}, True, False),
        ({"groups": 2}, False, True),
    ],
)
def test_what_peft_can_compute(changes, grouped, known):
    """It gives its A no dilation, and its A reads all channels; the rest is written as ours."""
    model = model_of([Case((9, 9), 4, 6, (3, 3)), Case((9, 9), 4, 6, (3, 3))._replace(**changes)])
    group = {"targets": ("all-conv",), "rank": 2, "grouped": grouped}
    (method,) = peft.build(model, ("lora",), {"lora": group})
    assert method.files.expressible(model) == known
    assert method.files.own == "CONV_LORA"


def test_geometry_is_the_modules():
    cases = [
        Case((5, 4), 4, 6, (3, 2), (2, 1), ((1, 0), (0, 2)), (1, 2), 2),
        Case((5, 5), 1, 1, (1, 1)),
    ]
    found = convolution.geometry(model_of(cases))
    assert set(found) == {"conv0", "conv1"}
    for i, case in enumerate(cases):
        conv = found[f"conv{i}"]
        assert (conv.strides, conv.padding, conv.dilation, conv.groups) == case[4:8]
