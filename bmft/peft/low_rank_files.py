"""How the factors of bmft.peft.low_rank stand in PEFT's files, peft_type LORA.

    <module>.lora_A.weight [r, in]           <module>.lora_B.weight [out, r]
    <module>.lora_A.weight [r, in, kh, kw]   <module>.lora_B.weight [out, r / groups, 1, 1]
    <module>.lora_embedding_A [r, v]         <module>.lora_embedding_B [d, r]
    <word embedding>.token_adapter...        bmft/peft/token_rows.py

The scale is in no tensor: PEFT computes it from r, lora_alpha, use_rslora and the patterns.
"""

import numpy as np

from bmft import names
from bmft.errors import Mistake
from bmft.peft import low_rank, matching, patterns, reading, token_rows

# Fields of PEFT's configuration: {field: (types, PEFT's default)}.
FIELDS = {
    "r": ((int,), 8),
    "lora_alpha": ((int, float), 8),
    "lora_dropout": ((int, float), 0.0),
    "use_rslora": ((bool,), False),
    "bias": ((str,), "none"),
    "rank_pattern": ((dict,), {}),
    "alpha_pattern": ((dict,), {}),
    "init_lora_weights": ((bool, str), True),
    "trainable_token_indices": ((list[int], dict), None),
}
# fan_in_fan_out speaks of GPT-2's layers; how the start was found is of no matter afterwards.
IGNORED = ("fan_in_fan_out", "eva_config")
DEFAULTS = {"megatron_core": "megatron.core", "qalora_group_size": 16}
# Starts that leave the base's weights as they are; the others rewrite them.
STARTS = (True, False, "gaussian", "eva", "orthogonal")


def codec(plan):
    """`encode` and `decode` of bmft.peft.files.Files."""
    table, sites, ranks, settings = plan.table, plan.sites, plan.ranks, plan.settings
    layouts = dict.fromkeys(plan.on("conv"), "conv")
    keys = dict.fromkeys(sites, ("lora_A.weight", "lora_B.weight"))
    keys |= dict.fromkeys(plan.on("embed"), ("lora_embedding_A", "lora_embedding_B"))
    theirs = {
        key: matching.pattern_values(table, sites, settings[f"{key}_pattern"], default, key)
        for key, default in (("rank", settings["r"]), ("alpha", settings["lora_alpha"]))
    }

    def encode(path, layer, leaves):
        at = matching.at(layer)
        r, scale = int(ranks[path][at]), leaves["lora_scale"]
        peft_scale = theirs["alpha"][path][at] / low_rank.root(
            theirs["rank"][path][at], settings["use_rslora"]
        )
        assert theirs["rank"][path][at] == r, (path, layer)
        assert np.allclose(scale[:r], peft_scale) and not scale[r:].any(), (path, layer)
        a, b = leaves["lora_a"], leaves["lora_b"]
        layout, share = layouts.get(path, "transpose"), r / a.shape[-1]
        a, b = a[..., :r], b[..., : round(b.shape[-2] * share), :]
        tensors = (names.to_file(layout, factor) for factor in (a, b))
        return dict(zip(keys[path], tensors, strict=True))

    def decode(path, layer, tensors):
        layout = layouts.get(path, "transpose")
        a, b = (names.from_file(layout, tensors[key]) for key in keys[path])
        # To the largest rank over the layers of the stack.
        missing = int(ranks[path].max()) - a.shape[-1]
        before = ((0, 0),) * (a.ndim - 2)
        return {
            "lora_a": np.pad(a, (*before, (0, 0), (0, missing))),
            "lora_b": np.pad(b, (*before, (0, missing), (0, 0))),
        }

    return encode, decode


def arguments(fields, table):
    """Arguments of a make from PEFT's configuration: with whole names, whatever it matched by."""
    if fields["init_lora_weights"] not in STARTS:
        how = fields["init_lora_weights"]
        raise Mistake(f"init_lora_weights is {how!r}, which changes the base; peft can convert it")
    sites = matching.targets(table, fields, low_rank.KINDS)

    heads = matching.head_modules(table)
    saved = matching.saved(table, fields["modules_to_save"])
    return {
        "rank": fields["r"],
        "alpha": float(fields["lora_alpha"]),
        "dropout": float(fields["lora_dropout"]),
        "rslora": fields["use_rslora"],
        "bias": fields["bias"],
        "targets": matching.exact_names(table, sites),
        "rank_pattern": patterns.entries(
            table, sites, fields["rank_pattern"], fields["r"], "rank_pattern"
        ),
        "alpha_pattern": patterns.entries(
            table, sites, fields["alpha_pattern"], fields["lora_alpha"], "alpha_pattern"
        ),
        "modules_to_save": matching.exact_names(
            table, {path: mask for path, mask in saved.items() if path not in heads}
        ),
        "trainable_token_indices": _tokens(fields["trainable_token_indices"], table),
    }


def _tokens(given, table):
    """The ids of trainable_token_indices: a list, or {module: list} of the word embedding alone.

    PEFT takes a module whose name ends in the given one, dot or not, as for modules_to_save.
    """
    if not isinstance(given, dict):
        return tuple(given or ())
    for name, ids in given.items():
        if len(given) > 1 or set(matching.saved(table, [name])) != {token_rows.WORD}:
            modules = " and ".join(map(repr, given))
            raise Mistake(
                f"trainable_token_indices is of {modules}: only the word embedding's are known here"
            )
        if not reading.is_of(ids, list[int]):
            raise Mistake(f"trainable_token_indices: {name!r} has no list of ids")
    return tuple(*given.values())
