"""The mathematics of LoRA on a convolution: an update that is a convolution of the base's geometry.

    update(x) = B * (scale (A * x))       A has the base's kernel size, strides, padding, dilation
    W + update = W + sum over r of A_r scale_r B_r                                       and groups

so that for every geometry the update is a change of the base's kernel, and merges exactly. Shapes:
g groups of the base, i = in / g channels that a group reads, r the rank, a multiple of g.

    A [kh, kw, i, r]    in g groups, as the base     B [1, 1, r / g, out]    in g groups

Hugging Face PEFT's A reads all channels even so, [kh, kw, in, r]: such an update is computed as
PEFT does, but it is no change of a grouped kernel. Where g is 1, the two are the same.
"""

import math

import jax
import jax.numpy as jnp

from bmft import layers, peft
from bmft.errors import Mistake
from bmft.peft import portable


def shapes(conv, channels, rank, grouped, method):
    """Shapes of A and B for a `layers.Conv` on so many channels; grouped: A is in groups, too;
    method: whose rank it is.

    Raises Mistake for a rank that is no multiple of the groups.
    """
    if rank % conv.groups:
        fits = -(-rank // conv.groups) * conv.groups
        where = peft.path_of(conv)
        raise Mistake(
            f"peft.{method}.rank: {where} is a convolution in {conv.groups} groups, and rank "
            f"{rank} is no multiple of them; try {fits}, here alone by rank_pattern"
        )
    read = channels // conv.groups if grouped else channels
    return (*conv.kernel, read, rank), (1, 1, rank // conv.groups, conv.features)


def update(x, a, b, scale, conv):
    """[b, y, x, out] of x [b, y, x, in], with the geometry of the `layers.Conv` conv."""
    h = layers.convolve(x, _spread(a, x.shape[-1]), conv, groups=1) * scale
    groups = h.shape[-1] // b.shape[-2]
    h_byxgr = h.reshape(*h.shape[:-1], groups, -1)
    b_rgo = b.reshape(b.shape[-2], groups, -1)
    return jnp.einsum("byxgr,rgo->byxgo", h_byxgr, b_rgo).reshape(*h.shape[:-1], -1)


def _spread(a, channels):
    """A [kh, kw, i, r] in groups as one of all channels [kh, kw, in, r], zeros between the groups.

    XLA's gradient of a convolution in groups is far slower on a CPU than that of a plain one (64
    maps of 16 x 16 x 32, 8 groups, two cores: 0.76 s, 0.0095 s); r is small.
    """
    groups = channels // a.shape[-2]
    own = jnp.kron(jnp.eye(groups), jnp.ones((a.shape[-2], a.shape[-1] // groups)))
    return jnp.tile(a, (1, 1, groups, 1)) * own if groups > 1 else a


def change(a, b, scale):
    """The update as a change of the base's kernel [kh, kw, i, out]; any axes in front."""
    groups = a.shape[-1] // b.shape[-2]
    a = a * scale[..., None, None, None, :]
    # [kh, kw, i, r] -> [kh, kw, g, i, r / g]; [1, 1, r / g, out] -> [1, 1, g, r / g, out / g]
    a, b = (m.reshape(*m.shape[:-1], groups, -1).swapaxes(-3, -2) for m in (a, b))
    change = (a @ b).swapaxes(-3, -2)  # [kh, kw, i, g, out / g]
    return change.reshape(*change.shape[:-2], -1)


def start(key, shape, dtype):
    """Uniform in ±1/sqrt(fan-in) for a kernel [..., out]: torch's kaiming with a = sqrt 5."""
    bound = math.prod(shape[:-1]) ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def geometry(model):
    """{module path: layers.Conv}: a model's convolutions; nothing is computed."""
    found = {}

    def look(module, call, *args):
        if isinstance(module, layers.Conv):
            found[peft.path_of(module)] = module
        return call(*args)

    portable.expected((peft.Method("geometry", lambda path: None, look),), model)
    return found
