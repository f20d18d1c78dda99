"""The contract every method keeps, found by file: a new method is tested by adding its file.

Each method runs on one encoder, each model family with three methods, scanned or unrolled in turn;
what it is made with stands in tests/cases/, by its name. Of a method whose variants are compared
with those of Hugging Face PEFT (tests/test_catalogue.py), the first of the settings runs here.
"""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import AbstractMesh

from bmft import peft, sharding, train, tree
from bmft.errors import Mistake
from bmft.names import saved

PEFTS = {method for method, _ in cases.catalogue().values()}
SETTINGS = {
    name: settings[:1] if name in PEFTS else settings for name, settings in cases.settings().items()
}
NOT_ON_TEXT = ("conv_adapter", "visual_prompt")  # tests/test_conv_methods.py, tests/test_vit.py
ON_BERT = [
    ("bert", (name,), group)
    for name in peft.names()
    if name not in NOT_ON_TEXT
    for group in SETTINGS.get(name, [{}])
]
FAMILIES = [
    (family, (name,), SETTINGS.get(name, [{}])[0])
    for family in ("roberta", "distilbert")
    for name in ("lora", "adapter", "bitfit")
]
TOGETHER = [
    ("bert", ("lora", "adapter"), {"kind": "parallel"}),
    ("distilbert", ("lora", "bitfit"), {}),
    ("roberta", ("lora", "prefix_tuning"), {"tokens": 3}),
    ("distilbert", ("lora", "prompt_tuning"), {"tokens": 3}),
]
CASES = ON_BERT + FAMILIES + TOGETHER
# Each method trains with the first of its settings; compiling a step is most of the time.
TRAINED = [
    number
    for number, (_, methods, group) in enumerate(CASES)
    if number >= len(ON_BERT) or group == SETTINGS.get(methods[0], [{}])[0]
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {
        family: tiny.directory(tmp_path_factory.mktemp(family), family) for family in tiny.FAMILIES
    }


@pytest.fixture(scope="module")
def shallow(tmp_path_factory):
    """Models of two layers: those that are unrolled compile in two thirds of the time of three."""
    depth = {"distilbert": "n_layers"}
    return {
        family: tiny.directory(
            tmp_path_factory.mktemp(family),
            family,
            **{depth.get(family, "num_hidden_layers"): 2},
        )
        for family in tiny.FAMILIES
    }


def case(number):
    family, methods, _ = CASES[number]
    return f"{family}-{'+'.join(methods)}-{number}"


def each(numbers):
    return pytest.mark.parametrize("fitted", numbers, indirect=True, ids=case, scope="module")


@pytest.fixture(scope="module")
def fitted(request, shallow):
    family, methods, group = CASES[request.param]
    unroll = 1 + request.param % 2  # scanned and unrolled in turn
    return tiny.Fitted(shallow[family], methods, {methods[-1]: group}, unroll=unroll)


@pytest.fixture(scope="module")
def outputs(fitted):
    """variables -> logits with the methods, and of the base alone: one program, as a run has it
    that compares the two."""

    def both(variables):
        return [
            fitted.apply(variables, fitted.batch(), adapter=adapter) for adapter in (True, False)
        ]

    return jax.jit(both)


@pytest.fixture(scope="module")
def trained(fitted):
    """The moving leaves after three steps from an adapter that is not at its start."""
    tx = optax.sgd(0.1)
    step = tiny.hasty(train.make_step(fitted.apply, tiny.loss, tx))
    moving = jax.tree.map(jnp.copy, fitted.moving)
    state = train.init_state(moving, tx, jax.random.key(2))
    frozen = jax.tree.map(jnp.copy, fitted.frozen)
    losses = []
    for _ in range(3):
        state, metrics = step(state, frozen, fitted.batch())
        losses.append(float(metrics["loss"]))
    return state, frozen, losses, metrics


@each(range(len(CASES)))
def test_identity_at_the_start_is_as_declared(fitted, outputs):
    adapted, base = outputs(fitted.variables)
    difference = float(abs(adapted - base).max() / abs(base).max())
    assert difference <= max(method.identity for method in fitted.methods)


@each(TRAINED)
def test_training_lowers_the_loss(trained):
    assert trained[2][2] < trained[2][0]


@each(TRAINED)
def test_only_claimed_leaves_move_and_all_of_them_do(fitted, trained):
    state, frozen, _, _ = trained
    for path, before in tree.flatten(fitted.frozen).items():
        assert np.array_equal(before, tree.flatten(frozen)[path]), path
    after = tree.flatten(state.moving)
    assert set(after) == set(fitted.claims)
    for path, before in tree.flatten(fitted.moving).items():
        # softmax does not feel what is added to all keys: their bias has no gradient but rounding
        if not path.endswith("attention/key/bias"):
            assert not np.array_equal(before, after[path]), path


@each(range(len(CASES)))
def test_head_moves_with_every_method(fitted):
    head = [path for path in fitted.claims if path.startswith("params/classifier/")]
    assert len(head) == len(tree.flatten(fitted.loaded.params["classifier"]))


@each(range(len(CASES)))
def test_each_leaf_has_its_place_on_a_mesh(fitted):
    mesh, axes = AbstractMesh((2, 2, 2), sharding.AXES), peft.axes(fitted.methods)
    where = sharding.of_leaf(mesh, fitted.model.sharding, axes)
    for path, leaf in tree.flatten(fitted.variables).items():
        share = where(path, leaf.shape).shard_shape(leaf.shape)
        assert len(share) == leaf.ndim
        whole = path.startswith(("peft_const/", "peft_shared/")) and path.split("/")[-1] not in axes
        assert not whole or share == leaf.shape, path


@each(range(len(CASES)))
def test_merge_equals_unmerged(fitted, outputs):
    """With leaves that are not at their start: some way off in any direction."""
    rng = np.random.default_rng(0)
    moving = jax.tree.map(lambda x: x + rng.normal(0, 0.05, x.shape).astype("f"), fitted.moving)
    variables = tree.join(moving, fitted.frozen)
    added = {name: variables[name] for name in peft.ADDED if name in variables}
    try:
        params = peft.merge(fitted.methods, variables["params"], added)
    except Mistake:
        assert any(method.hook and not method.merge for method in fitted.methods)
        return
    want, moved = outputs(variables)
    merged = tiny.plain(fitted.model.module, params, tiny.batch())
    np.testing.assert_allclose(merged, want, atol=2e-5)
    if variables.get("peft"):
        assert np.abs(moved - want).max() > 1e-3  # the added leaves mattered


def test_dropout_is_drawn_in_training_only(folders):
    on = tiny.Fitted(
        folders["bert"], ("lora",), {"lora": {"rank": 3, "alpha": 7.0, "dropout": 0.5}}
    )
    variables = tree.map_with_path(lambda p, x: x + 0.1 * p.endswith("lora_b"), on.variables)
    batch, key = tiny.batch(), jax.random.key(0)
    still = on.apply(variables, batch, train=False, key=key)
    assert np.array_equal(still, on.apply(variables, batch))
    one, two = (on.apply(variables, batch, train=True, key=jax.random.key(k)) for k in (0, 1))
    assert np.array_equal(one, on.apply(variables, batch, train=True, key=key))
    assert np.abs(one - still).max() > 1e-3
    assert np.abs(one - two).max() > 1e-3


@pytest.mark.parametrize("below", [0, 1])
def test_dropout_differs_by_layer_and_module(folders, below):
    """A module's draw is its own, in every layer of a scanned stack."""
    seen = []

    def hook(module, call, *args):
        if peft.path_of(module).endswith(("query", "value")):
            keep = peft.dropout(module, jnp.ones((64,)), 0.5)
            jax.debug.callback(lambda k: seen.append(tuple(np.asarray(k))), keep)
        return call(*args)

    fitted = tiny.Fitted(folders["bert"], ("linear_probe",))
    spy = peft.Method("spy", lambda path: None, hook)
    model = fitted.model._replace(module=fitted.model.module.clone(frozen_below=below))
    apply = peft.attach((spy,), model).apply
    apply(fitted.variables, tiny.batch(), train=True, key=jax.random.key(0))
    jax.effects_barrier()
    assert len(seen) == len(set(seen)) == 6


@pytest.mark.parametrize("unroll", [1, 3])
def test_nothing_is_differentiated_below_the_lowest_moving_layer(folders, unroll):
    """The stack in two pieces: the same outputs and gradients for fewer operations."""
    group = {"rank": 2, "alpha": 5.0, "layers_to_transform": (2,), "dropout": 0.2}
    whole = tiny.Fitted(folders["bert"], ("lora",), {"lora": group}, unroll=unroll)
    assert peft.first_moving_piece(whole.methods, whole.claims, whole.model.names) == 2
    model = whole.model._replace(module=whole.model.module.clone(frozen_below=2))
    apply = peft.attach(whole.methods, model).apply
    moving = tree.map_with_path(lambda p, x: x + 0.1 * p.endswith("lora_b"), whole.moving)

    def gradient(apply):
        def objective(moving):
            still = lambda variables, batch, **_: apply(variables, batch)  # noqa: E731 - no dropout
            forward = train.bind(still, tree.join(moving, whole.frozen))
            (total, _), _ = tiny.loss(forward, tiny.batch(), None)
            return total

        return tiny.hasty(jax.value_and_grad(objective)).lower(moving).compile()

    whole_grad, pieces_grad = gradient(whole.apply), gradient(apply)
    for one, other in zip(
        jax.tree.leaves(whole_grad(moving)), jax.tree.leaves(pieces_grad(moving)), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=1e-5)
    if unroll == 3:  # XLA counts the body of a loop once
        counts = [g.cost_analysis()["flops"] for g in (pieces_grad, whole_grad)]
        assert counts[0] < 0.75 * counts[1]


def shared_method(model, unroll=1):
    """A method with a leaf that all layers share, and a constant made on the weights."""
    where = ("layers/attention/query", "layers/mlp/up", "pooler")

    def shared(key, params):
        return {"all": 0.1 * jax.random.normal(key, params["pooler"]["bias"].shape)}

    def hook(module, call, *args):
        if peft.path_of(module) not in where:
            return call(*args)
        kernel = module.get_variable("params", "kernel")
        size = peft.constant(module, "size", lambda: jnp.abs(kernel).mean((0, 1)))
        own = peft.leaf(module, "factor", jax.nn.initializers.ones, ())
        return call(args[0] * (1 + size * own * peft.shared("toy")["all"]))

    moves = lambda path: "toy" if path.startswith(("peft/", "peft_shared/toy/")) else None  # noqa: E731
    return peft.Method("toy", moves, hook, shared=shared)


@pytest.mark.parametrize("option", [{}, {"unroll": 3}, {"remat": "block"}])
def test_shared_leaves_and_constants_of_weights(folders, option):
    fitted = tiny.Fitted(folders["bert"], ("linear_probe",), **option)
    method = shared_method(fitted.model)
    attached = peft.attach((method,), fitted.model)
    base = fitted.loaded.variables()
    added = attached.add(jax.random.key(0), base)
    assert {
        p: leaf.shape for p, leaf in tree.flatten(added).items() if "up" in p or "toy" in p
    } == {
        "peft/layers/mlp/up/factor": (3,),
        "peft_const/layers/mlp/up/size": (3,),
        "peft_shared/toy/all": (24,),
    }
    kernels = base["params"]["layers"]["mlp"]["up"]["kernel"]
    size = added["peft_const"]["layers"]["mlp"]["up"]["size"]
    np.testing.assert_allclose(size, jnp.abs(kernels).mean((1, 2)), rtol=1e-6)
    claims = peft.claims((method,), filter(peft.may_move, tree.flatten(base | added)), heads=())
    moving, frozen = tree.split(base | added, lambda path: path in claims)

    def objective(moving):
        forward = train.bind(attached.apply, tree.join(moving, frozen))
        return tiny.loss(lambda batch, train: forward(batch), tiny.batch(), None)[0][0]

    gradient = tiny.hasty(jax.value_and_grad(objective))
    _, grads = gradient(moving)
    step = 3e-2  # at which the rounding of a loss of 20 is 3e-5 of a slope
    for path, grad in tree.flatten(grads).items():  # every module's use of the shared leaf counts
        direction = np.sign(grad)
        at = lambda t, path=path, d=direction: tree.map_with_path(  # noqa: E731
            lambda p, x: x + t * d if p == path else x, moving
        )
        found = (gradient(at(step))[0] - gradient(at(-step))[0]) / (2 * step)
        assert found == pytest.approx(float(np.abs(grad).sum()), rel=0.02, abs=6e-5), path


@pytest.mark.parametrize("alpha, rslora, scale", [(7.0, False, 7 / 4), (7.0, True, 7 / 2)])
def test_lora_scale(folders, alpha, rslora, scale):
    group = {"rank": 4, "alpha": alpha, "rslora": rslora}
    fitted = tiny.Fitted(folders["bert"], ("lora",), {"lora": group})
    constant = fitted.variables["peft_const"]["layers"]["attention"]["query"]["lora_scale"]
    np.testing.assert_allclose(constant, np.full((3, 4), scale), rtol=1e-6)


def test_lora_start(folders):
    """A is uniform in ±1/sqrt(in), B zero; the whole tree of what is added."""
    fitted = tiny.Fitted(
        folders["bert"], ("lora",), {"lora": {"rank": 300, "targets": ("mlp.down",)}}
    )
    assert tree.describe(fitted.variables["peft"]) == [
        ("layers/mlp/down/lora_a", (3, 40, 300), "float32"),
        ("layers/mlp/down/lora_b", (3, 300, 24), "float32"),
    ]
    a = np.asarray(fitted.variables["peft"]["layers"]["mlp"]["down"]["lora_a"])
    bound = 40**-0.5
    assert np.abs(a).max() <= bound
    assert abs(a.std() - bound / 3**0.5) < 0.01 * bound
    assert abs(np.corrcoef(a[0].ravel(), a[1].ravel())[0, 1]) < 0.05  # layers are drawn apart


def test_layers_that_are_no_target_stay(folders):
    group = {"rank": 2, "alpha": 5.0, "layers_to_transform": (1,), "bias": "lora_only"}
    fitted = tiny.Fitted(folders["bert"], ("lora",), {"lora": group})
    path = "params/layers/attention/query/bias"
    assert peft.moving_rows(fitted.methods, path).tolist() == [False, True, False]
    assert peft.moving_rows(fitted.methods, "params/classifier/out/bias") is None


def test_entries_that_mean_the_same_are_no_mistake(folders):
    names = tiny.Fitted(folders["bert"], ("linear_probe",)).model.names
    entries = ("layers.1", "layers.1.mlp.up")
    assert saved(names, entries).keys() == saved(names, entries[:1]).keys()


def test_two_methods_that_claim_a_leaf_are_refused(folders):
    with pytest.raises(Mistake, match="moved both as 'bitfit' and as 'adapter'"):
        tiny.Fitted(folders["bert"], ("bitfit", "adapter"), {"adapter": {"kind": "houlsby"}})


def test_head_label_wins_where_it_was_asked_for(folders):
    fitted = tiny.Fitted(folders["bert"], ("full",))
    paths = ["params/classifier/out/bias", "params/pooler/bias", "params/layers/mlp/up/bias"]
    claims = peft.claims(fitted.methods, paths, heads=("classifier",), head_label=True)
    assert claims == dict(zip(paths, ("head", "full", "full"), strict=True))


def test_fresh_leaves_never_stay_behind(folders):
    fitted = tiny.Fitted(folders["bert"], ("linear_probe",))
    paths = ["params/pooler/kernel", "params/layers/mlp/up/kernel"]
    claims = peft.claims(fitted.methods, paths, heads=("classifier",), fresh=("pooler/kernel",))
    assert claims == {"params/pooler/kernel": "head"}


def test_bfloat16_base_with_float32_leaves(folders):
    fitted = tiny.Fitted(folders["bert"], ("lora",), {"lora": {"rank": 3}}, dtype=jnp.bfloat16)
    low = tree.map_with_path(
        lambda path, x: x.astype(jnp.bfloat16) if path.startswith("params/") else x,
        fitted.variables,
    )
    out = fitted.apply(low, tiny.batch())
    full = tiny.Fitted(folders["bert"], ("lora",), {"lora": {"rank": 3}})
    assert out.dtype == jnp.float32
    want = full.apply(full.variables, tiny.batch())
    assert 0 < np.abs(out - want).max() < 0.05 * np.abs(want).max() + 0.05


BAD = [
    (("lora",), {"rank": 0}, "rank is 0"),
    (("lora",), {"alpha": 0.0}, "alpha is 0.0"),
    (("lora",), {"dropout": 1.0}, "dropout is 1.0"),
    (("lora",), {"bias": "lora"}, "did you mean 'lora_only'"),
    (("lora",), {"targets": ("quary",)}, "did you mean 'query'"),
    (("lora",), {"targets": ("query", "valeu")}, "did you mean 'value'"),
    (("lora",), {"targets": ("re:[",)}, "regular expression"),
    (("lora",), {"targets": ("classifier",)}, "matches no module"),
    (("lora",), {"layers_to_transform": (3,)}, "no layer 3"),
    (("lora",), {"layers_to_transform": (0,), "targets": ("pooler.dense",)}, "match nothing"),
    (("lora",), {"rank_pattern": ("query",)}, "not of the form"),
    (("lora",), {"rank_pattern": ("query=0",)}, "not of the form"),
    (("lora",), {"rank_pattern": ("qury=2",)}, "matches no target"),
    (("lora",), {"modules_to_save": ("poler",)}, "did you mean 'pooler'"),
    (("adapter",), {"kind": "housby"}, "did you mean 'houlsby'"),
    (("adapter",), {"reduction": 0}, "reduction is 0"),
    (("adapter",), {"nonlinearity": "rely"}, "did you mean 'relu'"),
    (("adapter",), {"init": "berta"}, "did you mean 'bert'"),
    (("bitfit",), {"variant": "query_inter"}, "did you mean 'query_intermediate'"),
    (("lara",), {}, "did you mean 'lora'"),
    (("lora", "lora"), {}, "twice"),
    ((), {}, "empty"),
]


@pytest.mark.parametrize("methods, group, says", BAD)
def test_what_is_refused(folders, methods, group, says):
    with pytest.raises(Mistake) as refused:
        tiny.Fitted(folders["bert"], methods, {methods[-1]: group} if methods else {})
    assert says in str(refused.value)
