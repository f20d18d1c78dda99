"""Trainable token rows, PEFT's TrainableTokens: of an embedding's table only some rows move.

    y[id] = rows[i] if id is tokens[i] else table[id]

For tokens that were added to the vocabulary, or a few whose meaning is to change, at the price of
those rows. They replace rows of the table, which stays as it is, and start as what they replace:
the adapted model starts as the base.

Shapes: n tokens, d width, v rows of the table.

    peft/embeddings/word/token_rows [n, d]    beside params/embeddings/word/embedding [v, d]

PEFT's configuration of it has no modules_to_save: its own files hold no head, and the base's stays.
In ours the head stands beside the rows; PEFT takes it from there.

`beside` gives LoRA such rows of the word embedding: PEFT's trainable_token_indices, in its files

    base_model.model.bert.embeddings.word_embeddings.token_adapter.trainable_tokens_delta [n, d]
"""

import jax.numpy as jnp
import numpy as np

from bmft import layers, names, peft, tree
from bmft.errors import Mistake
from bmft.peft import matching
from bmft.peft.files import Files, Layout
from bmft.peft.portable import PREFIX

KINDS, WORD = ("embed",), "embeddings/word"
LEAF, TENSOR = "token_rows", "trainable_tokens_delta"
AXES = {LEAF: ".o"}  # see bmft.peft.Method


def make(model, *, tokens: tuple[int, ...] = (), targets: tuple[str, ...] = ("word",)):
    """tokens: the ids whose rows move. targets: the embeddings, by name."""
    sites = names.target(model.names, targets, kinds=KINDS)
    ids = _checked("peft.token_rows.tokens", tokens, _sizes(model, sites))

    def moves(path):
        own = path.startswith("peft/") and path.endswith(f"/{LEAF}")
        return "token_rows" if own else None

    files = Files(
        {"peft_type": "TRAINABLE_TOKENS", "token_indices": ids.tolist()},
        sites,
        encode=lambda path, layer, leaves: {TENSOR: leaves[LEAF]},
        decode=lambda path, layer, tensors: {LEAF: tensors[TENSOR]},
        kinds=KINDS,
        by_layer=False,
        saves=False,
    )
    hook, merge = _hook(sites, ids), _merge(sites, ids)
    # Decay would draw the rows to zero, not to those they replace.
    return peft.Method(
        "token_rows", moves, hook, axes=AXES, undecayed=(LEAF,), merge=merge, files=files
    )


def beside(method, model, tokens):
    """A method of the LoRA family, with the rows `tokens` of the word embedding moving beside its
    own leaves, under its own label; the method itself for no tokens.

    Raises Mistake where the embedding is one of the method's modules, or trained whole.
    """
    if not tokens:
        return method
    key, own = f"peft.{method.name}.trainable_token_indices", f"peft/{WORD}/{LEAF}"
    if WORD not in model.names.modules(*KINDS):
        raise Mistake(f"{key}: {model.name} has no {WORD}")
    for field, has in (
        ("targets", WORD in method.files.sites),
        ("modules_to_save", method.moves(f"params/{WORD}/embedding")),
    ):
        if has:
            raise Mistake(f"{key}: {WORD} is in peft.{method.name}.{field}, too; give up one")
    ids = _checked(key, tokens, _sizes(model, (WORD,)))
    of_rows, merge_rows = _hook((WORD,), ids), _merge((WORD,), ids)
    tensor = f"{PREFIX}{model.names.called(WORD, None)[1]}.token_adapter.{TENSOR}"

    def hook(module, call, *args):
        hook = of_rows if peft.path_of(module) == WORD else method.hook
        return hook(module, call, *args)

    files = method.files._replace(
        settings=method.files.settings | {"trainable_token_indices": ids.tolist()},
        encode_others=lambda leaves: {tensor: leaves[own]},
        decode_others=lambda tensors: {own: tensors[tensor]},
    )
    return method._replace(
        moves=lambda path: method.name if path == own else method.moves(path),
        hook=hook,
        rows=lambda path: None if path == own else method.rows(path),
        axes=method.axes | AXES,
        undecayed=(*method.undecayed, LEAF),
        merge=lambda params, added: merge_rows(method.merge(params, added), added),
        files=files,
    )


def _hook(sites, ids):
    """`Method.hook` of embeddings `sites`, whose rows ids [n] are others."""

    def hook(module, call, *args):
        out = call(*args)
        if peft.path_of(module) not in sites:
            return out
        table = module.get_variable("params", "embedding")
        start = lambda key, shape, dtype: table[ids].astype(dtype)  # noqa: E731
        rows = peft.leaf(module, LEAF, start, (len(ids), table.shape[-1]))
        place = np.full(len(table), len(ids), np.int32)
        place[ids] = np.arange(len(ids))
        place = jnp.asarray(place)[args[0]]
        own = module.scale * jnp.take(rows, place, axis=0, mode="clip").astype(out.dtype)
        return jnp.where((place < len(ids))[..., None], own, out)

    return hook


def _merge(sites, ids):
    """`Method.merge` of the same."""

    def merge(params, added):
        flat, own = tree.flatten(params), tree.flatten(added["peft"])
        for path in sites:
            table = f"{path}/embedding"
            flat[table] = jnp.asarray(flat[table]).at[ids].set(own[f"{path}/{LEAF}"])
        return tree.unflatten(flat)

    return merge


def _sizes(model, sites):
    """{module path: rows of its table}. Mistake where a head reads one of the tables, too."""
    if model.names.is_tied and "embeddings/word" in sites:
        raise Mistake(
            f"token rows: the head of {model.name} is the table of its word embedding, whose rows "
            "would change in one of the two places alone"
        )
    shapes = layers.shapes(model.module, model.dummy)["params"]
    return {path: tree.flatten(shapes)[f"{path}/embedding"].shape[0] for path in sites}


def _checked(key, tokens, sizes):
    """int [n] of the ids, each of which is a row of each table, once; key: what the config calls
    them."""
    if not tokens:
        raise Mistake(f"{key} is empty: say the ids of the tokens that move")
    for number, token in enumerate(tokens):
        if token in tokens[:number]:
            raise Mistake(f"{key} names {token} twice")
        for path, size in sizes.items():
            if not 0 <= token < size:
                raise Mistake(f"{key}: no {token} in {path}, which has rows 0 to {size - 1}")
    return np.array(tokens)


def _arguments(fields, table):
    """`make`'s arguments from PEFT's configuration."""
    return {
        "tokens": tuple(fields["token_indices"]),
        "targets": matching.exact_names(table, matching.targets(table, fields, KINDS)),
    }


LAYOUT = Layout(
    peft_type="TRAINABLE_TOKENS",
    fields={"token_indices": ((list[int],), [])},
    ignored=("init_weights",),  # the start is of no matter afterwards
    defaults={},
    arguments=_arguments,
)
