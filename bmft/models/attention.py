"""Attention of causal models, which keeps for the gradient what goes in and comes out, and no array
of scores: these are computed again, a block of queries at a time.

Shapes: b rows of a batch, t tokens of a row, s keys, h heads, g heads of keys and values, r heads
that share one of these (h = g r), k width of a head, q queries of a block. The formulas of the
gradient: Dao et al. 2022 (arXiv:2205.14135), section 3 and appendix B.

Measured on smollm2 with LoRA (4 x 512 tokens, float32, two cores): a step that kept the weights of
each layer spent a third of its time here, and half of that on the arrays it kept.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 64  # queries that meet their keys together
BLOCKS = 8  # of such, at most: each is compiled by itself


class Rules(NamedTuple):
    """What does not depend on the numbers."""

    cap: float | None  # scores lie softly between -cap and cap
    ahead: bool  # a token may see keys behind its own column


def attend(q_bthk, k_bsgk, v_bsgk, mask_b1ts, *, scale, cap=None, dropout=None, ahead=True):
    """[b, t, h k]: each head's mean of the values, by the softmax over the keys that are seen.

    cap: scores lie softly between -cap and cap. dropout: of the weights, a function; None: there is
    none. ahead: a token may see keys behind its own column, as those of a cache. If not, the last t
    keys are the tokens', and `BLOCK` queries at a time, or a quarter of a long text, meet only the
    keys up to theirs.
    """
    b, t, h, k = q_bthk.shape
    s, g = k_bsgk.shape[1:3]
    # Heads in front, so that each product is of matrices as they lie: forward and back in half the
    # time of a product of [b, t, h, k] on a CPU.
    q_btgrk = (q_bthk * scale).astype(q_bthk.dtype).reshape(b, t, g, h // g, k)
    q_bgrtk = q_btgrk.transpose(0, 2, 3, 1, 4)
    k_bgsk, v_bgsk = (array.swapaxes(1, 2) for array in (k_bsgk, v_bsgk))
    kept = dropout(jnp.ones((b, g, h // g, t, s), q_bthk.dtype)) if dropout else None
    means = _means(Rules(cap, ahead), q_bgrtk, k_bgsk, v_bgsk, mask_b1ts, kept)
    return means.transpose(0, 3, 1, 2, 4).reshape(b, t, h * k)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _means(rules, q_bgrtk, k_bgsk, v_bgsk, mask_b1ts, kept):
    """float [b, g, r, t, k]: means by the softmax of the scores, times `kept` [b, g, r, t, s]."""
    return _forward(rules, q_bgrtk, k_bgsk, v_bgsk, mask_b1ts, kept)[0]


def _forward(rules, q, k, v, mask, kept):
    means, highest, totals = [], [], []
    for block in _blocks(rules, q, k):
        scores = _masked(_scores(rules, q, k, block), mask, block)
        top = scores.max(-1, keepdims=True)
        powers = jnp.exp(scores - top)
        total = powers.sum(-1, keepdims=True)
        mean = _product("bgqs,bgsk->bgqk", _dropped(powers, kept, block), v[:, :, : block.keys])
        means.append(mean.reshape(*top.shape[:-1], -1) / total)
        highest.append(top)
        totals.append(total)
    means, highest, totals = (jnp.concatenate(a, 3) for a in (means, highest, totals))
    means = means.astype(v.dtype)
    return means, (q, k, v, mask, kept, means, highest, totals)


def _backward(rules, saved, d_means):
    q, k, v, mask, kept, means, highest, totals = saved
    d_q, d_k, d_v = [], *(jnp.zeros(array.shape, jnp.float32) for array in (k, v))
    # Of each query: the sum over keys of a weight by its gradient.
    turn = (d_means.astype(jnp.float32) * means).sum(-1, keepdims=True)
    for block in _blocks(rules, q, k):
        rows, keys = np.s_[:, :, :, block.queries], np.s_[:, :, : block.keys]
        raw = _scores(rules, q, k, block)
        weights = jnp.exp(_masked(raw, mask, block) - highest[rows]) / totals[rows]
        d_mean = _flat(d_means[rows])
        d_weights = _product("bgqk,bgsk->bgqs", d_mean, v[keys]).reshape(weights.shape)
        if kept is not None:
            d_weights *= kept[rows][..., : block.keys]
        d_scores = weights * (d_weights - turn[rows])
        if rules.cap is not None:
            d_scores *= 1 - jnp.square(raw / rules.cap)
        d_scores = _flat(d_scores).astype(q.dtype)
        dropped = _dropped(weights, kept, block).astype(v.dtype)
        d_q.append(_product("bgqs,bgsk->bgqk", d_scores, k[keys]).reshape(q[rows].shape))
        d_k = d_k.at[keys].add(_product("bgqs,bgqk->bgsk", d_scores, _flat(q[rows])))
        d_v = d_v.at[keys].add(_product("bgqs,bgqk->bgsk", dropped, d_mean))
    d_q = jnp.concatenate(d_q, 3).astype(q.dtype)
    none = None if kept is None else jnp.zeros_like(kept)  # it is drawn, and has no gradient
    return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype), None, none


_means.defvjp(_forward, _backward)


class _Block(NamedTuple):
    queries: slice
    keys: Any  # so many, the first ones, are seen by any of these queries


def _blocks(rules, q_bgrtk, k_bgsk):
    t, s = q_bgrtk.shape[3], k_bgsk.shape[2]
    width = BLOCK if t <= BLOCKS * BLOCK else -(-t // 4)
    width = t if rules.ahead else width
    for start in range(0, t, width):
        end = min(start + width, t)
        yield _Block(slice(start, end), s if rules.ahead else s - t + end)


def _scores(rules, q_bgrtk, k_bgsk, block):
    """float32 [b, g, r, q, s], of all keys of the block."""
    queries = q_bgrtk[:, :, :, block.queries]
    scores = _product("bgqk,bgsk->bgqs", _flat(queries), k_bgsk[:, :, : block.keys])
    return capped(scores.reshape(*queries.shape[:-1], block.keys), rules.cap)


def _masked(scores, mask_b1ts, block):
    seen = mask_b1ts[:, :, None, block.queries, : block.keys]
    return jnp.where(seen, scores, jnp.finfo(jnp.float32).min)


def _dropped(weights, kept, block):
    """weights [b, g, r, q, s] times what is kept of them, [b, g, r q, s]."""
    if kept is not None:
        weights = weights * kept[:, :, :, block.queries, : block.keys]
    return _flat(weights)


def _flat(array):
    """[b, g, r q, ...] of an array [b, g, r, q, ...]."""
    return array.reshape(*array.shape[:2], -1, array.shape[-1])


def _product(how, one, other):
    """float32, of factors in the type of the second."""
    return jnp.einsum(how, one.astype(other.dtype), other, preferred_element_type=jnp.float32)


def capped(x, cap):
    return x if cap is None else cap * jnp.tanh(x / cap)
