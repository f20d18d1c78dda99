"""What the methods have in common that learn a prompt: tokens, or keys and values, before each
example.

Virtual tokens are columns of a packed row: ids from the vocabulary's size on (`peft.virtual_ids`),
of type 0, at the first positions of their example, whose classification is read at the first of
them, as PEFT does. In the word embedding's place they have rows of the prompt.

PEFT's file has the prompt alone, `prompt_embeddings`, whatever it was computed from, and the head
by the names of the model itself, `base_model.classifier.weight`.
"""

import jax
import jax.numpy as jnp

from bmft import names, tree
from bmft.errors import Mistake
from bmft.peft import matching
from bmft.peft.files import Files

KEY, PREFIX = "prompt_embeddings", "base_model."
WORDS = "embeddings/word"

# Of PEFT's configurations; `fits` holds them against the model.
FIELDS = {
    "num_virtual_tokens": ((int,), None),
    "token_dim": ((int,), None),
    "num_layers": ((int,), None),
    "num_transformer_submodules": ((int,), None),
}


def check(model, method, tokens):
    """Raises Mistake for a number of tokens that the model has no room for."""
    limit = getattr(model.config, "max_length", None)
    if tokens < 1:
        raise Mistake(f"peft.{method}.tokens is {tokens}; it must be 1 or more")
    if limit is not None and tokens >= limit:
        raise Mistake(
            f"peft.{method}.tokens is {tokens}, which leaves no room for text: {model.name} has "
            f"{limit} positions"
        )


def check_words(model, method):
    """Raises Mistake for a model that reads no words."""
    if WORDS not in model.names.modules("embed"):
        raise Mistake(f"peft.{method}: {model.name} has no word embedding to put tokens before")


def embed(module, call, ids, prompt):
    """What the word embedding `module` gives for ids, with rows of prompt [n, d] for virtual ones;
    `call` is never asked for those."""
    place = ids - module.rows
    out = call(jnp.where(place < 0, ids, 0))
    rows = prompt[jnp.maximum(place, 0)].astype(out.dtype)
    return jnp.where((place < 0)[..., None], out, rows)


def claims(model, label, is_own, modules_to_save):
    """`moves` and `rows` of a method with leaves of its own and modules trained whole."""
    saved = names.saved(model.names, modules_to_save)

    def moves(path):
        collection, _, base = path.partition("/")
        return label if is_own(path) or (collection == "params" and base in saved) else None

    def rows(path):
        mask = saved.get(path.removeprefix("params/"))
        return None if mask is None or mask.all() else mask

    return moves, rows


# --- networks that make a prompt ---------------------------------------------------------------


def uniform(fan_in):
    """The start of torch's linear and recurrent layers, biases too: uniform in ±1/sqrt(fan-in)."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -bound, bound
    )


def linear(key, size_in, size_out):
    """The leaves of a dense layer."""
    kernel, bias = jax.random.split(key)
    start = uniform(size_in)
    return {"kernel": start(kernel, (size_in, size_out)), "bias": start(bias, (size_out,))}


def shared_leaves(method, leaves):
    """What hooks have from peft.shared, of leaves {collection/path: leaf}."""
    root = f"peft_shared/{method}/"
    own = {path.removeprefix(root): x for path, x in leaves.items() if path.startswith(root)}
    return tree.unflatten(own)


# --- in PEFT's files -------------------------------------------------------------------------


def files(model, peft_type, tokens, modules_to_save, encode, decode, expressible=None, **settings):
    """`Files` of a prompt: encode(leaves) -> array, decode(array) -> leaves {collection/path}."""
    settings = {"peft_type": peft_type, "num_virtual_tokens": tokens} | sizes(model) | settings
    return Files(
        settings,
        {},
        modules_to_save,
        encode_others=lambda leaves: {KEY: encode(leaves)},
        decode_others=lambda tensors: decode(tensors[KEY]),
        prefix=PREFIX,
        expressible=expressible,
    )


def sizes(model):
    """What PEFT's configuration says of a model."""
    return {
        "token_dim": model.config.width,
        "num_layers": model.config.depth,
        "num_attention_heads": model.config.heads,
        "num_transformer_submodules": 1,
    }


def fits(fields, model, sizes=sizes):
    """Raises Mistake where PEFT's configuration speaks of a model of other sizes."""
    for field, size in sizes(model).items():
        if fields.get(field) not in (None, size):
            raise Mistake(f"field {field!r} is {fields[field]}; {model.name} has {size}")


def arguments(fields, table):
    """The arguments of `make` that the methods share, from PEFT's configuration."""
    if fields["num_virtual_tokens"] is None:
        raise Mistake("field 'num_virtual_tokens' is missing")
    heads = matching.head_modules(table)
    saved = matching.saved(table, fields["modules_to_save"])
    others = {path: mask for path, mask in saved.items() if path not in heads}
    return {
        "tokens": fields["num_virtual_tokens"],
        "modules_to_save": matching.exact_names(table, others),
    }
