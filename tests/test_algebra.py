"""Adapters as updates of weights: combined, converted, taken out again, several in one batch.

What PEFT makes of the same adapters: tests/parity/test_algebra.py.
"""

import ast
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_images
import tiny_vit
from trained import LABELS, Trained

from bmft import models, peft, tree
from bmft.errors import Mistake
from bmft.models import weights
from bmft.peft import combining, converting, files, portable, several, updates

LORA = {"rank": 3, "alpha": 7.0, "targets": ("query", "mlp.down")}
PATTERNS = LORA | {
    "targets": ("query", "mlp.up"),
    "rank_pattern": ("layer.1.*query=5",),
    "alpha_pattern": ("up=4",),
    "rslora": True,
    "layers_to_transform": (1, 2),
}
IA3 = {"targets": ("query", "mlp.down", "pooler")}
LEARNT = {"targets": ("key",), "bias": "lora_only", "modules_to_save": ("pooler", "layers.1.mlp")}
SOME = PATTERNS | {"bias": "lora_only", "modules_to_save": ("pooler", "layers.0.mlp.up")}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(model, variables)"""
    folder = tiny.directory(tmp_path_factory.mktemp("bert"))
    model = models.find(str(folder), outputs=tiny.OUTPUTS)
    return model, weights.load(model, jax.random.key(0)).variables()


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """(groups, seed) -> files.Adapter of a directory; the seed changes every leaf."""

    @functools.cache
    def make(described, seed, changes):
        groups, changes = ast.literal_eval(described), dict(changes)
        model, variables = base
        trained = Trained(model, variables["params"], groups, size=0.1)
        rng = np.random.default_rng(seed)
        trained.moving = jax.tree.map(
            lambda leaf: leaf * (1 + rng.normal(0, 0.5 * (seed > 0), leaf.shape)), trained.moving
        )
        folder = tmp_path_factory.mktemp("adapter")
        return files.read(trained.write(folder, **changes), model)

    # Shared by the tests: each is written and read once.
    return lambda groups, seed=0, **changes: make(repr(groups), seed, tuple(changes.items()))


def changes(base, one):
    """{path: change of the base's leaf} of an adapter, folded in."""
    before = arrays(base)
    return {path: leaf - before[path] for path, leaf in converting.merged(one, base[1]).items()}


def arrays(base):
    return {path: np.asarray(leaf) for path, leaf in tree.flatten(base[1]["params"]).items()}


def kernels(found):
    return {path: leaf for path, leaf in found.items() if path.startswith("layers/")}


# --- updates and combinations ----------------------------------------------------------------


def test_an_update_is_what_is_merged(base, adapter):
    for group in (LORA, PATTERNS):
        one = adapter({"lora": group})
        found = changes(base, one)
        parts = updates.of(one, "one")
        assert {path for path, _ in parts} == {f"{path}" for path in one.methods[0].files.sites}
        for (path, layer), part in parts.items():
            want = found[f"{path}/kernel"][layer]
            np.testing.assert_allclose(updates.dense(part)[0], want, atol=1e-6)
            assert updates.norm(part) == pytest.approx(np.linalg.norm(want), rel=1e-5)


def test_a_shortened_update_is_the_nearest_of_its_rank():
    rng = np.random.default_rng(0)
    part = updates.Factors(rng.normal(size=(2, 9, 4)), rng.normal(size=(2, 4, 6)), -0.7)
    for rank in (1, 3, 8):
        short, cut = updates.shortened(part, rank), updates.truncated(updates.dense(part), rank)
        assert short.rank == cut.rank == 2 * -(-rank // 2)
        np.testing.assert_allclose(updates.dense(short), updates.dense(cut), atol=1e-5)
        s = np.linalg.svd(updates.dense(part), compute_uv=False)
        wrong, norm = updates.error(short, part)
        assert wrong == pytest.approx(np.linalg.norm(s[:, short.rank // 2 :]), abs=1e-5)
        assert norm == pytest.approx(np.linalg.norm(s))


def test_combinations_that_are_exact(base, adapter):
    """Different targets, layers, ranks and scales; the new directory is read again."""
    model = base[0]
    two = {"a": adapter({"lora": LORA}), "b": adapter({"lora": PATTERNS}, 1)}
    want = [changes(base, one) for one in two.values()]
    for how, rank in (("cat", None), ("svd", 8)):
        found = combining.combine(two, [0.7, 0.4], model, how=how, rank=rank)
        assert found.error < 1e-6
        got = changes(base, found.adapter)
        for path, leaf in kernels(got).items():
            np.testing.assert_allclose(leaf, 0.7 * want[0][path] + 0.4 * want[1][path], atol=1e-5)
        ranks = {place: part.rank for place, part in updates.of(found.adapter, "").items()}
        assert ranks["layers/attention/query", 1] == 8 and ranks["layers/mlp/up", 1] in (3, 8)
    cut = combining.combine(two, [0.7, 0.4], model, rank=2)
    got = changes(base, cut.adapter)
    wrong, exact = 0, 0
    for path in kernels(got):
        sum_of = 0.7 * want[0][path] + 0.4 * want[1][path]
        wrong += np.square(got[path] - sum_of).sum()
        exact += np.square(sum_of).sum()
    assert cut.error == pytest.approx(np.sqrt(wrong / exact), rel=1e-4) and cut.error > 0.1


def test_what_is_written_of_a_combination_is_read(base, adapter, tmp_path):
    two = {"a": adapter({"lora": LORA}), "b": adapter({"lora": PATTERNS}, 1)}
    made = combining.combine(two, [1.0, -0.5], base[0], how="cat", heads="first").adapter
    updates.write(tmp_path, made, base[0], base="tiny", fingerprint="f" * 64)
    again = files.read(tmp_path, base[0], fingerprint="f" * 64)
    assert files.card(tmp_path).peft_type == "LORA"
    assert again.labels == LABELS
    assert set(again.leaves) == set(made.leaves)
    for path, leaf in made.leaves.items():
        np.testing.assert_array_equal(again.leaves[path], leaf)


def test_heads_are_the_weighted_mean(base, adapter):
    two = {"a": adapter({"lora": LORA | LEARNT}), "b": adapter({"lora": LORA | LEARNT}, 1)}
    one, other = two.values()
    found = combining.combine(two, [3.0, 1.0], base[0], how="linear").adapter
    whole = [path for path in found.leaves if path.startswith("params/")]
    assert {"params/classifier/out/kernel", "params/pooler/bias"} < set(whole)
    assert {"params/layers/attention/key/bias", "params/layers/mlp/up/kernel"} < set(whole)
    for path in whole:
        want = 0.75 * one.leaves[path] + 0.25 * other.leaves[path]
        np.testing.assert_allclose(found.leaves[path], want, atol=1e-6)
    assert set(found.rows) == set(one.rows)
    first = combining.combine(two, [3.0, -1.0], base[0], heads="first").adapter
    np.testing.assert_array_equal(first.leaves[whole[0]], one.leaves[whole[0]])


def test_linear_is_wrong_by_its_cross_terms(base, adapter):
    one, other = adapter({"lora": LORA}), adapter({"lora": LORA}, 1)
    assert combining.combine({"a": one, "b": other}, [1, 1], base[0], how="linear").error > 0.1
    assert combining.combine({"a": one}, [-2.0], base[0], how="linear").error < 1e-6
    same = {"a": one, "b": one}  # (A/2 + A/2)(B/2 + B/2) of roots: 4 times a half
    assert combining.combine(same, [1, 1], base[0], how="linear").error == pytest.approx(
        1, abs=1e-5
    )


def test_what_dare_drops_is_seeded_and_keeps_the_mean(base, adapter):
    two = {"a": adapter({"lora": LORA}), "b": adapter({"lora": LORA}, 1)}

    def kernel(seed):
        options = {"how": "dare_ties", "density": 0.5, "seed": seed}
        found = combining.combine(two, [1, 1], base[0], **options)
        return found.adapter.leaves["peft/layers/mlp/down/lora_a"]

    np.testing.assert_array_equal(kernel(1), kernel(1))
    assert (kernel(1) != kernel(2)).any()
    ones = np.ones((200, 200))
    dropped = combining._drop(ones, 0.3, np.random.default_rng(0))
    assert set(np.unique(dropped)) == {0.0, 1 / 0.3}
    assert dropped.mean() == pytest.approx(1, abs=0.02)


def test_ties_on_numbers():
    """Trimmed to the two largest of four, the sign of the larger sum, the mean of those with it."""
    tensors = [np.array([4.0, -1.0, 3.0, 0.5]), np.array([-6.0, 0.1, 5.0, 0.2])]
    merge = combining._merger("ties", 0.5, "total", None)
    np.testing.assert_allclose(merge(tensors, [1.0, 0.5]), [-3.0, 0.0, (3 + 2.5) / 2, 0.0])
    merge = combining._merger("ties", 1, "frequency", None)
    np.testing.assert_allclose(merge(tensors, [1.0, 1.0]), [4.0, 0.1, 4.0, 0.35])  # a tie is +


REFUSED = [
    ({"how": "mean"}, "how: no 'mean'; known: "),
    ({"how": "linear", "rank": 4}, "rank: linear has its rank from the adapters"),
    ({"rank": 0}, "rank 0: it must be 1 or more"),
    ({"how": "ties"}, r"density must be in \(0, 1\]"),
    ({"how": "dare_ties", "density": 0.0}, r"density must be in \(0, 1\]"),
    ({"how": "cat", "density": 0.5}, "density: cat drops nothing"),
    ({"weights": [1]}, "2 adapters but 1 weights"),
    ({"weights": [0, 0]}, "not all 0"),
    ({"weights": [1, -1]}, "no mean by a weight below 0; heads=first"),
    ({"how": "linear", "b": {"lora": LORA | {"rank": 2}}}, "ranks 2 and 3: linear needs equal"),
    ({"b": {"ia3": {}}}, "b is no plain LoRA but ia3: `convert` makes one of it"),
    ({"b": {"lora": LORA, "bitfit": {}}}, "b is no plain LoRA but lora \\+ bitfit"),
    ({"b": {"lora": LORA | LEARNT}}, "b trains params/.* whole, and a does not"),
    ({"heads": "first", "a": SOME, "how": "cat"}, "attention/query is a target of another"),
    (
        {"heads": "first", "a": LORA | {"targets": ("query",), "modules_to_save": ("mlp.down",)}},
        "a trains layers/mlp/down whole, and another has LoRA there",
    ),
    ({"labels": tuple("vwxyz")}, "a and b have different labels, very bad/.* and v/w/x/y/z; heads"),
]


@pytest.mark.parametrize("case", range(len(REFUSED)))
def test_combinations_that_are_refused(base, adapter, case):
    arguments, message = REFUSED[case]
    arguments = dict(arguments)
    told = {"labels": arguments.pop("labels")} if "labels" in arguments else {}
    two = {"a": adapter({"lora": arguments.pop("a", LORA)})}
    two["b"] = adapter(arguments.pop("b", {"lora": LORA}), **told)
    shares = arguments.pop("weights", [1, 1])
    with pytest.raises(Mistake, match=message):
        combining.combine(two, shares, base[0], **arguments)


# --- conversions -----------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [{"lora": SOME}, {"ia3": IA3}, {"full": {}}])
def test_conversion_to_lora(base, adapter, tmp_path, groups):
    """At full rank it is the same; below, as wrong as it says; and written and read again."""
    model, variables = base
    one, before = adapter(groups), arrays(base)
    after = converting.merged(one, variables)
    exact = converting.to_lora(before, after, model, 99, labels=one.labels)
    assert exact.error < 1e-6 and exact.adapter.groups["lora"]["rank"] == 24
    updates.write(tmp_path, exact.adapter, model, base="tiny", fingerprint="f" * 64)
    assert files.card(tmp_path).peft_type == "LORA"
    again = files.read(tmp_path, model)
    assert again.labels == LABELS
    for path, leaf in converting.merged(again, variables).items():
        np.testing.assert_allclose(leaf, after[path], atol=1e-5, err_msg=path)
    cut = converting.to_lora(before, after, model, 2)
    got = converting.merged(cut.adapter, variables)
    for (path, layer), (wrong, norm) in cut.errors.items():
        at, kernel = () if layer is None else layer, f"{path}/kernel"
        assert norm == pytest.approx(
            np.linalg.norm(after[kernel][at] - before[kernel][at]), rel=1e-4
        )
        found = np.linalg.norm(got[kernel][at] - after[kernel][at])
        assert found == pytest.approx(wrong, rel=1e-3, abs=1e-5)
    others = set(after) - {f"{path}/kernel" for path, _ in cut.errors}
    for path in others:
        np.testing.assert_allclose(got[path], after[path], atol=1e-6, err_msg=path)


def test_what_a_conversion_carries_whole(base, adapter):
    after = converting.merged(adapter({"norm_tuning": {}, "ia3": IA3}), base[1])
    found = converting.to_lora(arrays(base), after, base[0], 4)
    assert {path for path, _ in found.errors} == {
        *("layers/attention/query", "layers/mlp/down", "pooler"),
    }
    biases = {"layers/attention/query/bias", "layers/mlp/down/bias", "pooler/bias"}
    norms = [path.rpartition("/")[0] for path in found.whole if path not in biases]
    assert set(norms) == {"embeddings/norm", "layers/attention_norm", "layers/mlp_norm"}
    assert biases < set(found.whole)


def test_conversions_that_are_refused(base, adapter):
    before = arrays(base)
    with pytest.raises(Mistake, match="'adapter' cannot be merged"):
        converting.merged(adapter({"adapter": {}}), base[1])
    after = converting.merged(adapter({"bitfit": {}}), base[1])
    with pytest.raises(Mistake, match="no kernel differs"):
        converting.to_lora(before, after, base[0], 4)
    with pytest.raises(Mistake, match="rank is 0"):
        converting.to_lora(before, after, base[0], 0)
    with pytest.raises(Mistake, match=r"classifier/out/bias has the shape \(5,\) .* \(3,\)"):
        converting.to_lora(before, after | {"classifier/out/bias": np.zeros(3)}, base[0], 4)


@pytest.mark.parametrize("groups", [{"lora": SOME}, {"ia3": IA3}, {"lora": LORA, "bitfit": {}}])
def test_a_merge_is_undone(base, adapter, groups):
    one, before = adapter(groups), arrays(base)
    found = converting.unmerge(one, converting.merged(one, base[1]))
    assert found.error < 1e-6
    assert "classifier/out/kernel" in found.replaced
    for path in set(before) - set(found.replaced):
        np.testing.assert_allclose(found.params[path], before[path], atol=1e-6, err_msg=path)


def test_a_merge_that_cannot_be_undone(base, adapter):
    one, path = adapter({"ia3": IA3}), "peft/layers/attention/query/ia3_out"
    factor = one.leaves[path].copy()
    factor[1, 3] = 0.0
    one = one._replace(leaves=one.leaves | {path: factor})
    with pytest.raises(Mistake, match="ia3 cannot be taken out of layers/attention/query/"):
        converting.unmerge(one, converting.merged(one, base[1]))


def test_a_merge_that_is_no_change_of_each_number_is_not_undone(base, adapter):
    """DoRA's kind: the norms of the base's columns are lost."""

    def merge(params, added):
        flat = tree.flatten(params)
        kernel = flat["layers/attention/query/kernel"] + 0.1
        flat["layers/attention/query/kernel"] = kernel / np.linalg.norm(
            kernel, axis=1, keepdims=True
        )
        return tree.unflatten(flat)

    one = adapter({"lora": LORA})
    one = one._replace(methods=(one.methods[0]._replace(merge=merge),))
    with pytest.raises(Mistake, match="lora cannot be taken out of layers/attention/query/kernel"):
        converting.unmerge(one, converting.merged(one, base[1]))


# --- several in one batch --------------------------------------------------------------------


BATCH = tiny.batch(rows=4, examples=3)
CHOSEN = np.array([[0, 1, -1], [2, 3, 0], [-1, -1, 2], [3, 3, 1]], np.int32)


@pytest.fixture(scope="module")
def together(base, adapter):
    """({name: adapter}, several, apply, logits [n + 1, b, e, c] of each alone, the base's last)"""
    adapters = {
        "plain": adapter({"lora": LORA}),
        "patterns": adapter({"lora": PATTERNS}, 1),
        "factors": adapter({"ia3": IA3}),
        "learnt": adapter({"lora": LORA | LEARNT}, 2),
    }
    found = several.attach(adapters, *base)
    alone = [
        tiny.hasty(peft.attach(one.methods, base[0]).apply)(files.insert(one, base[1]), BATCH)
        for one in adapters.values()
    ]
    plain = tiny.hasty(peft.attach((), base[0]).apply)(base[1], BATCH)
    return adapters, found, tiny.hasty(found.apply), np.stack([*alone, plain])


def own(alone):
    """Each example's logits by the adapter chosen for it."""
    return alone[CHOSEN, np.arange(4)[:, None], np.arange(3)]


def test_each_example_by_its_own_adapter(together):
    _, found, apply, alone = together
    got = apply(found.variables, BATCH | {"adapters": CHOSEN})
    np.testing.assert_allclose(got, own(alone), atol=1e-5)
    for one in alone[:-1]:
        assert np.abs(one - alone[-1]).max() > 0.1


def test_switching_compiles_nothing(together):
    adapters, found, apply, alone = together
    for name, want in zip([*adapters, None], alone, strict=True):
        got = apply(found.variables, found.choose(BATCH, name))
        np.testing.assert_allclose(got, want, atol=1e-5)
    assert apply._cache_size() == 1
    assert found.labels == dict.fromkeys(adapters, LABELS)


@pytest.mark.parametrize("about", [{"unroll": 3, "remat": "block"}, {"dtype": jnp.bfloat16}])
def test_unrolled_or_in_bfloat16(base, together, about):
    adapters, _, _, alone = together
    model = models.find(base[0].name, outputs=tiny.OUTPUTS, **about)
    found = several.attach(adapters, model, base[1])
    got = tiny.hasty(found.apply)(found.variables, BATCH | {"adapters": CHOSEN})
    assert got.dtype == np.float32
    loose = 0.1 * np.abs(alone).max() if "dtype" in about else 1e-5
    np.testing.assert_allclose(got, own(alone), atol=loose)


def test_what_cannot_stand_beside_others(base, adapter, together):
    one = adapter({"lora": LORA})
    for groups, message in (
        ({"adapter": {}}, r"'b' \(adapter\) moves params/.*norm/bias: .*merge it, or convert"),
        ({"adapter": {"kind": "parallel"}}, "moves peft/layers/mlp/adapter_"),
        ({"norm_tuning": {}}, r"'b' \(norm_tuning\) moves params/embeddings/norm/"),
        ({"lora": LORA | {"modules_to_save": ("LayerNorm",)}}, "moves params/.*norm"),
    ):
        with pytest.raises(Mistake, match=message):
            several.attach({"a": one, "b": adapter(groups)}, *base)
    head = one.leaves | {"params/classifier/out/bias": np.zeros(3)}
    other = one._replace(leaves=head)
    with pytest.raises(Mistake, match=r"'b' has classifier/out/bias of shape \[3\], the model"):
        several.attach({"a": one, "b": other}, *base)
    found = together[1]
    with pytest.raises(Mistake, match="no adapter 'plian'; did you mean 'plain'"):
        found.choose(tiny.batch(), "plian")
    with pytest.raises(Mistake, match="no 'adapters'"):
        found.apply(found.variables, tiny.batch())
    with pytest.raises(Mistake, match="no adapters"):
        several.attach({}, *base)


# --- of images -------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["resnext", "vit"])
def of_images(request, tmp_path_factory):
    """(model, variables, {name: adapter}, a batch): convolutions in groups, of different ranks."""
    family = request.param
    module = tiny_vit if family == "vit" else tiny_images
    folder = module.directory(tmp_path_factory.mktemp(family) / "model", family)
    model = models.find(str(folder), outputs=tiny.OUTPUTS)
    variables = weights.load(model, jax.random.key(0)).variables()
    targets = ("query", "mlp.up") if family == "vit" else ("conv2", "re:.*shortcut.conv")
    groups = {
        "small": {"lora": {"rank": 2, "alpha": 3.0, "targets": targets}},
        "large": {"lora": {"rank": 4, "alpha": 7.0, "targets": targets[:1]}},
        "factors": {"ia3": {"targets": targets, "feedforward": targets[:1]}},
    }
    rng, found = np.random.default_rng(0), {}
    for name, group in groups.items():
        methods = peft.build(model, tuple(group), group)
        leaves = tree.flatten({"params": {"classifier": variables["params"]["classifier"]}})
        leaves |= portable.expected(methods, model)[1]
        leaves = {
            path: rng.normal("ia3" in path, 0.2, leaf.shape).astype(np.float32)
            for path, leaf in leaves.items()
            if not path.startswith("peft_const")
        }
        found[name] = files.Adapter(methods, tuple(group), group, leaves, {}, LABELS, None, {})
    return model, variables, found, {"images": module.batch(rows=4)["images"]}


def test_each_image_by_its_own_adapter(of_images):
    model, variables, adapters, batch = of_images
    found = several.attach(adapters, model, variables)
    got = tiny.hasty(found.apply)(found.variables, batch | {"adapters": [2, -1, 1, 0]})
    for row, name in enumerate(["factors", None, "large", "small"]):
        methods = adapters[name].methods if name else ()
        own = files.insert(adapters[name], variables) if name else variables
        want = tiny.hasty(peft.attach(methods, model).apply)(own, batch)
        np.testing.assert_allclose(got[row], want[row], atol=1e-5 * np.abs(want).max())
    assert found.choose(batch, "large")["adapters"].tolist() == [1] * 4


def test_algebra_of_convolutions(of_images):
    model, variables, adapters, _ = of_images
    before = {p: np.asarray(leaf) for p, leaf in tree.flatten(variables["params"]).items()}
    two = {name: adapters[name] for name in ("small", "large")}
    after = [converting.merged(one, variables) for one in two.values()]
    kernels = {f"{path}/kernel" for path, _ in updates.of(two["small"], "")}
    for options in ({"how": "cat"}, {"how": "svd", "rank": 6}):
        made = combining.combine(two, [0.7, 0.2], model, **options)
        assert made.error < 1e-6
        found = converting.merged(made.adapter, variables)
        for path in kernels:
            want = before[path] + sum(
                w * (one[path] - before[path]) for w, one in zip([0.7, 0.2], after, strict=True)
            )
            np.testing.assert_allclose(found[path], want, atol=1e-5)
    scaled = converting.merged(adapters["factors"], variables)
    whole = tree.flatten(tree.join(*(variables[name] for name in variables)))
    whole = {path: np.asarray(leaf) for path, leaf in whole.items()}
    made = converting.to_lora(whole, scaled, model, 999)
    found = converting.merged(made.adapter, variables)
    for path in kernels:
        np.testing.assert_allclose(found[path], scaled[path], atol=1e-5)
    back = converting.unmerge(two["small"], after[0]).params
    for path in kernels:
        np.testing.assert_allclose(back[path], before[path], atol=1e-6)
