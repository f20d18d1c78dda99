"""What LoHa and LoKr share, of LyCORIS (Yeh et al. 2023, arXiv:2309.14859): where they are put, how
their scales and ranks differ by module, their two dropouts, and their fields in PEFT's files.

    y = base(x) + x change alpha / rank         change [in, out], in each method's own form

    rank_dropout     in training, outputs of the update are left out, the same ones for all tokens
    module_dropout   in training, the whole update of a module is left out
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bmft import names, peft
from bmft.errors import Mistake
from bmft.peft import matching, patterns
from bmft.peft.files import Files


class Placed(NamedTuple):
    """Where a method is. Values of a module are [l], or [] outside the stack."""

    sites: dict  # {module path: bool}
    ranks: dict  # {module path: int}, 0 in layers that are no target
    scales: dict  # {module path: alpha / rank}, 0 there, so that it all stays one array
    saved: dict  # {leaf path: bool} of modules trained whole
    modules_to_save: tuple
    settings: dict  # the fields of PEFT's configuration


def place(
    method,
    table,
    heads,
    *,
    rank,
    alpha,
    targets,
    rank_pattern,
    alpha_pattern,
    layers_to_transform,
    modules_to_save,
    rank_dropout,
    module_dropout,
    kinds,
):
    """The `Placed` of a method of the name `method`; the rest is as its make has it."""
    key = f"peft.{method}"
    for name, number in (("rank", rank), ("alpha", alpha)):
        if number <= 0:
            raise Mistake(f"{key}.{name} is {number}; it must be above 0")
    for name, share in (("rank_dropout", rank_dropout), ("module_dropout", module_dropout)):
        if not 0 <= share < 1:
            raise Mistake(f"{key}.{name} is {share}; it must be in [0, 1)")
    ranks_by = patterns.read(f"{key}.rank_pattern", rank_pattern, int)
    alphas_by = patterns.read(f"{key}.alpha_pattern", alpha_pattern, float)
    saved = names.saved(table, modules_to_save)
    whole = {path.rpartition("/")[0]: mask for path, mask in saved.items()}
    about = {"head": heads, "layers": layers_to_transform, "without": whole}
    sites = names.target(table, targets, kinds=kinds, **about)
    ranks = patterns.values(f"{key}.rank_pattern", table, sites, ranks_by, rank)
    alphas = patterns.values(f"{key}.alpha_pattern", table, sites, alphas_by, float(alpha))
    spell = matching.spell_pattern
    settings = {
        "peft_type": method.upper(),
        "r": rank,
        "alpha": int(alpha) if alpha == int(alpha) else alpha,
        "rank_dropout": rank_dropout,
        "module_dropout": module_dropout,
        "rank_pattern": spell(table, sites, ranks_by, ranks, rank, "rank_pattern"),
        "alpha_pattern": spell(table, sites, alphas_by, alphas, alpha, "alpha_pattern"),
        "init_weights": True,
    }
    scales = {path: alphas[path] / np.maximum(r, 1) for path, r in ranks.items()}
    return Placed(sites, ranks, scales, saved, modules_to_save, settings)


def method(name, placed, leaves, axes, hook, merge, encode, decode, identity=0.0):
    """The `Method`; leaves: the names of those it adds; axes: bmft.peft.Method's. Its constants, of
    each module:

    peft_const/<module>/<name>_scale [l]        peft_const/<module>/<name>_rank [l]
    """

    def moves(path):
        collection, _, base = path.partition("/")
        own = collection == "peft" and base.rpartition("/")[2] in leaves
        return name if own or (collection == "params" and base in placed.saved) else None

    def rows(path):
        base = path.partition("/")[2]
        module = base.rpartition("/")[0]
        mask = placed.sites[module] if path.startswith("peft/") else placed.saved[base]
        return None if mask.all() else mask

    constants = {
        path: {
            f"{name}_scale": placed.scales[path].astype(np.float32),
            f"{name}_rank": placed.ranks[path].astype(np.float32),
        }
        for path in placed.sites
    }
    files = Files(placed.settings, placed.sites, placed.modules_to_save, encode, decode)
    about = {"axes": axes, "merge": merge, "identity": identity, "files": files}
    return peft.Method(name, moves, hook, constants, rows=rows, **about)


def uniform(fan_in):
    """Uniform in ±1/sqrt(fan_in), a number or an array []: torch's kaiming with a = sqrt 5."""

    def init(key, shape, dtype):
        bound = jnp.maximum(fan_in, 1) ** -0.5
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def dropped(module, update, rank_dropout, module_dropout, scaled):
    """An update [..., out] in training; scaled: what stays of it makes up for what is left out."""
    if not module.has_rng("peft"):
        return update
    if rank_dropout:
        of_outputs = update.shape[-1:]
        keep = jax.random.bernoulli(module.make_rng("peft"), 1 - rank_dropout, of_outputs)
        # PEFT divides by the share kept; where nothing is, it computes 0 / 0.
        share = jnp.maximum(keep.mean(), 1 / keep.size) if scaled else 1.0
        update = update * (keep / share)
    if module_dropout:
        update = update * jax.random.bernoulli(module.make_rng("peft"), 1 - module_dropout)
    return update


# --- in PEFT's files -------------------------------------------------------------------------

FIELDS = {
    "r": ((int,), 8),
    "alpha": ((int, float), 8),
    "rank_dropout": ((int, float), 0.0),
    "module_dropout": ((int, float), 0.0),
    "rank_pattern": ((dict,), {}),
    "alpha_pattern": ((dict,), {}),
}
IGNORED = ("init_weights",)  # of no matter afterwards


def arguments(fields, table, kinds):
    """`make`'s arguments from FIELDS of PEFT's configuration, with whole names."""
    sites, heads = matching.targets(table, fields, kinds), matching.head_modules(table)
    saved = matching.saved(table, fields["modules_to_save"])
    rest = {path: mask for path, mask in saved.items() if path not in heads}
    return {
        "rank": fields["r"],
        "alpha": float(fields["alpha"]),
        "rank_dropout": float(fields["rank_dropout"]),
        "module_dropout": float(fields["module_dropout"]),
        "targets": matching.exact_names(table, sites),
        **{
            field: patterns.entries(table, sites, fields[field], fields[of], field)
            for field, of in (("rank_pattern", "r"), ("alpha_pattern", "alpha"))
        },
        "modules_to_save": matching.exact_names(table, rest),
    }
