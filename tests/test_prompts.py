"""Virtual tokens, prefixes and what makes them: places in a batch, starts, and what is refused.

That they compute what PEFT computes is tested by tests/test_catalogue.py and tests/parity.
"""

import json
import math

import examples
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_images
import tiny_vit
from trained import Trained

import bmft
from bmft import models, peft, tree
from bmft.data.batches import Batches
from bmft.data.text import Encoded
from bmft.errors import Mistake, command
from bmft.models import weights
from bmft.peft import files
from experiments import glue_lora

LENGTHS = (9, 3, 6)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {
        family: tiny.directory(tmp_path_factory.mktemp(family), family) for family in tiny.FAMILIES
    }
    tiny.tokenizer(found["bert"])
    (found["roberta"] / "tokenizer.json").write_text("{")
    found["vit"] = tiny_vit.directory(tmp_path_factory.mktemp("vit"))
    found["resnet"] = tiny_images.directory(tmp_path_factory.mktemp("resnet"), "resnet")
    return found


def fitted(folder, *methods, option=None, **group):
    return tiny.Fitted(folder, methods, {methods[-1]: group}, **option or {})


# --- in batches ------------------------------------------------------------------------------


def test_virtual_tokens_come_before_each_example():
    tokens, types = np.arange(10, 18, dtype=np.int32), np.ones(8, np.uint8)
    plain = Encoded(tokens, types, np.array([0, 3, 4, 8]), 1)
    found = plain.behind(range(60, 62))
    assert found.tokens.tolist() == [60, 61, 10, 11, 12, 60, 61, 13, 60, 61, 14, 15, 16, 17]
    assert found.types.tolist() == [0, 0, 1, 1, 1, 0, 0, 1, 0, 0, 1, 1, 1, 1]
    assert found.offsets.tolist() == [0, 5, 8, 14]
    assert (found.tokens.dtype, found.types.dtype, found.truncated) == (np.int32, np.uint8, 1)
    for one, other in zip(plain.behind(range(0)), plain, strict=True):
        assert np.array_equal(one, other)


def test_a_packed_row_of_them():
    plain = Encoded(np.arange(10, 18, dtype=np.int32), np.ones(8, np.uint8), np.array([0, 5, 8]), 0)
    batch = Batches(plain.behind(range(60, 62)), batch_size=2, row_length=14).at(0)
    want = {
        "input_ids": [60, 61, 10, 11, 12, 13, 14, 60, 61, 15, 16, 17, 0, 0],
        "segments": [1] * 7 + [2] * 5 + [0] * 2,
        "positions": [*range(7), *range(5), 0, 0],
        "token_types": [0, 0, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 0, 0],
        "first": [0, 7],
    }
    assert {name: batch[name][0].tolist() for name in want} == want


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_the_base_alone_reads_the_examples_without_them(folders, family):
    on = fitted(folders[family], "prompt_tuning", tokens=3)
    chosen, ids = examples.tokens(LENGTHS, 53, 2), peft.virtual_ids(on.methods, on.model)
    assert ids == range(53, 56)
    want = on.apply(on.variables, examples.both(chosen), adapter=False)
    found = on.apply(on.variables, examples.both(chosen, ids), adapter=False)
    for one, other in zip(examples.of_both(want), examples.of_both(found), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


# --- in models -------------------------------------------------------------------------------

NETWORKS = [
    ("prefix_tuning", {"projection": True, "hidden": 7}),
    ("p_tuning", {"encoder": "lstm", "hidden": 5}),
]


@pytest.mark.parametrize("method, group", NETWORKS)
def test_the_same_gradients_however_the_stack_is_computed(folders, method, group):
    def gradients(option):
        on = fitted(folders["bert"], method, tokens=3, option=option, **group)
        assert peft.first_moving_piece(on.methods, on.claims, on.model.names) == 0

        def objective(moving):
            variables = tree.join(moving, on.frozen)
            forward = lambda batch, train: on.apply(variables, batch)  # noqa: E731
            return tiny.loss(forward, on.batch(), None)[0][0]

        return tree.flatten(tiny.hasty(jax.grad(objective))(on.moving))

    plain, other = gradients({}), gradients({"unroll": 3, "remat": "block"})
    for path, leaf in plain.items():
        np.testing.assert_allclose(leaf, other[path], atol=1e-4, err_msg=path)
        assert np.abs(leaf).max() > 0, path


@pytest.mark.parametrize("method", ["prefix_tuning", "prompt_tuning", "p_tuning"])
def test_bfloat16_base_with_a_float32_prompt(folders, method):
    low = fitted(folders["bert"], method, tokens=3, option={"dtype": jnp.bfloat16})
    full = fitted(folders["bert"], method, tokens=3)
    added = [leaf.dtype for leaf in jax.tree.leaves(low.variables) if leaf.dtype != jnp.float32]
    assert not added
    out, want = (on.apply(full.variables, on.batch()) for on in (low, full))
    assert 0 < np.abs(out - want).max() < 0.05 * np.abs(want).max() + 0.05


def test_dropout_is_between_the_layers_of_the_lstm(folders):
    on = fitted(folders["bert"], "p_tuning", tokens=3, encoder="lstm", dropout=0.5)
    one, two = (
        on.apply(on.variables, on.batch(), train=True, key=jax.random.key(k)) for k in (0, 1)
    )
    assert np.abs(one - two).max() > 1e-4
    still = on.apply(on.variables, on.batch())
    assert np.array_equal(still, on.apply(on.variables, on.batch(), key=jax.random.key(0)))


def test_vision_transformers_have_prefixes_and_no_fewer_positions(folders):
    on = fitted(folders["vit"], "prefix_tuning", tokens=3)
    assert on.methods[0].positions == on.methods[0].virtual_tokens == 0
    batch = tiny_vit.batch()
    base = on.apply(on.variables, batch, adapter=False)
    assert np.abs(on.apply(on.variables, batch) - base).max() > 1e-3
    prefix = on.variables["peft"]["layers"]["attention"]["keys_values"]["prefix_value"]
    assert prefix.shape == (3, 3, 24)
    assert not on.methods[0].files.expressible(on.model)


# --- starts ----------------------------------------------------------------------------------


def prompt(folder, **group):
    on = fitted(folder, "prompt_tuning", **group)
    words = on.variables["params"]["embeddings"]["word"]
    return np.asarray(words["embedding"]), np.asarray(
        on.variables["peft"]["embeddings"]["word"]["prompt"]
    )


def test_random_starts(folders):
    _, found = prompt(folders["bert"], tokens=20)
    assert found.shape == (20, 24)
    assert abs(found.std() - 1) < 0.1
    on = fitted(folders["bert"], "prefix_tuning", tokens=15)
    for leaf in tree.flatten(on.variables["peft"]).values():
        assert leaf.shape == (3, 15, 24)
        assert abs(np.std(leaf) - 1) < 0.1
        assert abs(np.corrcoef(leaf[0].ravel(), leaf[1].ravel())[0, 1]) < 0.2


def test_starts_from_the_vocabulary(folders):
    table, found = prompt(folders["bert"], tokens=15, init="vocabulary")
    rows = [int(np.flatnonzero((table == row).all(1))[0]) for row in found]
    assert len(set(rows)) > 8


@pytest.mark.parametrize("tokens, words", [(7, [2, 5, 4, 3, 2, 5, 4]), (2, [2, 5])])
def test_starts_from_a_text_that_is_repeated_or_cut(folders, tokens, words):
    table, found = prompt(folders["bert"], tokens=tokens, init="text", text="bad good")
    assert np.array_equal(found, table[words])


def test_zero_prefixes(folders):
    plain = fitted(folders["bert"], "prefix_tuning", tokens=3, init="zero")
    assert not any(leaf.any() for leaf in jax.tree.leaves(plain.variables["peft"]))
    made = fitted(folders["bert"], "prefix_tuning", tokens=3, init="zero", projection=True)
    assert not any(leaf.any() for leaf in jax.tree.leaves(made.variables["peft"]))
    assert made.variables["peft_shared"]["prefix_tuning"]["embedding"].any()
    ways = [on.apply(on.variables, on.batch()) for on in (plain, made)]
    np.testing.assert_allclose(*ways, atol=1e-6)


def test_networks_start_as_torchs(folders):
    on = fitted(folders["bert"], "p_tuning", tokens=3, encoder="lstm", hidden=50)
    leaves = tree.flatten(on.variables["peft_shared"])
    lstm = {"input": 200, "state": 200, "input_bias": 200, "state_bias": 200}
    sizes = {"embedding": 24, "dense_0/kernel": 100, "dense_0/bias": 100}
    sizes |= {"dense_1/kernel": 24, "dense_1/bias": 24}
    for i, way in ((0, "forward"), (0, "backward"), (1, "forward"), (1, "backward")):
        sizes |= {f"lstm_{i}_{way}/{name}": size for name, size in lstm.items()}
    assert {path: leaf.shape[-1] for path, leaf in leaves.items()} == {
        f"p_tuning/{path}": size for path, size in sizes.items()
    }
    for path, leaf in leaves.items():
        if not path.endswith("embedding"):
            fan_in = 100 if "dense" in path else 50
            bound = fan_in**-0.5
            assert np.abs(leaf).max() <= bound, path
            assert abs(np.std(leaf) - bound / math.sqrt(3)) < 0.2 * bound, path


# --- in files --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "groups",
    [
        {"lora": {"rank": 2}, "p_tuning": {"tokens": 3, "encoder": "lstm", "hidden": 5}},
        {"prefix_tuning": {"tokens": 3, "projection": True}, "bitfit": {}},
    ],
)
def test_with_other_methods_they_are_written_whole(folders, tmp_path, groups):
    model = models.find(str(folders["bert"]), outputs=tiny.OUTPUTS)
    base = weights.load(model, jax.random.key(0)).params
    trained = Trained(model, base, groups)
    adapter = files.read(trained.write(tmp_path), model)
    found = tree.flatten(files.insert(adapter, {"params": base}))
    wanted = tree.flatten(trained.variables)
    assert set(found) == set(wanted)
    for path, leaf in wanted.items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)


FIELDS = [
    ("prefix_tuning", {"num_attention_heads": 3}, "'num_attention_heads' is 3; .* has 4"),
    ("prefix_tuning", {"num_layers": 12}, "'num_layers' is 12; .* has 3"),
    ("prompt_tuning", {"token_dim": 48}, "'token_dim' is 48; .* has 24"),
    ("prompt_tuning", {"num_virtual_tokens": None}, "'num_virtual_tokens' is missing"),
    ("prompt_tuning", {"num_virtual_tokens": 5}, "'prompt_embeddings' has shape .3, 24."),
    ("p_tuning", {"num_transformer_submodules": 2}, "'num_transformer_submodules' is 2"),
    ("p_tuning", {"experts": 2}, "'experts' is 2"),
]


@pytest.mark.parametrize("method, changes, says", FIELDS)
def test_what_a_file_may_not_say(folders, tmp_path, method, changes, says):
    model = models.find(str(folders["bert"]), outputs=tiny.OUTPUTS)
    base = weights.load(model, jax.random.key(0)).params
    file = Trained(model, base, {method: {"tokens": 3}}).write(tmp_path) / files.CONFIG
    fields = json.loads(file.read_text())
    assert fields["peft_type"] == method.upper()
    assert files.card(tmp_path).outputs == tiny.OUTPUTS
    file.write_text(json.dumps(fields | changes))
    with pytest.raises(Mistake, match=says):
        files.read(tmp_path, model)


# --- what is refused -------------------------------------------------------------------------

BAD = [
    ("bert", ("prompt_tuning",), {"tokens": 0}, "tokens is 0"),
    ("bert", ("prompt_tuning",), {"tokens": 22}, "no room for text: .* 22 positions"),
    ("roberta", ("prefix_tuning",), {"tokens": 20}, "no room for text: .* 20 positions"),
    ("bert", ("prompt_tuning",), {"init": "vocab"}, "did you mean 'vocabulary'"),
    ("bert", ("prompt_tuning",), {"init": "text"}, "each asks for the other"),
    ("bert", ("prompt_tuning",), {"text": "good"}, "each asks for the other"),
    ("roberta", ("prompt_tuning",), {"init": "text", "text": "good"}, "no tokenizer"),
    ("bert", ("prefix_tuning",), {"init": "zeros"}, "did you mean 'zero'"),
    ("bert", ("prefix_tuning",), {"hidden": 7}, "only a projection"),
    ("bert", ("prefix_tuning",), {"hidden": 0, "projection": True}, "hidden is 0"),
    ("bert", ("p_tuning",), {"encoder": "lstn"}, "did you mean 'lstm'"),
    ("bert", ("p_tuning",), {"hidden": 3, "encoder": "none"}, "without an encoder"),
    ("bert", ("p_tuning",), {"layers": 3}, "only an lstm"),
    ("bert", ("p_tuning",), {"dropout": 0.1}, "between the layers of an lstm"),
    ("bert", ("prefix_tuning", "p_tuning"), {}, "both take the first positions"),
    ("vit", ("prompt_tuning",), {}, "no word embedding"),
    ("vit", ("p_tuning",), {}, "no word embedding"),
    ("resnet", ("p_tuning",), {}, "no word embedding"),
    ("resnet", ("prefix_tuning",), {}, "no attention"),
]


@pytest.mark.parametrize("family, methods, group, says", BAD)
def test_what_is_refused(folders, family, methods, group, says):
    model = models.find(str(folders[family]), outputs=tiny.OUTPUTS)
    few = {name: {"tokens": 3} for name in methods}
    few[methods[-1]] = few[methods[-1]] | group
    with pytest.raises(Mistake, match=says):
        peft.build(model, methods, few)


# --- a run -----------------------------------------------------------------------------------


def test_a_run_and_its_predictions(tmp_path, capsys):
    """As many tokens as there is room for behind the prompt, and not one more."""
    tiny.tokenizer(tiny.directory(tmp_path / "model"))
    workdir = tmp_path / "run"
    arguments = [
        *(f"--config.model.name={tmp_path / 'model'}", "--config.train.steps=4"),
        *("--config.train.batch_size=12", "--config.peft.methods=prompt_tuning"),
        *("--config.peft.prompt_tuning.tokens=2", "--config.peft.prompt_tuning.init=text"),
        "--config.peft.prompt_tuning.text=good bad",
        *tiny.data(tmp_path / "data"),
    ]
    longer = [argument.replace("max_length=20", "max_length=21") for argument in arguments]
    longer.append(f"--workdir={tmp_path / 'longer'}")
    assert command(glue_lora.main, longer) == 2
    assert "22 positions, of which prompt_tuning leaves 20" in capsys.readouterr().err
    assert command(glue_lora.main, [*arguments, f"--workdir={workdir}"]) == 0
    assert json.loads((workdir / "adapter" / files.CONFIG).read_text())["num_virtual_tokens"] == 2
    predictor = bmft.load(workdir)
    rows = [line.split("\t") for line in (tmp_path / "data/test.tsv").read_text().splitlines()[1:]]
    found = predictor.predict([text for text, _ in rows])
    share = np.mean([one["label"] == label for one, (_, label) in zip(found, rows, strict=True)])
    report = json.loads((workdir / "report.json").read_text())
    assert share == pytest.approx(report["metrics"]["test"]["accuracy"])
    alone = predictor.predict([rows[0][0]])[0]
    np.testing.assert_allclose(alone["logits"], found[0]["logits"], atol=1e-5)
    long = " ".join(["w1"] * 30)
    assert predictor.predict([long]) == predictor.predict([long + " bad"])
