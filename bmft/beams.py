"""Beam search: of all continuations of a prompt the best k are followed, token by token.

As transformers' generate(num_beams=k, do_sample=False, early_stopping=False) has it. A text that is
over has the score log p / tokens^length_penalty, its end counted among the tokens. Of those over,
the best k are kept; a prompt's search ends when the best that goes on, were it over now, would not
be among them, and after the most tokens, when all that went on are over.

Shapes: b prompts, k beams, c candidates, s columns of a text, v vocabulary. Texts are int32
[b, k, s]; columns that hold none are -1.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

NEVER = -jnp.inf


class Beams(NamedTuple):
    """What goes from token to token."""

    made: Any  # int32 []: tokens so far
    going: Any  # {"sums" [b, k]: log p of what was made, best first; "texts"; "seen" [b, k, v]}
    over: Any  # {"scores" [b, k], best first; NEVER: there is none yet; "texts"}
    open: Any  # bool [b]: prompts whose search goes on
    logits: Any  # float32 [b k, v] of the next token
    cache: Any  # leaves [l, b k, ...]


def search(ahead, adjusted, state, *, beams, tokens, ends, length_penalty):
    """int32 [b, tokens]: the best text of each prompt, with its end, and -1 behind it.

    ahead(tokens, columns int32 [b k], cache) -> (logits, cache): the model, one token on.
    adjusted(log_p [b k, v], texts [b k, s], lengths [b k], seen) -> log_p, as the user wants it.
    state: a `bmft.generate.State` behind the prompts. tokens: to be made, at most. ends: ids behind
    which a text is over.
    """
    lengths = jnp.repeat(state.lengths, beams)

    def step(now):
        logp = jax.nn.log_softmax(now.logits)
        flat = jax.tree.map(_flat, now.going)
        logp = adjusted(logp, flat["texts"], lengths + now.made, flat["seen"])
        found = candidates(now.going["sums"], logp, 1 + len(ends))
        last = now.made + 1 == tokens
        found["over"] = jnp.isin(found["token"], jnp.array(ends, jnp.int32)) | last
        column = state.lengths + now.made
        going, parents = _go_on(now.going, found, column)
        over = _finish(now, found, column, length_penalty)
        best = going["sums"][:, 0] / (now.made + 1.0) ** length_penalty
        cache = jax.tree.map(lambda leaf: _of_cache(leaf, parents), now.cache)
        token = jnp.take_along_axis(_flat(going["texts"]), (lengths + now.made)[:, None], 1)[:, 0]
        logits, cache = ahead(token, lengths + now.made, cache)
        still = now.open & (best > over["scores"].min(-1))
        return Beams(now.made + 1, going, over, still, logits, cache)

    first = _first(state, beams)
    end = jax.lax.while_loop(lambda now: (now.made < tokens) & now.open.any(), step, first)
    columns = state.lengths[:, None] + jnp.arange(tokens)
    return jnp.take_along_axis(end.over["texts"][:, 0], columns, 1)


def _first(state, beams):
    """All beams alike, of which one counts."""
    rows, columns = len(state.lengths), jax.tree.leaves(state.cache)[0].shape[2]
    texts = jnp.full((rows, columns), -1, jnp.int32) if state.text is None else state.text
    sums = jnp.full((rows, beams), NEVER).at[:, 0].set(0.0)
    texts = jnp.repeat(texts[:, None], beams, 1)
    seen = None if state.seen is None else jnp.repeat(state.seen[:, None], beams, 1)
    return Beams(
        made=jnp.int32(0),
        going={"sums": sums, "texts": texts, "seen": seen},
        over={"scores": jnp.full((rows, beams), NEVER), "texts": jnp.full_like(texts, -1)},
        open=jnp.ones(rows, bool),
        logits=jnp.repeat(state.scores, beams, 0),
        cache=jax.tree.map(lambda leaf: jnp.repeat(leaf, beams, 1), state.cache),
    )


def candidates(sums, log_p, each):
    """{"sums", "parent", "token"} [b, c] of the best c = each k texts that are one token longer,
    best first: so many that k of them go on, though each beam be over in `each` - 1 ways."""
    rows, beams = sums.shape
    sums = sums[..., None] + log_p.reshape(rows, beams, -1)
    best, at = jax.lax.top_k(sums.reshape(rows, -1), each * beams)
    parent, token = jnp.divmod(at, sums.shape[-1])
    return {"sums": best, "parent": parent, "token": token}


def _go_on(going, found, column):
    """(the best k candidates that are not over, whose beams they come from [b, k])."""
    beams = going["sums"].shape[1]
    sums, at = jax.lax.top_k(jnp.where(found["over"], NEVER, found["sums"]), beams)
    parents, tokens = (_pick(found[name], at) for name in ("parent", "token"))
    seen = going["seen"]
    if seen is not None:
        seen = _pick(seen, parents) | (jnp.arange(seen.shape[-1]) == tokens[..., None])
    return {"sums": sums, "texts": _longer(going, parents, tokens, column), "seen": seen}, parents


def _finish(now, found, column, length_penalty):
    """`Beams.over`, with those of the best k candidates that are over now."""
    beams = now.going["sums"].shape[1]
    some = {name: values[:, :beams] for name, values in found.items()}
    scores = some["sums"] / (now.made + 1.0) ** length_penalty
    scores = jnp.where(some["over"] & now.open[:, None], scores, NEVER)
    texts = _longer(now.going, some["parent"], some["token"], column)
    scores, at = jax.lax.top_k(jnp.concatenate([now.over["scores"], scores], 1), beams)
    return {"scores": scores, "texts": _pick(jnp.concatenate([now.over["texts"], texts], 1), at)}


def _longer(going, parents, tokens, column):
    """The texts of the parents, with tokens [b, k] in a column [b]."""
    texts = _pick(going["texts"], parents)
    here = jnp.arange(texts.shape[-1]) == column[:, None, None]
    return jnp.where(here, tokens[..., None], texts)


def _pick(values, at):
    """values [b, k, ...] at [b, c]."""
    return jax.vmap(lambda row, where: row[where])(values, at)


def _flat(values):
    """[b, k, ...] as [b k, ...]."""
    return values.reshape(-1, *values.shape[2:])


def _of_cache(leaf, parents):
    """A leaf of the cache [l, b k, ...], whose beams come from these parents [b, k]."""
    rows = leaf.reshape(len(leaf), *parents.shape, *leaf.shape[2:])
    return jax.vmap(_pick, (0, None))(rows, parents).reshape(leaf.shape)
