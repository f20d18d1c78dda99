"""LoRA (Hu et al. 2021, arXiv:2106.09685) on dense layers, embeddings and convolutions, with PEFT's
options.

    y = base(x) + B(A(dropout(x))) alpha / rank        rsLoRA: alpha / sqrt(rank), arXiv:2312.03732

A is uniform in ±1/sqrt(fan-in) (torch's kaiming with a = sqrt 5, which jax's he_uniform is not), B
is zero; on an embedding A is zero and B standard normal: the adapted model starts as the base.
Dropout meets the update's input only, and not that of an embedding. A, B and the update are
float32, whatever the base computes in.

Shapes: l layers of a stack, r the largest rank of a module over its layers (bmft.peft.low_rank).

    peft/<module>/lora_a [l, in, r]    peft/<module>/lora_b [l, r, out]
    peft/<module>/lora_a [v, r]        peft/<module>/lora_b [r, d]              an embedding [v, d]
    peft/<module>/lora_a [kh, kw, in / groups, r]    peft/<module>/lora_b [1, 1, r / groups, out]
    peft_const/<module>/lora_scale [l, r]
"""

from bmft import peft
from bmft.errors import Mistake
from bmft.peft import convolution, low_rank, low_rank_files, token_rows
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
    grouped: bool = True,
):
    """rank_pattern, alpha_pattern: `pattern=value` by unstacked module name, first match wins.

    targets: names, `all-linear`, `all-conv`. grouped: A of a convolution in groups is in groups,
    too, so that it merges; False: it reads all channels, as PEFT's does, and PEFT's are read.
    trainable_token_indices: ids of tokens whose rows of the word embedding move, too.
    """
    plan = low_rank.plan(
        model,
        "lora",
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
    return token_rows.beside(of(plan, grouped), model, trainable_token_indices)


def of(plan, grouped):
    """The method of a `low_rank.Plan`."""

    def hook(module, call, *args):
        out = call(*args)
        if peft.path_of(module) not in plan.sites:
            return out
        factors = low_rank.factors(module, plan, args[0], out, grouped)
        x = low_rank.read(module, args[0], plan.dropout)
        return out + low_rank.update(module, x, *factors).astype(out.dtype)

    on_conv = plan.on("conv")

    def changed(path, weight, leaves):
        a, b, scale = leaves["lora_a"], leaves["lora_b"], leaves["lora_scale"]
        if a.shape[-2] != weight.shape[-2]:
            raise Mistake(
                f"method {plan.method!r} cannot be merged into plain weights: {path} is a "
                f"convolution in groups of {weight.shape[-2]} channels, and its A reads "
                f"{a.shape[-2]}, as PEFT's"
            )
        change = convolution.change if path in on_conv else low_rank.change
        return weight + change(a, b, scale)

    return peft.Method(
        plan.method,
        plan.moves,
        hook,
        constants=plan.constants(),
        axes=low_rank.AXES,
        rows=plan.rows,
        merge=lambda params, added: low_rank.merge(plan, params, added, changed),
        files=Files(
            plan.settings,
            plan.sites,
            plan.modules_to_save,
            *low_rank_files.codec(plan),
            kinds=low_rank.KINDS,
            own=f"CONV_{plan.method}".upper() if on_conv else None,
            expressible=lambda model: _in_peft(model, on_conv, grouped),
        ),
    )


def _in_peft(model, on_conv, grouped):
    """Can PEFT compute it? It leaves a dilation out, and has no A in groups."""
    found = convolution.geometry(model) if on_conv else {}
    return not any(
        found[path].dilation != (1, 1) or (grouped and found[path].groups > 1) for path in on_conv
    )


LAYOUT = Layout(
    peft_type="LORA",
    fields=low_rank_files.FIELDS,
    ignored=low_rank_files.IGNORED,
    defaults=low_rank_files.DEFAULTS,
    arguments=lambda fields, table: low_rank_files.arguments(fields, table) | {"grouped": False},
)
