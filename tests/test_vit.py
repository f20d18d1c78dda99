"""ViT: its files, its logits at any image size, its pieces, and the methods on it."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
import tiny
import tiny_vit
from safetensors.numpy import load_file, save_file
from trained import Trained

from bmft import evaluate, models, peft, sharding, train, tree
from bmft.errors import Mistake
from bmft.models import vit, vit_timm, weights
from bmft.peft import files

GOLDENS = pathlib.Path(__file__).resolve().parent / "goldens"
SIZES = ((20, 20), (28, 28), (12, 36))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {
        dialect: tiny_vit.directory(tmp_path_factory.mktemp(dialect), dialect)
        for dialect in tiny_vit.DIALECTS
    }


def load(folder, outputs=tiny_vit.OUTPUTS, **find):
    model = models.find(str(folder), outputs=outputs, **find)
    return model, weights.load(model, jax.random.key(0))


def close(one, other, atol=1e-5):
    np.testing.assert_allclose(one, other, atol=atol)


def change(folder, into, edit):
    """A copy of a directory whose tensors edit(tensors) changed in place."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, into / "model.safetensors", {"format": "pt"})
    (into / "config.json").write_bytes((folder / "config.json").read_bytes())
    return into


# --- logits ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES, ids="{0[0]}x{0[1]}".format)
def test_logits_of_transformers(size):
    """As tests/goldens/make_vit.py stored them; uint8 and floats in [0, 1] are the same images."""
    golden, name = np.load(GOLDENS / "vit.npz"), "{}x{}".format(*size)
    model, loaded = load(GOLDENS / "vit")
    assert loaded.fresh == () and loaded.ignored == ()
    images, apply = golden[f"images_{name}"], jax.jit(model.module.apply)
    assert images.shape[1:3] == size
    close(apply(loaded.variables(), {"images": images}), golden[f"logits_{name}"])
    close(apply(loaded.variables(), {"images": images / np.float32(255)}), golden[f"logits_{name}"])


@pytest.fixture(scope="module")
def gradient(folders):
    """gradient(module) -> loss and {path: gradient} of a module of the tiny ViT."""
    variables = load(folders["vit"])[1].variables()

    def of(module):
        total = lambda v: tiny_vit.loss(module, v, tiny_vit.batch())  # noqa: E731
        value, grads = tiny.hasty(jax.value_and_grad(total))(variables)
        return value, tree.flatten(grads["params"])

    return of


@pytest.fixture(scope="module")
def whole(folders, gradient):
    model, _ = load(folders["vit"])
    return model.module, *gradient(model.module)


@pytest.mark.parametrize(
    "variant", [{"unroll": 3}, {"unroll": 2, "remat": "block"}, {"remat": "block"}], ids=str
)
def test_the_same_however_the_stack_is_run(whole, gradient, variant):
    module, want, grads = whole
    value, found = gradient(module.clone(**variant))
    close(value, want)
    for path, leaf in found.items():
        np.testing.assert_allclose(leaf, grads[path], atol=1e-4, err_msg=path)


@pytest.mark.parametrize("below", [1, 3])
def test_nothing_is_differentiated_below_what_moves(whole, gradient, below):
    module, _, grads = whole
    for path, leaf in gradient(module.clone(frozen_below=below))[1].items():
        if path.startswith("embeddings/"):
            assert not np.any(leaf), path
        elif path.startswith("layers/"):
            assert not np.any(leaf[:below]), path
            close(leaf[below:], grads[path][below:])
        else:
            close(leaf, grads[path])


@pytest.mark.parametrize("dialect", tiny_vit.DIALECTS)
def test_bfloat16(folders, dialect):
    model, loaded = load(folders[dialect])
    low = models.find(str(folders[dialect]), outputs=tiny_vit.OUTPUTS, dtype=jnp.bfloat16)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), loaded.params)
    batch = tiny_vit.batch(size=(28, 12))
    want = jax.jit(model.module.apply)(loaded.variables(), batch)
    got = jax.jit(low.module.apply)({"params": params}, batch)
    assert got.dtype == want.dtype == jnp.float32
    assert 0 < np.abs(got - want).max() < 0.05 * np.abs(want).max()


def test_every_split_into_pieces_gives_the_whole(folders):
    model, loaded = load(folders["pooled"])
    batch, variables = tiny_vit.batch(size=(12, 20)), loaded.variables()

    def run(batch, **pieces):
        return jax.jit(model.module.clone(**pieces).apply)(variables, batch)

    whole = run(batch)
    assert vit.pieces(model.config) == 4
    for cut in range(1, 5):
        below = run(batch, end=cut)
        assert below.shape == ((4, 24) if cut == 4 else (4, 1 + 3 * 5, 24))
        close(run({"features": below}, begin=cut), whole, atol=1e-6)
        if cut == 3:
            first = run(batch, end=1)
            close(run({"features": first}, begin=1, end=cut), below, atol=1e-6)


def test_a_table_of_its_own_size_is_taken_as_it_is():
    table = np.random.default_rng(0).normal(size=(1, 17, 6)).astype(np.float32)
    assert vit.positions(table, 4, 4) is table
    for count in (1, 4, 7):
        np.testing.assert_array_equal(vit.bicubic(count, count), np.eye(count))
    close(vit.bicubic(5, 8).sum(1), np.ones(8))  # an even table stays even
    # as many patches in another arrangement are other places
    assert np.abs(vit.positions(table, 2, 8) - table).max() > 0.1
    np.testing.assert_array_equal(vit.positions(table, 3, 9)[:, 0], table[:, 0])


@pytest.mark.parametrize("size", [(21, 20), (20, 18), (3, 4)])
def test_images_that_are_no_patches(folders, size):
    model, loaded = load(folders["vit"])
    with pytest.raises(Mistake, match=f"images of {size[0]} x {size[1]} pixels: .* patch, 4,"):
        model.module.apply(loaded.variables(), tiny_vit.batch(size=size))


# --- files -----------------------------------------------------------------------------------


def test_the_whole_tree(folders):
    _, loaded = load(folders["vit"])
    names = ("query", "key", "value", "output")
    attention = [f"layers/attention/{name}" for name in sorted(names)]
    layers = [(f"{path}/{leaf}", (3, 24, *[24] * (leaf == "kernel")), "float32")
              for path in attention for leaf in ("bias", "kernel")]  # fmt: skip
    assert tree.describe(loaded.params) == [
        ("classifier/out/bias", (5,), "float32"),
        ("classifier/out/kernel", (24, 5), "float32"),
        ("embeddings/class", (1, 1, 24), "float32"),
        ("embeddings/patch/bias", (24,), "float32"),
        ("embeddings/patch/kernel", (4, 4, 3, 24), "float32"),
        ("embeddings/position", (1, 26, 24), "float32"),
        *layers,
        ("layers/attention_norm/bias", (3, 24), "float32"),
        ("layers/attention_norm/scale", (3, 24), "float32"),
        ("layers/mlp/down/bias", (3, 24), "float32"),
        ("layers/mlp/down/kernel", (3, 40, 24), "float32"),
        ("layers/mlp/up/bias", (3, 40), "float32"),
        ("layers/mlp/up/kernel", (3, 24, 40), "float32"),
        ("layers/mlp_norm/bias", (3, 24), "float32"),
        ("layers/mlp_norm/scale", (3, 24), "float32"),
        ("norm/bias", (24,), "float32"),
        ("norm/scale", (24,), "float32"),
    ]


@pytest.mark.parametrize("dialect", ["timm", "pooled"])
def test_timms_tensors_where_they_belong(folders, dialect):
    tensors = load_file(folders[dialect] / "model.safetensors")
    model, loaded = load(folders[dialect])
    assert loaded.fresh == () and loaded.ignored == ()
    assert tree.count(loaded.params) == sum(tensor.size for tensor in tensors.values())
    attention = loaded.params["layers"]["attention"]
    for layer in range(3):
        for part, name in enumerate(("query", "key", "value")):
            rows = slice(24 * part, 24 * (part + 1))
            kernel = tensors[f"blocks.{layer}.attn.qkv.weight"][rows].T
            np.testing.assert_array_equal(attention[name]["kernel"][layer], kernel)
            bias = tensors[f"blocks.{layer}.attn.qkv.bias"][rows]
            np.testing.assert_array_equal(attention[name]["bias"][layer], bias)
    norm = "fc_norm.weight" if dialect == "pooled" else "norm.weight"
    np.testing.assert_array_equal(loaded.params["norm"]["scale"], tensors[norm])
    assert model.config.mean == (0.4, 0.5, 0.6) and model.config.resample == "bicubic"


def test_each_device_reads_its_part_of_fused_tensors(folders):
    mesh = jax.make_mesh((2, 2, 2), sharding.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)
    model, whole = load(folders["timm"])
    lies = sharding.of_leaf(mesh, model.sharding)
    parts = weights.load(model, jax.random.key(0), sharding=lies).params
    value = parts["layers"]["attention"]["value"]["kernel"]
    assert {shard.data.shape for shard in value.addressable_shards} == {(3, 12, 12)}
    for path, leaf in tree.flatten(parts).items():
        np.testing.assert_array_equal(leaf, tree.flatten(whole.params)[path], err_msg=path)


def test_a_file_of_tensors_alone(folders):
    """Its sizes are in the shapes, but for the heads; 64 numbers a head is what S, B, L have."""
    shapes = {
        name: tensor.shape
        for name, tensor in load_file(folders["timm"] / "model.safetensors").items()
    }
    settings = vit.recognize(shapes)
    with pytest.raises(Mistake, match="no model_args.num_heads, and how many heads a ViT 24 wide"):
        vit.configure(settings, 5)
    for width, heads in ((192, 3), (384, 6), (768, 12), (1024, 16)):
        config = vit.configure(settings | {"hidden_size": width}, 5)
        assert (config.heads, config.mean, config.resample) == (heads, (0.5,) * 3, "bicubic")
    assert vit.recognize({"conv1.weight": (64, 3, 7, 7), "fc.weight": (10, 64)}) is None


def test_another_head_and_what_an_encoder_alone_has(folders, tmp_path):
    def edit(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("vit.")] = tensors.pop(name)
        del tensors["classifier.weight"], tensors["classifier.bias"]
        tensors["pooler.dense.weight"] = np.zeros((24, 24), np.float32)
        tensors["pooler.dense.bias"] = np.zeros(24, np.float32)

    _, loaded = load(change(folders["vit"], tmp_path, edit), outputs=7)
    assert set(loaded.fresh) == {"classifier/out/kernel", "classifier/out/bias"}
    assert set(loaded.ignored) == {"pooler.dense.weight", "pooler.dense.bias"}
    _, whole = load(folders["vit"])
    for path, leaf in tree.flatten(loaded.params).items():
        if path not in loaded.fresh:
            np.testing.assert_array_equal(leaf, tree.flatten(whole.params)[path], err_msg=path)
    _, other = load(folders["timm"], outputs=7)
    assert set(other.ignored) == {"head.weight", "head.bias"}


@pytest.mark.parametrize("dialect", tiny_vit.DIALECTS)
def test_queries_without_biases(tmp_path, dialect):
    folder = tiny_vit.directory(tmp_path, dialect, qkv_bias=False)
    model, loaded = load(folder)
    assert not model.config.qkv_bias
    assert set(loaded.params["layers"]["attention"]["query"]) == {"kernel"}
    assert "bias" in loaded.params["layers"]["attention"]["output"]


REFUSED_TENSORS = [
    (lambda t: t.update({"blocks.0.ls1.gamma": np.ones(24)}), "'blocks.0.ls1.gamma': this ViT has"),
    (lambda t: t.update(reg_token=np.ones((1, 4, 24))), "'reg_token': this ViT has no register"),
    (lambda t: t.update(dist_token=np.ones((1, 1, 24))), "'dist_token': this ViT has no distil"),
    (lambda t: t.update({"norm_pre.weight": np.ones(24)}), "'norm_pre.weight': this ViT has no"),
    (lambda t: t.pop("cls_token"), "'cls_token' is missing"),
    (lambda t: t.pop("pos_embed"), "'pos_embed' is missing"),
    (lambda t: t.update(pos_embed=t["pos_embed"][:, :-1].copy()), "'pos_embed' has 25 rows, not"),
    (lambda t: t.update(strange=np.ones(1)), "no place for tensor 'strange'"),
    (lambda t: t.pop("blocks.1.norm1.weight"), "tensor 'blocks.1.norm1.weight' is missing"),
]


@pytest.mark.parametrize("edit, says", REFUSED_TENSORS)
def test_tensors_that_are_not_computed(folders, tmp_path, edit, says):
    folder = change(folders["timm"], tmp_path, edit)
    with pytest.raises(Mistake) as refused:
        load(folder)
    assert says in str(refused.value)


REFUSED_SETTINGS = [
    ("vit", {"model_type": "deit"}, "unknown model_type 'deit'"),
    ("vit", {"hidden_act": "gelo"}, "did you mean 'gelu'"),
    ("vit", {"image_size": [20, 24]}, "image_size is [20, 24]; only squares"),
    ("vit", {"num_attention_heads": 5}, "5 heads do not divide the width 24"),
    ("vit", {"num_channels": 1}, "num_channels is 1"),
    ("timm", {"global_pool": "avg"}, "global_pool is 'avg' with tensor 'norm.weight'"),
    ("pooled", {"global_pool": "token"}, "global_pool is 'token' with tensor 'fc_norm.weight'"),
    ("timm", {"model_args": {"act_layer": "quick_gelu"}}, "model_args has 'act_layer'"),
]


@pytest.mark.parametrize("dialect, changes, says", REFUSED_SETTINGS)
def test_settings_that_are_not_computed(folders, tmp_path, dialect, changes, says):
    folder = change(folders[dialect], tmp_path, lambda tensors: None)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | changes))
    with pytest.raises(Mistake) as refused:
        load(folder)
    assert says in str(refused.value)


def test_what_a_preprocessor_says(folders, tmp_path):
    folder = change(folders["vit"], tmp_path, lambda tensors: None)
    said = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 3}
    said |= {"size": {"shortest_edge": 23}}
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    config = load(folder)[0].config
    assert (config.mean, config.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (config.resample, config.size, config.grid) == ("bicubic", 20, 5)


@pytest.mark.parametrize("dialect", tiny_vit.DIALECTS)
def test_what_is_written_is_read_as_the_same(folders, dialect):
    """By transformers' names and fields where it can compute it, else by timm's."""
    model, _ = load(folders[dialect])
    written = vit.written_config(model.config, model.json)
    again = vit.configure(written, tiny_vit.OUTPUTS)
    pooled = dialect == "pooled"
    assert written["model_type"] == (vit_timm.MODEL_TYPE if pooled else "vit")
    assert again == model.config._replace(family=written["model_type"])
    assert ("architecture" in written) == pooled
    theirs = {leaf.path: vit.names(again).written(leaf) for leaf in vit.names(again).leaves}
    assert theirs == {leaf.path: model.names.written(leaf) for leaf in model.names.leaves}
    first = "blocks.{}.attn.qkv.weight" if pooled else QUERY_4.format("{}") + ".weight"
    assert theirs["layers/attention/query/kernel"] == first


# --- methods ---------------------------------------------------------------------------------

QUERY_4, QUERY_5 = (
    "vit.encoder.layer.{}.attention.attention.query",
    "vit.layers.{}.attention.q_proj",
)
CASES = [
    ("vit", {"lora": {"rank": 3, "alpha": 7.0, "targets": ("query", "v_proj")}}),
    ("timm", {"lora": {"rank": 3, "alpha": 7.0, "targets": ("all-linear",), "bias": "all"}}),
    ("vit", {"adapter": {"kind": "houlsby", "reduction": 4}}),
    ("pooled", {"adapter": {"kind": "pfeiffer", "reduction": 4}}),
    ("vit", {"adapter": {"kind": "parallel", "reduction": 3}}),
    ("pooled", {"visual_prompt": {"tokens": 3}}),
    ("vit", {"visual_prompt": {"tokens": 2, "deep": False}, "bitfit": {}}),
    ("vit", {"visual_prompt": {"tokens": 2}, "lora": {"rank": 2, "layers_to_transform": (1,)}}),
]


@pytest.fixture(
    scope="module", params=list(enumerate(CASES)), ids=lambda p: f"{p[1][0]}-{'+'.join(p[1][1])}"
)
def fitted(request, folders):
    number, (dialect, groups) = request.param
    how = {"remat": "block"} if number == 7 else {"unroll": 3} if number == 0 else {}
    return tiny.Fitted(folders[dialect], tuple(groups), groups, **how)


def test_methods_start_as_declared(fitted):
    """Exactly as the base, but for prompts and for adapters whose last layer is not zero."""
    found = evaluate.compare_with_base(fitted.apply, fitted.variables, tiny_vit.batch())
    declared = max(method.identity for method in fitted.methods)
    assert found <= declared
    assert (found > 0) == (declared > 0)


def test_only_what_is_claimed_moves_and_all_of_it(fitted):
    tx = optax.sgd(0.05)
    step = tiny.hasty(train.make_step(fitted.apply, tiny_vit.task_loss, tx))
    state = train.init_state(jax.tree.map(jnp.copy, fitted.moving), tx, jax.random.key(2))
    losses = []
    for _ in range(3):
        state, metrics = step(state, fitted.frozen, tiny_vit.batch())
        losses.append(float(metrics["loss"]))
    assert losses[2] < losses[0]
    after = tree.flatten(state.moving)
    assert set(after) == set(fitted.claims)
    for path, before in tree.flatten(fitted.moving).items():
        if not path.endswith("attention/key/bias"):  # which softmax does not feel
            assert not np.array_equal(before, after[path]), path
    if "lora" not in fitted.groups or "visual_prompt" in fitted.groups:
        return
    variables = train.variables(state, fitted.frozen)
    merged = peft.merge(fitted.methods, variables["params"], variables)
    want = fitted.apply(variables, tiny_vit.batch())
    got = fitted.apply({"params": merged}, tiny_vit.batch(), adapter=False)
    close(got, want, atol=2e-5)
    assert np.abs(want - fitted.apply(variables, tiny_vit.batch(), adapter=False)).max() > 1e-4


def test_houlsby_moves_the_norms(folders):
    fitted = tiny.Fitted(folders["vit"], ("adapter",))
    norms = {path for path in fitted.claims if path.startswith("params/") and "norm" in path}
    assert len(norms) == 6  # two in a layer and the last, a scale and a bias each


def test_pfeiffer_reads_the_sum(folders):
    """Without a norm behind the sum, the adapter reads the sum itself."""
    fitted = tiny.Fitted(folders["vit"], ("adapter",), {"adapter": {"kind": "pfeiffer"}})
    flat = tree.flatten(fitted.variables)
    at = "peft/layers/mlp_norm/adapter_"
    flat = {path: leaf + 0.1 * path.startswith(at) for path, leaf in flat.items()}
    seen = []

    def spy(module, call, *args):
        out = call(*args)
        if peft.path_of(module) == "layers/mlp_norm":
            jax.debug.callback(lambda *a: seen.append([np.asarray(x) for x in a]), *args, out)
        return out

    method = peft.Method("spy", lambda path: None, spy)
    apply = peft.attach((method, *fitted.methods), fitted.model).apply
    apply(tree.unflatten(flat), tiny_vit.batch())
    jax.effects_barrier()
    assert len(seen) == 3
    weights_of = {path.removeprefix(at): leaf for path, leaf in flat.items() if at in path}
    for layer, (h, stream, out) in enumerate(seen):
        w = {name: np.asarray(leaf[layer]) for name, leaf in weights_of.items()}
        down = (h + stream) @ w["down_kernel"] + w["down_bias"]
        close(out, stream + h + np.maximum(down, 0) @ w["up_kernel"] + w["up_bias"], atol=1e-4)


def test_adapters_in_both_dialects(folders, tmp_path):
    """Written by the names of transformers 5; the same by those of 4 means the same."""
    model, loaded = load(folders["vit"])
    group = {
        "rank": 3,
        "alpha": 7.0,
        "targets": ("query", "mlp.up", "attention.output"),
        "rank_pattern": ("layers.1.*query=2",),
        "bias": "lora_only",
        "layers_to_transform": (0, 1),
    }
    trained = Trained(model, loaded.params, {"lora": group})
    trained.write(tmp_path / "new")
    tensors = load_file(tmp_path / "new" / "adapter_model.safetensors")
    assert f"base_model.model.{QUERY_5.format(1)}.lora_A.weight" in tensors
    settings = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert settings["task_type"] is None and settings["modules_to_save"] == ["classifier"]
    assert settings["target_modules"] == ["fc1", "o_proj", "q_proj"]
    renamed = {
        "q_proj": "attention.query",
        "fc1": "intermediate.dense",
        "o_proj": "attention.output.dense",
    }
    older = {"layers.0.": "encoder.layer.0.", "layers.1.": "encoder.layer.1."}
    older |= {f".{new}": f".{old}" for new, old in renamed.items()}
    older |= {
        ".mlp.intermediate": ".intermediate",
        "attention.attention.output": "attention.output",
    }

    def in_old(name):
        for new, old in older.items():
            name = name.replace(new, old)
        return name

    (tmp_path / "old").mkdir()
    about = {"bmft_labels": '["a"]'}
    save_file({in_old(key): tensor for key, tensor in tensors.items()},
              tmp_path / "old" / "adapter_model.safetensors", about)  # fmt: skip
    settings["target_modules"] = [renamed[name] for name in settings["target_modules"]]
    settings["rank_pattern"] = {"layer.1.*query": 2}
    (tmp_path / "old" / "adapter_config.json").write_text(json.dumps(settings))
    want = trained.variables
    for folder in ("new", "old"):
        adapter = files.read(tmp_path / folder, model)
        variables = tree.flatten(files.insert(adapter, loaded.variables()))
        assert set(variables) == set(tree.flatten(want))
        for path, leaf in tree.flatten(want).items():
            np.testing.assert_array_equal(variables[path], leaf, err_msg=path)
    # Read from the old, it is written by the new names.
    moving, frozen = tree.split(want, lambda path: path in trained.claims)
    files.write(tmp_path / "again", adapter.methods, adapter.groups, model, moving, frozen,
                base="tiny", fingerprint="")  # fmt: skip
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert again.keys() == tensors.keys()


def test_adapters_of_other_tasks(folders, tmp_path):
    model, loaded = load(folders["vit"])
    Trained(model, loaded.params, {"lora": {"rank": 2}}).write(tmp_path)
    path = tmp_path / "adapter_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"task_type": "FEATURE_EXTRACTION"}))
    assert files.read(tmp_path, model).names == ("lora",)
    path.write_text(json.dumps(settings | {"task_type": "SEQ_CLS"}))
    with pytest.raises(Mistake, match="task_type 'SEQ_CLS'; None and 'FEATURE_EXTRACTION' are"):
        files.read(tmp_path, model)


# --- visual prompts --------------------------------------------------------------------------


def prompted(folder, **group):
    """A model with prompts that matter, and its variables."""
    return tiny.Fitted(folder, ("visual_prompt",), {"visual_prompt": group})


def by_hand(fitted, batch, deep):
    """The logits in NumPy, from the patches on: prompts put in before each layer, or once."""
    config, params = fitted.model.config, jax.tree.map(np.float64, fitted.variables["params"])
    own = jax.tree.map(np.float64, fitted.variables["peft"])
    at = own["layers"]["prompt"] if deep else own["embeddings"]["prompt"][None]
    n, block = at.shape[1], params["layers"]

    def norm(x, w):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt(x.var(-1, keepdims=True) + config.eps) * w["scale"] + w["bias"]

    def dense(x, w):
        return x @ w["kernel"] + w["bias"]

    def attention(x, w):
        q, k, v = (
            dense(x, w[name]).reshape(*x.shape[:2], config.heads, -1).swapaxes(1, 2)
            for name in ("query", "key", "value")
        )
        shares = np.exp(q @ k.swapaxes(2, 3) / np.sqrt(q.shape[-1]))
        mixed = shares / shares.sum(-1, keepdims=True) @ v
        return dense(mixed.swapaxes(1, 2).reshape(x.shape), w["output"])

    def mlp(x, w):
        h = dense(x, w["up"])
        return dense(h * scipy.stats.norm.cdf(h), w["down"])  # GELU

    variables = {"params": fitted.variables["params"]}
    x = np.float64(fitted.model.module.clone(end=1).apply(variables, batch))
    for layer in range(config.depth):
        if deep or layer == 0:
            patches = x[:, 1:] if layer == 0 else x[:, 1 + n :]
            prompts = np.broadcast_to(at[layer], (len(x), *at.shape[1:]))
            x = np.concatenate([x[:, :1], prompts, patches], 1)
        w = jax.tree.map(lambda leaf, layer=layer: leaf[layer], block)
        x = x + attention(norm(x, w["attention_norm"]), w["attention"])
        x = x + mlp(norm(x, w["mlp_norm"]), w["mlp"])
    x = x[:, 1 + n :].mean(1) if config.pooled else x[:, 0]
    return dense(norm(x, params["norm"]), params["classifier"]["out"])


@pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])
@pytest.mark.parametrize("dialect", ["vit", "pooled"])
def test_prompts_equal_prompts_put_in_by_hand(folders, dialect, deep):
    fitted = prompted(folders[dialect], tokens=3, deep=deep)
    batch = tiny_vit.batch(size=(12, 20))
    logits = fitted.apply(fitted.variables, batch)
    close(logits, by_hand(fitted, batch, deep))
    assert np.abs(logits - fitted.apply(fitted.variables, batch, adapter=False)).max() > 1e-2
    still = fitted.apply(fitted.variables, batch, train=False, key=jax.random.key(3))
    np.testing.assert_array_equal(logits, still)


@pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])
def test_the_head_reads_as_many_tokens_as_ever_and_the_layers_more(folders, deep):
    fitted, seen = prompted(folders["pooled"], tokens=3, deep=deep), {}

    def spy(module, call, *args):
        if peft.path_of(module) in ("layers", "layers/attention", "readout"):
            seen[peft.path_of(module)] = args[0].shape[1]
        return call(*args)

    method = peft.Method("spy", lambda path: None, spy)
    apply = peft.attach((*fitted.methods, method), fitted.model).apply
    apply(fitted.variables, tiny_vit.batch(size=(12, 20)))
    assert seen == {"layers": 1 + 3 + 15, "layers/attention": 1 + 3 + 15, "readout": 1 + 15}


def test_prompts_are_drawn_as_published(folders):
    """For patches of p pixels and width d uniform in ±sqrt(6 / (3 p p + d)), each layer apart."""
    deep = prompted(folders["vit"], tokens=400).variables["peft"]
    assert tree.describe(deep) == [("layers/prompt", (3, 400, 24), "float32")]
    drawn, bound = np.asarray(deep["layers"]["prompt"]), (6 / (3 * 16 + 24)) ** 0.5
    assert 0.99 * bound < np.abs(drawn).max() <= bound
    assert abs(drawn.std() - bound / 3**0.5) < 0.01 * bound
    assert abs(np.corrcoef(drawn[0].ravel(), drawn[1].ravel())[0, 1]) < 0.05
    shallow = prompted(folders["vit"], tokens=4, deep=False).variables["peft"]
    assert tree.describe(shallow) == [("embeddings/prompt", (4, 24), "float32")]


@pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])
def test_gradients_reach_the_prompts_of_every_layer(folders, deep):
    """Nothing is frozen below them, as they come in before the stack."""
    fitted = prompted(folders["vit"], tokens=3, deep=deep)
    below = peft.first_moving_piece(fitted.methods, fitted.claims, fitted.model.names)
    assert below == 0
    module = fitted.model.module.clone(frozen_below=below)
    apply = peft.attach(fitted.methods, fitted.model._replace(module=module)).apply

    def total(own):
        forward = train.bind(apply, fitted.variables | {"peft": own}, jax.random.key(0))
        return tiny_vit.task_loss(forward, tiny_vit.batch(), None)[0][0]

    (gradient,) = tree.flatten(tiny.hasty(jax.grad(total))(fitted.variables["peft"])).values()
    assert gradient.shape == ((3,) if deep else ()) + (3, 24)
    assert (np.abs(gradient).max(-1) > 1e-6).all()


def test_dropout_of_prompts_is_drawn_by_image_in_training(folders):
    fitted = prompted(folders["vit"], tokens=3, dropout=0.5)
    batch = tiny_vit.batch()
    batch["images"][:] = batch["images"][:1]  # all alike
    one, two = (
        fitted.apply(fitted.variables, batch, train=True, key=jax.random.key(k)) for k in (0, 1)
    )
    assert np.abs(one - two).max() > 1e-3
    assert np.abs(one[0] - one[1]).max() > 1e-3
    still = fitted.apply(fitted.variables, batch)
    close(still[0], still[1])


def test_prompts_in_bfloat16(folders):
    low = tiny.Fitted(folders["vit"], ("visual_prompt",), dtype=jnp.bfloat16)
    full = tiny.Fitted(folders["vit"], ("visual_prompt",))
    assert low.variables["peft"]["layers"]["prompt"].dtype == jnp.float32
    want = full.apply(full.variables, tiny_vit.batch())
    got = low.apply(low.variables, tiny_vit.batch())
    assert 0 < np.abs(got - want).max() < 0.05 * np.abs(want).max()


@pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])
def test_prompts_in_an_adapter_of_ours(folders, tmp_path, deep):
    model, loaded = load(folders["vit"])
    group = {"visual_prompt": {"tokens": 3, "deep": deep}}
    trained = Trained(model, loaded.params, group)
    trained.write(tmp_path)
    assert files.card(tmp_path).peft_type == "BMFT_VISUAL_PROMPT"
    assert files.card(tmp_path).outputs == tiny_vit.OUTPUTS
    adapter = files.read(tmp_path, model)
    variables = tree.flatten(files.insert(adapter, loaded.variables()))
    for path, leaf in tree.flatten(trained.variables).items():
        np.testing.assert_array_equal(variables[path], leaf, err_msg=path)
    with pytest.raises(Mistake, match="'visual_prompt' cannot be merged"):
        peft.merge(trained.methods, loaded.params, trained.variables)


def test_where_prompts_cannot_go(folders, tmp_path):
    text = models.find(str(tiny.directory(tmp_path)), outputs=2)
    with pytest.raises(Mistake, match="takes no images cut into patches; it is for ViT"):
        peft.build(text, ("visual_prompt",), {})
    model, _ = load(folders["vit"])
    for group, says in (({"tokens": 0}, "tokens is 0"), ({"dropout": 1.0}, "dropout is 1.0")):
        with pytest.raises(Mistake, match=says):
            peft.build(model, ("visual_prompt",), {"visual_prompt": group})
