"""What DoRA, PiSSA, LoRA+ and LoRA on embeddings have of their own, beside the contract that every
method keeps (tests/test_methods.py)."""

from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_conv_lora import Model

from bmft import layers, optim, peft, tree
from bmft.errors import Mistake
from bmft.names import Leaf, Names
from bmft.peft import files

IN, OUT, RANK, ALPHA = 6, 9, 2, 5.0


class Net(nn.Module):
    features: int = OUT

    @nn.compact
    def __call__(self, x, train=False):
        return layers.Dense(self.features, name="dense")(x)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def adapted(method, features=OUT, **group):
    """(variables, apply) of one dense layer; kernel and bias are random."""
    leaves = (Leaf("dense/kernel", "dense.weight", "transpose"), Leaf("dense/bias", "dense.bias"))
    model = Model(Net(features), Names(leaves, 0, ""), normal(0, 4, 3, IN))
    group = {"targets": ("dense",), "rank": RANK, "alpha": ALPHA} | group
    methods = peft.build(model, (method,), {method: group})
    add, apply = peft.attach(methods, model)
    base = {"params": {"dense": {"kernel": normal(1, IN, features), "bias": normal(2, features)}}}
    return base | add(jax.random.key(3), base), apply


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return tiny.directory(tmp_path_factory.mktemp("bert") / "bert")


def test_dora_is_its_definition_and_so_are_its_gradients():
    """Of W' = m V / |V|, with no gradient through |V|; V is built here, and never there."""
    variables, apply = adapted("dora")
    flat, x = tree.flatten(variables), normal(5, 4, 3, IN)
    np.testing.assert_allclose(
        flat["peft/dense/lora_magnitude"],
        np.linalg.norm(flat["params/dense/kernel"], axis=0),
        rtol=1e-6,
    )
    for seed, path in enumerate(path for path in flat if path.startswith("peft/")):
        flat[path] += 0.5 * normal(10 + seed, *flat[path].shape)
    target = normal(6, 4, 3, OUT)

    def direct(flat, x):
        a, b = flat["peft/dense/lora_a"], flat["peft/dense/lora_b"]
        v = flat["params/dense/kernel"] + ALPHA / RANK * a @ b
        norm = jax.lax.stop_gradient(jnp.linalg.norm(v, axis=0))
        weight = flat["peft/dense/lora_magnitude"] * v / norm
        return ((x @ weight + flat["params/dense/bias"] - target) ** 2).sum()

    def ours(flat, x):
        return ((apply(tree.unflatten(flat), x) - target) ** 2).sum()

    want, got = (tiny.hasty(jax.value_and_grad(f, argnums=(0, 1)))(flat, x) for f in (direct, ours))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    for path in want[1][0]:
        if path.startswith("peft_const/"):  # the scale never moves
            continue
        scale = np.abs(want[1][0][path]).max()
        np.testing.assert_allclose(
            got[1][0][path], want[1][0][path], atol=1e-5 * scale, err_msg=path
        )
    np.testing.assert_allclose(got[1][1], want[1][1], atol=1e-5 * np.abs(want[1][1]).max())


def test_doras_dropout_meets_what_is_stretched_and_not_the_base():
    """W = 1, B = 0, m = 3 |W|: y = x + 2 dropout(x), as PEFT computes it."""
    variables, apply = adapted("dora", features=IN, dropout=0.25)
    flat, x = tree.flatten(variables), normal(5, 4, 3, IN)
    flat["params/dense/kernel"] = jnp.eye(IN)
    flat["params/dense/bias"] *= 0
    flat["peft/dense/lora_magnitude"] = 3 * jnp.ones(IN)
    variables = tree.unflatten(flat)
    np.testing.assert_allclose(apply(variables, x), 3 * x, rtol=1e-6)
    share = apply(variables, x, train=True, key=jax.random.key(0)) / x
    dropped = np.isclose(share, 1, atol=1e-5)
    assert 0 < dropped.sum() < share.size
    np.testing.assert_allclose(np.where(dropped, 1, share), np.where(dropped, 1, 1 + 2 / 0.75))


def test_a_column_of_zeros_stays_one_under_dora():
    variables, apply = adapted("dora")
    flat, x = tree.flatten(variables), normal(5, 4, 3, IN)
    flat["params/dense/kernel"] = flat["params/dense/kernel"].at[:, 1].set(0.0)
    flat["peft/dense/lora_magnitude"] = flat["peft/dense/lora_magnitude"].at[1].set(0.0)
    assert np.isfinite(apply(tree.unflatten(flat), x)).all()


@pytest.mark.parametrize("rslora, scale", [(False, ALPHA / RANK), (True, ALPHA / RANK**0.5)])
def test_pissa_starts_from_the_principal_part(rslora, scale):
    variables, apply = adapted("pissa", rslora=rslora)
    flat, x = tree.flatten(variables), normal(5, 4, 3, IN)
    a, b = flat["peft/dense/lora_a"], flat["peft/dense/lora_b"]
    assert np.array_equal(a, flat["peft_const/dense/pissa_a"])
    assert np.array_equal(b, flat["peft_const/dense/pissa_b"])
    u, s, v = np.linalg.svd(np.float64(flat["params/dense/kernel"]))
    best = u[:, :RANK] * s[:RANK] @ v[:RANK]
    np.testing.assert_allclose(scale * a @ b, best, atol=1e-5)
    # The singular values are shared out evenly.
    np.testing.assert_allclose(a.T @ a, np.diag(s[:RANK] / scale), atol=1e-5)
    np.testing.assert_allclose(b @ b.T, np.diag(s[:RANK] / scale), atol=1e-5)
    # As PiSSA's residual base with A and B that have moved.
    flat["peft/dense/lora_a"], flat["peft/dense/lora_b"] = a + 0.3, b - 0.2
    residual = flat["params/dense/kernel"] - best
    want = x @ (residual + scale * (a + 0.3) @ (b - 0.2)) + flat["params/dense/bias"]
    np.testing.assert_allclose(apply(tree.unflatten(flat), x), want, atol=1e-4)


def test_lora_on_an_embedding_starts_the_other_way_round(bert):
    group = {"rank": 200, "targets": ("word_embeddings",)}
    own = tiny.Fitted(bert, ("lora",), {"lora": group}).variables["peft"]
    assert tree.describe(own) == [
        ("embeddings/word/lora_a", (53, 200), "float32"),
        ("embeddings/word/lora_b", (200, 24), "float32"),
    ]
    a, b = (np.asarray(leaf) for leaf in tree.flatten(own).values())
    assert not a.any()
    assert abs(b.mean()) < 0.06 and abs(b.std() - 1) < 0.04


def test_rates_of_labels_with_a_factor():
    config = SimpleNamespace(
        optim=SimpleNamespace(learning_rate=0.1, weight_decay=0.5, head_learning_rate=None),
        peft={"lora_plus": {"learning_rate": 0.01, "weight_decay": 0.2}},
    )
    labels = ["lora_plus", "lora_plus*2.5", "head", "full"]
    assert optim.rates(config, labels) == {
        "lora_plus": (0.01, 0.2),
        "lora_plus*2.5": (0.025, 0.2),
        "head": (0.1, 0.5),
        "full": (0.1, 0.5),
    }


def test_labels_of_lora_plus(bert):
    group = {"ratio": 4.0, "bias": "lora_only", "modules_to_save": ("pooler",)}
    claims = tiny.Fitted(bert, ("lora_plus",), {"lora_plus": group}).claims
    slow, fast = "lora_plus", "lora_plus*4"
    want = {
        "peft/layers/attention/value/lora_a": slow,
        "peft/layers/attention/value/lora_b": fast,
        "params/layers/attention/value/bias": fast,
        "params/pooler/kernel": slow,
        "params/pooler/bias": fast,
        "params/classifier/out/bias": "head",
    }
    assert {path: claims[path] for path in want} == want
    assert set(claims.values()) == {slow, fast, "head"}


PATTERNS = {
    "rank": 3,
    "alpha": 7.0,
    "targets": ("query", "up", "pooler"),
    "rank_pattern": ("layer.1.*=5",),
    "alpha_pattern": ("pooler=2",),
    "bias": "lora_only",
}
WRITTEN = [
    ({"pissa": {**PATTERNS, "rslora": True}}, ("lora",)),
    ({"lora_plus": PATTERNS}, ("lora",)),
    ({"pissa": PATTERNS, "norm_tuning": {}}, ("pissa", "norm_tuning")),
]


@pytest.mark.parametrize("groups, names", WRITTEN)
def test_what_is_written_computes_the_same_when_read(bert, tmp_path, groups, names):
    """PiSSA alone and LoRA+ as a LoRA; PiSSA with others by our own paths, its start beside it."""
    fitted = tiny.Fitted(bert, tuple(groups), groups)
    moving = tree.map_with_path(
        lambda path, x: x + 0.1 * normal(len(path), *x.shape), fitted.moving
    )
    rows = {path: peft.moving_rows(fitted.methods, path) for path in fitted.claims}
    assert all(mask is None for mask in rows.values())
    told = {"base": "tiny", "fingerprint": "f" * 64}
    about = fitted.methods, fitted.groups, fitted.model, moving, fitted.frozen
    files.write(tmp_path, *about, **told)
    adapter = files.read(tmp_path, fitted.model)
    assert adapter.names == names
    read = files.insert(adapter, fitted.loaded.variables(), fitted.loaded.fresh)
    apply = tiny.hasty(peft.attach(adapter.methods, fitted.model).apply)
    want = fitted.apply(tree.join(moving, fitted.frozen), tiny.batch())
    np.testing.assert_allclose(apply(read, tiny.batch()), want, atol=2e-5)


BAD = [
    (("dora",), {"targets": ("word",)}, "embeddings/word is a module of another kind: dora is"),
    (("pissa",), {"targets": ("word",)}, "lora is for convolutions and embeddings, too"),
    (("pissa",), {"rank": 25}, "has 24 singular values, and rank 25 asks for more"),
    (("lora_plus",), {"ratio": 0.5}, "peft.lora_plus.ratio is 0.5; it must be 1 or more"),
    (("lora_plus",), {"targets": ("word",)}, "for dense layers and convolutions; lora"),
    (("dora",), {"rank": 0}, "peft.dora.rank is 0"),
    (
        ("pissa",),
        {"rank_pattern": ("qury=2",)},
        "peft.pissa.rank_pattern: 'qury' matches no target",
    ),
    (("lora", "dora"), {}, "two of them add lora_a to layers/attention/query; give up one"),
    (("lora", "dora"), {"targets": ("up",)}, "moved both as 'lora' and as 'dora'"),
]


@pytest.mark.parametrize("methods, group, says", BAD)
def test_what_is_refused(bert, methods, group, says):
    with pytest.raises(Mistake) as refused:
        tiny.Fitted(bert, methods, {methods[-1]: group})
    assert says in str(refused.value)
