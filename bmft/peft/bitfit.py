"""BitFit (Ben Zaken et al. 2022, arXiv:2106.10199): only bias vectors move.

`all` is every bias: of dense layers, of convolutions, of norms, of the pooler. `query_intermediate`
is the paper's smaller set: the biases of the queries and of the MLP's first layer, with which the
authors' code always moves the pooler's. The task's head moves as everywhere.

The convolutions of most nets have no bias: what they have is the shift of the BatchNorm behind
them. `norm` says what moves of norms: shift, scale_and_shift, none.
"""

from bmft import tree
from bmft.errors import Mistake, nearest
from bmft.peft import Method

VARIANTS = {
    "all": ("**/bias",),
    "query_intermediate": ("layers/attention/query/bias", "layers/mlp/up/bias", "pooler/bias"),
}
NORMS = {"shift": ("bias",), "scale_and_shift": ("scale", "bias"), "none": ()}


def make(model, *, variant: str = "all", norm: str = "shift"):
    """norm: counts for `all` alone. Raises Mistake for a model without such biases."""
    for key, value, known in (("variant", variant, VARIANTS), ("norm", norm, NORMS)):
        if value not in known:
            raise Mistake(f"peft.bitfit.{key}: no {value!r}; {nearest(value, known)}")
    if variant != "all" and norm != "shift":
        raise Mistake(f"peft.bitfit.norm={norm!r} is for variant 'all'; {variant!r} moves no norm")
    norms = model.names.modules("norm")

    def moves_base(path):
        module, _, leaf = path.rpartition("/")
        if variant == "all" and module in norms:
            return leaf in NORMS[norm]
        return any(tree.match(pattern, path) for pattern in VARIANTS[variant])

    paths = [leaf.path for leaf in model.names.leaves if not tree.under(leaf.path, model.heads)]
    if not any(moves_base(path) for path in paths):
        said = f"variant={variant!r}" if variant != "all" else f"norm={norm!r}"
        raise Mistake(f"peft.bitfit.{said}: {model.name} has no such biases, but for its head's")

    def moves(path):
        collection, _, base = path.partition("/")
        return "bitfit" if collection == "params" and moves_base(base) else None

    return Method("bitfit", moves)
