"""Prefix tuning (Li and Liang 2021, arXiv:2101.00190), as PEFT computes it: learnt keys and values
before those of each layer, which every token of every example reads. Without a projection it is
P-tuning v2 (Liu et al. 2021, arXiv:2110.07602).

    attention(q, [P_k; k], [P_v; v])                    a softmax over both, in every head
    projection:  z = tanh(E W + b),  P_k = z W_k + b_k  in each layer, and P_v likewise

It takes no room in a packed row, but the first n positions of each example, whose tokens are
counted from n on, as PEFT's are; its keys are not turned where keys are rotary, and it lies in
every sliding window. (A vision transformer has its positions in the image.) Prefixes and E start
normal with deviation 1, W and its like as torch's linear layers; `zero` makes P_k and P_v 0, which
still takes its share of the attention. So it does not start as the base.

PEFT's file has the prefix itself, and that is what is read and trained on: W and E are not in it.

Shapes: l layers, n tokens, d width of a token's keys (the model's, unless heads share them),
h hidden.

    peft/layers/attention/keys_values/prefix_{key,value} [l, n, d]
    with a projection, in their place:
    peft_shared/prefix_tuning/embedding [n, d]
    peft_shared/prefix_tuning/dense/{kernel [d, h],bias [h]}
    peft/layers/attention/keys_values/prefix_{key,value}_{kernel [l, h, d],bias [l, d]}
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from bmft import layers, peft
from bmft.errors import Mistake, nearest
from bmft.peft import prompts
from bmft.peft.files import Layout

NAME = "prefix_tuning"
TAP = "layers/attention/keys_values"
POSITIONS = ("embeddings/position", "rotary")
STARTS = ("random", "zero")
PARTS = ("prefix_key", "prefix_value")
AXES = {f"{part}{leaf}": "." for part in PARTS for leaf in ("", "_kernel", "_bias")}


def make(
    model,
    *,
    tokens: int = 20,
    init: str = "random",
    projection: bool = False,
    hidden: int | None = None,
    modules_to_save: tuple[str, ...] = (),
):
    """tokens: keys and values a layer; 20 are those of PEFT's examples. init: `random` or `zero`.
    hidden: width inside the projection; None is the model's. Raises Mistake for a model without
    attention."""
    if "layers/attention/output" not in model.names.modules("dense"):
        raise Mistake(f"peft.prefix_tuning: {model.name} has no attention, and no keys and values")
    if init not in STARTS:
        raise Mistake(f"peft.prefix_tuning.init is {init!r}; {nearest(init, STARTS)}")
    if hidden is not None and (hidden < 1 or not projection):
        why = "it must be 1 or more" if projection else "only a projection has one"
        raise Mistake(f"peft.prefix_tuning.hidden is {hidden}; {why}")
    prompts.check(model, NAME, tokens)
    width = _width(model.config)
    hidden = hidden or model.config.width

    def hook(module, call, *args):
        path = peft.path_of(module)
        if path in POSITIONS:
            return call(args[0] + tokens)
        if not isinstance(module, layers.KeysValues):
            return call(*args)
        k_bshk, v_bshk, mask = call(*args)
        own = _projected if projection else _learnt
        k_bshk, v_bshk = (
            _before(own(module, part, tokens, width, hidden, init), x)
            for part, x in zip(PARTS, (k_bshk, v_bshk), strict=True)
        )
        if mask is not None:
            mask = jnp.pad(mask, ((0, 0), (0, 0), (0, 0), (tokens, 0)), constant_values=True)
        return k_bshk, v_bshk, mask

    def shared(key, params):
        embedding, dense = jax.random.split(key)
        return {
            "embedding": jax.random.normal(embedding, (tokens, width)),
            "dense": prompts.linear(dense, width, hidden),
        }

    def is_own(path):
        return path.startswith((f"peft/{TAP}/prefix_", f"peft_shared/{NAME}/"))

    moves, rows = prompts.claims(model, NAME, is_own, modules_to_save)
    files = prompts.files(
        model,
        "PREFIX_TUNING",
        tokens,
        modules_to_save,
        _encode(projection),
        _decode(model.config),
        _in_peft,
        # A prefix that was projected is like any other, and PEFT may train on as one.
        prefix_projection=False,
        **_sizes(model),
    )
    return peft.Method(
        NAME,
        moves,
        hook,
        shared=shared if projection else None,
        rows=rows,
        axes=AXES,
        undecayed=tuple(f"{part}_bias" for part in PARTS),
        identity=math.inf,
        positions=tokens if "positions" in model.dummy else 0,
        files=files,
    )


def _width(config):
    """Numbers of a token's keys, of all heads."""
    return config.kv_heads * config.head_dim if hasattr(config, "kv_heads") else config.width


def _before(prefix_nd, x_bshk):
    """x [b, s, h, k] behind the prefix [n, d], in x's dtype."""
    prefix_nhk = prefix_nd.reshape(-1, *x_bshk.shape[2:]).astype(x_bshk.dtype)
    prefix_bnhk = jnp.broadcast_to(prefix_nhk, (len(x_bshk), *prefix_nhk.shape))
    return jnp.concatenate([prefix_bnhk, x_bshk], 1)


def _learnt(module, part, tokens, width, hidden, init):
    """The prefix [n, d] of one layer, as it is learnt."""
    start = jax.nn.initializers.zeros if init == "zero" else jax.nn.initializers.normal(1.0)
    return peft.leaf(module, part, start, (tokens, width))


def _projected(module, part, tokens, width, hidden, init):
    """The prefix [n, d] of one layer, projected from what all layers share."""
    start = jax.nn.initializers.zeros if init == "zero" else prompts.uniform(hidden)
    kernel = peft.leaf(module, f"{part}_kernel", start, (hidden, width))
    bias = peft.leaf(module, f"{part}_bias", start, (width,))
    return _inside(peft.shared(NAME)) @ kernel + bias


def _inside(own):
    """z [n, h] of the leaves that all layers share."""
    return jnp.tanh(own["embedding"] @ own["dense"]["kernel"] + own["dense"]["bias"])


# --- in PEFT's files -------------------------------------------------------------------------


def _encode(projection):
    def prefixes(leaves):
        """[l, n, d] for key and value."""
        own = {name: leaves.get(f"peft/{TAP}/{name}") for name in PARTS}
        if not projection:
            return [own[part] for part in PARTS]
        with jax.default_matmul_precision("highest"):
            z = np.asarray(_inside(prompts.shared_leaves(NAME, leaves)))
        kernels = (leaves[f"peft/{TAP}/{part}_kernel"] for part in PARTS)
        biases = (leaves[f"peft/{TAP}/{part}_bias"] for part in PARTS)
        return [z @ kernel + bias[:, None] for kernel, bias in zip(kernels, biases, strict=True)]

    def encode(leaves):
        """[n, l x 2 x d]: by layer, the key before the value."""
        both_nlpd = np.stack(prefixes(leaves), 1).transpose(2, 0, 1, 3)
        return both_nlpd.reshape(len(both_nlpd), -1)

    return encode


def _decode(config):
    def decode(table):
        both_nlpd = table.reshape(-1, config.depth, 2, _width(config))
        halves = both_nlpd.transpose(2, 1, 0, 3)
        return {f"peft/{TAP}/{part}": half for part, half in zip(PARTS, halves, strict=True)}

    return decode


def _in_peft(model):
    """Can PEFT compute it? transformers' DistilBERT and ViT take no keys and values from before;
    and where there are sliding windows, the prefix soon lies outside of them."""
    causal = model.names.head is not None and not _slides(model)
    return causal or model.config.family in ("bert", "roberta")


def _slides(model):
    return any(getattr(model.config, "windows", ()))


def _sizes(model):
    """What PEFT's configuration says of a model: of its keys and values."""
    heads = getattr(model.config, "kv_heads", model.config.heads)
    own = {"token_dim": _width(model.config), "num_attention_heads": heads}
    return prompts.sizes(model) | own


def _fits(fields, model):
    """Raises Mistake where PEFT's configuration speaks of another model, or PEFT computes it
    otherwise."""
    prompts.fits(fields, model, _sizes)
    if _slides(model):
        raise Mistake(
            f"{model.name} has sliding windows, outside of which PEFT leaves the prefix; here "
            "every token reads it"
        )


LAYOUT = Layout(
    peft_type="PREFIX_TUNING",
    fields={**prompts.FIELDS, "num_attention_heads": ((int,), None)},
    # How the prefix was made, of which the file has the result.
    ignored=("encoder_hidden_size", "init_weights", "prefix_projection"),
    defaults={},
    arguments=prompts.arguments,
    fits=_fits,
)
