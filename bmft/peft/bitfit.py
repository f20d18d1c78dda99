"""BitFit (Ben Zaken et al. 2022, arXiv:2106.10199): only bias vectors move.

`all` is every bias: of dense layers, of norms, of the pooler. `query_intermediate` is the paper's
smaller set: the biases of the queries and of the MLP's first layer, with which the authors' code
always moves the pooler's. The task's head moves as everywhere.
"""

from bmft import tree
from bmft.errors import Mistake, nearest
from bmft.peft import Method

VARIANTS = {
    "all": ("**/bias",),
    "query_intermediate": ("layers/attention/query/bias", "layers/mlp/up/bias", "pooler/bias"),
}


def make(model, *, variant: str = "all"):
    if variant not in VARIANTS:
        raise Mistake(f"peft.bitfit.variant: no {variant!r}; {nearest(variant, VARIANTS)}")
    patterns = ["params/" + pattern for pattern in VARIANTS[variant]]

    def moves(path):
        return "bitfit" if any(tree.match(pattern, path) for pattern in patterns) else None

    return Method("bitfit", moves)
