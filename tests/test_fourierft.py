"""FourierFT: which entries move, the update they make, and what is refused."""

import hashlib
import math

import jax
import numpy as np
import pytest
import tiny

from bmft import models, peft
from bmft.errors import Mistake
from bmft.peft import fourierft, portable

# Of torch.randperm(960) and torch.randperm(100_000), seeded with 777.
GOLDEN, DIGEST = [935, 63, 621, 188, 487, 902, 807, 861], "f86d26179f3c3507"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return models.find(str(tiny.directory(tmp_path_factory.mktemp("bert"))), outputs=tiny.OUTPUTS)


def test_entries_are_torchs():
    """torch.randperm's, of a generator seeded so (torch 2.13); live in tests/parity."""
    assert fourierft.permutation(960, 8, 777).tolist() == GOLDEN
    whole = fourierft.permutation(100_000, 100_000, 777).astype(np.int64)
    assert np.array_equal(np.sort(whole), np.arange(100_000))
    assert hashlib.sha256(whole.tobytes()).hexdigest()[:16] == DIGEST
    # Fewer are the first of more: a pattern takes away from the end.
    assert np.array_equal(fourierft.permutation(100_000, 50, 777), whole[:50])
    with pytest.raises(Mistake, match="too large"):
        fourierft.permutation(10**9, 5, 777)


def test_the_update_is_the_real_part_of_the_inverse_transform():
    """By the definition, in torch's layout [out, in]: sums over the entries of a cosine."""
    spectrum = np.random.default_rng(0).normal(size=(2, 9)).astype(np.float32)
    read, out = fourierft._entries("x", (6, 10), 9, 777)
    found = fourierft._change(spectrum, (read, out), (2, 6, 10))
    flat = fourierft.permutation(60, 9, 777)
    i, o = np.meshgrid(np.arange(6), np.arange(10), indexing="ij")
    for layer in range(2):
        want = sum(
            c * np.cos(2 * np.pi * (p % 6 * i / 6 + p // 6 * o / 10)) / 60
            for c, p in zip(spectrum[layer], flat, strict=True)
        )
        np.testing.assert_allclose(found[layer], want, atol=1e-6)


def test_start(model):
    group = {"n_frequency": 500, "targets": ("mlp.up",), "n_frequency_pattern": ("layers.2.*=3",)}
    for init_weights in (False, True):
        group |= {"init_weights": init_weights}
        (method,) = peft.build(model, ("fourierft",), {"fourierft": group})
        shapes = jax.eval_shape(model.module.init, jax.random.key(0), model.dummy)
        base = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
        added = jax.jit(peft.attach((method,), model).add)(jax.random.key(1), base)
        leaves = {**added["peft"]["layers"]["mlp"]["up"]}
        spectrum = np.asarray(leaves.pop("fourierft_spectrum"))
        assert spectrum.shape == (3, 500) and not leaves
        if init_weights:
            assert not spectrum.any() and method.identity == 0
        else:
            assert spectrum.std() == pytest.approx(1, abs=0.05) and method.identity == math.inf
    scale = added["peft_const"]["layers"]["mlp"]["up"]["fourierft_scale"]
    assert (np.asarray(scale) > 0).sum(1).tolist() == [500, 500, 3]


@pytest.mark.parametrize(
    "group, says",
    [
        ({"n_frequency": 0}, "n_frequency is 0"),
        ({"n_frequency": 577}, "query has a spectrum of 576 entries, of which 577 cannot move"),
        ({"n_frequency": 5, "n_frequency_pattern": ("qury=4",)}, "'qury' matches no target"),
        ({"n_frequency": 5, "n_frequency_pattern": ("query",)}, "not of the form"),
        ({"n_frequency": 5, "n_frequency_pattern": ("query=0",)}, "not of the form"),
        ({"n_frequency": 5, "n_frequency_pattern": ("(=4",)}, "not of the form"),
        ({"n_frequency": 5, "targets": ("classifier",)}, "matches no module"),
    ],
)
def test_what_is_refused(model, group, says):
    with pytest.raises(Mistake, match=says):
        portable.expected(peft.build(model, ("fourierft",), {"fourierft": group}), model)
