"""LoHa, LoKr and Compacter against their formulas, written out; their starts; what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from bmft import evaluate, peft, tree
from bmft.errors import Mistake
from bmft.peft import files, lokr, lycoris


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.directory(tmp_path_factory.mktemp("bert") / "bert")


def built(folder, method, **group):
    """(Fitted, its variables with leaves of the method that are no longer as they started)"""
    fitted = tiny.Fitted(folder, (method,), {method: group})
    rng = np.random.default_rng(0)
    moved = tree.map_with_path(
        lambda path, x: x + rng.normal(0, 0.3, x.shape) if path.startswith("peft") else x,
        {name: fitted.variables[name] for name in fitted.variables if name != "peft_const"},
    )
    return fitted, fitted.variables | moved


def changes(fitted, variables, module):
    """[l, in, out]: what the method changes of a kernel, by its merge."""
    params = peft.merge(fitted.methods, variables["params"], variables)
    both = (tree.flatten(each)[f"{module}/kernel"] for each in (params, variables["params"]))
    merged, plain = map(np.asarray, both)
    return merged - plain


@pytest.mark.parametrize("rank", [2, 5])  # by products of columns, and by the whole matrix
def test_loha_is_a_hadamard_product(folder, rank):
    group = {"rank": rank, "alpha": 7.0, "targets": ("mlp.up",), "rank_pattern": ("layer.1.*=1",)}
    fitted, variables = built(folder, "loha", **group)
    leaves = jax.tree.map(np.asarray, variables["peft"]["layers"]["mlp"]["up"])
    assert {name: leaf.shape for name, leaf in leaves.items()} == {
        "loha_a1": (3, rank, 40),
        "loha_a2": (3, rank, 40),
        "loha_b1": (3, 24, rank),
        "loha_b2": (3, 24, rank),
    }
    want = np.zeros((3, 24, 40))
    for layer, r in enumerate((rank, 1, rank)):
        a1, a2, b1, b2 = (leaves[name][layer] for name in sorted(leaves))
        want[layer] = (b1[:, :r] @ a1[:r]) * (b2[:, :r] @ a2[:r]) * 7 / r
    np.testing.assert_allclose(changes(fitted, variables, "layers/mlp/up"), want, atol=1e-5)
    params = tree.flatten(variables["params"])
    params["layers/mlp/up/kernel"] += jnp.asarray(want, jnp.float32)
    plain = tiny.plain(fitted.model.module, tree.unflatten(params), tiny.batch())
    np.testing.assert_allclose(fitted.apply(variables, tiny.batch()), plain, atol=2e-5)


def test_lokr_is_a_kronecker_product(folder):
    """Of matrices that are products in some layers and stand whole in others."""
    group = {"rank": 1, "alpha": 7.0, "targets": ("mlp.up",), "decompose_both": True}
    group["rank_pattern"] = ("layer.1.*=3", "layer.2.*=9")
    fitted, variables = built(folder, "lokr", **group)
    leaves = jax.tree.map(np.asarray, variables["peft"]["layers"]["mlp"]["up"])
    assert {name: leaf.shape for name, leaf in leaves.items()} == {
        "lokr_w1": (3, 4, 5),
        "lokr_b1": (3, 4, 1),
        "lokr_a1": (3, 1, 5),
        "lokr_w2": (3, 6, 8),
        "lokr_b2": (3, 6, 3),
        "lokr_a2": (3, 3, 8),
    }
    w1, b1, a1, w2, b2, a2 = (leaves[f"lokr_{n}{side}"] for side in "12" for n in "wba")
    want = [
        np.kron(b1[0] @ a1[0], b2[0][:, :1] @ a2[0][:1]) * 7,
        np.kron(w1[1], b2[1] @ a2[1]) * 7 / 3,
        np.kron(w1[2], w2[2]) * 7 / 9,
    ]
    np.testing.assert_allclose(changes(fitted, variables, "layers/mlp/up"), want, atol=1e-5)
    params = tree.flatten(variables["params"])
    params["layers/mlp/up/kernel"] += jnp.asarray(np.stack(want), jnp.float32)
    plain = tiny.plain(fitted.model.module, tree.unflatten(params), tiny.batch())
    np.testing.assert_allclose(fitted.apply(variables, tiny.batch()), plain, atol=2e-5)


@pytest.mark.parametrize(
    "size, factor, parts",
    [
        (256, -1, (16, 16)),
        (128, -1, (8, 16)),
        (127, -1, (1, 127)),
        (24, 8, (8, 3)),
        (24, 5, (4, 6)),
        (40, 3, (2, 20)),
        (40, 100, (5, 8)),
    ],
)
def test_factors_of_a_width(size, factor, parts):
    """As peft.tuners.lokr.layer.factorization, which was compared up to 800."""
    assert lokr.factorize(size, factor) == parts


STARTS = [
    ("loha", {"rank": 300}, {"a1": 300, "b1": 24, "a2": 300, "b2": None}),
    ("lokr", {"rank": 300}, {"w1": None, "w2": 6}),
    ("lokr", {"rank": 2, "decompose_factor": 1}, {"w1": None, "b2": 24, "a2": 2}),
    (
        "lokr",
        {"rank": 2, "decompose_factor": 12, "decompose_both": True},
        {"b1": 12, "a1": None, "w2": 2},
    ),
]


@pytest.mark.parametrize("method, group, fan_in", STARTS)
def test_starts_are_those_of_peft(folder, method, group, fan_in):
    """Uniform in ±1/sqrt(fan-in) of torch's tensor; None: zero."""
    fitted = tiny.Fitted(folder, (method,), {method: {"targets": ("query",), **group}})
    leaves = fitted.variables["peft"]["layers"]["attention"]["query"]
    assert set(leaves) == {f"{method}_{name}" for name in fan_in}
    for name, width in fan_in.items():
        leaf = np.asarray(leaves[f"{method}_{name}"])
        if width is None:
            assert not leaf.any()
            continue
        assert 0.8 * width**-0.5 < np.abs(leaf).max() <= width**-0.5
        assert leaf.std() == pytest.approx((3 * width) ** -0.5, rel=0.3)
        assert not np.array_equal(leaf[0], leaf[1])  # layers are drawn apart


def drops(folder, method, keys, **group):
    """The logits of training steps with these keys, as one array, and those without dropout."""
    fitted, variables = built(folder, method, targets=("mlp.down",), **group)
    steps = [
        fitted.apply(variables, tiny.batch(), train=True, key=jax.random.key(key)) for key in keys
    ]
    return np.array(steps), np.asarray(fitted.apply(variables, tiny.batch()))


@pytest.mark.parametrize("method", ["loha", "lokr"])
def test_module_dropout_leaves_out_whole_updates(folder, method):
    """Of three layers each has its update or not: at most eight outcomes, of which one is none
    and one is all."""
    steps, whole = drops(folder, method, range(40), rank=2, module_dropout=0.5)
    outcomes = {tuple(step.ravel().round(3)) for step in steps}
    assert 4 <= len(outcomes) <= 8
    assert min(np.abs(step - whole).max() for step in steps) < 1e-5


@pytest.mark.parametrize("scaled", [True, False])
def test_rank_dropout_leaves_out_outputs(folder, scaled):
    seen = []

    def hook(module, call, *args):
        if peft.path_of(module) == "pooler":
            ones = jnp.ones((2, 3, 1000))
            seen.append(lycoris.dropped(module, ones, 0.25, 0.0, scaled))
        return call(*args)

    fitted = tiny.Fitted(folder, ("linear_probe",))
    apply = peft.attach((peft.Method("spy", lambda path: None, hook),), fitted.model).apply
    apply(fitted.variables, tiny.batch(), train=True, key=jax.random.key(0))
    apply(fitted.variables, tiny.batch())
    trained, still = (np.asarray(each) for each in seen)
    assert (still == 1).all()
    assert (trained == trained[0, 0]).all()  # the same outputs for all tokens
    kept = (trained[0, 0] > 0).mean()
    assert kept == pytest.approx(0.75, abs=0.05)
    assert trained.max() == pytest.approx(1 / kept if scaled else 1.0)


def test_compacter_is_a_sum_of_kronecker_products(folder):
    group = {"reduction": 3, "n": 4, "rank": 2, "nonlinearity": "relu"}
    fitted, variables = built(folder, "compacter", **group)
    own = jax.tree.map(np.asarray, variables["peft"]["layers"]["mlp_norm"])
    assert {name: leaf.shape for name, leaf in own.items()} == {
        "compacter_down_left": (3, 4, 6, 2),
        "compacter_down_right": (3, 4, 2, 2),
        "compacter_down_bias": (3, 8),
        "compacter_up_left": (3, 4, 2, 2),
        "compacter_up_right": (3, 4, 2, 6),
        "compacter_up_bias": (3, 24),
    }
    rule = np.asarray(variables["peft_shared"]["compacter"]["rule"])

    def dense(leaves, layer, name):
        left, right = (leaves[f"compacter_{name}_{side}"][layer] for side in ("left", "right"))
        kernel = sum(np.kron(a, s @ t) for a, s, t in zip(rule, left, right, strict=True))
        return kernel, leaves[f"compacter_{name}_bias"][layer]

    # The same kernels, built, in adapters of Houlsby's.
    houlsby = tiny.Fitted(
        folder, ("adapter",), {"adapter": {"reduction": 3, "nonlinearity": "relu"}}
    )
    built_ = {}
    for norm in ("attention_norm", "mlp_norm"):
        leaves = jax.tree.map(np.asarray, variables["peft"]["layers"][norm])
        built_[norm] = {
            f"adapter_{name}_{part}": np.stack(
                [dense(leaves, layer, name)[i] for layer in range(3)]
            )
            for name in ("down", "up")
            for i, part in enumerate(("kernel", "bias"))
        }
    want = houlsby.apply(houlsby.variables | {"peft": {"layers": built_}}, tiny.batch())
    plain = tiny.plain(fitted.model.module, variables["params"], tiny.batch())
    assert np.abs(want - plain).max() > 0.1
    np.testing.assert_allclose(fitted.apply(variables, tiny.batch()), want, atol=2e-5)


def test_compacter_starts_as_its_authors_ran_it(folder):
    fitted = tiny.Fitted(folder, ("compacter",), {"compacter": {"reduction": 3, "n": 8}})
    rule = np.asarray(fitted.variables["peft_shared"]["compacter"]["rule"])
    assert rule.shape == (8, 8, 8)
    assert rule.std() == pytest.approx(1e-4, rel=0.1)
    left = np.asarray(fitted.variables["peft"]["layers"]["mlp_norm"]["compacter_down_left"])
    assert 0.9 * 3**0.5 < np.abs(left).max() <= 3**0.5  # sqrt(12 / (3 + 1))
    difference = evaluate.compare_with_base(fitted.apply, fitted.variables, tiny.batch())
    assert 0 < difference < fitted.methods[0].identity == 1e-5


def test_compacter_after_the_mlp_only(folder):
    fitted = tiny.Fitted(
        folder, ("compacter",), {"compacter": {"reduction": 3, "attention": False, "norms": False}}
    )
    assert set(fitted.variables["peft"]["layers"]) == {"mlp_norm"}
    claimed = {path for path, label in fitted.claims.items() if label == "compacter"}
    assert "peft_shared/compacter/rule" in claimed
    assert all(path.startswith(("peft/layers/mlp_norm/", "peft_shared/")) for path in claimed)


def test_compacter_is_written_and_read(folder, tmp_path):
    """In our own layout, the leaves that layers share among them."""
    fitted, variables = built(folder, "compacter", reduction=3)
    moving, frozen = tree.split(variables, lambda path: path in fitted.claims)
    about = {"base": "tiny", "fingerprint": ""}
    made = fitted.methods, fitted.groups, fitted.model, moving, frozen
    files.write(tmp_path, *made, **about)
    adapter = files.read(tmp_path, fitted.model)
    assert adapter.names == ("compacter",)
    again = files.insert(adapter, fitted.loaded.variables())
    apply = tiny.hasty(peft.attach(adapter.methods, fitted.model).apply)
    want = fitted.apply(variables, tiny.batch())
    assert np.array_equal(apply(again, tiny.batch()), want)


BAD = [
    ("loha", {"rank": 0}, "peft.loha.rank is 0"),
    ("loha", {"alpha": 0.0}, "peft.loha.alpha is 0.0"),
    ("loha", {"rank_dropout": 1.0}, "peft.loha.rank_dropout is 1.0"),
    ("loha", {"module_dropout": -0.5}, "peft.loha.module_dropout is -0.5"),
    ("loha", {"rank_pattern": ("qury=2",)}, "peft.loha.rank_pattern: 'qury' matches no target"),
    ("loha", {"alpha_pattern": ("query",)}, "peft.loha.alpha_pattern: 'query' is not of the form"),
    ("lokr", {"rank": -1}, "peft.lokr.rank is -1"),
    ("lokr", {"decompose_factor": 0}, "peft.lokr.decompose_factor is 0"),
    ("lokr", {"targets": ("quary",)}, "did you mean 'query'"),
    ("compacter", {"n": 0}, "peft.compacter.n is 0"),
    ("compacter", {"nonlinearity": "rely"}, "did you mean 'relu'"),
    ("compacter", {"n": 5, "reduction": 3}, "try one of [2, 3, 4, 6, 8]"),
    ("compacter", {"reduction": 4}, "the bottleneck 6"),
    ("compacter", {}, "try the reduction 6"),
]


@pytest.mark.parametrize("method, group, says", BAD)
def test_what_is_refused(folder, method, group, says):
    with pytest.raises(Mistake) as refused:
        tiny.Fitted(folder, (method,), {method: group})
    assert says in str(refused.value)


@pytest.mark.parametrize("method", ["lokr", "compacter"])
def test_low_precision_base_and_blocks_computed_again(folder, method):
    """float32 leaves on a bfloat16 base, under remat."""
    group = {"reduction": 3} if method == "compacter" else {"rank": 2, "targets": ("all-linear",)}
    full, variables = built(folder, method, **group)
    want = np.asarray(full.apply(variables, tiny.batch()))
    low = tiny.Fitted(folder, (method,), {method: group}, dtype=jnp.bfloat16, remat="block")
    cast = tree.map_with_path(
        lambda path, x: x.astype(jnp.bfloat16) if path.startswith("params/") else x, variables
    )
    out = low.apply(cast, tiny.batch())
    assert out.dtype == jnp.float32
    assert 0 < np.abs(out - want).max() < 0.05 * np.abs(want).max() + 0.05
