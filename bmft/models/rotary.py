"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864), with the scalings of transformers.

A pair of numbers of a head turns by position x frequency. k numbers of a head make k/2 pairs, the
first half with the second, as transformers' files are laid out:

    frequency_i = theta ** (-2 i / k)

    linear     all frequencies over `factor`
    llama3     long waves over `factor`, short ones as they are, between them a mixture
    yarn       likewise by dimension (Peng et al. 2023, arXiv:2309.00071), and longer cos and sin
    dynamic    theta grows with texts beyond max_position_embeddings; up to there it is the default

Shapes: b rows of a batch, t tokens of a row, h heads, k width of a head, n ways of turning.
"""

import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from bmft.errors import Mistake, nearest


class Rotary(nn.Module):
    """cos and sin float32 [n, b, t, k/2] of positions [b, t]; a module, so that methods which put
    columns before the tokens can move the positions."""

    ways: tuple  # n of what `ways` gives: (frequencies, factor)

    @nn.compact
    def __call__(self, positions):
        frequencies_nk = jnp.asarray([frequencies for frequencies, _ in self.ways], jnp.float32)
        factors = jnp.asarray([factor for _, factor in self.ways], jnp.float32)
        angles_nbtk = positions[None, ..., None] * frequencies_nk[:, None, None]
        factors = factors[:, None, None, None]
        return jnp.cos(angles_nbtk) * factors, jnp.sin(angles_nbtk) * factors


def turn(x_bthk, cos_btk, sin_btk):
    """x with its pairs turned, in float32; returns x's dtype. The tables are k/2 wide."""
    one, other = jnp.split(x_bthk.astype(jnp.float32), 2, -1)
    cos, sin = cos_btk[:, :, None], sin_btk[:, :, None]
    turned = jnp.concatenate([one * cos - other * sin, other * cos + one * sin], -1)
    return turned.astype(x_bthk.dtype)


def way(parameters, head_dim, positions):
    """(frequencies, a tuple of k/2 numbers; factor of cos and sin) of transformers'
    rope_parameters; positions: max_position_embeddings. Raises Mistake for another scaling."""
    kind, theta = parameters.get("rope_type", "default"), parameters["rope_theta"]
    if kind not in KINDS:
        raise Mistake(f"config.json: rope_type {kind!r} is not computed; {nearest(kind, KINDS)}")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        part = parameters["partial_rotary_factor"]
        raise Mistake(f"config.json: partial_rotary_factor is {part}; whole heads are turned here")
    try:
        plain = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
        frequencies, factor = KINDS[kind](plain.astype(np.float32), parameters, positions)
    except (KeyError, TypeError) as error:
        raise Mistake(f"config.json: rope_type {kind!r} lacks a number: {error}") from None
    return tuple(float(f) for f in frequencies), float(factor)


def _default(plain, parameters, positions):
    return plain, 1.0


def _linear(plain, parameters, positions):
    return plain / np.float32(parameters["factor"]), 1.0


def _llama3(plain, parameters, positions):
    old, factor = parameters["original_max_position_embeddings"], parameters["factor"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    waves = 2 * math.pi / plain
    share = np.clip((old / waves - low) / (high - low), 0, 1)  # 0: a long wave, 1: a short one
    return (1 - share) * plain / factor + share * plain, 1.0


def _yarn(plain, parameters, positions):
    old = parameters["original_max_position_embeddings"]
    theta, k = parameters["rope_theta"], 2 * len(plain)
    factor = parameters["factor"] or positions / old

    def dimension(turns):
        """Where a wave turns so often over the old length."""
        return k * math.log(old / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = dimension(parameters.get("beta_fast") or 32)
    high = dimension(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, k - 1)
    width = high - low or 0.001
    slow = np.clip((np.arange(len(plain), dtype=np.float32) - low) / width, 0, 1)
    return plain / factor * slow + plain * (1 - slow), _lengthening(parameters, factor)


def _lengthening(parameters, factor):
    """yarn's factor of cos and sin."""
    given = parameters.get("attention_factor")
    if given is not None:
        return given
    one, other = parameters.get("mscale"), parameters.get("mscale_all_dim")

    def by(scale):
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    return by(one) / by(other) if one and other else by(1.0)


KINDS = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "dynamic": _default,
}
