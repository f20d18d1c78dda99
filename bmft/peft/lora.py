"""LoRA (Hu et al. 2021, arXiv:2106.09685) on dense layers and convolutions, with PEFT's options.

    y = base(x) + B(A(dropout(x))) alpha / rank        rsLoRA: alpha / sqrt(rank), arXiv:2312.03732

A is uniform in ±1/sqrt(fan-in) (torch's kaiming with a = sqrt 5, which jax's he_uniform is not), B
is zero: the adapted model starts as the base. Dropout meets the update's input only. A, B and the
update are float32, whatever the base computes in. Convolutions: bmft/peft/convolution.py.

Shapes: l layers of a stack, r the largest rank of a module over its layers.

    peft/<module>/lora_a [l, in, r]    peft/<module>/lora_b [l, r, out]
    peft/<module>/lora_a [kh, kw, in / groups, r]    peft/<module>/lora_b [1, 1, r / groups, out]
    peft_const/<module>/lora_scale [l, r]    the scale; zero past a layer's own rank, and in layers
                                             that are no target, so that it all stays one array
"""

import re

import jax
import jax.numpy as jnp
import numpy as np

from bmft import layers, names, peft, tree
from bmft.errors import Mistake, nearest
from bmft.peft import convolution, matching
from bmft.peft.files import Files, Layout

BIASES = ("none", "all", "lora_only")
KINDS = ("dense", "conv")


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
    grouped: bool = True,
):
    """rank_pattern, alpha_pattern: `pattern=value` by unstacked module name, first match wins.

    targets: names, `all-linear`, `all-conv`. grouped: A of a convolution in groups is in groups,
    too, so that it merges; False: it reads all channels, as PEFT's does, and PEFT's are read.
    """
    _check(rank, alpha, dropout, bias)
    table = model.names
    ranks_by = _pattern("rank", rank_pattern, int)
    alphas_by = _pattern("alpha", alpha_pattern, float)
    saved = names.saved(table, modules_to_save)
    whole = {path.rpartition("/")[0]: mask for path, mask in saved.items()}
    about = {"head": model.heads, "layers": layers_to_transform, "without": whole}
    sites = names.target(table, targets, kinds=KINDS, **about)
    ranks = _values(table, sites, "rank", ranks_by, rank)
    alphas = _values(table, sites, "alpha", alphas_by, float(alpha))
    scales = {path: alphas[path] / np.maximum(_root(r, rslora), 1) for path, r in ranks.items()}

    def hook(module, call, *args):
        out, path = call(*args), peft.path_of(module)
        if path not in sites:
            return out
        x, r = args[0].astype(jnp.float32), ranks[path].max()
        on_conv = isinstance(module, layers.Conv)
        of_a, of_b = (x.shape[-1], r), (r, out.shape[-1])
        if on_conv:
            of_a, of_b = convolution.shapes(module, x.shape[-1], r, grouped)
        a = peft.leaf(module, "lora_a", convolution.start, of_a)
        b = peft.leaf(module, "lora_b", jax.nn.initializers.zeros, of_b)
        scale = module.get_variable("peft_const", "lora_scale")
        x = peft.dropout(module, x, dropout)
        update = convolution.update(x, a, b, scale, module) if on_conv else ((x @ a) * scale) @ b
        return out + update.astype(out.dtype)

    def moves(path):
        kind, _, base = path.partition("/")
        if kind == "peft":
            return "lora" if path.rpartition("/")[2] in ("lora_a", "lora_b") else None
        module, _, leaf = base.rpartition("/")
        biased = leaf == "bias" and (bias == "all" or (bias == "lora_only" and module in sites))
        return "lora" if kind == "params" and (biased or base in saved) else None

    def rows(path):
        module, _, leaf = path.partition("/")[2].rpartition("/")
        if path.startswith("peft/"):
            return None if sites[module].all() else sites[module]
        if leaf == "bias" and bias == "all":
            return None
        own = sites.get(module) if leaf == "bias" and bias == "lora_only" else None
        masks = [mask for mask in (whole.get(module), own) if mask is not None]
        return None if not masks or np.any(masks, axis=0).all() else np.any(masks, axis=0)

    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": dropout,
        "use_rslora": rslora,
        "use_dora": False,
        "bias": bias,
        "rank_pattern": matching.spell_pattern(table, sites, ranks_by, ranks, rank, "rank_pattern"),
        "alpha_pattern": matching.spell_pattern(
            table, sites, alphas_by, alphas, alpha, "alpha_pattern"
        ),
        "init_lora_weights": True,
        "fan_in_fan_out": False,
    }
    files = _files(table, sites, ranks, settings, modules_to_save, grouped)
    return peft.Method(
        "lora",
        moves,
        hook,
        constants={path: {"lora_scale": _scale(ranks[path], scales[path])} for path in sites},
        rows=rows,
        merge=_merge,
        files=files,
    )


def _files(table, sites, ranks, settings, modules_to_save, grouped):
    return Files(
        settings,
        sites,
        modules_to_save,
        *_codec(table, sites, ranks, settings),
        own="CONV_LORA" if _on_conv(table, sites) else "LORA",
        expressible=lambda model: _in_peft(model, sites, grouped),
    )


def _values(table, sites, key, patterns, default):
    """{module path: [l] or []}: what the patterns say of each module of `sites`; 0 elsewhere."""
    values = {path: np.where(mask, default, 0) for path, mask in sites.items()}
    used = set()
    for path, mask in sites.items():
        for layer in matching.layers(mask):
            called = table.called(path, layer)
            values[path][matching.at(layer)] = names.pattern_value(patterns, called, default)
            used |= {
                pattern for pattern in patterns if names.pattern_value({pattern: 1}, called, 0)
            }
    for pattern in patterns:
        if pattern not in used:
            near = nearest(pattern, sites)
            raise Mistake(f"peft.lora.{key}_pattern: {pattern!r} matches no target; {near}")
    return values


def _root(ranks, rslora):
    return ranks**0.5 if rslora else ranks


def _scale(ranks, scales):
    """[l, r] of ranks [l] and scales [l]; [r] of scalars."""
    return np.where(np.arange(ranks.max()) < ranks[..., None], scales[..., None], 0).astype(
        np.float32
    )


def _merge(params, added):
    """W + A scale B on every module that has an A; [l, in, out].

    Raises Mistake for PEFT's A on a convolution in groups, which is no change of its kernel."""
    flat, own = tree.flatten(params), tree.flatten(added["peft"])
    scales = tree.flatten(added["peft_const"])
    for path in [path for path in own if path.endswith("/lora_a")]:
        module = path.removesuffix("/lora_a")
        kernel, a, b = flat[f"{module}/kernel"], own[path], own[f"{module}/lora_b"]
        scale = scales[f"{module}/lora_scale"]
        if a.shape[-2] != kernel.shape[-2]:
            raise Mistake(
                f"method 'lora' cannot be merged into plain weights: {module} is a convolution in "
                f"groups of {kernel.shape[-2]} channels, and its A reads {a.shape[-2]}, as PEFT's"
            )
        on_conv = a.ndim - scale.ndim == 3
        update = convolution.change(a, b, scale) if on_conv else (a * scale[..., None, :]) @ b
        flat[f"{module}/kernel"] = kernel + update
    return tree.unflatten(flat)


def _on_conv(table, sites):
    """Those of the modules that are convolutions."""
    return [path for path in table.modules("conv") if path in sites]


def _in_peft(model, sites, grouped):
    """Can PEFT compute it? It leaves a dilation out, and has no A in groups."""
    on_conv = _on_conv(model.names, sites)
    found = convolution.geometry(model) if on_conv else {}
    return not any(
        found[path].dilation != (1, 1) or (grouped and found[path].groups > 1) for path in on_conv
    )


# --- in PEFT's files -------------------------------------------------------------------------


def _codec(table, sites, ranks, settings):
    """`encode` and `decode` of bmft.peft.files.Files: torch has A [r, in] and B [out, r], on a
    convolution A [r, in, kh, kw] and B [out, r / groups, 1, 1]."""
    layouts = dict.fromkeys(_on_conv(table, sites), "conv")
    theirs = {
        key: matching.pattern_values(table, sites, settings[f"{key}_pattern"], default, key)
        for key, default in (("rank", settings["r"]), ("alpha", settings["lora_alpha"]))
    }

    def encode(path, layer, leaves):
        at = matching.at(layer)
        r, scale = int(ranks[path][at]), leaves["lora_scale"]
        # The scale is not in the file: PEFT computes it from these fields.
        peft_scale = theirs["alpha"][path][at] / _root(
            theirs["rank"][path][at], settings["use_rslora"]
        )
        assert theirs["rank"][path][at] == r, (path, layer)
        assert np.allclose(scale[:r], peft_scale) and not scale[r:].any(), (path, layer)
        layout, share = layouts.get(path, "transpose"), r / ranks[path].max()
        a, b = leaves["lora_a"][..., :r], leaves["lora_b"]
        b = b[..., : round(b.shape[-2] * share), :]
        return {
            "lora_A.weight": names.to_file(layout, a),
            "lora_B.weight": names.to_file(layout, b),
        }

    def decode(path, layer, tensors):
        layout = layouts.get(path, "transpose")
        a, b = (names.from_file(layout, tensors[f"lora_{m}.weight"]) for m in "AB")
        # To the largest rank over the layers of the stack.
        missing = int(ranks[path].max()) - a.shape[-1]
        before = ((0, 0),) * (a.ndim - 2)
        return {
            "lora_a": np.pad(a, (*before, (0, 0), (0, missing))),
            "lora_b": np.pad(b, (*before, (0, missing), (0, 0))),
        }

    return encode, decode


# Starts that leave the base's weights as they are; the others rewrite them.
STARTS = (True, False, "gaussian", "eva", "orthogonal")


def _arguments(fields, table):
    """`make`'s arguments from PEFT's configuration: with whole names, whatever it matched by."""
    if fields["init_lora_weights"] not in STARTS:
        how = fields["init_lora_weights"]
        raise Mistake(f"init_lora_weights is {how!r}, which changes the base; peft can convert it")
    sites = matching.targets(table, fields, KINDS)

    def by_name(field, default):
        values = matching.pattern_values(table, sites, fields[field], default, field)
        others = {path: mask & (values[path] != default) for path, mask in sites.items()}
        found = [v for path, mask in others.items() for v in values[path][mask]]
        called = matching.exact_names(table, others)
        return tuple(f"{name}={value}" for name, value in zip(called, found, strict=True))

    heads = matching.head_modules(table)
    saved = matching.saved(table, fields["modules_to_save"])
    return {
        "rank": fields["r"],
        "alpha": float(fields["lora_alpha"]),
        "dropout": float(fields["lora_dropout"]),
        "rslora": fields["use_rslora"],
        "bias": fields["bias"],
        "targets": matching.exact_names(table, sites),
        "rank_pattern": by_name("rank_pattern", fields["r"]),
        "alpha_pattern": by_name("alpha_pattern", fields["lora_alpha"]),
        "modules_to_save": matching.exact_names(
            table, {path: mask for path, mask in saved.items() if path not in heads}
        ),
        "grouped": False,
    }


LAYOUT = Layout(
    peft_type="LORA",
    fields={
        "r": ((int,), 8),
        "lora_alpha": ((int, float), 8),
        "lora_dropout": ((int, float), 0.0),
        "use_rslora": ((bool,), False),
        "bias": ((str,), "none"),
        "rank_pattern": ((dict,), {}),
        "alpha_pattern": ((dict,), {}),
        "init_lora_weights": ((bool, str), True),
    },
    # fan_in_fan_out speaks of GPT-2's layers; how the start was found is of no matter afterwards.
    ignored=("fan_in_fan_out", "eva_config"),
    defaults={"megatron_core": "megatron.core", "qalora_group_size": 16},
    arguments=_arguments,
)


def _check(rank, alpha, dropout, bias):
    if rank < 1:
        raise Mistake(f"peft.lora.rank is {rank}; it must be 1 or more")
    if alpha <= 0:
        raise Mistake(f"peft.lora.alpha is {alpha}; it must be above 0")
    if not 0 <= dropout < 1:
        raise Mistake(f"peft.lora.dropout is {dropout}; it must be in [0, 1)")
    if bias not in BIASES:
        raise Mistake(f"peft.lora.bias: no {bias!r}; {nearest(bias, BIASES)}")


def _pattern(key, entries, kind):
    """{pattern: value} of `pattern=value` entries."""
    found = {}
    for entry in entries:
        pattern, equals, value = entry.rpartition("=")
        try:
            found[pattern] = kind(value)
            re.compile(pattern)
        except (ValueError, re.error):
            equals = ""
        if not equals or not pattern or found[pattern] <= 0:
            form = "'layer.0.attention.self.query=4'"
            raise Mistake(f"peft.lora.{key}_pattern: {entry!r} is not of the form {form}")
    return found
