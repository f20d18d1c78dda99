"""PiSSA (Meng et al. 2024, arXiv:2404.02948): LoRA that starts from the principal part of W.

    W = U S V        A0 = U_r sqrt(S_r / scale)        B0 = sqrt(S_r / scale) V_r
    y = x (W - scale A0 B0) + update(x)                A and B start as A0 and B0

of dense layers, with the largest r singular values. The paper puts W - scale A0 B0 in the place of
W. We do not rewrite the base: A0 and B0 are kept as constants beside it, made on the loaded
weights, and

    y = base(x) + update(x) - scale x A0 B0

is the same function. So frozen weights stay as they were to the bit, the base keeps its
fingerprint, and one base serves many adapters; the price is a second update of rank r. With
dropout, A and B read the dropped x, and A0 and B0 x itself, as PEFT's residual base does.

In PEFT's files it is the LoRA of twice the rank that PEFT converts its own to, [A | A0] and
[B ; -B0], on the plain base; so it is read back as `lora`.

    peft/<module>/lora_a [l, in, r]           peft/<module>/lora_b [l, r, out]
    peft_const/<module>/pissa_a [l, in, r]    peft_const/<module>/pissa_b [l, r, out]
    peft_const/<module>/lora_scale [l, r]
"""

import functools

import jax.numpy as jnp
import numpy as np

from bmft import layers, peft
from bmft.errors import Mistake
from bmft.peft import low_rank, low_rank_files, token_rows
from bmft.peft.files import Files


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
        "pissa",
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
        out, path = call(*args), peft.path_of(module)
        if path not in plan.sites:
            return out
        kernel, scale = layers.kernel_of(module), low_rank.scale_of(module)
        if len(scale) > min(kernel.shape):
            raise Mistake(
                f"peft.pissa.rank: {path} has {min(kernel.shape)} singular values, "
                f"and rank {len(scale)} asks for more"
            )
        start = functools.cache(lambda: principal(kernel, scale))
        a0 = peft.constant(module, "pissa_a", lambda: start()[0])
        b0 = peft.constant(module, "pissa_b", lambda: start()[1])
        a = peft.leaf(module, "lora_a", lambda *_: a0, a0.shape)
        b = peft.leaf(module, "lora_b", lambda *_: b0, b0.shape)
        x = args[0].astype(jnp.float32)
        dropped = low_rank.read(module, x, plan.dropout)
        update = low_rank.update(module, dropped, a, b, scale)
        update -= low_rank.update(module, x, a0, b0, scale)
        return out + update.astype(out.dtype)

    method = peft.Method(
        "pissa",
        plan.moves,
        hook,
        constants=plan.constants(),
        axes=low_rank.AXES | {"pissa_a": "i.", "pissa_b": ".o"},
        rows=plan.rows,
        merge=lambda params, added: low_rank.merge(plan, params, added, _changed),
        identity=1e-5,  # two equal products of the size of base(x), which may be compiled apart
        files=_files(plan),
    )
    return token_rows.beside(method, model, trainable_token_indices)


def principal(kernel, scale):
    """(A0, B0) of a kernel [in, out]; zeros where the scale [r] is."""
    r = len(scale)
    u, s, v = jnp.linalg.svd(kernel.astype(jnp.float32), full_matrices=False)
    root = jnp.sqrt(jnp.where(scale > 0, s[:r] / jnp.where(scale > 0, scale, 1), 0))
    return u[:, :r] * root, root[:, None] * v[:r]


def _changed(path, weight, leaves):
    scale = leaves["lora_scale"]
    start = low_rank.change(leaves["pissa_a"], leaves["pissa_b"], scale)
    return weight + (low_rank.change(leaves["lora_a"], leaves["lora_b"], scale) - start)


# --- in PEFT's files -------------------------------------------------------------------------


def _files(plan):
    """As LoRA of twice the rank, of the same scale."""
    of_alpha = 2**0.5 if plan.settings["use_rslora"] else 2

    def times(factor, values):
        return {key: low_rank.whole_number(factor * value) for key, value in values.items()}

    doubled = plan._replace(
        ranks={path: 2 * ranks for path, ranks in plan.ranks.items()},
        settings=plan.settings
        | times(2, {"r": plan.settings["r"]})
        | times(of_alpha, {"lora_alpha": plan.settings["lora_alpha"]})
        | {
            "rank_pattern": times(2, plan.settings["rank_pattern"]),
            "alpha_pattern": times(of_alpha, plan.settings["alpha_pattern"]),
        },
    )
    encode_lora, _ = low_rank_files.codec(doubled)

    def encode(path, layer, leaves):
        # Ranks that this layer does not have are zeros, between the two halves.
        own = np.flatnonzero(leaves["lora_scale"])
        halves = {
            "lora_a": [leaves["lora_a"][:, own], leaves["pissa_a"][:, own]],
            "lora_b": [leaves["lora_b"][own], -leaves["pissa_b"][own]],
            "lora_scale": [leaves["lora_scale"][own]] * 2,
        }
        axes = {"lora_a": 1, "lora_b": 0, "lora_scale": 0}
        both = {name: np.concatenate(two, axes[name]) for name, two in halves.items()}
        return encode_lora(path, layer, both)

    return Files(doubled.settings, plan.sites, plan.modules_to_save, encode, kinds=("dense",))
