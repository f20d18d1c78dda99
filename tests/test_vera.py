"""VeRA: how it starts, what is shared and stays, and which files are refused."""

import json

import jax
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file
from trained import Trained

from bmft import models, peft, tree
from bmft.errors import Mistake
from bmft.models import weights
from bmft.peft import files

GROUP = {"rank": 150, "targets": ("mlp.up", "mlp.down", "query"), "layers_to_transform": (0, 2)}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tiny.directory(tmp_path_factory.mktemp("bert"))
    model = models.find(str(folder), outputs=tiny.OUTPUTS)
    return model, weights.load(model, jax.random.key(0)).params


def test_start(base):
    """A and B as large as the largest, uniform in ±sqrt(6 / fan-in); lambda_b is zero."""
    model, params = base
    methods = peft.build(model, ("vera",), {"vera": GROUP | {"d_initial": 0.3}})
    add = tiny.hasty(peft.attach(methods, model).add)
    added = tree.flatten(add(jax.random.key(1), {"params": params}))
    assert {path: leaf.shape for path, leaf in added.items()} == {
        "peft/layers/attention/query/vera_lambda_d": (3, 150),
        "peft/layers/attention/query/vera_lambda_b": (3, 24),
        "peft/layers/mlp/up/vera_lambda_d": (3, 150),
        "peft/layers/mlp/up/vera_lambda_b": (3, 40),
        "peft/layers/mlp/down/vera_lambda_d": (3, 150),
        "peft/layers/mlp/down/vera_lambda_b": (3, 24),
        "peft_shared/vera/a": (40, 150),
        "peft_shared/vera/b": (150, 40),
    }
    for path, leaf in added.items():
        if path.startswith("peft/"):
            assert np.all(leaf == np.float32(0.3 if path.endswith("_d") else 0)), path
            assert peft.moving_rows(methods, path).tolist() == [True, False, True]
    for name, fan_in in (("a", 40), ("b", 150)):
        leaf, bound = np.asarray(added[f"peft_shared/vera/{name}"]), (6 / fan_in) ** 0.5
        assert np.abs(leaf).max() <= bound
        assert leaf.std() == pytest.approx(bound / 3**0.5, rel=0.03)
    claims = peft.claims(methods, filter(peft.may_move, added), heads=())
    assert set(claims) == {path for path in added if path.startswith("peft/")}


def test_dropout_meets_the_update_alone(base):
    model, params = base
    trained = Trained(model, params, {"vera": {"rank": 9, "dropout": 0.5, "targets": ("mlp.up",)}})
    apply = tiny.hasty(peft.attach(trained.methods, model).apply, static_argnames="train")
    batch = tiny.batch()
    still = apply(trained.variables, batch)
    one, two = (apply(trained.variables, batch, train=True, key=jax.random.key(k)) for k in (0, 1))
    assert np.abs(one - still).max() > 1e-4 and np.abs(one - two).max() > 1e-4
    off = tree.map_with_path(
        lambda path, x: 0 * x if path.endswith("lambda_b") else x, trained.variables
    )
    np.testing.assert_array_equal(
        apply(off, batch, train=True, key=jax.random.key(0)), apply(off, batch)
    )


def test_our_own_layout_holds_the_projections(base, tmp_path):
    """Beside another method; they cannot be drawn again by who reads it."""
    model, params = base
    trained = Trained(model, params, {"vera": {"rank": 3}, "bitfit": {}})
    trained.write(tmp_path)
    adapter = files.read(tmp_path, model)
    assert files.card(tmp_path).peft_type == "BMFT_VERA_BITFIT"
    found = tree.flatten(files.insert(adapter, {"params": params}))
    assert set(found) == set(tree.flatten(trained.variables))
    for path, leaf in tree.flatten(trained.variables).items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)
    assert np.abs(found["peft_shared/vera/a"]).max() > 0.1


def changed(folder, field, value):
    fields = json.loads((folder / files.CONFIG).read_text()) | {field: value}
    (folder / files.CONFIG).write_text(json.dumps(fields))


@pytest.mark.parametrize(
    "field, value, says",
    [
        ("save_projection", False, "only torch's random numbers make them again"),
        ("bias", "lora_only", "no 'lora_only'; did you mean 'vera_only'"),
        ("r", 4, r"'base_model.vera_A' has shape \[3, 24\], the model needs \[4, 24\]"),
        ("vera_dropout", 1.0, "dropout is 1.0"),
    ],
)
def test_fields_that_are_refused(base, tmp_path, field, value, says):
    model, params = base
    Trained(model, params, {"vera": {"rank": 3}}).write(tmp_path)
    changed(tmp_path, field, value)
    with pytest.raises(Mistake, match=says):
        files.read(tmp_path, model)


def test_projections_that_are_missing_are_refused(base, tmp_path):
    model, params = base
    Trained(model, params, {"vera": {"rank": 3}}).write(tmp_path)
    tensors = load_file(tmp_path / files.TENSORS)
    del tensors["base_model.vera_B"]
    save_file(tensors, tmp_path / files.TENSORS)
    with pytest.raises(Mistake, match=r"no tensor 'base_model\.vera_B'"):
        files.read(tmp_path, model)


@pytest.mark.parametrize(
    "group, says", [({"rank": 0}, "rank is 0"), ({"dropout": 1.0}, "dropout is 1.0")]
)
def test_values_that_are_refused(base, group, says):
    with pytest.raises(Mistake, match=says):
        peft.build(base[0], ("vera",), {"vera": group})
