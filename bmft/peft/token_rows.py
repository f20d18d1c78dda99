"""Trainable token rows, PEFT's TrainableTokens: of an embedding's table only some rows move.

    y[id] = rows[i] if id is tokens[i] else table[id]

For tokens that were added to the vocabulary, or a few whose meaning is to change, at the price of
those rows. They replace rows of the table, which stays as it is, and start as what they replace:
the adapted model starts as the base.

Shapes: n tokens, d width, v rows of the table.

    peft/embeddings/word/token_rows [n, d]    beside params/embeddings/word/embedding [v, d]

PEFT's configuration of it has no modules_to_save: its own files hold no head, and the base's stays.
In ours the head stands beside the rows; PEFT takes it from there.
"""

import jax.numpy as jnp
import numpy as np

from bmft import layers, names, peft, tree
from bmft.errors import Mistake
from bmft.peft import matching
from bmft.peft.files import Files, Layout

KINDS = ("embed",)


def make(model, *, tokens: tuple[int, ...] = (), targets: tuple[str, ...] = ("word",)):
    """tokens: the ids whose rows move. targets: the embeddings, by name."""
    sites = names.target(model.names, targets, kinds=KINDS)
    ids = _checked(tokens, _sizes(model, sites))

    def hook(module, call, *args):
        out, path = call(*args), peft.path_of(module)
        if path not in sites:
            return out
        table = module.get_variable("params", "embedding")
        start = lambda key, shape, dtype: table[ids].astype(dtype)  # noqa: E731
        rows = peft.leaf(module, "token_rows", start, (len(ids), table.shape[-1]))
        place = np.full(len(table), len(ids), np.int32)
        place[ids] = np.arange(len(ids))
        place = jnp.asarray(place)[args[0]]
        own = module.scale * jnp.take(rows, place, axis=0, mode="clip").astype(out.dtype)
        return jnp.where((place < len(ids))[..., None], own, out)

    def moves(path):
        own = path.startswith("peft/") and path.endswith("/token_rows")
        return "token_rows" if own else None

    def merge(params, added):
        flat = tree.flatten(params)
        for path in sites:
            table, rows = f"{path}/embedding", tree.flatten(added["peft"])[f"{path}/token_rows"]
            flat[table] = jnp.asarray(flat[table]).at[ids].set(rows)
        return tree.unflatten(flat)

    files = Files(
        {"peft_type": "TRAINABLE_TOKENS", "token_indices": ids.tolist()},
        sites,
        encode=lambda path, layer, leaves: {"trainable_tokens_delta": leaves["token_rows"]},
        decode=lambda path, layer, tensors: {"token_rows": tensors["trainable_tokens_delta"]},
        kinds=KINDS,
        by_layer=False,
        saves=False,
    )
    # Decay would draw the rows to zero, not to those they replace.
    undecayed = ("token_rows",)
    return peft.Method("token_rows", moves, hook, undecayed=undecayed, merge=merge, files=files)


def _sizes(model, sites):
    """{module path: rows of its table}. Mistake where a head reads one of the tables, too."""
    if model.names.is_tied and "embeddings/word" in sites:
        raise Mistake(
            f"token rows: the head of {model.name} is the table of its word embedding, whose rows "
            "would change in one of the two places alone"
        )
    shapes = layers.shapes(model.module, model.dummy)["params"]
    return {path: tree.flatten(shapes)[f"{path}/embedding"].shape[0] for path in sites}


def _checked(tokens, sizes):
    """int [n] of the ids, each of which is a row of each table, once."""
    if not tokens:
        raise Mistake("peft.token_rows.tokens is empty: say the ids of the tokens that move")
    for number, token in enumerate(tokens):
        if token in tokens[:number]:
            raise Mistake(f"peft.token_rows.tokens names {token} twice")
        for path, size in sizes.items():
            if not 0 <= token < size:
                raise Mistake(
                    f"peft.token_rows.tokens: no {token} in {path}, which has rows 0 to {size - 1}"
                )
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
