"""AdaLoRA (Zhang et al. 2023, arXiv:2303.10512), as PEFT computes it: LoRA whose ranks are dealt
out among the modules while it trains.

    y = base(x) + B(E * A(dropout(x))) alpha / (init_rank + 1e-5)

A and B are normal with a deviation of 0.02, E is zero: the adapted model starts as the base. E are
the singular values of the update, and where one is zero its triplet (a column of A, a row of B)
counts for nothing. The budget of triplets falls with the third power of the steps, from init_rank
a module to target_rank on average. What a triplet is worth is its E's importance and the means of
A's and B's: |value x gradient|, smoothed, times its smoothed deviation. Every delta_t steps the
least are set to zero, of all modules together; from the step where the budget meets its target,
the same ones after each step. A penalty keeps A and B near orthogonal: the Frobenius norm of
A'A - 1 and BB' - 1 (the paper: its square).

A step's number t counts the steps done, so that the last is the run's length and the budget is met
at the end even with tfinal 0 (PEFT leaves the numbers to its caller). Of equals, just as many fall
as must, over all modules evenly (PEFT: all of them). Files hold the triplets whose E is not zero.

Shapes: l layers of a stack, r the initial rank. float32, whatever the base computes in.

    peft/<module>/adalora_a [l, in, r] or [kh, kw, in, r]
    peft/<module>/adalora_e [l, r]        peft/<module>/adalora_b [l, r, out]
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bmft import layers, names, peft, tree
from bmft.errors import Mistake, nearest
from bmft.peft import beside, convolution, matching
from bmft.peft.files import Files, Layout
from bmft.peft.portable import PREFIX

LEAVES = A, E, B = "adalora_a", "adalora_e", "adalora_b"
KINDS = ("dense", "conv")


def make(
    model,
    *,
    target_rank: int = 8,
    init_rank: int = 12,
    tinit: int = 0,
    tfinal: int = 0,
    delta_t: int = 1,
    beta1: float = 0.85,
    beta2: float = 0.85,
    orthogonality: float = 0.5,
    alpha: float = 8.0,
    dropout: float = 0.0,
    targets: tuple[str, ...] = ("query", "value"),
    layers_to_transform: tuple[int, ...] | None = None,
    bias: str = "none",
    modules_to_save: tuple[str, ...] = (),
):
    """tinit, tfinal: steps before ranks begin to fall, and after they have fallen. delta_t: steps
    from one choice to the next. beta1, beta2: how importance and its deviation are smoothed.
    orthogonality: weight of the penalty. bias: LoRA's."""
    plan = Plan(target_rank, init_rank, tinit, tfinal, delta_t, beta1, beta2)
    _check(plan, orthogonality, alpha, dropout)
    beside.check_bias("adalora", bias, "lora_only")
    table = model.names
    saved = names.saved(table, modules_to_save)
    whole = {path.rpartition("/")[0]: mask for path, mask in saved.items()}
    about = {"head": model.heads, "without": whole, "layers": layers_to_transform}
    sites = names.target(table, targets, kinds=KINDS, **about)
    scale = alpha / (init_rank + 1e-5)

    def hook(module, call, *args):
        out = call(*args)
        if peft.path_of(module) not in sites:
            return out
        x = args[0].astype(jnp.float32)
        on_conv = isinstance(module, layers.Conv)
        kernel = _kernel(module) if on_conv else ()
        a = peft.leaf(module, A, _normal, (*kernel, x.shape[-1], init_rank))
        e = peft.leaf(module, E, jax.nn.initializers.zeros, (init_rank,))
        b = peft.leaf(module, B, _normal, (init_rank, out.shape[-1]))
        x = peft.dropout(module, x, dropout)
        if on_conv:
            update = convolution.update(x, a, b[None, None], e * scale, module)
        else:
            update = ((x @ a) * (e * scale)) @ b
        return out + update.astype(out.dtype)

    moves, rows = beside.moves("adalora", sites, LEAVES, saved, bias)

    settings = {
        "peft_type": "ADALORA",
        **{theirs: getattr(plan, ours) for theirs, ours in PLAN.items()},
        # PEFT reads no adapter without it; the run's own length is in its config.json.
        "total_step": tinit + tfinal + 1,
        "orth_reg_weight": orthogonality,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": dropout,
        "bias": bias,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }
    files = Files(
        settings, sites, modules_to_save, *_codec(model, sites), pack=_pack, unpack=_unpack
    )
    return peft.Method(
        "adalora",
        moves,
        hook,
        rows=rows,
        axes={A: "i.", E: ".", B: ".o"},
        merge=lambda params, added: _merge(params, added, scale),
        penalty=_penalty(sites, orthogonality) if orthogonality else None,
        memory=lambda steps: _memory(plan, sites, steps),
        files=files,
    )


def _kernel(conv):
    if conv.groups > 1:
        raise Mistake(
            f"peft.adalora.targets: {peft.path_of(conv)} is a convolution in groups, whose update "
            "of low rank is none of its kernel; lora takes it"
        )
    return conv.kernel


def _normal(key, shape, dtype):
    return 0.02 * jax.random.normal(key, shape, dtype)


def _penalty(sites, weight):
    """variables -> weight times the mean, over A and B of every module, of how far it is from
    orthogonal."""

    def penalty(variables):
        own, norms = tree.flatten(variables["peft"]), []
        for path, mask in sites.items():
            a, b = (_on(mask, own[f"{path}/{name}"]) for name in (A, B))
            a_nir = a.reshape(len(a), -1, a.shape[-1])
            for m in (a_nir, b.swapaxes(-1, -2)):
                square = jnp.square(m.swapaxes(-1, -2) @ m - jnp.eye(m.shape[-1])).sum((1, 2))
                norms.append(jnp.sqrt(jnp.maximum(square, 1e-30)))  # a root has no slope at zero
        return weight * jnp.concatenate(norms).mean()

    return penalty


def _merge(params, added, scale):
    """W + A E scale B on every module that has an A; [l, in, out]."""
    flat, own = tree.flatten(params), tree.flatten(added["peft"])
    for path in [path for path in own if path.rpartition("/")[2] == A]:
        module = path.rpartition("/")[0]
        a, e, b = (own[f"{module}/{name}"] for name in LEAVES)
        if a.ndim == e.ndim + 3:
            update = convolution.change(a, b[None, None], e * scale)
        else:
            update = (a * (e * scale)[..., None, :]) @ b
        flat[f"{module}/kernel"] = flat[f"{module}/kernel"] + update
    return tree.unflatten(flat)


# --- the budget ------------------------------------------------------------------------------


class Plan(NamedTuple):
    """When how many triplets are left, and how they are chosen."""

    target_rank: int
    init_rank: int
    tinit: int
    tfinal: int
    delta_t: int
    beta1: float
    beta2: float


def budgets(plan, modules, steps):
    """int [steps - tfinal + 1]: the triplets of all modules that are left after each step t; the
    last of them is the target."""
    first, last = plan.init_rank * modules, plan.target_rank * modules
    met = steps - plan.tfinal
    share = (1 - (t - plan.tinit) / (met - plan.tinit) for t in range(plan.tinit + 1, met + 1))
    falling = [int((first - last) * left**3 + last) for left in share]
    return np.array([first] * (plan.tinit + 1) + falling, np.int32)


def _memory(plan, sites, steps):
    """`Method.memory`: {importance, deviation: of every number; kept: of every triplet}."""
    met = steps - plan.tfinal
    if met <= plan.tinit:
        raise Mistake(
            f"peft.adalora.tinit={plan.tinit} and peft.adalora.tfinal={plan.tfinal} leave none of "
            f"{steps} steps for ranks to fall in; lower them, or raise train.steps"
        )
    if plan.target_rank > plan.init_rank:
        raise Mistake(
            f"peft.adalora.target_rank={plan.target_rank} is above "
            f"peft.adalora.init_rank={plan.init_rank}; ranks fall from the second to the first"
        )
    left = budgets(plan, sum(int(mask.sum()) for mask in sites.values()), steps)

    def own(moving):
        return {f"{path}/{name}": moving[f"{path}/{name}"] for path in sites for name in LEAVES}

    def begin(moving):
        leaves = own(tree.flatten(moving["peft"]))
        zeros = lambda: {path: jnp.zeros_like(leaf) for path, leaf in leaves.items()}  # noqa: E731
        kept = {path: jnp.ones_like(leaves[f"{path}/{E}"], bool) for path in sites}
        memory = {"importance": zeros(), "deviation": zeros(), "kept": kept}
        return {name: tree.unflatten(flat) for name, flat in memory.items()}

    def after(step, moving, grads, memory):
        leaves, slopes = (tree.flatten(variables["peft"]) for variables in (moving, grads))
        memory = {name: tree.flatten(kept) for name, kept in memory.items()}
        importance, deviation = memory["importance"], memory["deviation"]
        for path, leaf in own(leaves).items():
            now = jnp.abs(leaf * slopes[path])
            mean = plan.beta1 * importance[path] + (1 - plan.beta1) * now
            spread = plan.beta2 * deviation[path] + (1 - plan.beta2) * jnp.abs(now - mean)
            importance[path] = jnp.where(step < met, mean, importance[path])
            deviation[path] = jnp.where(step < met, spread, deviation[path])
        chooses = (step > plan.tinit) & (step < met) & (step % plan.delta_t == 0) | (step == met)
        worth = {path: importance[path] * deviation[path] for path in importance}
        memory["kept"] = jax.lax.cond(
            chooses,
            lambda: _best(sites, worth, jnp.asarray(left)[jnp.minimum(step, met)]),
            lambda: memory["kept"],
        )
        for path, kept in memory["kept"].items():
            falls = (chooses | (step > met)) & ~kept
            leaves[f"{path}/{E}"] = jnp.where(falls, 0.0, leaves[f"{path}/{E}"])
        memory = {name: tree.unflatten(kept) for name, kept in memory.items()}
        return moving | {"peft": tree.unflatten(leaves)}, memory

    return begin, after


def _best(sites, worth, budget):
    """{module path: bool, as its E}: the `budget` best triplets by what each number is worth."""
    found = []
    for path, mask in sites.items():
        a, e, b = (_on(mask, worth[f"{path}/{name}"]) for name in LEAVES)
        found.append(e + a.reshape(len(a), -1, a.shape[-1]).mean(1) + b.mean(-1))
    worth_nr = jnp.concatenate(found)
    order = jnp.argsort(worth_nr.T.ravel())  # stable: of equals the first triplets fall first
    is_best = jnp.arange(len(order)) >= len(order) - budget
    kept_nr = jnp.zeros_like(is_best).at[order].set(is_best).reshape(worth_nr.shape[::-1]).T
    ends = np.cumsum([len(of_module) for of_module in found])[:-1]
    parts = zip(sites.items(), jnp.split(kept_nr, ends), strict=True)
    return {path: _off(mask, part) for (path, mask), part in parts}


def _on(mask, leaf):
    """The layers of a leaf that are targets, [n, ...]."""
    return leaf[np.flatnonzero(mask)] if mask.ndim else leaf[None]


def _off(mask, part):
    """`_on` undone for a leaf of bool, which is true in the other layers."""
    if not mask.ndim:
        return part[0]
    return jnp.ones((len(mask), *part.shape[1:]), bool).at[np.flatnonzero(mask)].set(part)


# --- in PEFT's files -------------------------------------------------------------------------


def _codec(model, sites):
    """`encode` and `decode` of bmft.peft.files.Files: A [r, in], on a convolution flattened from
    [r, in, kh, kw]; E [r, 1]; B [out, r]; of all triplets."""
    on_conv = [path for path in model.names.modules("conv") if path in sites]
    geometry = functools.cache(lambda: convolution.geometry(model))

    def encode(path, layer, leaves):
        a, e, b = (leaves[name] for name in LEAVES)
        a = names.to_file("conv" if path in on_conv else "transpose", a)
        return {"lora_A": a.reshape(len(a), -1), "lora_E": e[:, None], "lora_B": b.T}

    def decode(path, layer, tensors):
        a, e, b = (tensors[f"lora_{m}"] for m in "AEB")
        if path in on_conv:
            a = a.reshape(len(a), -1, *geometry()[path].kernel)
        layout = "conv" if path in on_conv else "transpose"
        return {A: names.from_file(layout, a), E: e[:, 0], B: b.T}

    return encode, decode


def _pack(fields, tensors):
    """Without the triplets whose E is zero, if others have one; rank_pattern says which stay."""
    pattern = {
        key.removeprefix(PREFIX): (e[:, 0] != 0).tolist()
        for key, e in tensors.items()
        if key.endswith(".lora_E")
    }
    ranks = [stays for kept in pattern.values() for stays in kept]
    if all(ranks) or not any(ranks):
        return fields | {"rank_pattern": None}, tensors
    packed = dict(tensors)
    for name, kept in pattern.items():
        for key, axis in _triplets(name):
            packed[key] = tensors[key].compress(kept, axis)
    return fields | {"rank_pattern": pattern}, packed


def _unpack(fields, tensors):
    """The tensors of all triplets: those that are not in the file are zero."""
    full, r = dict(tensors), fields["init_r"]
    for name, kept in (fields["rank_pattern"] or {}).items():
        if not isinstance(kept, list) or [type(stays) for stays in kept] != [bool] * r:
            raise Mistake(f"rank_pattern: {name!r} has no list of {r} (init_r) times true or false")
        for key, axis in _triplets(name):
            if key not in tensors:
                raise Mistake(f"rank_pattern names {name!r}; {nearest(key, tensors)}")
            found = tensors[key].shape
            if found[axis] != sum(kept):
                shape = list(found)
                raise Mistake(f"rank_pattern keeps {sum(kept)} of {name!r}, {key} is {shape}")
            shape = [r if i == axis else size for i, size in enumerate(found)]
            full[key] = np.zeros(shape, np.float32)
            full[key][(slice(None),) * axis + (np.array(kept),)] = tensors[key]
    return full


def _triplets(name):
    """(key, axis of the triplets) of the tensors that an entry of rank_pattern is about."""
    module = PREFIX + name.removesuffix(".default").removesuffix(".lora_E")
    return [(f"{module}.lora_A", 0), (f"{module}.lora_E", 0), (f"{module}.lora_B", 1)]


# How PEFT calls what stands in a `Plan`.
PLAN = {
    "target_r": "target_rank",
    "init_r": "init_rank",
    "tinit": "tinit",
    "tfinal": "tfinal",
    "deltaT": "delta_t",
    "beta1": "beta1",
    "beta2": "beta2",
}


def _arguments(fields, table):
    """`make`'s arguments from PEFT's configuration: with whole names, whatever it matched by."""
    sites = matching.targets(table, fields, KINDS)
    heads = matching.head_modules(table)
    saved = matching.saved(table, fields["modules_to_save"])
    return {ours: fields[theirs] for theirs, ours in PLAN.items()} | {
        "orthogonality": float(fields["orth_reg_weight"]),
        "alpha": float(fields["lora_alpha"]),
        "dropout": float(fields["lora_dropout"]),
        "targets": matching.exact_names(table, sites),
        "bias": fields["bias"],
        "modules_to_save": matching.exact_names(
            table, {path: mask for path, mask in saved.items() if path not in heads}
        ),
    }


LAYOUT = Layout(
    peft_type="ADALORA",
    fields={
        "target_r": ((int,), 8),
        "init_r": ((int,), 12),
        "tinit": ((int,), 0),
        "tfinal": ((int,), 0),
        "deltaT": ((int,), 1),
        "beta1": ((int, float), 0.85),
        "beta2": ((int, float), 0.85),
        "orth_reg_weight": ((int, float), 0.5),
        "lora_alpha": ((int, float), 8),
        "lora_dropout": ((int, float), 0.0),
        "rank_pattern": ((dict,), None),
        "bias": ((str,), "none"),
    },
    # r is LoRA's, which PEFT does not look at here; the length of the run and the start are of no
    # matter afterwards; fan_in_fan_out speaks of GPT-2's layers.
    ignored=("r", "total_step", "init_lora_weights", "fan_in_fan_out"),
    defaults={"megatron_core": "megatron.core", "qalora_group_size": 16},
    arguments=_arguments,
)


def _check(plan, orthogonality, alpha, dropout):
    values = plan._asdict() | {"orthogonality": orthogonality, "alpha": alpha, "dropout": dropout}
    for keys, holds, what in (
        (("init_rank", "target_rank", "delta_t"), lambda value: value >= 1, "1 or more"),
        (("tinit", "tfinal", "orthogonality"), lambda value: value >= 0, "0 or more"),
        (("beta1", "beta2"), lambda value: 0 < value < 1, "between 0 and 1"),
        (("alpha",), lambda value: value > 0, "above 0"),
        (("dropout",), lambda value: 0 <= value < 1, "in [0, 1)"),
    ):
        for key in keys:
            if not holds(values[key]):
                raise Mistake(f"peft.adalora.{key} is {values[key]}; it must be {what}")
