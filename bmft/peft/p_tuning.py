"""P-tuning (Liu et al. 2021, arXiv:2103.10385), as PEFT computes it: prompt tuning
(bmft/peft/prompt_tuning.py) whose tokens are made from an embedding by a small network.

    mlp     P = W3 relu(W2 relu(W1 E))                          biases left out
    lstm    P = W2 relu(W1 lstm(E))                             both ways along the tokens
    none    P itself is learnt: what PEFT's file has, which keeps the network's output alone

E starts normal with deviation 1, all else uniform as torch's layers. Dropout is between the layers
of the LSTM. It does not start as the base.

Shapes: n tokens, d width, h hidden; g = 4 h, the gates in, forget, cell, out.

    peft_shared/p_tuning/embedding [n, d]
    mlp    peft_shared/p_tuning/dense_{0,1,2}/{kernel,bias}     d to h to h to d
    lstm   peft_shared/p_tuning/lstm_<i>_{forward,backward}/{input [., g],state [h, g],input_bias,
           state_bias},  dense_{0,1}/{kernel,bias}              2h to 2h to d
    none   peft/embeddings/word/prompt [n, d]
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from bmft import peft
from bmft.errors import Mistake, nearest
from bmft.peft import prompts
from bmft.peft.files import Layout

NAME, LEAF = "p_tuning", f"peft/{prompts.WORDS}/prompt"
ENCODERS = ("mlp", "lstm", "none")
WAYS = ("forward", "backward")


def make(
    model,
    *,
    tokens: int = 20,
    encoder: str = "mlp",
    hidden: int | None = None,
    layers: int = 2,
    dropout: float = 0.0,
    modules_to_save: tuple[str, ...] = (),
):
    """tokens: 20 are those of PEFT's examples. encoder: `mlp`, `lstm` or `none`. hidden: its width;
    None is the model's. layers, dropout: of the LSTM."""
    prompts.check_words(model, NAME)
    prompts.check(model, NAME, tokens)
    _check(encoder, hidden, layers, dropout)
    width = model.config.width
    hidden = hidden or width
    make_own = {"mlp": _make_mlp, "lstm": _make_lstm(layers)}.get(encoder)
    run = {"mlp": _mlp, "lstm": _lstm}.get(encoder)

    def shared(key, params):
        embedding, network = jax.random.split(key)
        own = {"embedding": jax.random.normal(embedding, (tokens, width))}
        return own | make_own(network, width, hidden)

    def hook(module, call, *args):
        if peft.path_of(module) != prompts.WORDS:
            return call(*args)
        if encoder == "none":
            prompt = peft.leaf(module, "prompt", jax.nn.initializers.normal(1.0), (tokens, width))
        else:
            prompt = run(peft.shared(NAME), lambda x: peft.dropout(module, x, dropout))
        return prompts.embed(module, call, args[0], prompt)

    def is_own(path):
        return path == LEAF or path.startswith(f"peft_shared/{NAME}/")

    def encode(leaves):
        if encoder == "none":
            return leaves[LEAF]
        with jax.default_matmul_precision("highest"):
            return np.asarray(run(prompts.shared_leaves(NAME, leaves), lambda x: x))

    moves, rows = prompts.claims(model, NAME, is_own, modules_to_save)
    files = prompts.files(
        model,
        "P_TUNING",
        tokens,
        modules_to_save,
        encode,
        lambda table: {LEAF: table},
        encoder_reparameterization_type="LSTM" if encoder == "lstm" else "MLP",
        encoder_hidden_size=hidden,
        encoder_num_layers=layers,
        encoder_dropout=dropout,
    )
    return peft.Method(
        NAME,
        moves,
        hook,
        shared=None if encoder == "none" else shared,
        rows=rows,
        axes={"prompt": "o"},
        undecayed=("input_bias", "state_bias"),
        identity=math.inf,
        virtual_tokens=tokens,
        positions=tokens,
        files=files,
    )


def _check(encoder, hidden, layers, dropout):
    if encoder not in ENCODERS:
        raise Mistake(f"peft.p_tuning.encoder is {encoder!r}; {nearest(encoder, ENCODERS)}")
    if hidden is not None and (hidden < 1 or encoder == "none"):
        why = "it must be 1 or more" if encoder != "none" else "without an encoder there is none"
        raise Mistake(f"peft.p_tuning.hidden is {hidden}; {why}")
    if layers < 1 or (layers != 2 and encoder != "lstm"):
        why = "it must be 1 or more" if encoder == "lstm" else "only an lstm has another number"
        raise Mistake(f"peft.p_tuning.layers is {layers}; {why}")
    if not 0 <= dropout < 1 or (dropout and (encoder != "lstm" or layers == 1)):
        why = "it lies between the layers of an lstm, in [0, 1)"
        raise Mistake(f"peft.p_tuning.dropout is {dropout}; {why}")


# --- the networks ----------------------------------------------------------------------------


def _dense_layers(key, sizes):
    keys = jax.random.split(key, len(sizes) - 1)
    return {
        f"dense_{i}": prompts.linear(keys[i], *pair)
        for i, pair in enumerate(itertools.pairwise(sizes))
    }


def _make_mlp(key, width, hidden):
    return _dense_layers(key, (width, hidden, hidden, width))


def _make_lstm(layers):
    def own(key, width, hidden):
        dense, *keys = jax.random.split(key, 1 + 2 * layers)
        start, leaves = prompts.uniform(hidden), {}
        for i, way in itertools.product(range(layers), WAYS):
            of_input, *rest = jax.random.split(keys[2 * i + WAYS.index(way)], 4)
            size = width if i == 0 else 2 * hidden
            leaves[f"lstm_{i}_{way}"] = {
                "input": start(of_input, (size, 4 * hidden)),
                "state": start(rest[0], (hidden, 4 * hidden)),
                "input_bias": start(rest[1], (4 * hidden,)),
                "state_bias": start(rest[2], (4 * hidden,)),
            }
        return leaves | _dense_layers(dense, (2 * hidden, 2 * hidden, width))

    return own


def _dense(own, x):
    """x through the dense layers of a network, with a ReLU between them."""
    count = sum(name.startswith("dense_") for name in own)
    for i in range(count):
        x = x @ own[f"dense_{i}"]["kernel"] + own[f"dense_{i}"]["bias"]
        x = jax.nn.relu(x) if i < count - 1 else x
    return x


def _mlp(own, drop):
    return _dense(own, own["embedding"])


def _lstm(own, drop):
    x = own["embedding"]
    count = sum(name.startswith("lstm_") for name in own) // 2
    for i in range(count):
        ways = [_one_way(own[f"lstm_{i}_{way}"], x, way == "backward") for way in WAYS]
        x = jnp.concatenate(ways, -1)
        x = drop(x) if i < count - 1 else x
    return _dense(own, x)


def _one_way(own, x_nd, backward):
    """[n, h]: an LSTM (Hochreiter and Schmidhuber 1997) along the tokens, from the last if
    backward."""

    def step(carry, gates_g):
        state, cell = carry
        gates_g = gates_g + state @ own["state"] + own["state_bias"]
        read, keep, new, show = jnp.split(gates_g, 4)
        cell = jax.nn.sigmoid(keep) * cell + jax.nn.sigmoid(read) * jnp.tanh(new)
        state = jax.nn.sigmoid(show) * jnp.tanh(cell)
        return (state, cell), state

    gates_ng = x_nd @ own["input"] + own["input_bias"]
    zero = jnp.zeros(len(own["state"]))
    return jax.lax.scan(step, (zero, zero), gates_ng, reverse=backward)[1]


LAYOUT = Layout(
    peft_type="P_TUNING",
    fields=prompts.FIELDS,
    ignored=(
        # The network, of which the file has the output.
        *("encoder_reparameterization_type", "encoder_hidden_size"),
        *("encoder_num_layers", "encoder_dropout"),
        "num_attention_heads",  # PEFT asks for them, and has no use for them here
    ),
    defaults={},
    arguments=lambda fields, table: prompts.arguments(fields, table) | {"encoder": "none"},
    fits=prompts.fits,
)
