"""Updates of weights in LoRA's form, module by module: out of an adapter, and into a new one.

    Delta W = scale A B        A [g, n, k], B [g, k, o]

of one module in one layer: g groups of a convolution (1 elsewhere), n numbers that an output reads
(in, or kh kw in / g), k = rank / g, o = out / g. Products and norms are taken in float64, through
QR of the factors where there are factors: an update is never built to be measured.
"""

from typing import Any, NamedTuple

import numpy as np

from bmft import peft, tree
from bmft.errors import Mistake
from bmft.peft import files, matching, portable

FACTORS = ("lora_a", "lora_b")


class Factors(NamedTuple):
    """The update of one module in one layer."""

    a: Any  # [g, n, k]
    b: Any  # [g, k, o]
    scale: float = 1.0

    @property
    def rank(self):
        return self.a.shape[0] * self.a.shape[-1]


def of(adapter, called):
    """{(module path, layer): Factors} of a `files.Adapter` that is LoRA and nothing else.

    called: the adapter's name, for the Mistake that refuses another.
    """
    own = [path for path in adapter.leaves if path.startswith("peft")]
    if adapter.names != ("lora",) or any(path.rpartition("/")[2] not in FACTORS for path in own):
        methods = " + ".join(adapter.names)
        rows = " with token rows" if adapter.names == ("lora",) else ""
        raise Mistake(f"{called} is no plain LoRA but {methods}{rows}: `convert` makes one of it")
    constants, found = tree.flatten(peft.constants(adapter.methods)), {}
    for path, mask in adapter.methods[0].files.sites.items():
        a, b = (adapter.leaves[f"peft/{path}/{name}"] for name in FACTORS)
        scale = np.asarray(constants[f"peft_const/{path}/lora_scale"])
        for layer in matching.layers(mask):
            at = matching.at(layer)
            found[path, layer] = of_leaves(a[at], b[at], scale[at])
    return found


def of_leaves(a, b, scale):
    """Factors of one layer's leaves, without the ranks that are there for other layers alone."""
    groups, rank = a.shape[-1] // b.shape[-2], int((scale > 0).sum())
    k = rank // groups
    a_gnk = a[..., :rank].reshape(-1, groups, k).swapaxes(0, 1)
    b_gko = b[..., :k, :].reshape(k, groups, -1).swapaxes(0, 1)
    return Factors(a_gnk, b_gko, float(scale[0]))


# --- mathematics -----------------------------------------------------------------------------


def total(parts, weights):
    """Factors of sum_i weights_i Delta W_i, exact: ranks stacked, scale 1."""
    pairs = list(zip(parts, weights, strict=True))
    a = np.concatenate([part.a * (weight * part.scale) for part, weight in pairs], -1)
    return Factors(a, np.concatenate([part.b for part in parts], 1))


def norm(part):
    """Frobenius norm of an update."""
    of_a, of_b = _triangles(part)
    return float(abs(part.scale) * np.linalg.norm(of_a @ of_b.swapaxes(1, 2)))


def error(found, exact):
    """(Frobenius norm of found - exact, that of exact)."""
    return norm(total([found, exact], [1.0, -1.0])), norm(exact)


def dense(part):
    """Delta W as a matrix [g, n, o], float64."""
    return part.scale * np.matmul(part.a, part.b, dtype=np.float64)


def shortened(part, rank):
    """The nearest update of a rank by Frobenius norm (Eckart-Young), A orthonormal, scale 1."""
    (q_a, r_a), (q_b, r_b) = (np.linalg.qr(m.astype(np.float64)) for m in _sides(part))
    u, s, v = np.linalg.svd(part.scale * (r_a @ r_b.swapaxes(1, 2)), full_matrices=False)
    k = _share(rank, u)
    a, b = (q_a @ u)[..., :k], s[:, :k, None] * (v @ q_b.swapaxes(1, 2))[:, :k]
    return Factors(a.astype(np.float32), b.astype(np.float32))


def truncated(matrix_gno, rank):
    """The nearest Factors of a rank to a matrix [g, n, o]; scale 1, one side orthonormal.

    By the eigenvectors of the smaller Gram matrix, in float64: 768 x 3072 numbers take 0.24 s, an
    SVD 1.4 s (one thread); it is as good, as no small singular value is asked for by itself.
    """
    if matrix_gno.shape[1] > matrix_gno.shape[2]:
        other = truncated(matrix_gno.swapaxes(1, 2), rank)
        return Factors(other.b.swapaxes(1, 2), other.a.swapaxes(1, 2))
    matrix_gno = matrix_gno.astype(np.float64)
    u = np.linalg.eigh(matrix_gno @ matrix_gno.swapaxes(1, 2))[1][..., ::-1]
    u = u[..., : _share(rank, u)]
    return Factors(u.astype(np.float32), (u.swapaxes(1, 2) @ matrix_gno).astype(np.float32))


def _share(rank, u_gnk):
    """The rank of each group: rounded up, and no more than there is."""
    return min(-(-rank // len(u_gnk)), u_gnk.shape[-1])


def _sides(part):
    return part.a, part.b.swapaxes(1, 2)


def _triangles(part):
    return [np.linalg.qr(m.astype(np.float64), mode="r") for m in _sides(part)]


def relative(errors):
    """The relative error over all modules of {module: (norm of the error, norm of the exact)}."""
    wrong, exact = np.sqrt(np.square(list(errors.values())).sum(0))
    return float(wrong / exact) if exact else float(wrong)


# --- into an adapter -------------------------------------------------------------------------


def adapter(factors, model, whole, *, labels=None, rows=None, **group):
    """The `files.Adapter` of {(module path, layer): Factors}: LoRA of alpha = rank, so that the
    scale is 1; scales are put into A.

    whole: {"params/...": leaf} that move beside, the head among them; rows: those of which only
    some layers are meant. group: arguments of LoRA's make that say so (bias, modules_to_save).
    """
    table, sites = model.names, {}
    for path, layer in factors:
        mask = sites.setdefault(path, np.zeros(() if layer is None else table.layers, bool))
        mask[matching.at(layer)] = True
    ranks = {place: part.rank for place, part in factors.items()}
    usual = max(sorted(set(ranks.values())), key=list(ranks.values()).count)
    pattern = _pattern(table, {place: rank for place, rank in ranks.items() if rank != usual})
    group |= {
        "rank": usual,
        "alpha": float(usual),
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "targets": matching.exact_names(table, sites),
    }
    methods = peft.build(model, ("lora",), {"lora": group})
    leaves = dict(whole)
    for path, leaf in portable.expected(methods, model)[1].items():
        if path.rpartition("/")[2] in FACTORS:
            leaves[path] = np.zeros(leaf.shape, np.float32)
    for (path, layer), part in factors.items():
        k, of_a, of_b = part.a.shape[-1], *(leaves[f"peft/{path}/{name}"] for name in FACTORS)
        of_a, of_b = of_a[matching.at(layer)], of_b[matching.at(layer)]
        a = (part.a * np.float32(part.scale)).swapaxes(0, 1)
        of_a[..., : part.rank] = a.reshape(*of_a.shape[:-1], part.rank)
        of_b[..., :k, :] = part.b.swapaxes(0, 1).reshape(*of_b.shape[:-2], k, -1)
    return files.Adapter(methods, ("lora",), {"lora": group}, leaves, rows or {}, labels, None, {})


def _pattern(table, ranks):
    """rank_pattern of {(module path, layer): rank}."""
    found = []
    for (path, layer), rank in ranks.items():
        mask = np.zeros(() if layer is None else table.layers, bool)
        mask[matching.at(layer)] = True
        found += [f"{name}={rank}" for name in matching.exact_names(table, {path: mask})]
    return tuple(found)


def write(folder, adapter, model, *, base, fingerprint):
    """The directory of a `files.Adapter`; base: what its base is called."""
    flat = adapter.leaves | tree.flatten(peft.constants(adapter.methods))
    moving, frozen = tree.split(tree.unflatten(flat), adapter.leaves.__contains__)
    about = {"base": base, "fingerprint": fingerprint, "labels": adapter.labels}
    files.write(folder, adapter.methods, adapter.groups, model, moving, frozen, **about)
