"""Token rows: only the given rows are others, and which ids are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from trained import Trained

from bmft import models, peft, tree
from bmft.errors import Mistake
from bmft.models import weights
from bmft.peft import files

TOKENS = (9, 4, 50, 31)
ROWS = "peft/embeddings/word/token_rows"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tiny.directory(tmp_path_factory.mktemp("bert"))
    model = models.find(str(folder), outputs=tiny.OUTPUTS)
    return model, weights.load(model, jax.random.key(0)).params


def test_start_is_the_rows_in_their_order(base):
    """Of a base in a lower precision, too."""
    model, params = base
    methods = peft.build(model, ("token_rows",), {"token_rows": {"tokens": TOKENS}})
    table = params["embeddings"]["word"]["embedding"]
    for dtype in (jnp.float32, jnp.bfloat16):
        low = {"params": jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), params)}
        added = tiny.hasty(peft.attach(methods, model).add)(jax.random.key(0), low)
        assert tree.describe(added["peft"]) == [("embeddings/word/token_rows", (4, 24), "float32")]
        rows = added["peft"]["embeddings"]["word"]["token_rows"]
        np.testing.assert_array_equal(rows, table[np.array(TOKENS)].astype(dtype))


def test_the_rows_replace_those_of_the_table_and_no_others(base):
    model, params = base
    trained = Trained(model, params, {"token_rows": {"tokens": TOKENS}})
    apply = tiny.hasty(peft.attach(trained.methods, model).apply, static_argnames="adapter")
    batch = tiny.batch()
    others = ~np.isin(np.arange(53), TOKENS)
    table = np.array(params["embeddings"]["word"]["embedding"])
    merged = peft.merge(trained.methods, trained.variables["params"], trained.variables)
    found = np.asarray(merged["embeddings"]["word"]["embedding"])
    np.testing.assert_array_equal(found[others], table[others])
    rows = trained.variables["peft"]["embeddings"]["word"]["token_rows"]
    np.testing.assert_array_equal(found[np.array(TOKENS)], rows)
    want = apply({"params": merged}, batch, adapter=False)
    np.testing.assert_array_equal(apply(trained.variables, batch), want)
    assert np.abs(want - apply(trained.variables, batch, adapter=False)).max() > 1e-2
    # Examples without these tokens do not feel them.
    batch["input_ids"] = np.where(np.isin(batch["input_ids"], TOKENS), 5, batch["input_ids"])
    same = apply(trained.variables, batch, adapter=False)
    np.testing.assert_array_equal(apply(trained.variables, batch), same)


@pytest.mark.parametrize("method", ["lora", "lora_plus", "dora"])
def test_rows_beside_lora_in_its_files(base, tmp_path, method):
    """They move under its label, and are read as they were written."""
    model, params = base
    group = {"rank": 2, "targets": ("pooler",), "trainable_token_indices": TOKENS}
    trained = Trained(model, params, {method: group})
    assert trained.claims[ROWS] == method
    assert "token_rows" in trained.methods[0].undecayed
    trained.write(tmp_path)
    adapter = files.read(tmp_path, model)
    assert files.card(tmp_path).peft_type == "LORA"
    assert adapter.names == ({"dora": "dora"}.get(method, "lora"),)
    assert adapter.groups[adapter.names[0]]["trainable_token_indices"] == TOKENS
    np.testing.assert_array_equal(adapter.leaves[ROWS], tree.flatten(trained.variables)[ROWS])


@pytest.mark.parametrize(
    "group, says",
    [
        ({"trainable_token_indices": (53,)}, "lora.trainable_token_indices: no 53 in embeddings"),
        ({"targets": ("word",)}, "embeddings/word is in peft.lora.targets, too"),
        ({"modules_to_save": ("embeddings",)}, "is in peft.lora.modules_to_save, too"),
    ],
)
def test_what_is_refused_beside_lora(base, group, says):
    with pytest.raises(Mistake, match=says):
        peft.build(base[0], ("lora",), {"lora": {"trainable_token_indices": (1,)} | group})


@pytest.mark.parametrize(
    "group, says",
    [
        ({}, "tokens is empty"),
        ({"tokens": (3, 53)}, "no 53 in embeddings/word, which has rows 0 to 52"),
        ({"tokens": (-1,)}, "no -1 in embeddings/word"),
        ({"tokens": (7, 3, 7)}, "names 7 twice"),
        ({"tokens": (2,), "targets": ("type", "word")}, "no 2 in embeddings/type"),
        ({"tokens": (1,), "targets": ("wird",)}, "did you mean 'word'"),
        ({"tokens": (1,), "targets": ("query",)}, "matches no module"),
    ],
)
def test_what_is_refused(base, group, says):
    with pytest.raises(Mistake, match=says):
        peft.build(base[0], ("token_rows",), {"token_rows": group})
