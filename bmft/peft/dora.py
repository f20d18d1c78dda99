"""DoRA (Liu et al. 2024, arXiv:2402.09353): LoRA with the length of each column of W apart.

    y = base(x) + (m / n - 1) x W + (m / n) update(x)        n = |W + A scale B|, over the input

of dense layers: m [out] moves, and n is what it is, but no gradient goes through it. The base's
bias is not scaled. update, A, B and the scale are LoRA's (bmft/peft/lora.py), and m starts as |W|:
the adapted model starts as the base. With dropout, x W and the update read the same dropped x, as
in PEFT, at the price of one more product; base(x) reads x.

n is found without W + A scale B, from products of A (A' is A scale) with W and with itself:

    n_o^2 = |W_o|^2 + 2 B_o . (A'^T W)_o + B_o . (A'^T A') B_o

    peft/<module>/lora_a [l, in, r]       peft/<module>/lora_b [l, r, out]
    peft/<module>/lora_magnitude [l, out]
    peft_const/<module>/lora_scale [l, r]
"""

import jax
import jax.numpy as jnp

from bmft import layers, peft
from bmft.peft import low_rank, low_rank_files, token_rows
from bmft.peft.files import Files, Layout


def make(
    model,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    targets: tuple[str, ...] = ("query", "value"),
    rslora: bool = False,
    rank_pattern: tuple[str, ...] = (),
    alpha_pattern: tuple[str, ...] = (),
    layers_to_transform: tuple[int, ...] | None = None,
    bias: str = "none",
    modules_to_save: tuple[str, ...] = (),
    trainable_token_indices: tuple[int, ...] = (),
):
    """The arguments are LoRA's."""
    plan = low_rank.plan(
        model,
        "dora",
        ("dense",),
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        targets=targets,
        rslora=rslora,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        layers_to_transform=layers_to_transform,
        bias=bias,
        modules_to_save=modules_to_save,
    )

    def hook(module, call, *args):
        out = call(*args)
        if peft.path_of(module) not in plan.sites:
            return out
        a, b, scale = low_rank.factors(module, plan, args[0], out)
        stored = layers.stored_kernel(module)
        kernel = layers.as_array(stored)
        norm = jax.lax.stop_gradient(_norm(kernel, a, b, scale))
        m = peft.leaf(module, "lora_magnitude", lambda *_: _length(kernel), norm.shape)
        # Where a layer is no target, its scale is zero, and m says nothing.
        factor = jnp.where(scale[0] > 0, m / norm, 1)
        x = low_rank.read(module, args[0], plan.dropout)
        update = low_rank.update(module, x, a, b * factor, scale)
        x = x.astype(module.dtype)
        if plan.dropout and module.has_rng("peft"):
            straight = layers.product(x, stored, module.dtype)
        else:
            straight = out - module.get_variable("params", "bias") if module.use_bias else out
        stretched = _stretched(straight.astype(jnp.float32), factor, x, stored)
        return out + (stretched + update).astype(out.dtype)

    encode, decode = low_rank_files.codec(plan)

    def encode_all(path, layer, leaves):
        magnitude = {"lora_magnitude_vector": leaves["lora_magnitude"]}
        return encode(path, layer, leaves) | magnitude

    def decode_all(path, layer, tensors):
        magnitude = {"lora_magnitude": tensors["lora_magnitude_vector"]}
        return decode(path, layer, tensors) | magnitude

    method = peft.Method(
        "dora",
        lambda path: plan.moves(path, "lora_magnitude"),
        hook,
        constants=plan.constants(),
        axes=low_rank.AXES | {"lora_magnitude": "o"},
        rows=plan.rows,
        undecayed=("lora_magnitude",),  # decay would shrink W itself
        merge=lambda params, added: low_rank.merge(plan, params, added, _changed),
        identity=1e-5,  # n is summed anew in each program, and m / n is 1 to rounding
        files=Files(
            plan.settings | {"use_dora": True},
            plan.sites,
            plan.modules_to_save,
            encode_all,
            decode_all,
            kinds=("dense",),
        ),
    )
    return token_rows.beside(method, model, trainable_token_indices)


@jax.custom_vjp
def _stretched(straight, factor, x, kernel):
    """(factor - 1) straight [..., out], where straight is x W.

    The gradient of the factor needs straight again, and computes it from x and W, which are kept
    for other gradients anyway (W as it is stored): to keep straight, too, took more memory than
    LoRA in all.
    """
    return (factor - 1) * straight


def _stretched_forward(straight, factor, x, kernel):
    return _stretched(straight, factor, x, kernel), (factor, x, kernel)


def _stretched_backward(kept, grad):
    factor, x, kernel = kept
    again = layers.product(x, kernel, x.dtype).astype(jnp.float32)
    of_factor = (grad * again).sum(tuple(range(grad.ndim - 1)))
    return (factor - 1) * grad, of_factor, None, None  # the gradient of x is that of straight


_stretched.defvjp(_stretched_forward, _stretched_backward)


def _norm(kernel, a, b, scale):
    """|W + A scale B| [out] of W [in, out], without that sum."""
    kernel, a = kernel.astype(jnp.float32), a * scale
    b_or = b.T
    mixed_or = 2 * (kernel.T @ a) + b_or @ (a.T @ a)
    return jnp.sqrt(_above_zero((kernel * kernel).sum(0) + (b_or * mixed_or).sum(1)))


def _length(weight):
    """|W| [..., out], which is _norm where B is zero. Not by _norm itself: XLA's CPU compiler (of
    jax 0.10.2) gives NaN for a small product with what it knows to be zeros."""
    weight = weight.astype(jnp.float32)
    return jnp.sqrt(_above_zero((weight * weight).sum(-2)))


def _above_zero(square):
    """A column of zeros would divide by zero."""
    return jnp.maximum(square, jnp.finfo(jnp.float32).tiny)


def _changed(path, weight, leaves):
    """(m / n) (W + A scale B), of layers that are targets."""
    scale = leaves["lora_scale"]
    sum_io = weight + low_rank.change(leaves["lora_a"], leaves["lora_b"], scale)
    factor = (leaves["lora_magnitude"] / _length(sum_io))[..., None, :]
    return jnp.where(scale[..., :1, None] > 0, factor * sum_io, weight)


LAYOUT = Layout(
    peft_type="LORA",
    fields=low_rank_files.FIELDS | {"use_dora": ((bool,), False)},
    ignored=low_rank_files.IGNORED,
    defaults=low_rank_files.DEFAULTS,
    arguments=low_rank_files.arguments,
    takes=lambda fields: fields.get("use_dora") is True,
)
