"""AdapterHub's directories of bottleneck adapters, in and out, for BERT, RoBERTa and DistilBERT.

The format of its package `adapters` 1.3.0 (github.com/adapter-hub/adapters), in safetensors:

    adapter_config.json        {"config": {...}, "model_type": "bert", "name": "sst", ...}
    adapter.safetensors        bert.encoder.layer.0.output.adapters.sst.adapter_down.0.weight [m, d]
    head_config.json, model_head.safetensors        the head (bmft.peft.adapterhub_head)

    double_seq_bn    houlsby, while the base's layer norms stay as they are
    seq_bn           pfeiffer
    par_bn           parallel

What `config` says and what is refused of it: bmft.peft.adapterhub_config.
"""

import json
from pathlib import Path

import numpy as np

from bmft import peft
from bmft.errors import Mistake
from bmft.names import from_file, in_file, to_file
from bmft.peft import adapter as bottleneck
from bmft.peft import adapterhub_config, adapterhub_head, portable, reading

NAME = "ADAPTERHUB"  # what a card says in place of a peft_type
CONFIG = "adapter_config.json"
ADAPTER = "adapter.safetensors", "pytorch_adapter.bin"  # the file that is read, and the pickle
VERSION = "adapters.1.3.0"

# Where the adapters of a layer are: after the attention, and after (or beside) the MLP.
_BERT = ("encoder.layer.{}.attention.output.adapters", "encoder.layer.{}.output.adapters")
PLACES = {
    "bert": _BERT,
    "roberta": _BERT,
    "distilbert": (
        "transformer.layer.{}.attention_adapters.adapters",
        "transformer.layer.{}.output_adapters.adapters",
    ),
}
# key after the adapter's name -> (leaf, its layout)
ENDS = {
    "adapter_down.0.weight": ("adapter_down_kernel", "transpose"),
    "adapter_down.0.bias": ("adapter_down_bias", "same"),
    "adapter_up.weight": ("adapter_up_kernel", "transpose"),
    "adapter_up.bias": ("adapter_up_bias", "same"),
}


def is_one(fields):
    """Is this what an adapter_config.json of AdapterHub's holds?"""
    known = isinstance(fields, dict) and "peft_type" not in fields
    return known and isinstance(fields.get("config"), dict)


# --- out -------------------------------------------------------------------------------------


def write(folder, adapter, model, *, base, fingerprint, name="bmft"):
    """Writes the directory of a `files.Adapter`, which AdapterHub will know by `name`.

    base: what the model is called; fingerprint: of its weights. Raises Mistake for what AdapterHub
    has no place for: another method than `adapter`, leaves that moved beside it, another model.
    """
    adapterhub_head.class_of(model)
    _check_name("write", name)
    if adapter.names != ("adapter",):
        names = " + ".join(adapter.names)
        raise Mistake(f"AdapterHub's format is written of the method adapter alone, not of {names}")
    group = {key: value for key, value in adapter.groups["adapter"].items() if value is not None}
    kind, left_out = group.get("kind", "houlsby"), tuple(group.get("leave_out", ()))
    settings = {key: group[key] for key in group if key in bottleneck.Kind._fields}
    chosen = bottleneck.settled(kind, **settings)
    tensors = {
        key: to_file(layout, np.asarray(adapter.leaves[path])[layer])
        for key, (path, layer, layout) in _slots(model, chosen, left_out, name).items()
    }
    moved = {path: leaf for path, leaf in adapter.leaves.items() if not path.startswith("peft/")}
    about = {
        "hidden_size": model.config.width,
        "model_name": base,
        "model_type": model.json["model_type"],
        "name": name,
        "version": VERSION,
    }
    head = adapterhub_head.encode(moved, model, adapter.labels, about)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    about = about | {
        "model_class": head[0]["model_class"],
        "config": adapterhub_config.encode(chosen, kind, left_out),
    }
    reading.write_json(folder / CONFIG, about)
    metadata = {"format": "pt", reading.BASE_KEY: fingerprint}
    reading.write_tensors(folder / ADAPTER[0], tensors, metadata)
    adapterhub_head.write(folder, *head)


# --- in --------------------------------------------------------------------------------------


def decode(folder, fields, model):
    """(methods, groups, leaves, labels) of `bmft.peft.files.Adapter`, of a directory and what its
    adapter_config.json holds. Raises Mistake, naming file and field or tensor, for what is missing,
    unknown, or does not fit."""
    file = folder / CONFIG
    adapterhub_head.check_base(file, fields, model)
    name = fields.get("name")
    _check_name(file, name)
    group = adapterhub_config.decode(file, fields, model)
    try:
        methods = peft.build(model, ("adapter",), {"adapter": group})
    except Mistake as mistake:
        raise Mistake(f"{file}: {mistake}") from None
    chosen = bottleneck.settled(group["kind"], reduction=group["reduction"])
    base, added = portable.expected(methods, model)
    tensors = reading.tensors(folder / ADAPTER[0])
    headed = any(key.startswith(model.names.prefix) for key in tensors)
    slots = _slots(model, chosen, group["leave_out"], name, model.names.prefix if headed else "")
    shapes = {
        key: in_file(layout, added[path].shape[1:]) for key, (path, _, layout) in slots.items()
    }
    portable.check(shapes, tensors, folder / ADAPTER[0])
    leaves = {
        path: np.zeros(leaf.shape, np.float32)
        for path, leaf in added.items()
        if path.startswith("peft/")
    }
    for key, (path, layer, layout) in slots.items():
        leaves[path][layer] = from_file(layout, tensors[key])
    of_head, labels = adapterhub_head.decode(folder, model, base)
    return methods, {"adapter": group}, leaves | of_head, labels


def _check_name(where, name):
    # It is the key of a torch ModuleDict, and a part of the tensors' keys.
    if not isinstance(name, str) or not name or "." in name:
        raise Mistake(f"{where}: name is {json.dumps(name)}; needs a text without dots")


def _slots(model, chosen, left_out, name, prefix=None):
    """{key: (path, layer, layout)} of the tensors in adapter.safetensors."""
    prefix, found = model.names.prefix if prefix is None else prefix, {}
    for module in chosen.modules:
        place = prefix + PLACES[model.config.family][module != "layers/attention_norm"]
        for layer in set(range(model.names.layers)) - set(left_out):
            for end, (leaf, layout) in ENDS.items():
                key = f"{place.format(layer)}.{name}.{end}"
                found[key] = f"peft/{module}/{leaf}", layer, layout
    return found
