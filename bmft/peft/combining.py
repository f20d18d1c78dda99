"""Weighted combinations of LoRA adapters of one base, as PEFT's add_weighted_adapter defines them.

    cat      [A_1 | A_2 | ...], [B_1; B_2; ...]: the ranks stacked; exact
    svd      the sum of the updates, cut to a rank by its singular values; exact if that is enough
    linear   sum of sqrt(w s) A, sum of sqrt(w s) B: a sum of factors is no sum of products, so
             this is wrong by the cross terms A_i B_j, by how much is measured

and between the weighting and the sum, on the factors (as linear) or, with `_svd`, on the updates:

    magnitude_prune   the largest |numbers| of each tensor alone, a share `density` of them
    ties              these, then a sign is elected for each number, and the mean taken over those
                      that have it (Yadav et al. 2023, arXiv:2306.01708)
    dare_linear       numbers dropped at random, the rest over `density` (Yu et al. 2023,
                      arXiv:2311.03099)
    dare_ties         so dropped, then elected

A module that some of the adapters are not on is the combination of the others'. What the adapters
train whole, the head first of all, PEFT refuses to combine; here it is the weighted mean.
"""

from typing import Any, NamedTuple

import numpy as np

from bmft.errors import Mistake, nearest
from bmft.peft import matching, updates
from bmft.peft.updates import Factors

PRUNING = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
ON_FACTORS = ("linear", *PRUNING)  # these need equal ranks
ON_UPDATES = ("svd", *(f"{how}_svd" for how in PRUNING))
HOWS = (*ON_FACTORS, "cat", *ON_UPDATES)
SIGNS = ("total", "frequency")
HEADS = ("mean", "first")


class Combined(NamedTuple):
    adapter: Any  # bmft.peft.files.Adapter
    # {(module path, layer): (Frobenius norm of the error, that of the exact weighted sum)}
    errors: dict
    error: float  # relative, over all modules


def combine(
    adapters,
    weights,
    model,
    *,
    how="svd",
    rank=None,
    density=None,
    sign="total",
    seed=0,
    heads="mean",
):
    """`Combined` of {name: files.Adapter} by weights [one each].

    how: of HOWS. rank: of those that end in svd; None: the largest there is. density: the share
    that pruning keeps, in (0, 1]. sign: elected by the sum of the numbers, or of their signs.
    seed: of what dare drops. heads: `mean`, by the weights, of whatever the adapters train whole;
    `first`: the first adapter's.

    The error is that of the update against sum_i w_i s_i A_i B_i. Raises Mistake where ranks, what
    is trained whole, or labels do not fit together.
    """
    _check(adapters, weights, how, rank, density, sign, heads)
    base = how.removesuffix("_svd")
    merge = _merger(base, density, sign, np.random.default_rng(seed)) if base != "cat" else None
    parts = [updates.of(adapter, name) for name, adapter in adapters.items()]
    factors, errors = {}, {}
    for place in dict.fromkeys(place for part in parts for place in part):
        have = [i for i, part in enumerate(parts) if place in part]
        mine, shares = [parts[i][place] for i in have], [weights[i] for i in have]
        exact = updates.total(mine, shares)
        _check_shapes(place, mine, how)
        if how == "cat":
            found = exact
        elif how == "svd":  # in factors, which is the same and never builds the matrix
            found = updates.shortened(exact, _rank(rank, parts))
        elif how in ON_UPDATES:
            matrix = merge([updates.dense(part) for part in mine], shares)
            found = updates.truncated(matrix, _rank(rank, parts))
        else:
            found = _of_factors(mine, shares, merge)
        factors[place], errors[place] = found, updates.error(found, exact)
    whole, rows, labels = _trained_whole(adapters, weights, heads)
    name, first = next((name, one.groups["lora"]) for name, one in adapters.items())
    _check_together(name, first, factors, whole, rows, model.names)
    group = {key: first[key] for key in ("bias", "modules_to_save") if key in first}
    group["grouped"] = all(a.groups["lora"].get("grouped", True) for a in adapters.values())
    made = updates.adapter(factors, model, whole, labels=labels, rows=rows, **group)
    return Combined(made, errors, updates.relative(errors))


def _rank(rank, parts):
    return rank or max(one.rank for part in parts for one in part.values())


def _of_factors(parts, weights, merge):
    """Both factors merged by the roots of weight and scale; a negative sign goes with A's."""
    full = np.array([weight * part.scale for part, weight in zip(parts, weights, strict=True)])
    root = np.sqrt(abs(full))
    a = merge([part.a for part in parts], np.where(full >= 0, root, -root))
    b = merge([part.b for part in parts], root)
    return Factors(a.astype(np.float32), b.astype(np.float32))


# --- on one tensor of each adapter -----------------------------------------------------------


def _merger(how, density, sign, rng):
    """(tensors, weights) -> tensor."""

    def prune(tensor):
        if density is None or density == 1:
            return tensor
        return _drop(tensor, density, rng) if how.startswith("dare") else _trim(tensor, density)

    def merge(tensors, weights):
        if how in PRUNING:
            tensors = [prune(tensor) for tensor in tensors]
        stacked = np.stack(tensors).astype(np.float64)
        weighted = stacked * np.reshape(weights, (-1, *[1] * (stacked.ndim - 1)))
        if not how.endswith("ties"):
            return weighted.sum(0)
        elected = _elect(stacked, sign)
        return (weighted * elected).sum(0) / np.maximum(elected.sum(0), 1)

    return merge


def _trim(tensor, density):
    """The largest numbers, the others 0."""
    flat = tensor.ravel()
    kept = np.argsort(-abs(flat), kind="stable")[: int(density * flat.size)]
    trimmed = np.zeros_like(flat)
    trimmed[kept] = flat[kept]
    return trimmed.reshape(tensor.shape)


def _drop(tensor, density, rng):
    """Each number with probability `density`, over it, so that the mean stays."""
    return np.where(rng.random(tensor.shape) < density, tensor / density, 0)


def _elect(stacked, sign):
    """Which numbers [n, ...] have the sign that wins; a tie is won by +."""
    signs = np.sign(stacked)
    winner = np.where((stacked if sign == "total" else signs).sum(0) >= 0, 1, -1)
    return signs == winner


# --- what is trained whole -------------------------------------------------------------------


def _trained_whole(adapters, weights, heads):
    """(leaves, rows, labels) of what stands in the adapters beside the method's own leaves."""
    names, values = list(adapters), list(adapters.values())
    found = [
        {path: leaf for path, leaf in one.leaves.items() if not path.startswith("peft")}
        for one in values
    ]
    if heads == "first" or len(values) == 1:
        return found[0], values[0].rows, values[0].labels
    hint = "heads=first takes those of the first adapter"
    for name, other, leaves in zip(names[1:], values[1:], found[1:], strict=True):
        if other.labels != values[0].labels:
            labels = f"{_said(values[0].labels)} and {_said(other.labels)}"
            raise Mistake(f"{names[0]} and {name} have different labels, {labels}; {hint}")
        for path in sorted({*found[0], *leaves}):
            if path not in found[0] or path not in leaves:
                one, without = (names[0], name) if path in found[0] else (name, names[0])
                raise Mistake(f"{one} trains {path} whole, and {without} does not; {hint}")
            shapes = found[0][path].shape, leaves[path].shape
            if shapes[0] != shapes[1] or not _same_rows(values[0], other, path):
                raise Mistake(f"{path} of {names[0]} and of {name} differ in shape or layers")
    if min(weights) < 0 or sum(weights) <= 0:
        raise Mistake(f"what is trained whole has no mean by a weight below 0; {hint}")
    shares = np.array(weights) / sum(weights)
    mean = {
        path: np.tensordot(shares, np.stack([leaves[path] for leaves in found]), 1)
        for path in found[0]
    }
    mean = {path: leaf.astype(np.float32) for path, leaf in mean.items()}
    return mean, values[0].rows, values[0].labels


def _same_rows(one, other, path):
    return np.array_equal(one.rows.get(path, True), other.rows.get(path, True))


def _said(labels):
    return "none" if labels is None else "/".join(labels)


# --- checks ----------------------------------------------------------------------------------


def _check(adapters, weights, how, rank, density, sign, heads):
    for key, value, known in (("how", how, HOWS), ("sign", sign, SIGNS), ("heads", heads, HEADS)):
        if value not in known:
            raise Mistake(f"{key}: no {value!r}; {nearest(value, known)}")
    if not adapters or len(adapters) != len(weights):
        raise Mistake(f"{len(adapters)} adapters but {len(weights)} weights")
    if not np.isfinite(weights).all() or not any(weights):
        raise Mistake(f"weights {', '.join(map(str, weights))}: they must be numbers, not all 0")
    if rank is not None and (rank < 1 or how not in ON_UPDATES):
        raise Mistake(
            f"rank {rank}: it must be 1 or more"
            if rank < 1
            else f"rank: {how} has its rank from the adapters; {' and '.join(ON_UPDATES)} take one"
        )
    pruned = how.removesuffix("_svd") in PRUNING
    if pruned and (density is None or not 0 < density <= 1):
        raise Mistake(f"{how} keeps a share of the numbers: density must be in (0, 1]")
    if density is not None and not pruned:
        raise Mistake(f"density: {how} drops nothing; {', '.join(PRUNING)} do")


def _check_together(name, group, factors, whole, rows, table):
    """What is trained whole, of adapter `name`, stands beside the updates of all of them."""
    biased = {leaf.path for leaf in table.leaves} if group.get("bias") == "lora_only" else ()

    def holds(path, layer):
        mask = rows.get(f"params/{path}")
        return f"params/{path}" in whole and (mask is None or mask[matching.at(layer)])

    for path, layer in factors:
        if holds(f"{path}/kernel", layer):
            raise Mistake(f"{name} trains {path} whole, and another has LoRA there")
        if f"{path}/bias" in biased and not holds(f"{path}/bias", layer):
            raise Mistake(
                f"{name} trains the biases of its targets (bias=lora_only), and {path} is a target "
                "of another: its bias is in no adapter"
            )


def _check_shapes(place, parts, how):
    where, ranks = place[0], sorted({part.rank for part in parts})
    if len({(part.a.shape[:2], part.b.shape[-1]) for part in parts}) > 1:
        raise Mistake(f"{where}: updates of different shapes; are the adapters of one base?")
    if how in ON_FACTORS and len(ranks) > 1:
        found = " and ".join(map(str, ranks))
        raise Mistake(f"{where} has ranks {found}: {how} needs equal ones; cat and svd do not")
