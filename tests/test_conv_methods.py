"""The contract of methods on convolutional nets: tests/test_methods.py has it on encoders.

alpha is unlike rank, and no two sizes of the nets are alike. LoRA's geometry: test_conv_lora.py.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
import tiny_images
import tiny_vit
from tiny_nets import Fitted

from bmft import models, peft, train, tree
from bmft.errors import Mistake
from bmft.peft import files

SMALL = {"depths": [1, 1], "hidden_sizes": [12, 20]}
NETS = {
    "resnet": SMALL,
    "resnext": SMALL | {"inner_sizes": [6, 8]},
    "cifar": {"depths": [1, 1]},
    "vgg": {},
    "vgg_bn": {},
    "vgg_features": {},
}
ALL = ("all-conv",)
# Net, methods with their groups, the leaves that move beside the head's.
CASES = [
    ("resnet", {"full": {}}, ("params/**",)),
    ("resnet", {"linear_probe": {}}, ()),
    ("resnet", {"bitfit": {"norm": "scale_and_shift"}}, ("params/**/norm*/*",)),
    ("vgg_bn", {"bitfit": {"norm": "none"}}, ("params/**/conv/bias", "params/fc*/bias")),
    ("resnet", {"norm_tuning": {}}, ("params/**/norm*/*",)),
    (
        "resnet",
        {"norm_tuning": {"targets": ("layer.1.normalization", "stem.norm")}},
        ("params/stages/*/blocks/0/norm2/*", "params/stem/norm/*"),
    ),
    ("resnet", {"partial_tuning": {}}, ("params/stages/1/**",)),
    ("resnet", {"conv_adapter": {"reduction": 3}}, ("peft/stages/*/blocks/0/conv_adapter_*",)),
    (
        "vgg_features",
        {"conv_adapter": {"kind": "after", "kernel": 5, "nonlinearity": "gelu"}},
        ("peft/blocks/*/units/*/conv_adapter_*",),
    ),
    ("resnet", {"lora": {"rank": 3, "alpha": 7.0, "targets": ALL}}, ("peft/**/lora_*",)),
    (
        "resnet",
        {
            "lora": {
                "rank": 2,
                "alpha": 5.0,
                "rslora": True,
                "targets": ("embedder.convolution", "re:stages.1.*conv2", "shortcut.conv"),
                "rank_pattern": ("embedder.*=5",),
                "alpha_pattern": ("shortcut.conv=9",),
                "bias": "all",
                "modules_to_save": ("stages.0.blocks.0.conv3", "stages.0.blocks.0.norm3"),
            }
        },
        (
            *("peft/stem/conv/lora_*", "peft/stages/1/blocks/0/conv2/lora_*"),
            *("peft/stages/*/blocks/0/shortcut/conv/lora_*", "params/**/norm*/bias"),
            *("params/stages/0/blocks/0/conv3/kernel", "params/stages/0/blocks/0/norm3/scale"),
        ),
    ),
    ("resnext", {"lora": {"rank": 4, "alpha": 7.0, "targets": ALL}}, ("peft/**/lora_*",)),
    ("vgg", {"lora": {"rank": 3, "targets": (*ALL, "all-linear")}}, ("peft/**/lora_*",)),
    ("resnet", {"ia3": {"targets": ALL}}, ("peft/**/conv*/ia3_out",)),
    (
        "vgg_bn",
        {"ia3": {"targets": (*ALL, "fc1", "fc2"), "feedforward": ("units.1.conv", "fc2")}},
        (
            *("peft/blocks/*/units/0/conv/ia3_out", "peft/blocks/*/units/1/conv/ia3_in"),
            *("peft/fc1/ia3_out", "peft/fc2/ia3_in"),
        ),
    ),
    ("resnext", {"ia3": {"targets": ("conv2",), "feedforward": ("conv2",)}}, ("peft/**/ia3_in",)),
    (
        "resnet",
        {"adalora": {"init_rank": 3, "target_rank": 2, "alpha": 400.0, "targets": ALL}},
        ("peft/**/adalora_*",),
    ),
    (
        "cifar",
        {"lora": {"rank": 3, "targets": ("conv2",)}, "bitfit": {}},
        ("peft/**/conv2/lora_*", "params/**/norm*/bias"),
    ),
    (
        "cifar",
        {"norm_tuning": {}, "conv_adapter": {}},
        ("params/**/norm*/*", "peft/stages/**/conv_adapter_*"),
    ),
]
HEAD = "params/classifier/out/*"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {
        net: tiny_images.directory(tmp_path_factory.mktemp(net), net, **changes)
        for net, changes in NETS.items()
    }


@pytest.fixture(scope="module")
def plain(folders):
    """{net: apply(variables of the base, batch), compiled once}"""
    return {
        net: tiny.hasty(models.find(str(folder), outputs=5).module.apply)
        for net, folder in folders.items()
    }


class Run:
    """Methods in a net, before and after two steps of gradient descent."""

    def __init__(self, folder, groups):
        self.groups, self.fitted = groups, Fitted(folder, groups)
        self.model, self.methods = self.fitted.model, self.fitted.methods
        self.batch, apply = tiny_images.batch(), self.fitted.forward

        def step(moving, frozen):
            def objective(moving):
                forward = train.bind(apply, tree.join(moving, frozen), jax.random.key(0))
                (total, weight), _ = tiny_images.loss(forward, self.batch, None)
                return total / weight

            loss, gradient = jax.value_and_grad(objective)(moving)
            return jax.tree.map(lambda x, g: x - 0.05 * g, moving, gradient), loss

        def both(moving, frozen):
            variables = tree.join(moving, frozen)
            return apply(variables, self.batch), apply(variables, self.batch, adapter=False)

        step, both = tiny.hasty(step), jax.jit(both)
        moving, frozen = self.fitted.moving, self.fitted.frozen
        self.start, self.base = both(moving, frozen)
        moving, first = step(moving, frozen)
        moving = step(moving, frozen)[0]
        self.moving = jax.device_get(moving)
        last, self.logits = step(moving, frozen)[1], both(moving, frozen)[0]
        self.losses = first, last
        self.variables = tree.join(self.moving, jax.device_get(frozen))


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{'+'.join(case[1])}")
def run(request, folders):
    net, groups, moves = request.param
    return Run(folders[net], groups), net, moves


def test_a_method_starts_as_the_base(run):
    np.testing.assert_array_equal(run[0].start, run[0].base)


def test_the_right_leaves_move_and_all_of_them(run):
    run, _, moves = run
    claimed = set(run.fitted.claims)
    right = {p for p in tree.flatten(run.fitted.variables) for g in moves if tree.match(g, p)}
    right |= {path for path in tree.flatten(run.fitted.variables) if tree.match(HEAD, path)}
    assert claimed == right
    assert all(any(tree.match(g, path) for path in claimed) for g in moves)
    after = tree.flatten(run.moving)
    for path, before in tree.flatten(run.fitted.moving).items():
        assert before.dtype == np.float32
        assert not np.array_equal(before, after[path]), path
    assert run.losses[1] < run.losses[0]


def test_merged_is_unmerged(run, plain):
    run, net, _ = run
    variables, added = run.variables, {"peft": {}, "peft_const": {}}
    added |= {name: variables[name] for name in added if name in variables}
    statistics = {name: variables[name] for name in ("batch_stats",) if name in variables}
    if "conv_adapter" in run.groups:
        with pytest.raises(Mistake, match="'conv_adapter' cannot be merged into plain weights"):
            peft.merge(run.methods, variables["params"], added)
        return
    merged = peft.merge(run.methods, variables["params"], added)
    np.testing.assert_allclose(
        plain[net]({"params": merged} | statistics, run.batch), run.logits, atol=1e-5
    )
    if added["peft"]:  # ... and what was added mattered
        still = plain[net]({"params": variables["params"]} | statistics, run.batch)
        assert np.abs(still - run.logits).max() > 1e-3


def test_what_is_written_is_read(run, folders, tmp_path):
    run, net, _ = run
    own = {"lora": "LORA", "ia3": "IA3", "norm_tuning": "LN_TUNING", "adalora": "ADALORA"}
    wanted = own.get(*run.groups) if len(run.groups) == 1 else None
    if net == "resnext" and "lora" in run.groups:
        wanted = "BMFT_CONV_LORA"
    write(tmp_path, run)
    card = files.card(tmp_path)
    assert card.peft_type == (wanted or "BMFT_" + "_".join(run.groups).upper())
    assert card.outputs == tiny_images.OUTPUTS
    adapter = files.read(tmp_path, run.model, fingerprint="f" * 64)
    assert adapter.names == tuple(run.groups)
    found = files.insert(adapter, run.fitted.loaded.variables())
    same(found, run.variables)
    again = peft.build(run.model, adapter.names, adapter.groups)
    same(peft.constants(again), peft.constants(run.methods))


def write(folder, run, moving=None):
    told = {"base": "tiny", "fingerprint": "f" * 64, "labels": None}
    moving, frozen = run.moving | (moving or {}), run.fitted.frozen
    files.write(folder, run.methods, run.groups, run.model, moving, frozen, **told)


def same(one, other):
    one, other = tree.flatten(one), tree.flatten(other)
    assert set(one) == set(other)
    for path, leaf in one.items():
        np.testing.assert_array_equal(leaf, other[path], err_msg=path)


SPELLINGS = [
    ("resnet", {"targets": ALL}, {"target_modules": ["convolution"]}),
    ("resnet", {"targets": ALL}, {"modules_to_save": ["classifier"], "task_type": None}),
    ("resnet", {"targets": ("conv2",)}, {"target_modules": ["1.convolution"]}),
    (
        "resnet",
        {"targets": ("re:stages.0.*conv2",), "modules_to_save": ("norm1", "norm2", "norm3")},
        {
            "target_modules": ["0.layers.0.layer.1.convolution"],
            "modules_to_save": ["classifier"]
            + [
                f"resnet.encoder.stages.{s}.layers.0.layer.{i}.normalization"
                for s, i in np.ndindex(2, 3)
            ],
        },
    ),
    # `conv1` alone would be that of every block, too.
    ("cifar", {"targets": ("stem.conv",)}, {"target_modules": "conv1"}),
    ("cifar", {"targets": ALL, "rank_pattern": ("stem.conv=2",)}, {"rank_pattern": {"^conv1": 2}}),
    ("cifar", {"targets": ALL}, {"modules_to_save": ["linear"]}),
    # `0` alone would be an activation or a pooling somewhere; `classifier` is more than the head.
    (
        "vgg",
        {"targets": ("re:blocks.0.*conv", "fc2")},
        {"target_modules": ["classifier.3", "features.0"], "modules_to_save": ["classifier.6"]},
    ),
]


@pytest.mark.parametrize("net, group, wanted", SPELLINGS)
def test_fields_that_mean_what_ours_do(folders, tmp_path, net, group, wanted):
    """PEFT takes them so, too: tests/parity/test_conv_peft.py"""
    groups = {"lora": group}
    fitted = Fitted(folders[net], groups)
    fixed = fitted.methods, groups, fitted.model, fitted.moving, fitted.frozen
    files.write(tmp_path, *fixed, base="tiny", fingerprint="")
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {field: written[field] for field in wanted} == wanted
    found = files.insert(files.read(tmp_path, fitted.model), fitted.loaded.variables())
    same(found, fitted.variables)


# --- running statistics ----------------------------------------------------------------------

WITH_STATISTICS = [
    {"lora": {"targets": ("conv2",)}},
    {"lora": {"targets": ("conv2",), "bias": "all", "modules_to_save": ("norm1",)}},
    {"norm_tuning": {}},
    {"norm_tuning": {"targets": ("norm1",)}},
    {"ia3": {"targets": ("conv2",)}},
    {"conv_adapter": {}},
    {"lora": {"targets": ("conv2",)}, "bitfit": {}},
]


@pytest.mark.parametrize("groups", WITH_STATISTICS)
def test_statistics_that_moved_travel(folders, tmp_path, groups):
    fitted = Fitted(folders["resnet"], groups)
    base, rng = fitted.loaded.variables(), np.random.default_rng(0)
    statistics = jax.tree.map(lambda x: x + rng.uniform(0.1, 1, x.shape), base["batch_stats"])
    statistics = jax.tree.map(np.float32, statistics)
    about = {"base": "tiny", "fingerprint": "f" * 64}
    fixed = fitted.model, fitted.moving | {"batch_stats": statistics}, fitted.frozen
    files.write(tmp_path / "new", fitted.methods, groups, *fixed, **about)
    found = files.insert(files.read(tmp_path / "new", fitted.model), base)
    same(found, fitted.variables | {"batch_stats": statistics})
    fixed = fitted.model, fitted.moving, fitted.frozen
    files.write(tmp_path / "old", fitted.methods, groups, *fixed, **about)
    found = files.insert(files.read(tmp_path / "old", fitted.model), base)
    same(found, fitted.variables)


def test_statistics_of_a_training_are_those_of_its_adapter(folders, tmp_path):
    """From the step to the file and back: the net computes what it did when it was trained."""
    groups = {"norm_tuning": {}}
    fitted = Fitted(folders["resnet"], groups, batch_norm="update")
    stays = {name: leaves for name, leaves in fitted.frozen.items() if name != "batch_stats"}
    statistics = {"batch_stats": fitted.frozen["batch_stats"]}
    tx = optax.sgd(0.01)
    step = train.make_step(fitted.forward, tiny_images.loss, tx, momentum=lambda step: 0.1)
    copy = jax.tree.map(jnp.copy, (fitted.moving, statistics))
    state = train.init_state(copy[0], tx, jax.random.key(0), copy[1])
    state, _ = step(state, stays, tiny_images.batch())
    moved = jax.device_get(state.moving | state.stats)
    for path, before in tree.flatten(statistics).items():
        assert not np.array_equal(before, tree.flatten(moved)[path]), path
    files.write(
        tmp_path, fitted.methods, groups, fitted.model, moved, stays, base="", fingerprint=""
    )
    adapter = files.read(tmp_path, fitted.model)
    found = files.insert(adapter, fitted.loaded.variables())
    want = fitted.apply(train.variables(state, stays), tiny_images.batch(seed=1))
    np.testing.assert_array_equal(fitted.apply(found, tiny_images.batch(seed=1)), want)


# --- one by one ------------------------------------------------------------------------------


def test_the_leaves_of_a_convolutional_adapter(folders):
    """The whole tree of one block, which halves the sides: 12 channels in, 20 out."""
    fitted = Fitted(folders["resnet"], {"conv_adapter": {"reduction": 5}})
    block = fitted.variables["peft"]["stages"]["1"]["blocks"]
    assert tree.describe(block) == [
        ("0/conv_adapter_down_bias", (2,), "float32"),
        ("0/conv_adapter_down_kernel", (3, 3, 6, 2), "float32"),
        ("0/conv_adapter_scale", (20,), "float32"),
        ("0/conv_adapter_up_bias", (20,), "float32"),
        ("0/conv_adapter_up_kernel", (1, 1, 2, 20), "float32"),
    ]
    leaves = tree.flatten(block)
    assert not np.any(leaves["0/conv_adapter_up_kernel"])
    assert np.all(leaves["0/conv_adapter_scale"] == 1)
    assert np.any(leaves["0/conv_adapter_down_kernel"])


@pytest.mark.parametrize("kind", ["parallel", "after"])
def test_blocks_that_are_computed_again_are_adapted_once(folders, kind):
    """remat wraps a block in a call of its own, which is none of the block's."""
    groups, outputs = {"conv_adapter": {"kind": kind}}, []
    for remat in ("none", "block"):
        fitted = Fitted(folders["resnet"], groups, remat=remat)
        variables = tree.map_with_path(
            lambda path, x: x + 0.3 if path.endswith("up_kernel") else x, fitted.variables
        )
        outputs.append(fitted.apply(variables, tiny_images.batch(rows=2)))
        assert (
            np.abs(outputs[-1] - fitted.apply(fitted.variables, tiny_images.batch(2))).max() > 0.1
        )
    np.testing.assert_allclose(*outputs, atol=1e-5)


def test_low_precision_base_with_float32_leaves(folders):
    groups = {
        "lora": {"rank": 3, "alpha": 7.0, "targets": ("conv2",)},
        "conv_adapter": {},
        "ia3": {"targets": ("conv1",)},
        "bitfit": {},
    }
    full = Fitted(folders["resnet"], groups)
    half = Fitted(folders["resnet"], groups, dtype=jnp.bfloat16)
    variables = tree.map_with_path(
        lambda path, x: x + 0.1 if path.endswith(("lora_b", "up_kernel")) else x, full.variables
    )
    low = tree.map_with_path(
        lambda path, x: x.astype(jnp.bfloat16) if path.startswith("params/") else x, variables
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(half.variables["peft"])} == {np.dtype("float32")}
    out, want = half.apply(low, tiny_images.batch()), full.apply(variables, tiny_images.batch())
    assert out.dtype == jnp.float32
    assert 0 < np.abs(out - want).max() < 0.05 * np.abs(want).max() + 0.05


def claims(folder, groups):
    model = models.find(str(folder), outputs=5)
    methods = peft.build(model, tuple(groups), groups)
    paths = [f"params/{leaf.path}" for leaf in model.names.leaves if not leaf.is_statistic]
    claimed = peft.claims(methods, paths, heads=model.heads)
    return model, methods, claimed


def test_pieces_below_what_moves(folders):
    for last in (1, 2, 3):
        model, methods, claimed = claims(folders["resnet"], {"partial_tuning": {"last": last}})
        assert peft.first_moving_piece(methods, claimed, model.names) == 3 - last


def test_methods_that_do_not_ask_for_convolutions(folders, tmp_path):
    """Norms and layers of a stack: of a vision transformer, and LoRA on its one convolution."""
    folder = tiny_vit.directory(tmp_path)
    _, methods, claimed = claims(folder, {"partial_tuning": {"last": 2}})
    assert not any(path.startswith("params/embeddings/") for path in claimed)
    assert {"params/norm/scale", "params/layers/mlp/up/kernel"} <= set(claimed)
    assert peft.moving_rows(methods, "params/layers/mlp/up/kernel").tolist() == [False, True, True]
    assert peft.moving_rows(methods, "params/norm/scale") is None
    _, _, claimed = claims(folder, {"norm_tuning": {}})
    norms = ("layers/attention_norm", "layers/mlp_norm", "norm")
    moving = {f"params/{norm}/{leaf}" for norm in norms for leaf in ("scale", "bias")}
    assert {path for path, label in claimed.items() if label == "norm_tuning"} == moving
    model, group = models.find(str(folder), outputs=5), {"targets": ("projection", "query")}
    methods = peft.build(model, ("lora",), {"lora": group})
    assert sorted(methods[0].files.sites) == ["embeddings/patch", "layers/attention/query"]


REFUSED = [
    ("resnet", {"lora": {}}, "target 'query' matches no module"),
    ("resnet", {"lora": {"targets": ("convolutoin",)}}, "did you mean 'convolution'"),
    ("resnet", {"lora": {"targets": ("normalization",)}}, "matches no module"),
    ("resnet", {"lora": {"targets": ("classifier.1",)}}, "matches no module"),
    ("resnext", {"lora": {"targets": ALL, "rank": 3}}, "in 2 groups, and rank 3 is no multiple"),
    ("resnet", {"adapter": {"kind": "houlsby"}}, "has no layers/attention_norm for a houlsby"),
    ("resnet", {"adapter": {"kind": "parallel"}}, "has no layers/mlp for a parallel adapter"),
    ("resnet", {"visual_prompt": {}}, "takes no images cut into patches"),
    ("resnet", {"bitfit": {"variant": "query_intermediate"}}, "has no such biases"),
    ("resnet", {"bitfit": {"norm": "none"}}, "has no such biases, but for its head's"),
    ("resnet", {"bitfit": {"norm": "shfit"}}, "did you mean 'shift'"),
    (
        "vgg",
        {"bitfit": {"norm": "none", "variant": "query_intermediate"}},
        "peft.bitfit.norm='none' is for variant 'all'",
    ),
    ("resnet", {"ia3": {}}, "target 'key' matches no module"),
    (
        "resnet",
        {"ia3": {"targets": ("conv1",), "feedforward": ("conv2",)}},
        "peft.ia3.feedforward means stages/0/blocks/0/conv2, which is not among peft.ia3.targets",
    ),
    ("resnet", {"ia3": {"targets": ALL, "feedforward": ("cnv2",)}}, "did you mean 'conv2'"),
    ("resnet", {"ia3": {"targets": ALL, "modules_to_save": ("norm9",)}}, "matches no module"),
    ("vgg", {"norm_tuning": {}}, "has no norms"),
    ("resnet", {"norm_tuning": {"targets": ("convolution",)}}, "matches no module"),
    ("resnet", {"partial_tuning": {"last": 0}}, "last is 0"),
    ("resnet", {"partial_tuning": {"last": 4}}, "has 1 to 3 stages"),
    ("vit", {"partial_tuning": {"last": 4}}, "has 1 to 3 layers"),
    ("vit", {"conv_adapter": {}}, "is no convolutional net"),
    ("bert", {"conv_adapter": {}}, "is no convolutional net"),
    ("resnet", {"conv_adapter": {"kind": "paralel"}}, "did you mean 'parallel'"),
    ("resnet", {"conv_adapter": {"kernel": 2}}, "kernel is 2; it must be odd"),
    ("resnet", {"conv_adapter": {"reduction": 0}}, "reduction is 0"),
    ("resnet", {"conv_adapter": {"nonlinearity": "rely"}}, "did you mean 'relu'"),
    ("resnet", {"bitfit": {}, "norm_tuning": {}}, "moved both as 'bitfit' and as 'norm_tuning'"),
]


@pytest.fixture(scope="module")
def all_folders(folders, tmp_path_factory):
    others = {"vit": tiny_vit.directory, "bert": tiny.directory}
    return folders | {name: make(tmp_path_factory.mktemp(name)) for name, make in others.items()}


@pytest.mark.parametrize("net, groups, says", REFUSED)
def test_what_is_refused(all_folders, net, groups, says):
    with pytest.raises(Mistake) as refused:
        Fitted(all_folders[net], groups)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)
