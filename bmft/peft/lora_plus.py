"""LoRA+ (Hayou et al. 2024, arXiv:2402.12354): LoRA whose B learns faster than its A.

    rate(A) = learning_rate        rate(B) = ratio learning_rate

`peft.lora_plus.learning_rate` is A's, and `peft.lora_plus.weight_decay` is of both. As in PEFT's
create_loraplus_optimizer, base leaves that move with the factors have A's rate if they are
matrices and B's if they are vectors (`bias`, `modules_to_save`); the task's head has its own. The
leaves are LoRA's (bmft/peft/lora.py), and so are the files, which are read as LoRA's.

Not on embeddings: PEFT trains their factors, whose starts are the other way round, at a rate that
is no multiple of A's.
"""

from bmft.errors import Mistake
from bmft.peft import lora, low_rank, token_rows

VECTORS = ("bias", "scale")  # of base leaves


def make(
    model,
    *,
    ratio: float = 16.0,
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
    """ratio: of B's rate to A's, the paper's λ; the others are LoRA's."""
    if ratio < 1:
        raise Mistake(f"peft.lora_plus.ratio is {ratio}; it must be 1 or more")
    plan = low_rank.plan(
        model,
        "lora_plus",
        ("dense", "conv"),
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

    def moves(path):
        label, leaf = plan.moves(path), path.rpartition("/")[2]
        return f"{label}*{ratio:g}" if label and leaf in ("lora_b", *VECTORS) else label

    method = lora.of(plan, grouped)._replace(moves=moves)
    return token_rows.beside(method, model, trainable_token_indices)
