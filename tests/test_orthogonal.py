"""Rotations of OFT and BOFT: the mathematics, training's dropout, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from bmft import tree
from bmft.errors import Mistake
from bmft.peft import boft, oft, rotation


def skew(n, k, size=0.3, seed=0):
    upper = np.random.default_rng(seed).normal(0, size, (n, k * (k - 1) // 2))
    return rotation.skew(jnp.asarray(upper, jnp.float32), k)


def test_the_upper_triangle_is_read_row_by_row():
    q = rotation.skew(jnp.arange(1.0, 7.0)[None], 4)
    want = [[0, 1, 2, 3], [-1, 0, 4, 5], [-2, -4, 0, 6], [-3, -5, -6, 0]]
    np.testing.assert_array_equal(q[0], want)


def test_cayley_is_a_rotation():
    r = np.eye(6) + np.asarray(rotation.cayley(skew(3, 6, size=2.0)))
    np.testing.assert_allclose(
        r @ r.swapaxes(-1, -2), np.broadcast_to(np.eye(6), r.shape), atol=1e-5
    )
    np.testing.assert_allclose(np.linalg.det(r), 1, atol=1e-5)


@pytest.mark.parametrize("k, size", [(3, 1.0), (33, 0.3)])
def test_cayley_and_its_gradient_are_those_of_solving(k, size):
    q = skew(4, k, size).reshape(2, 2, k, k)
    slope = np.random.default_rng(1).normal(size=q.shape)
    solved = lambda q: jnp.linalg.solve(jnp.eye(k) + q, -2 * q)  # noqa: E731
    (want, back), (found, own) = (jax.vjp(jax.jit(f), q) for f in (solved, rotation.cayley))
    np.testing.assert_allclose(found, want, atol=5e-6)
    (want,), (found,) = back(jnp.float32(slope)), own(jnp.float32(slope))
    np.testing.assert_allclose(found, want, atol=1e-5 * np.abs(want).max())
    np.testing.assert_array_equal(rotation.cayley(0 * q), 0 * q)  # to the bit: the base's input


def test_no_matrix_of_a_batch_waits_for_another():
    """LAPACK's LU of a batch, in two modules at once, stood still on two cores."""
    calls = jax.jit(jax.grad(lambda q: rotation.cayley(q).sum())).lower(skew(4, 6)).as_text()
    assert "stablehlo.while" in calls and "custom_call" not in calls


@pytest.mark.parametrize(
    "terms, factors", [(2, [2]), (3, [2, 2, 1]), (4, [2, 2, 1]), (6, [2] * 4 + [1])]
)
def test_the_series(terms, factors):
    q = np.asarray(skew(2, 4), np.float64)
    powers = [np.linalg.matrix_power(q, i + 1) for i in range(len(factors))]
    want = sum(factor * power for factor, power in zip(factors, powers, strict=True))
    np.testing.assert_allclose(rotation.neumann(skew(2, 4), terms), want, atol=1e-6)


def test_a_long_series_turns_the_other_way():
    q = skew(2, 4, size=0.1)
    np.testing.assert_allclose(rotation.neumann(q, 30), rotation.cayley(-q), atol=1e-6)


@pytest.mark.parametrize("n", [1, 3])
def test_turning_the_kernel_is_turning_the_input(n):
    rng, change = np.random.default_rng(1), rotation.cayley(skew(n, 4))
    x, kernel = rng.normal(size=(5, 2, 12)), rng.normal(size=(12, 7))
    want = rotation.turn(x, change) @ kernel
    np.testing.assert_allclose(x @ rotation.turn_kernel(kernel, change), want, atol=1e-5)


def test_factors_of_a_butterfly_mix_all_blocks():
    """Three factors of blocks of 2: each input of 8 reaches every output; two reach only 4."""
    x = jnp.eye(8)
    for i, reach in enumerate((2, 4, 8)):
        x = boft._turn(x, rotation.cayley(skew(4, 2, seed=i)), i)
        assert ((np.abs(x) > 1e-4).sum(0) == reach).all()
    np.testing.assert_allclose(x @ x.T, np.eye(8), atol=1e-6)


def test_a_constrained_rotation_is_no_longer_than_eps():
    long, short = np.full((1, 3), 9.0, np.float32), np.full((1, 3), 1e-3, np.float32)
    upper = jnp.concatenate([long, short, 0 * short])
    found = oft._shortened(upper, 0.5)
    lengths = np.linalg.norm(rotation.skew(found, 3), axis=(-1, -2))
    np.testing.assert_allclose(lengths, [0.5 / 3**0.5, 1e-3 * 6**0.5, 0], rtol=1e-5)
    np.testing.assert_array_equal(found[1:], upper[1:])
    gradient = jax.grad(lambda upper: oft._shortened(upper, 0.5)[..., 0].sum())(upper)
    assert np.isfinite(gradient).all()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.directory(tmp_path_factory.mktemp("bert"))


def test_dropout_of_blocks_in_training_only(folder):
    group = {"block_size": 4, "factors": 2, "dropout": 0.5}
    fitted = tiny.Fitted(folder, ("boft",), {"boft": group})
    key = jax.random.key(3)
    moved = tree.map_with_path(
        lambda p, x: jax.random.normal(key, x.shape) if p.endswith("boft_r") else x,
        fitted.variables,
    )
    batch = tiny.batch()
    still = fitted.apply(moved, batch)
    one, two = (fitted.apply(moved, batch, train=True, key=jax.random.key(i)) for i in (0, 1))
    assert np.array_equal(one, fitted.apply(moved, batch, train=True, key=jax.random.key(0)))
    assert np.abs(one - still).max() > 1e-3
    assert np.abs(one - two).max() > 1e-3


def test_one_factor_loses_a_share_of_its_blocks():
    class Module:
        has_rng = staticmethod(lambda name: True)
        make_rng = staticmethod(lambda name: jax.random.key(5))

    changes = jnp.ones((3, 10, 2, 2))
    kept = boft._dropped(Module, changes, 0.37)[:, :, 0, 0]
    assert sorted(np.asarray(10 - kept.sum(1))) == [0, 0, 3]


REFUSED = [
    ("oft", {}, "block_size is 32, which does not part the 24 inputs of layers/attention/query"),
    ("oft", {"block_size": 7}, "into equal blocks of 2 or more; the nearest that does is 8"),
    ("oft", {"blocks": 24}, "blocks is 24, .* the nearest that does is 12"),
    ("oft", {"blocks": 4, "block_size": 6}, "give one of the two"),
    ("oft", {"blocks": 0}, "blocks is 0; it must be 1 or more"),
    ("oft", {"block_size": 8, "terms": 1}, "terms is 1"),
    ("oft", {"block_size": 8, "coft": True, "eps": 0.0}, "eps is 0.0"),
    ("oft", {"block_size": 8, "bias": "boft_only"}, "did you mean 'oft_only'"),
    ("oft", {"block_size": 8, "targets": ("LayerNorm",)}, "matches no module"),
    ("boft", {"block_size": 3, "factors": 2}, "by 2 factors; the nearest that does is 4"),
    ("boft", {"block_size": 4, "factors": 3}, "by 3 factors; the nearest that does is 6"),
    ("boft", {"factors": 0}, "factors is 0"),
    ("boft", {"dropout": 1.0}, "dropout is 1.0"),
    ("boft", {"bias": "lora_only"}, "did you mean"),
]


@pytest.mark.parametrize("method, group, says", REFUSED)
def test_what_is_refused(folder, method, group, says):
    with pytest.raises(Mistake, match=says):
        tiny.Fitted(folder, (method,), {method: group})
