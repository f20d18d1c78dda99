"""What LoRA and the methods made of it share: the modules, the ranks and scales, the factors.

    update(x) = (x A) scale B        A [in, r]   B [r, out]

A `Plan` says on which modules, with what rank and scale in each layer; what a method's hook does
with the update is its own. A, B and the update are float32, whatever the base computes in.

    dense layer    x A is a product; dropout meets x
    embedding      A [v, r]: x are ids, and x A the rows of A that they name; nothing is dropped
    convolution    bmft/peft/convolution.py; dropout meets x

Shapes: l layers of a stack, r the largest rank of a module over its layers. The scale is [l, r]:
zero past a layer's own rank, and in layers that are no target, so that it all stays one array.
How it stands in PEFT's files: bmft/peft/low_rank_files.py.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bmft import layers, names, peft, tree
from bmft.errors import Mistake, nearest
from bmft.peft import convolution, matching, patterns

BIASES = ("none", "all", "lora_only")
KINDS = ("dense", "conv", "embed", "tied")
FACTORS = ("lora_a", "lora_b")
AXES = {"lora_a": "i.", "lora_b": ".o"}  # see bmft.peft.Method
WORDS = "embeddings/word"


class Plan(NamedTuple):
    """Where the factors are, and what else moves with them."""

    method: str  # the method's name, and its label
    table: names.Names
    sites: dict  # {module path: bool [l], or [] outside the stack}
    ranks: dict  # {module path: int [l] or []}, 0 where it is not on
    scales: dict  # {module path: float [l] or []}, likewise
    saved: dict  # {leaf path: bool [l] or []}: modules trained whole
    settings: dict  # the fields of PEFT's configuration
    modules_to_save: tuple  # as the user wrote them

    @property
    def whole(self):
        """{module path: bool [l] or []}: modules trained whole."""
        return {path.rpartition("/")[0]: mask for path, mask in self.saved.items()}

    @property
    def dropout(self):
        return self.settings["lora_dropout"]

    def on(self, kind):
        """Those of the modules that are of a kind."""
        return [path for path in self.table.modules(kind) if path in self.sites]

    def constants(self):
        """{module path: {lora_scale: [l, r]}}, of bmft.peft.Method."""
        return {
            path: {"lora_scale": _padded(self.ranks[path], self.scales[path])}
            for path in self.sites
        }

    def moves(self, path, *more):
        """The label of a leaf, or None. more: names of leaves of its own beside the factors."""
        kind, _, base = path.partition("/")
        module, _, leaf = base.rpartition("/")
        if kind == "peft":
            return self.method if leaf in (*FACTORS, *more) else None
        bias = self.settings["bias"]
        biased = leaf == "bias" and (
            bias == "all" or (bias == "lora_only" and module in self.sites)
        )
        return self.method if kind == "params" and (biased or base in self.saved) else None

    def rows(self, path):
        """bool [l] of a moving leaf of the stack: which layers move; None is all."""
        module, _, leaf = path.partition("/")[2].rpartition("/")
        bias = self.settings["bias"]
        if path.startswith("peft/"):
            return None if self.sites[module].all() else self.sites[module]
        if leaf == "bias" and bias == "all":
            return None
        own = self.sites.get(module) if leaf == "bias" and bias == "lora_only" else None
        masks = [mask for mask in (self.whole.get(module), own) if mask is not None]
        return None if not masks or np.any(masks, axis=0).all() else np.any(masks, axis=0)


def plan(
    model,
    method,
    kinds=KINDS,
    *,
    rank,
    alpha,
    dropout,
    targets,
    rslora,
    rank_pattern,
    alpha_pattern,
    layers_to_transform,
    bias,
    modules_to_save,
):
    """The `Plan` of a method's arguments. kinds: of modules it can be on.

    Raises Mistake for a value out of range, a pattern or target that matches nothing, and a module
    of another kind.
    """
    _check(method, rank, alpha, dropout, bias)
    table = model.names
    ranks_by = patterns.read(f"peft.{method}.rank_pattern", rank_pattern, int)
    alphas_by = patterns.read(f"peft.{method}.alpha_pattern", alpha_pattern, float)
    saved = names.saved(table, modules_to_save)
    whole = {path.rpartition("/")[0]: mask for path, mask in saved.items()}
    about = {"head": model.heads, "layers": layers_to_transform, "without": whole}
    sites = names.target(table, targets, kinds=KINDS, **about)
    _check_kinds(method, table, sites, kinds)
    ranks = patterns.values(f"peft.{method}.rank_pattern", table, sites, ranks_by, rank)
    named = f"peft.{method}.alpha_pattern"
    alphas = patterns.values(named, table, sites, alphas_by, float(alpha))
    scales = {path: alphas[path] / np.maximum(root(r, rslora), 1) for path, r in ranks.items()}
    spelled = {
        f"{key}_pattern": matching.spell_pattern(table, sites, by, values, default, key)
        for key, by, values, default in (
            ("rank", ranks_by, ranks, rank),
            ("alpha", alphas_by, alphas, alpha),
        )
    }
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": whole_number(alpha),
        "lora_dropout": dropout,
        "use_rslora": rslora,
        "use_dora": False,
        "bias": bias,
        **spelled,
        "init_lora_weights": True,
        # What PEFT calls it that kernels lie [in, out], as GPT-2's do.
        "fan_in_fan_out": any(_lies_as_ours(table, path) for path in sites),
    }
    return Plan(method, table, sites, ranks, scales, saved, settings, tuple(modules_to_save))


def _check_kinds(method, table, sites, kinds):
    """Refuses a method on a module of a kind that it is not for."""
    for kind in set(KINDS).difference(kinds):
        others = [path for path in table.modules(kind) if path in sites]
        if others:
            only = " and ".join(f"{matching.KINDS[known]}s" for known in kinds)
            raise Mistake(
                f"peft.{method}.targets: {others[0]} is a module of another kind: {method} is for "
                f"{only}; lora is for convolutions and embeddings, too"
            )


def _lies_as_ours(table, path):
    """Is a module's kernel [in, out] in transformers' files?"""
    kernels = [leaf for leaf in table.leaves if leaf.path == f"{path}/kernel"]
    return any((leaf.written_layout or leaf.layout) == "same" for leaf in kernels)


def root(ranks, rslora):
    """What alpha is divided by."""
    return ranks**0.5 if rslora else ranks


def whole_number(value):
    """7.0 as 7, as PEFT's configurations have it."""
    return int(value) if value == int(value) else value


# --- in a module -----------------------------------------------------------------------------


def factors(module, plan, x, out, grouped=True):
    """(A, B, scale) at a module that reads x and gives out. Both starts are PEFT's: B is zero, and
    on an embedding A is, with B standard normal."""
    rank = plan.ranks[peft.path_of(module)].max()
    zeros, of_b = jax.nn.initializers.zeros, (rank, out.shape[-1])
    if isinstance(module, layers.Embed):
        a = peft.leaf(module, "lora_a", zeros, (module.rows, rank))
        b = peft.leaf(module, "lora_b", jax.nn.initializers.normal(1.0), of_b)
    else:
        of_a = (x.shape[-1], rank)
        if isinstance(module, layers.Conv):
            of_a, of_b = convolution.shapes(module, x.shape[-1], rank, grouped, plan.method)
        a = peft.leaf(module, "lora_a", convolution.start, of_a)
        b = peft.leaf(module, "lora_b", zeros, of_b)
    return a, b, scale_of(module)


def scale_of(module):
    return module.get_variable("peft_const", "lora_scale")


def read(module, x, dropout):
    """What the update reads of a module's input: float32 with dropout, or ids as they are."""
    if isinstance(module, layers.Embed):
        return x
    return peft.dropout(module, x.astype(jnp.float32), dropout)


def update(module, x, a, b, scale):
    """The update of what `read` gives, float32."""
    if isinstance(module, layers.Conv):
        return convolution.update(x, a, b, scale, module)
    if isinstance(module, layers.Embed):
        return (a[x] * scale) @ b * module.scale
    return (x @ a * scale) @ b


def merge(plan, params, added, changed):
    """params with the weights of the plan's modules changed; any axes of layers in front.

    changed(module path, weight, {name: leaf of the method}) -> weight.
    """
    flat, embeds = tree.flatten(params), plan.on("embed")
    if plan.table.is_tied and {plan.table.head_module, WORDS} & set(plan.sites):
        raise Mistake(
            f"method {plan.method!r} cannot be merged into plain weights: the head and the word "
            "embedding are one table, and only one of the two is changed"
        )
    leaves = tree.flatten(added["peft"]) | tree.flatten(added["peft_const"])
    for path in plan.sites:
        weight = f"{path}/{'embedding' if path in embeds else 'kernel'}"
        own = {p.rpartition("/")[2]: x for p, x in leaves.items() if p.rpartition("/")[0] == path}
        flat[weight] = changed(path, flat[weight], own)
    return tree.unflatten(flat)


def change(a, b, scale):
    """(A scale) B: the update as a change of the weights, [l, in, out]."""
    return (a * scale[..., None, :]) @ b


# --- arguments -------------------------------------------------------------------------------


def _check(method, rank, alpha, dropout, bias):
    if rank < 1:
        raise Mistake(f"peft.{method}.rank is {rank}; it must be 1 or more")
    if alpha <= 0:
        raise Mistake(f"peft.{method}.alpha is {alpha}; it must be above 0")
    if not 0 <= dropout < 1:
        raise Mistake(f"peft.{method}.dropout is {dropout}; it must be in [0, 1)")
    if bias not in BIASES:
        raise Mistake(f"peft.{method}.bias: no {bias!r}; {nearest(bias, BIASES)}")


def _padded(ranks, scales):
    """[l, r] of ranks [l] and scales [l]; [r] of scalars."""
    return np.where(np.arange(ranks.max()) < ranks[..., None], scales[..., None], 0).astype(
        np.float32
    )
