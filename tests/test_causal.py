"""Causal language models: transformers' logits, the loss in chunks, the cache, files.

Logits of all families, live, are in tests/parity/test_causal.py.
"""

import json
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_causal
from safetensors.numpy import load_file, save_file

from bmft import layers, models, peft
from bmft.errors import Mistake
from bmft.models import attention, causal, rotary, weights

GOLDENS = np.load(pathlib.Path(__file__).resolve().parent / "goldens" / "causal.npz")
FAMILIES = ("llama", "gemma2", "gpt2")  # the rest differ in config.json: tests/parity
TEXTS = tiny_causal.texts()
# Lower than the logits' size of 3 by what two ways of computing them round.
TOLERANCE = 1e-5


class Family:
    """A tiny model, and its outputs for the batch of `both`, compiled once."""

    def __init__(self, folder):
        self.model = models.find(str(folder))
        self.params = weights.load(self.model, jax.random.key(0)).params
        self.apply = tiny.hasty(self.model.module.apply)
        self.batch = tiny_causal.both(TEXTS)

    def run(self, batch):
        return self.apply({"params": self.params}, batch)


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    folders = {name: tmp_path_factory.mktemp(name) for name in FAMILIES}
    return {name: Family(tiny_causal.directory(at, name)) for name, at in folders.items()}


@pytest.fixture(scope="module")
def logits(families):
    """{family: logits of `both`}"""
    return {
        name: np.asarray(family.run(tiny_causal.asked(family.batch)))
        for name, family in families.items()
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_transformers_packed_and_one_a_row(logits, name):
    pairs = tiny_causal.of_both(logits[name], TEXTS)
    for way in range(2):
        ours = np.concatenate([pair[way] for pair in pairs])
        np.testing.assert_allclose(ours[:, ::3], GOLDENS[name], atol=TOLERANCE)


def test_the_loss_of_a_stack_in_pieces(families, logits):
    """Windows and the like go with their layers, wherever the stack is cut; unrolled, and with
    remat. gemma2's logits are capped."""
    family, want = families["gemma2"], np.asarray(jax.nn.log_softmax(logits["gemma2"]))
    module = family.model.module.clone(unroll=3, remat="block", frozen_below=1)
    batch, targets = tiny_causal.asked(family.batch, "targets"), family.batch["targets"]
    loss = tiny.hasty(module.apply)({"params": family.params}, batch)
    picked = np.take_along_axis(want, np.maximum(targets, 0)[..., None], -1)[..., 0]
    np.testing.assert_allclose(loss, np.where(targets < 0, 0, -picked), atol=TOLERANCE)


def test_keys_by_blocks(monkeypatch):
    """Blocks of four queries, the last of three, and one block: what comes out, and its gradients,
    with dropout and without. All see two columns before the tokens."""
    monkeypatch.setattr(attention, "BLOCK", 4)
    rng = np.random.default_rng(0)
    shapes = ((2, 11, 6, 8), (2, 13, 2, 8), (2, 13, 2, 8))
    arrays = [rng.normal(0, 1, shape).astype(np.float32) for shape in shapes]
    segments = np.array([[1] * 5 + [2] * 6, [1] * 8 + [0] * 3])
    own = (segments[:, :, None] == segments[:, None]) & np.tri(11, dtype=bool)
    mask = np.concatenate([np.ones((2, 11, 2), bool), own], -1)[:, None]

    kept = rng.choice([0.0, 2.0], (2, 2, 3, 11, 13)).astype(np.float32)
    drops = [None, lambda ones: ones * kept]

    def plain(q, k, v, drop):
        k, v = (jnp.repeat(array, 3, 2) for array in (k, v))
        scores = 3 * jnp.tanh(jnp.einsum("bthk,bshk->bhts", q * 0.5, k) / 3)
        weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf))
        weights = weights * kept.reshape(2, 6, 11, 13) if drop else weights
        return jnp.einsum("bhts,bshk->bthk", weights, v).reshape(2, 11, 48)

    def blocks(q, k, v, drop, ahead):
        return attention.attend(q, k, v, mask, scale=0.5, cap=3.0, dropout=drop, ahead=ahead)

    def slopes(function, *given):
        def loss(*arrays):
            out = function(*arrays, *given)
            return jnp.square(out).sum(), out

        return jax.grad(loss, (0, 1, 2), has_aux=True)

    def every(*arrays):
        return [
            [slopes(plain, drop)(*arrays), *(slopes(blocks, drop, a)(*arrays) for a in (0, 1))]
            for drop in drops
        ]

    for want, *found in tiny.hasty(every)(*arrays):
        for one in found:
            for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(want), strict=True):
                np.testing.assert_allclose(a, b, atol=1e-5)


# --- the cache -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gemma2", "gpt2"])  # llama's: tests/test_generate.py
def test_decoding_equals_the_whole_text(families, logits, name):
    """Texts of different lengths, five columns a call; where a text ends, nothing is written."""
    family, columns = families[name], 5
    cache, found = causal.empty_cache(family.model.config, len(TEXTS), 22), [[] for _ in TEXTS]
    at, width = np.zeros(len(TEXTS), int), [2, 5, 1, 3]  # the rows go on at their own pace
    for _ in range(10):
        pieces = [ids[i : i + w] for ids, i, w in zip(TEXTS, at, width, strict=True)]
        batch = {key: np.zeros((4, columns), np.int32) for key in ("input_ids", "segments")}
        batch["positions"] = np.zeros((4, columns), np.int32)
        for row, ids in enumerate(pieces):
            batch["input_ids"][row, : len(ids)] = ids
            batch["segments"][row, : len(ids)] = 1
            batch["positions"][row, : len(ids)] = at[row] + np.arange(len(ids))
        out, cache = family.run(batch | {"cache": cache})
        for row, ids in enumerate(pieces):
            found[row].extend(np.asarray(out[row, : len(ids)]))
            at[row] += len(ids)
    for ours, want in zip(found, tiny_causal.of_both(logits[name], TEXTS), strict=True):
        np.testing.assert_allclose(ours, want[1], atol=TOLERANCE)
    written = np.abs(cache["keys"]).sum((0, 3, 4)) > 0
    assert written.sum(1).tolist() == [len(ids) for ids in TEXTS]


# --- the head --------------------------------------------------------------------------------


def test_chosen_columns():
    """Of each row its own, in any order, and more than once."""
    x_btd = np.random.default_rng(0).normal(0, 1, (3, 5, 4)).astype(np.float32)
    at = np.array([[3, 0], [4, 4], [1, 2]], np.int32)
    found = causal.outputs(lambda x: 2 * x, x_btd, {"at": at})
    np.testing.assert_array_equal(found, [2 * x[i] for x, i in zip(x_btd, at, strict=True)])


class Alone(nn.Module):
    """The loss of a head on x, whose gradient is wanted, too."""

    words: int
    tied: bool
    chunk: int
    smoothing: float = 0.0
    frozen: bool = False

    @nn.compact
    def __call__(self, targets):
        x = self.get_variable("params", "x")
        if self.tied:
            head, tables = causal.TiedHead(name="head"), (self.get_variable("params", "table"),)
        else:
            head, tables = layers.Dense(self.words, use_bias=False, name="head"), ()
        batch = {"targets": targets}
        if self.smoothing:
            batch["smoothing"] = np.float32(self.smoothing)
        about = {"cap": 4.0, "chunk": self.chunk, "frozen": self.frozen}
        each = causal.outputs(head, x, batch, tables, **about)
        return (each * jnp.arange(each.size).reshape(each.shape)).sum() / 9


WAYS = {  # (chunk, frozen): all of three rows of 11 tokens at once, 1, 2 and 4 columns at a time
    "apart": (False, 0.0, ((99, False), (2, False), (12, True))),
    "tied": (True, 0.0, ((12, False), (6, True))),
    "smoothed": (True, 0.3, ((12, False), (12, True))),
}


@pytest.mark.parametrize(("tied", "smoothing", "ways"), WAYS.values(), ids=WAYS)
def test_chunks_of_the_loss_are_no_matter(tied, smoothing, ways):
    """x has the same gradient of a head that is frozen. A row has few targets, one has none."""
    rng = np.random.default_rng(0)
    x_btd, kernel_dv = rng.normal(0, 1, (3, 11, 7)), rng.normal(0, 1, (7, 29))
    targets = rng.integers(-1, 29, (3, 11)).astype(np.int32)
    targets[1, :7], targets[2] = -1, -1

    def loss(x, kernel, chunk=None, frozen=False):
        if chunk is None:
            logits = jax.nn.log_softmax(4 * jnp.tanh(x @ kernel / 4))
            wanted = jax.nn.one_hot(targets, 29) * (1 - smoothing) + smoothing / 29
            each = jnp.where(targets < 0, 0, -(wanted * logits).sum(-1))
            return (each * jnp.arange(33).reshape(3, 11)).sum() / 9
        params = {"x": x} | ({"table": kernel.T} if tied else {"head": {"kernel": kernel}})
        return Alone(29, tied, chunk, smoothing, frozen).apply({"params": params}, targets)

    def all_of(x, kernel):
        of = jax.value_and_grad(loss, (0, 1))
        return [of(x, kernel, *way) for way in ((), *ways)]

    (value, slopes), *others = tiny.hasty(all_of)(*map(jnp.float32, (x_btd, kernel_dv)))
    assert not others[-1][1][1].any()  # whoever says that it is frozen asks for none
    others[-1] = others[-1][0], (others[-1][1][0], slopes[1])
    for same, these in others:
        np.testing.assert_allclose(same, value, rtol=1e-5)
        for one, other in zip(these, slopes, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)
            assert np.abs(one).max() > 0.1


@pytest.mark.parametrize(
    ("path", "still"),
    [
        ("peft/layers/mlp/gate/lora_a", True),
        ("params/norm/scale", True),
        ("params/head/kernel", False),
        ("peft/head/lora_b", False),
        ("params/embeddings/word/embedding", False),
        ("peft_shared/vera/a", False),
    ],
)
def test_when_nothing_of_the_head_moves(path, still):
    assert peft.head_is_still(["peft/layers/attention/query/lora_a", path]) is still


def test_the_logits_of_a_chunk_alone_are_held():
    """Temporaries of the loss and its gradient; 2,048 tokens, 1,024 words."""
    params = {"x": jnp.zeros((4, 512, 8)), "head": {"kernel": jnp.zeros((8, 1024))}}
    targets, sizes = jnp.zeros((4, 512), jnp.int32), []
    for chunk, smoothing in ((2048, 0.0), (256, 0.0), (256, 0.1)):
        gradient = tiny.hasty(jax.grad(Alone(1024, False, chunk, smoothing).apply))
        program = gradient.lower({"params": params}, targets).compile()
        sizes.append(program.memory_analysis().temp_size_in_bytes)
    assert max(sizes[1:]) < 0.5 * sizes[0]


# --- files -----------------------------------------------------------------------------------


def test_a_tied_head_in_the_file(tmp_path):
    """It may be there as a copy; another tensor is refused, as transformers would not tie it."""
    tiny_causal.directory(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    model = models.find(str(tmp_path))
    assert weights.load(model, jax.random.key(0)).ignored == ()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    told = weights.load(model, jax.random.key(0)).ignored
    assert told == ("layers.1.self_attn.rotary_emb.inv_freq", "lm_head.weight")
    tensors["lm_head.weight"] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(Mistake, match="tie_word_embeddings: false"):
        weights.load(model, jax.random.key(0))


def test_a_head_that_is_missing(tmp_path):
    tiny_causal.directory(tmp_path, "gpt2_untied")
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    tensors = {name.removeprefix("transformer."): array for name, array in tensors.items()}
    tensors["h.0.attn.bias"] = np.zeros((1, 1, 64, 64), np.float32)  # as the first files have it
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(Mistake, match="'lm_head.weight' is missing"):
        weights.load(models.find(str(tmp_path)), jax.random.key(0))
    settings = tiny_causal.CONFIGS["gpt2_untied"] | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    told = weights.load(models.find(str(tmp_path)), jax.random.key(0)).ignored
    assert told == ("h.0.attn.bias",)


LONGROPE = {
    "rope_type": "longrope",
    "factor": 2.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 16,
}
BAD = [
    ("llama", {"rope_scaling": LONGROPE}, "rope_type 'longrope' is not computed"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ("llama", {"num_key_value_heads": 4}, "6 heads and 4 of keys and values"),
    ("llama", {"hidden_act": "sliu"}, "did you mean 'silu'"),
    ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention must be false"),
    ("qwen2", {"layer_types": ["chunked_attention"] * 3}, "layer_types must be 3 of"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention must be false"),
    ("gpt2", {"n_head": 5}, "5 heads do not divide the width 36"),
]


@pytest.mark.parametrize(("name", "changes", "says"), BAD)
def test_what_is_refused(tmp_path, name, changes, says):
    (tmp_path / "config.json").write_text(json.dumps(tiny_causal.CONFIGS[name] | changes))
    with pytest.raises(Mistake) as refused:
        models.find(str(tmp_path))
    assert says in str(refused.value)


# What the family, and not the field alone, decides; computed against transformers in tests/parity.
OF_FAMILIES = [
    ("gemma", {"activation": "gelu_pytorch_tanh", "tied": True, "logit_cap": None}),
    ("mistral", {"qkv_bias": False, "windows": (5, 5, 5), "tied": False}),
    ("llama_biases", {"qkv_bias": True, "output_bias": True, "mlp_bias": True, "logit_cap": None}),
    ("qwen2", {"qkv_bias": True, "output_bias": False, "windows": (None, 4, 4), "head_dim": 6}),
    ("gemma3", {"attention_cap": None, "logit_cap": 4.0, "windows": (4, None, 4)}),
]


@pytest.mark.parametrize(("name", "want"), OF_FAMILIES, ids=[name for name, _ in OF_FAMILIES])
def test_what_a_family_makes_of_its_fields(tmp_path, name, want):
    (tmp_path / "config.json").write_text(json.dumps(tiny_causal.CONFIGS[name]))
    config = models.find(str(tmp_path)).config
    assert {field: getattr(config, field) for field in want} == want


def test_what_is_no_language_model(tmp_path):
    tiny.directory(tmp_path / "bert")
    with pytest.raises(Mistake, match="there is no language model here"):
        models.find(str(tmp_path / "bert"))
    (tmp_path / "config.json").write_text(json.dumps(tiny_causal.CONFIGS["llama"]))
    with pytest.raises(Mistake, match="there is no classifier here"):
        models.find(str(tmp_path), outputs=3)


@pytest.mark.parametrize(
    ("name", "architectures", "speaks"),
    [
        ("llama", ["LlamaForCausalLM"], True),
        ("llama", None, True),
        ("llama", ["LlamaForSequenceClassification"], False),
        ("gpt2", ["GPT2LMHeadModel"], True),
    ],
)
def test_who_speaks(tmp_path, name, architectures, speaks):
    settings = tiny_causal.CONFIGS[name] | {"architectures": architectures}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert models.speaks(tmp_path) == speaks


def test_rotary_frequencies():
    """Worked by hand: 4 pairs, theta 16: waves of 2 pi times 1, 2, 4, 8."""
    plain = {"rope_type": "default", "rope_theta": 16.0}
    np.testing.assert_allclose(rotary.way(plain, 8, 64)[0], (1, 0.5, 0.25, 0.125), rtol=1e-6)
    linear = plain | {"rope_type": "linear", "factor": 4.0}
    want = 0.25, 0.125, 0.0625, 0.03125
    np.testing.assert_allclose(rotary.way(linear, 8, 64)[0], want, rtol=1e-6)
    # Waves of 6.3, 12.6, 25.1, 50.3 tokens: below 8 they stay, above 32 they are four times longer.
    llama3 = linear | {"rope_type": "llama3", "original_max_position_embeddings": 32}
    llama3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    one, other = (32 / (4 * np.pi) - 1) / 3, (32 / (8 * np.pi) - 1) / 3
    want = 1.0, 0.5 * (one + (1 - one) / 4), 0.25 * (other + (1 - other) / 4), 1 / 32
    np.testing.assert_allclose(rotary.way(llama3, 8, 64)[0], want, rtol=1e-6)
