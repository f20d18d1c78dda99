"""Visual prompt tuning (Jia et al. 2022, arXiv:2203.12119): learnt tokens between the class token
and the patches of a vision transformer; the head moves as everywhere.

    deep      layer i reads [class, P_i, patches]; what it gives in the place of P_i is dropped
    shallow   the first layer reads [class, P, patches], and what it gives there goes on

Prompts come in behind the position table, uniform in ±sqrt(6 / (3 p p + d)) for patches of p x p
pixels, as in the authors' code (github.com/KMnP/vpt). Dropout is of the prompts, by image; the
authors take 0.1 or none for deep prompts and none for shallow ones. A model that reads the mean of
its patches takes it without the prompts (theirs takes it over both).

It does not start near the base: random tokens take their share of the attention in every layer. On
tiny random models ten of them among 25 patches changed the logits by a quarter to two thirds of the
largest, so nothing is declared.

Shapes: l layers, n tokens, d width.

    peft/layers/prompt [l, n, d]    deep        peft/embeddings/prompt [n, d]    shallow
"""

import math

import jax
import jax.numpy as jnp

from bmft import peft
from bmft.errors import Mistake


def make(model, *, tokens: int = 10, deep: bool = True, dropout: float = 0.1):
    """tokens: prompts a layer. Raises Mistake for a model that is no vision transformer."""
    if "embeddings/patch" not in model.names.modules("conv"):
        raise Mistake(
            f"peft.visual_prompt: {model.name} takes no images cut into patches; it is for ViT"
        )
    if tokens < 1:
        raise Mistake(f"peft.visual_prompt.tokens is {tokens}; it must be 1 or more")
    if not 0 <= dropout < 1:
        raise Mistake(f"peft.visual_prompt.dropout is {dropout}; it must be in [0, 1)")
    bound = math.sqrt(6 / (3 * model.config.patch**2 + model.config.width))

    def prompts(module, x):
        """[b, n, d] for x [b, t, d], in its dtype."""
        p_nd = peft.leaf(module, "prompt", _uniform(bound), (tokens, x.shape[-1]))
        p_bnd = jnp.broadcast_to(p_nd, (len(x), *p_nd.shape))
        return peft.dropout(module, p_bnd, dropout).astype(x.dtype)

    def without(x):
        return jnp.concatenate([x[:, :1], x[:, 1 + tokens :]], 1)

    def insert(p, x):
        return jnp.concatenate([x[:, :1], p, x[:, 1:]], 1)

    def hook(module, call, *args):
        path = peft.path_of(module)
        if path == "embeddings":  # a scanned layer gives as many tokens as it gets: room for them
            x = call(*args)
            room = jnp.zeros((len(x), tokens, x.shape[-1]), x.dtype)
            return insert(room if deep else prompts(module, x), x)
        if path == "layers" and deep:
            x, *rest = args
            return call(insert(prompts(module, x), without(x)), *rest)
        if path == "readout":
            return call(without(*args))
        return call(*args)

    def moves(path):
        return "visual_prompt" if path.startswith("peft/") and path.endswith("/prompt") else None

    return peft.Method("visual_prompt", moves, hook, axes={"prompt": "d"}, identity=math.inf)


def _uniform(bound):
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)
