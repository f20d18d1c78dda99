"""The head beside an AdapterHub adapter: head_config.json and model_head.safetensors.

    classifier.weight           [c, d]    of XForSequenceClassification, as transformers has it
    heads.<name>.1.weight       [d, d]    of an AdapterModel: layers with an activation between
    heads.<name>.4.weight       [c, d]

BERT's pooler is the base's, and stays, but in an AdapterModel's head of two layers with tanh: that
is a pooler of its own. Any other head computes another function than ours, and is refused.
"""

import json
import re

import numpy as np

from bmft.errors import Mistake
from bmft.names import from_file, in_file, to_file
from bmft.peft import portable, reading

CONFIG = "head_config.json"
HEAD = "model_head.safetensors", "pytorch_model_head.bin"  # the file that is read, and the pickle
OUT_BIAS = r"classifier\.bias|classifier\.out_proj\.bias|heads\.[^.]+\.\d+\.bias"

# model_type -> what its classes are called after. The package has no others of ours.
CLASSES = {
    "bert": "Bert",
    "roberta": "Roberta",
    "xlm-roberta": "XLMRoberta",
    "distilbert": "DistilBert",
}
STATIC, FLEXIBLE = "ForSequenceClassification", ("AdapterModel", "ModelWithHeads")
# The heads of an AdapterModel that are ours: {(layers, activation, use_pooler): modules}.
_TWO = ("classifier/dense", "classifier/out")
OURS = {
    "bert": {
        (1, None, True): ("classifier/out",),
        (2, "tanh", False): ("pooler", "classifier/out"),
    },
    "roberta": {(2, "tanh", False): _TWO},
    "distilbert": {(2, "relu", False): _TWO},
}
# Fields of an AdapterModel's head with the package's default, and those that say nothing of it.
FIELDS = {"layers": 2, "activation_function": "tanh", "use_pooler": False}
FIXED = {"head_type": "classification", "bias": True}
IGNORED = ("label2id", "id2label", "num_labels", "dropout_prob")


def class_of(model):
    """What the package calls the model's classes after; Mistake if it has none."""
    kind = model.json["model_type"]
    if kind not in CLASSES:
        known = ", ".join(CLASSES)
        raise Mistake(
            f"AdapterHub's adapters of {kind} ({model.name}) are not known here: {known} are"
        )
    return CLASSES[kind]


def check_base(file, fields, model):
    """Mistake if the fields of a file speak of a model of another architecture or width."""
    class_of(model)
    for field, own in (
        ("model_type", model.json["model_type"]),
        ("hidden_size", model.config.width),
    ):
        if fields.get(field) != own:
            raise Mistake(
                f"{file}: {field} is {json.dumps(fields.get(field))}; {model.name} has "
                f"{json.dumps(own)}"
            )


# --- out -------------------------------------------------------------------------------------


def encode(moved, model, labels, about):
    """(fields of head_config.json, {key: tensor}) of the base leaves that moved, {"params/...":
    leaf}; no tensors where none did.

    about: fields that both files have. Raises Mistake for a leaf that no head of AdapterHub's has.
    """
    pooled = any(path.startswith("params/pooler/") for path in moved)
    modules = OURS["bert"][2, "tanh", False] if pooled else tuple(_static(model).values())
    for path in sorted(moved):
        if path.removeprefix("params/").rpartition("/")[0] not in modules:
            norms = "; peft.adapter.norms=False keeps it" if "norm/" in path else ""
            raise Mistake(f"AdapterHub's format has no place for {path}, which moved{norms}")
    if len(set(labels or ())) < len(labels or ()):
        raise Mistake(f"AdapterHub's format has no place for labels of one name: {labels}")
    told = {"label2id": {label: i for i, label in enumerate(labels)} if labels else None}
    told["num_labels"] = model.config.outputs
    fields = about | {"model_class": class_of(model) + (FLEXIBLE[0] if pooled else STATIC)}
    if pooled:
        config = FIXED | FIELDS | {"dropout_prob": None} | told
        fields |= {"config": config}
    else:
        fields |= {"config": None, "name": None} | told
    places = _flexible(about["name"], modules) if pooled else _static(model)
    slots = _slots(model, places) if moved else {}
    return fields, {
        key: to_file(leaf.layout, np.asarray(moved[f"params/{leaf.path}"]))
        for key, leaf in slots.items()
    }


def write(folder, fields, tensors):
    """Writes both files; neither where there are no tensors."""
    if tensors:
        reading.write_json(folder / CONFIG, fields)
        reading.write_tensors(folder / HEAD[0], tensors, {"format": "pt"})


# --- in --------------------------------------------------------------------------------------


def about(folder):
    """(labels or None, number of outputs) of the head of a directory; None, None without one."""
    fields = _fields(folder)
    if fields is None:
        return None, None
    shapes = reading.headers(folder / HEAD[0])[1]
    biases = sorted(key for key in shapes if re.fullmatch(OUT_BIAS, key) and shapes[key])
    return _labels(folder / CONFIG, fields), shapes[biases[-1]][0] if biases else None


def decode(folder, model, base):
    """({"params/...": leaf}, labels) of a directory's head, {} and None without one.

    base: {path: shape} of the base tree. Raises Mistake for another function than the model's head.
    """
    fields, file = _fields(folder), folder / CONFIG
    if fields is None:
        return {}, None
    check_base(file, fields, model)
    kind, config = fields.get("model_class"), fields.get("config")
    if kind == class_of(model) + STATIC:
        places = _static(model)
    elif kind in [class_of(model) + end for end in FLEXIBLE] and isinstance(config, dict):
        places = _flexible(fields.get("name"), _modules(file, config, model))
    else:
        known = f"{class_of(model)}{STATIC} and, with a config, {class_of(model)}{FLEXIBLE[0]}"
        raise Mistake(f"{file}: model_class is {json.dumps(kind)}; {known} are known here")
    slots, tensors = _slots(model, places), reading.tensors(folder / HEAD[0])
    shapes = {key: in_file(leaf.layout, base[leaf.path].shape) for key, leaf in slots.items()}
    portable.check(shapes, tensors, folder / HEAD[0])
    labels = _labels(file, fields)
    if labels and len(labels) != model.config.outputs:
        raise Mistake(
            f"{file}: label2id has {len(labels)} labels for {model.config.outputs} outputs"
        )
    return {
        f"params/{leaf.path}": from_file(leaf.layout, tensors[key]) for key, leaf in slots.items()
    }, labels


def _fields(folder):
    """What head_config.json holds; None where there is no head at all."""
    if not any((folder / name).exists() for name in (CONFIG, *HEAD)):
        return None
    if not (folder / CONFIG).is_file():
        raise Mistake(f"{folder}: no {CONFIG} beside the tensors of a head")
    reading.check_there(folder, *HEAD)
    fields = reading.json_of(folder / CONFIG)
    if not isinstance(fields, dict):
        raise Mistake(f"{folder / CONFIG}: no fields of a head")
    return fields


def _modules(file, config, model):
    """Our modules of an AdapterModel's head, from the input on."""
    for field, value in config.items():
        known = field in FIELDS or field in IGNORED or value == FIXED.get(field)
        if not known and (field in FIXED or value not in (None, False, "", [], {})):
            raise Mistake(f"{file}: config.{field} is {json.dumps(value)}, which is not known here")
    told = [config.get(field, default) for field, default in FIELDS.items()]
    if told[0] == 1:
        told[1] = None  # there is nothing it could lie between
    elif isinstance(told[1], str):
        told[1] = told[1].lower()
    for known, modules in OURS[model.config.family].items():
        if told == list(known) and [type(one) for one in told] == [type(one) for one in known]:
            return modules
    layers, activation, pooler = map(json.dumps, told)
    ours = " or ".join(
        f"layers {n}, activation_function {json.dumps(one)}, use_pooler {json.dumps(pooled)}"
        for n, one, pooled in OURS[model.config.family]
    )
    raise Mistake(
        f"{file}: config.layers {layers}, activation_function {activation}, use_pooler {pooler} is "
        f"another function than the head of {model.name}: that is {ours}"
    )


def _static(model):
    """{module in a class of transformers: our module} of a head."""
    tops = [leaf for leaf in model.names.leaves if leaf.top]
    return {leaf.file.rpartition(".")[0]: leaf.path.rpartition("/")[0] for leaf in tops}


def _flexible(name, modules):
    """{module in an AdapterModel: our module}: each comes after a dropout, and an activation after
    each but the last."""
    return {f"heads.{name}.{1 + 3 * i}": module for i, module in enumerate(modules)}


def _slots(model, places):
    """{key: row of the names table} of the tensors in model_head.safetensors."""
    leaves = {leaf.path: leaf for leaf in model.names.leaves}
    return {
        f"{theirs}.{end}": leaves[f"{ours}/{leaf}"]
        for theirs, ours in places.items()
        for end, leaf in (("weight", "kernel"), ("bias", "bias"))
    }


def _labels(file, fields):
    """Names of the outputs, None for one output or where there are none."""
    config = fields.get("config")
    told = (config if isinstance(config, dict) else fields).get("label2id")
    if told is None:
        return None
    numbers = list(told.values()) if isinstance(told, dict) else None
    ours = numbers is not None and all(reading.is_of(number, int) for number in numbers)
    if not ours or sorted(numbers) != list(range(len(numbers))):
        raise Mistake(f"{file}: label2id does not number labels from 0 on")
    return tuple(sorted(told, key=told.get)) if len(told) > 1 else None
