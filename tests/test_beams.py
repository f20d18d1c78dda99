"""Beam search, and n-grams that do not come again, on a table of trigrams.

Against transformers' on models: tests/parity/test_beams.py.
"""

import itertools
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from bmft import generate
from bmft.generate import Sampling
from bmft.models import causal

V, TOKENS, END = 4, 4, 3
PROMPTS = [[0, 1, 2, 1, 2], [2, 0]]
TABLE = np.random.default_rng(5).normal(0, 1.5, (V, V, V)).astype(np.float32)
LOG_P = TABLE - np.log(np.exp(TABLE).sum(-1, keepdims=True))
CONFIG = SimpleNamespace(depth=1, kv_heads=1, head_dim=1, max_length=64, vocabulary=V)
MODEL = SimpleNamespace(name="toy", config=CONFIG, module=SimpleNamespace(dtype=jnp.float32))


def apply(variables, batch):
    """(scores [b, 1, v], the cache): it holds the tokens, of which the last two say what comes;
    the words of row i are turned by turns[i]."""
    sight = causal.sight(batch)
    ids = batch["input_ids"][..., None, None]
    cache, kept, _ = causal.remember(batch["cache"], 0, sight, ids, ids)
    rows, at = jnp.arange(len(ids)), batch.get("at", batch["positions"])[:, 0]
    before, last = (kept[rows, at - back, 0, 0].astype(jnp.int32) for back in (1, 0))
    own = (jnp.arange(V) + batch["turns"]) % V
    return jnp.take_along_axis(jnp.array(TABLE)[before, last], own, -1)[:, None], cache


def written(sampling, ends):
    generator = generate.Generator(apply, {}, MODEL, tokens=TOKENS, ends=ends, burst=TOKENS)
    (texts,) = generator(PROMPTS, sampling, more={"turns": np.array([[0], [1]])})
    return texts


def score(prompt, text, turn):
    """The log-likelihood of a text."""
    whole, total = [*prompt, *text], 0.0
    for i in range(len(prompt), len(whole)):
        total += LOG_P[whole[i - 2], whole[i - 1], (whole[i] + turn) % V]
    return total


def repeats(text, size, new):
    """Is one of the last `new` n-grams of a text in it twice?"""
    grams = [text[i : i + size] for i in range(len(text) - size + 1)]
    return any(grams.count(gram) > 1 for gram in grams[max(len(grams) - new, 0) :])


def best(prompt, turn, how, ends):
    """The best of all texts that are over, at their end or at the most tokens."""
    found = {}
    for text in itertools.product(range(V), repeat=TOKENS):
        stop = next((i + 1 for i, token in enumerate(text) if token in ends), TOKENS)
        text = list(text[:stop])
        counted = [*prompt, *text] if how.ngrams_of == "text" else text
        if not how.no_repeat_ngram or not repeats(counted, how.no_repeat_ngram, len(text)):
            found[tuple(text)] = score(prompt, text, turn) / len(text) ** how.length_penalty
    return list(max(found, key=found.get))


@pytest.mark.parametrize(
    ("how", "ends"),
    [
        (Sampling(length_penalty=0.0), (END,)),
        (Sampling(length_penalty=0.8, no_repeat_ngram=2), (1, END)),
        (Sampling(length_penalty=3.0, no_repeat_ngram=1, ngrams_of="answer"), ()),
    ],
)
def test_beams_enough_find_the_best_of_all_texts(how, ends):
    texts = written(how._replace(beams=V**3), ends)
    assert texts == [best(prompt, turn, how, ends) for turn, prompt in enumerate(PROMPTS)]


@pytest.mark.parametrize("of", generate.NGRAMS_OF)
def test_the_likeliest_token_that_repeats_nothing(of):
    texts = written(Sampling(no_repeat_ngram=1, ngrams_of=of), ())
    for turn, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=True)):
        for i, token in enumerate(text):
            out = set(text[:i]) | (set(prompt) if of == "text" else set())
            if left := set(range(V)) - out:
                one = {word: score(prompt + text[:i], [word], turn) for word in left}
                assert token == max(one, key=one.get)
