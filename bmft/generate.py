"""Causal language models go on with prompts: batches of different lengths, a cache of keys and
values, two compiled programs (the prompts at once, then some tokens a call).

    generator = Generator(apply, variables, model, tokens=64)
    for texts in generator([[5, 8, 2], [7]], Sampling(temperature=0.7, top_p=0.9), seed=3): ...

Shapes: b prompts, t columns of the longest prompt, s columns of the cache, n tokens to be made,
v vocabulary. How a token is chosen are pure functions of scores [b, v], as transformers has them
and in its order: repetition penalty, n-grams, temperature, top-k, top-p, min-p. With beams, whole
texts are chosen: bmft/beams.py.
"""

import copy
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bmft import beams, evaluate, models, peft
from bmft.errors import Mistake, nearest
from bmft.models import causal

ROUND = 32  # the fewest columns
NEVER = -jnp.inf
NGRAMS_OF = ("text", "answer")


class Sampling(NamedTuple):
    """How tokens are chosen; as it stands, the likeliest. Hashable: a program is compiled of it."""

    temperature: float = 0.0  # 0: the likeliest token, whatever the other fields say but the last
    top_k: int = 0  # of the so many likeliest; 0: of all
    top_p: float = 1.0  # of the fewest that have so much probability together
    min_p: float = 0.0  # of those that have so much of the likeliest one's probability
    repetition_penalty: float = 1.0  # Keskar et al. 2019 (arXiv:1909.05858), of the prompt, too
    no_repeat_ngram: int = 0  # so many tokens in a row never come again; 0: they may
    ngrams_of: str = "text"  # text: the prompt's neither, as in transformers; answer: its own alone
    beams: int = 1  # texts that are followed, of which the best is the answer; bmft/beams.py
    length_penalty: float = 1.0  # of beams: scores are over the tokens to this power


LIKELIEST = Sampling()


class State(NamedTuple):
    """What goes from token to token."""

    cache: Any
    scores: Any  # float32 [b, v] of the next token
    lengths: Any  # int32 [b]: tokens in the cache
    done: Any  # bool [b]
    seen: Any  # bool [b, v]: tokens of the text so far; None without a repetition penalty
    keys: Any  # [b]
    text: Any = None  # int32 [b, s]: what is not to be repeated, else -1; None: all may be


# --- how a token is chosen ---------------------------------------------------------------------


def penalised(scores, seen, penalty):
    """Scores of tokens that were seen are moved down: over the penalty, or times it below zero."""
    return jnp.where(seen, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)


def top_k(scores, k):
    """All but the k highest are out; what equals the lowest of those stays."""
    least = jax.lax.top_k(scores, min(k, scores.shape[-1]))[0][..., -1:]
    return jnp.where(scores < least, NEVER, scores)


def top_p(scores, p):
    """The fewest of the highest that have the probability p together; at least one."""
    order = jnp.argsort(scores, -1)
    rising = jnp.cumsum(jax.nn.softmax(jnp.take_along_axis(scores, order, -1)), -1)
    out = (rising <= 1 - p).at[..., -1].set(False)
    return jnp.where(jnp.take_along_axis(out, jnp.argsort(order, -1), -1), NEVER, scores)


def min_p(scores, p):
    """Those with at least p times the probability of the likeliest."""
    chances = jax.nn.softmax(scores)
    return jnp.where(chances < p * chances.max(-1, keepdims=True), NEVER, scores)


def repeating(text, lengths, size, words):
    """bool [b, words]: the tokens behind `lengths` [b] that would end as many tokens in a row as
    text [b, s] has already; -1 is no token."""
    columns = lengths[:, None] - size + 1 + jnp.arange(size - 1)
    last = jnp.take_along_axis(text, columns, 1)
    after = text[:, size - 1 :]
    same = (after >= 0) & ((columns >= 0) & (last >= 0)).all(-1, keepdims=True)
    for i in range(size - 1):
        same &= text[:, i : i + after.shape[1]] == last[:, i : i + 1]
    rows = jnp.arange(len(text))[:, None]
    found = jnp.where(same, after, words)
    return jnp.zeros((len(text), words), bool).at[rows, found].set(True, mode="drop")


def unrepeated(scores, text, lengths, sampling):
    """Scores without the tokens that would repeat an n-gram of the text."""
    if not sampling.no_repeat_ngram:
        return scores
    out = repeating(text, lengths, sampling.no_repeat_ngram, scores.shape[-1])
    return jnp.where(out, NEVER, scores)


def chosen(scores, seen, sampling, keys):
    """int32 [b]: a token a row, each by its own of the keys [b]."""
    how = sampling
    if how.repetition_penalty != 1.0:
        scores = penalised(scores, seen, how.repetition_penalty)
    if how.temperature == 0.0:
        return scores.argmax(-1).astype(jnp.int32)
    scores = scores / how.temperature
    if how.top_k:
        scores = top_k(scores, how.top_k)
    if how.top_p < 1.0:
        scores = top_p(scores, how.top_p)
    if how.min_p:
        scores = min_p(scores, how.min_p)
    return jax.vmap(jax.random.categorical)(keys, scores).astype(jnp.int32)


def check(sampling, shown=False):
    """Raises Mistake for a value out of range. shown: texts are, as they grow."""
    bounds = {
        "temperature": (0, None),
        "top_k": (0, None),
        "top_p": (0, 1),
        "min_p": (0, 1),
        "repetition_penalty": (0, None),
        "no_repeat_ngram": (0, None),
        "beams": (1, None),
    }
    for field, (low, high) in bounds.items():
        value, open_below = getattr(sampling, field), field in ("top_p", "repetition_penalty")
        inside = value > low if open_below else value >= low  # of which no NaN is either
        if not inside or (high is not None and value > high):
            least = f"above {low}" if open_below else f"{low} or more"
            most = "" if high is None else f", and at most {high}"
            raise Mistake(f"{field} is {value}; it must be {least}{most}")
    if sampling.ngrams_of not in NGRAMS_OF:
        raise Mistake(f"ngrams_of={sampling.ngrams_of!r}; {nearest(sampling.ngrams_of, NGRAMS_OF)}")
    if sampling.beams > 1 and sampling.temperature > 0:
        how = f"beams={sampling.beams} and temperature={sampling.temperature}"
        raise Mistake(f"{how}: beams leave nothing to chance; set beams=1 or temperature=0")
    if sampling.beams > 1 and shown:
        how = f"beams={sampling.beams}: which text is the best is known at its end"
        raise Mistake(f"{how}, so none is shown as it is written; set beams=1")


# --- the loop ----------------------------------------------------------------------------------


def multiple(length):
    """A program for each 32 tokens more; for prompts that are known."""
    return -(-length // ROUND) * ROUND


def power(length):
    """A program for each doubling; for prompts that grow, as a chat does."""
    return max(ROUND, 1 << (length - 1).bit_length())


class Generator:
    """Goes on with prompts, which are lists of ids. Methods are as they are in `apply`."""

    def __init__(
        self, apply, variables, model, *,
        tokens, methods=(), ends=(), burst=16, columns=multiple, put=lambda arrays: arrays,
    ):  # fmt: skip
        """apply: of bmft.peft.attach (or of bmft.peft.several). tokens: to be made, at most.
        ends: ids behind which a text is over; they are its last. burst: tokens made between two
        looks of the host, which is how long a text that is streamed waits. columns: tokens -> to
        how many they are padded, as a program is compiled for each width. put: {name: numpy [b,
        ...]} -> where it shall lie, say its rows on several devices."""
        self._apply, self._variables, self._model = apply, variables, model
        self._tokens, self._ends, self._burst = tokens, tuple(ends), burst
        self._virtual = list(peft.virtual_ids(methods, model))
        self._room = peft.room(methods, model)
        self._dtype, self._columns, self._put = model.module.dtype, columns, put
        self._begin = jax.jit(self._prefill, static_argnames=("penalty", "columns", "ngrams"))
        self._search = jax.jit(self._beams, static_argnames=("sampling",))
        # The cache is written in place.
        self._advance = jax.jit(self._decode, static_argnames=("sampling",), donate_argnums=1)

    def with_variables(self, variables):
        """The same for others of the same shapes: nothing is compiled again."""
        other = copy.copy(self)
        other._variables = variables
        return other

    def __call__(self, prompts, sampling=LIKELIEST, *, seed=0, over=None, more=None):
        """Yields the new ids of each prompt so far, [[id, ...], ...], until all texts are over.

        over: asked with the same lists, gives bool [b]: texts that are over for another reason (a
        stop string); of beams, at their end alone. more: arrays that the batch has beside the
        tokens (`adapters` [b, 1] of bmft.peft.several). Row i draws by seed + i alone, whatever the
        others are. Raises Mistake for prompts that are empty or leave no room.
        """
        check(sampling)
        ids, lengths, columns = self._padded(prompts)
        seeds = (seed + np.arange(len(ids))).astype(np.uint32)
        batch = self._put({"ids": ids, "lengths": lengths, "seeds": seeds})
        more = self._put(more or {})
        about = {"penalty": sampling.repetition_penalty != 1.0, "columns": columns}
        about["ngrams"] = sampling.ngrams_of if sampling.no_repeat_ngram else None
        state = self._begin(self._variables, more, **batch, **about)
        if sampling.beams > 1:
            best = evaluate.gather(self._search(self._variables, state, more, sampling=sampling))
            texts = [[int(token) for token in row if token >= 0] for row in best]
            if over is not None:
                over(texts)
            yield texts
            return
        texts, made, done = [[] for _ in prompts], 0, np.zeros(len(prompts), bool)
        while made < self._tokens and not done.all():
            burst, state = self._advance(self._variables, state, more, sampling=sampling)
            burst, done = evaluate.gather((burst, state.done))
            burst = burst[: self._tokens - made]
            made += len(burst)
            for text, new in zip(texts, burst.T, strict=True):
                text.extend(int(token) for token in new if token >= 0)
            if over is not None:
                done = done | np.asarray(over(texts), bool)
                state = state._replace(**self._put({"done": done}))
            yield texts

    def longest(self, prompts):
        """Tokens of the longest prompt. Raises Mistake for prompts that cannot be gone on with."""
        if not prompts or not all(prompts):
            raise Mistake("a prompt is empty: there is nothing to go on with")
        models.check_ids(max(map(max, prompts)), self._model)
        longest = len(self._virtual) + max(map(len, prompts))
        if longest + self._tokens > self._room:
            raise Mistake(
                f"a prompt of {longest} tokens and {self._tokens} new ones are more than the "
                f"{self._room} that {self._model.name} has room for"
            )
        return longest

    def _padded(self, prompts):
        """(ids [b, t], lengths [b], columns of the cache)"""
        longest = self.longest(prompts)
        prompts = [[*self._virtual, *ids] for ids in prompts]
        ids = np.zeros((len(prompts), self._columns(longest)), np.int32)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = prompt
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        return ids, lengths, self._columns(longest + self._tokens)

    def _prefill(self, variables, more, ids, lengths, seeds, penalty, columns, ngrams):
        cache = causal.empty_cache(self._model.config, len(ids), columns, self._dtype)
        text = jnp.full((len(ids), columns), -1, jnp.int32) if ngrams else None
        columns = jnp.arange(ids.shape[1])
        real = columns < lengths[:, None]
        batch = {
            "input_ids": ids,
            "segments": real.astype(jnp.int32),
            "positions": jnp.broadcast_to(columns, ids.shape),
            "at": lengths[:, None] - 1,
            "cache": cache,
        }
        scores, cache = self._apply(variables, batch | more)
        rows, seen = jnp.arange(len(ids))[:, None], None
        if penalty:
            seen = jnp.zeros(scores[:, 0].shape, bool)
            outside = jnp.where(real, ids, seen.shape[1])  # padding, as virtual tokens
            seen = seen.at[rows, outside].set(True, mode="drop")
        keys = jax.vmap(jax.random.key)(seeds)
        if ngrams == "text":
            text = text.at[:, : ids.shape[1]].set(jnp.where(real, ids, -1))
        return State(cache, scores[:, 0], lengths, jnp.zeros(len(ids), bool), seen, keys, text)

    def _decode(self, variables, state, more, sampling):
        """(tokens [burst, b], -1 where a text was over, the state behind them)."""

        def step(state, _):
            keys, own = jax.vmap(jax.random.split, out_axes=1)(state.keys)
            scores = unrepeated(state.scores, state.text, state.lengths, sampling)
            token = chosen(scores, state.seen, sampling, own)
            shown = jnp.where(state.done, -1, token)
            over = jnp.isin(token, jnp.array(self._ends, jnp.int32)) if self._ends else False
            batch = {
                "input_ids": token[:, None],
                "segments": 1 - state.done[:, None].astype(jnp.int32),
                "positions": state.lengths[:, None],
                "cache": state.cache,
            }
            scores, cache = self._apply(variables, batch | more)
            seen, text, rows = state.seen, state.text, jnp.arange(len(token))
            if seen is not None:
                seen = seen.at[rows, token].set(True)
            if text is not None:
                text = text.at[rows, state.lengths].set(shown, mode="drop")
            lengths = state.lengths + ~state.done
            return State(cache, scores[:, 0], lengths, state.done | over, seen, keys, text), shown

        state, tokens = jax.lax.scan(step, state, length=self._burst)
        return tokens, state

    def _beams(self, variables, state, more, sampling):
        """int32 [b, n]: the best texts, -1 behind their ends."""
        more = jax.tree.map(lambda rows: jnp.repeat(rows, sampling.beams, 0), more)

        def ahead(tokens, columns, cache):
            batch = {"input_ids": tokens[:, None], "positions": columns[:, None], "cache": cache}
            batch["segments"] = jnp.ones_like(batch["input_ids"])
            scores, cache = self._apply(variables, batch | more)
            return scores[:, 0], cache

        def adjusted(scores, text, lengths, seen):
            if seen is not None:
                scores = penalised(scores, seen, sampling.repetition_penalty)
            return unrepeated(scores, text, lengths, sampling)

        how = {"beams": sampling.beams, "length_penalty": sampling.length_penalty}
        return beams.search(ahead, adjusted, state, tokens=self._tokens, ends=self._ends, **how)


# --- texts -------------------------------------------------------------------------------------


def cut(text, stops):
    """(the text before the first of the stop strings, whether there was one)."""
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    return (text[: min(found)], True) if found else (text, False)


def speak(generator, tokenizer, prompts, sampling=LIKELIEST, *, stops=(), show=None, **how):
    """The texts that prompts are gone on with: what is made, without prompts and special tokens.

    prompts: lists of ids. stops: strings before which a text ends. show(row, new text): called as
    it grows; a text that may be the beginning of a stop string, or of a character, is held back.
    """
    check(sampling, shown=show is not None)
    shown, texts = [0] * len(prompts), [("", False)] * len(prompts)

    def read(lists):
        decoded = (_decoded(tokenizer, ids) for ids in lists)
        texts[:] = [cut(text, stops) for text in decoded]
        return [over for _, over in texts]

    for _ in generator(prompts, sampling, over=read, **how):
        if show is not None:
            _show(texts, shown, stops, show, last=False)
    if show is not None:
        _show(texts, shown, stops, show, last=True)
    return [text for text, _ in texts]


def _decoded(tokenizer, ids):
    """What the ids say, as they say it: not what some tokenizers tidy up (`it 's`), which would
    change the end of a text that is shown already."""
    how = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    return tokenizer.decode(ids, **how)


def _show(texts, shown, stops, show, last):
    for row, (text, over) in enumerate(texts):
        end = len(text) if last or over else len(text) - held(text, stops)
        if end > shown[row]:
            show(row, text[shown[row] : end])
            shown[row] = end


def held(text, stops):
    """How many of the last characters may be the beginning of a stop string, or are half a
    character (U+FFFD)."""
    broken = len(text) - len(text.rstrip("\ufffd"))
    starts = (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
    return max(broken, *starts, 0)
