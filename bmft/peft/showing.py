"""What an adapter directory says of itself, read without its base, or a model at all.

The norm of each module and layer says where an adapter does its work: of LoRA the Frobenius norm of
the update scale B A (all there is of it but a magnitude, in DoRA), of any other tensor its own.
"""

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bmft import names
from bmft.peft import adapterhub, adapterhub_config, files, own, portable, updates

# The number of a layer in a module's name: bert.encoder.layer.3.attention.self.query
LAYER = re.compile(r"(?<=\.)(?:layers?|blocks?|h)\.(\d+)(?=\.)")
PAIR = {"lora_A.weight": "lora_B.weight"}


class Row(NamedTuple):
    module: str  # {} stands for the layer
    what: str  # a tensor's name, or `update` of LoRA's pair
    shape: tuple  # of one layer's tensor; of an update that of the whole change, in torch's layout
    rank: str  # of updates; "2 to 5" where it differs by layer
    norms: dict  # {layer or None: Frobenius norm}


class About(NamedTuple):
    """An adapter directory."""

    card: Any  # bmft.peft.files.Card
    task_type: str | None
    settings: dict  # what adapter_config.json says beside, in short
    tensors: int
    numbers: int  # that moved
    constants: int  # numbers that are saved and never moved
    size: int  # bytes of its adapter_config.json and tensors
    rows: list


def about(folder):
    """`About` of a directory; Mistake if it is none."""
    folder = Path(folder)
    card = files.card(folder)
    fields = json.loads((folder / files.CONFIG).read_text(encoding="utf-8"))
    tensors, of_tensors = files.tensors_of(folder)
    told = fields
    if adapterhub.is_one(fields):
        told = {field: fields["config"].get(field) for field in adapterhub_config.READ}
    fixed = [key for key in tensors if key.startswith("peft_const/")]
    settings = {
        field: value
        for field, value in sorted(told.items())
        if field not in files.ABOUT and value not in (None, False, "", [], {})
    }
    ours = card.peft_type.startswith(own.PREFIX)
    rows = _of_ours(tensors) if ours else _of_pefts(tensors, fields)
    return About(
        card=card,
        task_type=fields.get("task_type"),
        settings=settings,
        tensors=len(tensors),
        numbers=sum(tensor.size for key, tensor in tensors.items() if key not in fixed),
        constants=sum(tensors[key].size for key in fixed),
        size=sum(path.stat().st_size for path in (folder / files.CONFIG, *of_tensors)),
        rows=rows,
    )


# --- PEFT's layout ---------------------------------------------------------------------------


def _of_pefts(tensors, fields):
    """Rows of {key: tensor}, a tensor a module and layer."""
    found, lora = {}, fields.get("peft_type") == "LORA"
    for key, tensor in sorted(tensors.items()):
        end = next((end for pair in PAIR.items() for end in pair if key.endswith("." + end)), None)
        module, _, what = key.removeprefix(portable.PREFIX).rpartition("." + end if end else ".")
        what = what or end
        if lora and end in PAIR.values():
            continue
        layer = LAYER.search(module)
        place = LAYER.sub(lambda m: m[0].replace(m[1], "{}"), module, count=1)
        number = int(layer[1]) if layer else None
        if lora and end in PAIR and f"{key.removesuffix(end)}{PAIR[end]}" in tensors:
            b = tensors[f"{key.removesuffix(end)}{PAIR[end]}"]
            part = _factors(tensor, b, _scale(module, fields))
            shape, rank = (b.shape[0], *tensor.shape[1:]), len(tensor)
            one = found.setdefault((place, "update"), [shape, {}, {}])
            one[1][number], one[2][number] = rank, updates.norm(part)
        else:
            one = found.setdefault((place, what), [tensor.shape, {}, {}])
            one[2][number] = float(np.linalg.norm(tensor))
    return _rows(found)


def _scale(module, fields):
    """PEFT's: alpha over rank, or over its root."""
    alpha, rank = (
        names.pattern_value(fields.get(f"{key}_pattern") or {}, (module,), fields.get(field, 8))
        for key, field in (("alpha", "lora_alpha"), ("rank", "r"))
    )
    return alpha / (math.sqrt(rank) if fields.get("use_rslora") else rank)


def _factors(a, b, scale):
    """updates.Factors of torch's A [r, in, ...] and B [out, r / g, ...]."""
    k = math.prod(b.shape[1:])
    groups = len(a) // k
    a_gnk = a.reshape(groups, k, -1).swapaxes(1, 2)
    b_gko = b.reshape(groups, -1, k).swapaxes(1, 2)
    return updates.Factors(a_gnk, b_gko, scale)


# --- ours ------------------------------------------------------------------------------------


def _of_ours(tensors):
    """Rows of {collection/path: whole stack}; constants are counted, not shown."""
    found = {}
    for path, leaf in sorted(tensors.items()):
        collection, _, where = path.partition("/")
        module, _, what = where.rpartition("/")
        scale = tensors.get(f"peft_const/{module}/lora_scale")
        in_pair = scale is not None and what in updates.FACTORS
        if collection == "peft_const" or (in_pair and what == "lora_b"):
            continue
        stacked = module.startswith("layers/")
        place = module.replace("layers/", "layers/{}/", 1) if stacked else module
        b = tensors.get(f"peft/{module}/lora_b")
        for layer in range(len(leaf)) if stacked else [None]:
            at = () if layer is None else layer
            if not in_pair:
                one = found.setdefault((place, what), [leaf[at].shape, {}, {}])
                one[2][layer] = float(np.linalg.norm(leaf[at]))
            elif scale[at].any():
                part = updates.of_leaves(leaf[at], b[at], scale[at])
                shape = (b.shape[-1], *leaf[at].shape[:-1])
                one = found.setdefault((place, "update"), [shape, {}, {}])
                one[1][layer], one[2][layer] = part.rank, updates.norm(part)
    return _rows(found)


def _rows(found):
    rows = []
    for (place, what), (shape, ranks, norms) in found.items():
        values = sorted(set(ranks.values()))
        rank = f"{values[0]} to {values[-1]}" if len(values) > 1 else "".join(map(str, values))
        rows.append(Row(place, what, tuple(shape), rank, dict(sorted(norms.items(), key=_order))))
    return rows


def _order(item):
    return -1 if item[0] is None else item[0]
