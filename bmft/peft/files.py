"""Adapter directories, out and in: adapter_config.json and adapter_model.safetensors.

One method that Hugging Face PEFT has too stands there as PEFT writes it, a tensor a module and
layer, in torch's layout; PEFT loads it and computes the same (bmft.peft.portable):

    base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight     [r, in]
    base_model.model.bert.encoder.layer.0.attention.self.query.base_layer.bias   a moved bias
    base_model.model.classifier.weight                                           the head

Anything else stands by our own paths, whole stacks, under the peft_type `BMFT_<METHOD>`
(bmft.peft.own).

AdapterHub's directories are read, too (bmft.peft.adapterhub).

Running statistics that moved are in either: `running_mean` of a norm that stands there whole, or
`batch_stats/stem/norm/mean`. An adapter without them leaves the base's.

The base's fingerprint and the label names travel in the metadata, which PEFT does not look at.
Reading is strict: what is not understood and could change the outputs is refused by its name.
"""

import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from bmft import peft, tree
from bmft.errors import Mistake, nearest
from bmft.peft import adapterhub, adapterhub_head, matching, own, portable, reading

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
# PEFT's task_type of text classifiers; it has none for images, which are adapted without, or with
# the one of encoders.
TEXT, IMAGES, LANGUAGE = ("SEQ_CLS", None), (None, "FEATURE_EXTRACTION"), ("CAUSAL_LM", None)
# The bias of a head's last layer: ours, and as transformers, torchvision and timm call it.
HEAD_BIAS = (
    r"params/classifier/out/bias|"
    r"base_model\.(model\.)?(classifier(\.\d|\.out_proj)?|fc|linear|head)\.bias"
)
LABELS_KEY = "bmft_labels"

# What any configuration may say that makes no difference to what a trained adapter computes.
COMMON = (
    *("task_type", "inference_mode", "peft_version", "base_model_name_or_path"),
    *("revision", "auto_mapping", "runtime_config"),
)
ABOUT = ("peft_type", *COMMON)
# On which modules: {field: (types, PEFT's default)}; bmft.peft.matching says what they mean.
WHERE = {
    "target_modules": ((list[str], str), None),
    "exclude_modules": ((list[str], str), None),
    "layers_to_transform": ((list[int], int), None),
    "layers_pattern": ((list[str], str), None),
    "modules_to_save": ((list[str],), None),
}


class Files(NamedTuple):
    """How a built method's leaves stand in a PEFT adapter, one module of one layer at a time.

    Leaves and tensors are NumPy arrays, without the layer axis; tensors in torch's layout.
    """

    settings: dict  # the method's fields of adapter_config.json, peft_type among them
    sites: dict  # the modules it is on: {module path: bool [l], or [] outside the stack}
    modules_to_save: tuple = ()  # as the user wrote them
    # (module path, layer or None, {leaf name: array}, constants among them)
    # -> {key after the module's name: tensor}; needed where it adds leaves
    encode: Callable | None = None
    # (module path, layer or None, {key after the module's name: tensor}) -> {leaf name: array}
    decode: Callable | None = None
    kinds: tuple = ("dense", "conv")  # of modules it may be on
    parts: dict | None = None  # {field: those of `sites` that it means}, beside target_modules
    by_layer: bool = True  # has its configuration a layers_to_transform?
    copies: str | None = None  # what PEFT calls the whole copy that it trains of a site, if it does
    elsewhere: float | dict = 0.0  # of its leaves, or {name: of each}, in layers that it is not on
    # {collection/path: leaf} of the leaves that are at no site -> {whole key: tensor}, and back
    # from all tensors of a file
    encode_others: Callable | None = None
    decode_others: Callable | None = None
    # Of a whole file, where its fields or shapes depend on what was learnt: last in writing,
    # (fields, {key: tensor}) -> both; first in reading, (fields, {key: tensor}) -> {key: tensor}
    pack: Callable | None = None
    unpack: Callable | None = None
    prefix: str = portable.PREFIX  # of the keys of modules trained whole
    expressible: Callable | None = None  # model -> can PEFT compute it? None: always
    # Has its configuration a modules_to_save? If not, PEFT's own files hold no head; what stands in
    # one is read, by PEFT and by us.
    saves: bool = True
    own: str | None = None  # BMFT_<own> is its peft_type where PEFT cannot; None: its name


class Layout(NamedTuple):
    """How a method is read from PEFT's configuration: the `LAYOUT` of the method's file."""

    peft_type: str  # "LORA"
    fields: dict  # those it reads: {field: (types, PEFT's default)}
    ignored: tuple  # those that make no difference to a trained adapter
    defaults: dict  # {field: the one value it may have, beside null, false and empty}
    # ({field: value}, of `fields` and of WHERE, names table) -> arguments of the method's make
    arguments: Callable
    # fields -> bool, where methods share a peft_type: is it this one's? None: if no other's
    takes: Callable | None = None
    # (fields, model): raises Mistake if they speak of a model of other sizes
    fits: Callable | None = None


class Adapter(NamedTuple):
    """An adapter directory, read for a model."""

    methods: tuple  # built
    names: tuple  # of the methods
    groups: dict  # {method's name: arguments of its make}
    leaves: dict  # {"params/...": float32 array, "peft/...": ...}: whole stacks
    rows: dict  # {"params/...": bool [l]}: leaves of which only these layers are meant
    labels: tuple | None
    file: Path  # of the tensors
    repeated: dict  # {"params/...": leaf}: base leaves that are in it and did not move


class Card(NamedTuple):
    """What an adapter directory says of itself, before there is a model."""

    peft_type: str
    base: str | None  # the base, as its trainer called it
    fingerprint: str | None  # of the base; None in files that are not ours
    labels: tuple | None
    outputs: int | None  # numbers the head gives; None: there is no head that has a name we know
    task_type: str | None = None  # as PEFT calls it


# --- out -------------------------------------------------------------------------------------


def write(folder, methods, groups, model, moving, frozen, *, base, fingerprint, labels=None):
    """Writes the two files into `folder`, which is made if need be.

    methods, groups: as built, and {name: group of the config}; moving, frozen: trees of variables,
    whole on this host; base: what the model is called; labels: names, None where there are none.
    """
    task, encoded = _tasks(model)[0], None
    if len(methods) == 1 and methods[0].files:
        encoded = portable.encode(methods[0], model, moving, frozen, _implied(task))
    settings, tensors = encoded or own.encode(methods, groups, model, moving, frozen)
    settings |= {"base_model_name_or_path": base, "task_type": task, "inference_mode": True}
    about = {"format": "pt", reading.BASE_KEY: fingerprint}
    if labels is not None:
        about[LABELS_KEY] = json.dumps(list(labels))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    reading.write_tensors(folder / TENSORS, tensors, about)
    reading.write_json(folder / CONFIG, settings)


def _tasks(model):
    """The task_types that an adapter of the model may have, the first of which is written."""
    if model.names.head:
        return LANGUAGE
    return IMAGES if "images" in model.dummy else TEXT


def _implied(task):
    """What PEFT takes for modules_to_save of a task_type, whatever the file says."""
    return matching.HEADS if task == TEXT[0] else ()


# --- in --------------------------------------------------------------------------------------


def card(folder):
    """The `Card` of an adapter directory; Mistake if it is none."""
    folder = Path(folder)
    fields = _read_config(folder)
    file = _file_of(folder, fields)
    about, shapes = reading.headers(file)
    if adapterhub.is_one(fields):
        labels, outputs = adapterhub_head.about(folder)
        base = fields.get("model_name")  # empty of a model that was never in a file
        base = base if base and isinstance(base, str) else None
        return Card(adapterhub.NAME, base, about.get(reading.BASE_KEY), labels, outputs)
    heads = sorted(key for key in shapes if re.fullmatch(HEAD_BIAS, key))
    return Card(
        peft_type=fields["peft_type"],
        base=fields.get("base_model_name_or_path"),
        fingerprint=about.get(reading.BASE_KEY),
        labels=_labels(about, file),
        outputs=shapes[heads[-1]][0] if heads and shapes[heads[-1]] else None,
        task_type=fields.get("task_type"),
    )


def tensors_of(folder):
    """({key: float32 array}, files) of an adapter directory: its tensors, as they are called
    there, and the files they are from."""
    folder = Path(folder)
    files = [_file_of(folder, _read_config(folder))]
    head = folder / adapterhub_head.HEAD[0]
    if files[0].name == adapterhub.ADAPTER[0] and head.is_file():
        files.append(head)
    return {key: array for file in files for key, array in reading.tensors(file).items()}, files


def read(folder, model, *, fingerprint=None):
    """The `Adapter` in a directory, for a model, whose weights need not be read.

    fingerprint: the base's; an adapter that was trained on another is refused. Raises Mistake,
    naming file and field or tensor, for what is missing, unknown, or does not fit.
    """
    folder = Path(folder)
    fields = _read_config(folder)
    hub, file = adapterhub.is_one(fields), _file_of(folder, fields)
    about, _ = reading.headers(file)
    if fingerprint and about.get(reading.BASE_KEY, fingerprint) != fingerprint:
        trained_on = fields.get("model_name" if hub else "base_model_name_or_path")
        raise Mistake(
            f"{folder}: the adapter was trained on another base ({trained_on!r}) than "
            f"{model.name!r}: its weights have the fingerprint {about[reading.BASE_KEY][:12]}, "
            f"these {fingerprint[:12]}"
        )
    if hub:
        methods, groups, leaves, labels = adapterhub.decode(folder, fields, model)
        return Adapter(methods, ("adapter",), groups, leaves, {}, labels, file, {})
    asked, known = fields.get("task_type"), _tasks(model)
    if asked not in known:
        known = " and ".join(map(repr, known))
        raise Mistake(f"{folder / CONFIG}: task_type {asked!r}; {known} are known for {model.name}")
    tensors = reading.tensors(file)
    if fields["peft_type"].startswith(own.PREFIX):
        others = {field: value for field, value in fields.items() if field not in COMMON}
        read = own.decode(others, tensors, model, folder / CONFIG, file)
    else:
        read = _decode(folder, fields, tensors, model)
    methods, groups, leaves, rows, repeated = read
    names = tuple(method.name for method in methods)
    return Adapter(methods, names, groups, leaves, rows, _labels(about, file), file, repeated)


def insert(adapter, base, fresh=()):
    """All variables of a loaded base (`Loaded.variables`) and an `Adapter` for it.

    fresh: paths that no base file had; Mistake if the adapter has them neither, or if it repeats a
    leaf of the base otherwise than the base has it.
    """
    lost = [path for path in fresh if f"params/{path}" not in adapter.leaves]
    if lost:
        raise Mistake(f"{adapter.file}: has no {lost[0]}, and nor has the base: it would be random")
    flat = tree.flatten({**base, **peft.constants(adapter.methods)})
    for path, leaf in adapter.repeated.items():
        if not np.array_equal(jnp.asarray(leaf, flat[path].dtype), flat[path]):
            raise Mistake(
                f"{adapter.file}: its {path.removeprefix('params/')} is not the base's: it "
                "was trained on another base, or with a vocabulary of its own"
            )
    for path, leaf in adapter.leaves.items():
        if path in adapter.rows:
            mask = adapter.rows[path].reshape(-1, *[1] * (leaf.ndim - 1))
            leaf = jnp.where(mask, leaf, flat[path])
        flat[path] = jnp.asarray(leaf)
    return tree.unflatten(flat)


def _decode(folder, fields, tensors, model):
    """(methods, groups, leaves, rows, repeated) of PEFT's layout."""
    layouts = {name: layout for name in peft.names() if (layout := _layout(name))}
    # One that takes these very fields goes before one that takes any.
    sharing = sorted(layouts, key=lambda name: layouts[name].takes is None, reverse=True)
    types = {
        layouts[name].peft_type: name
        for name in sharing
        if layouts[name].takes is None or layouts[name].takes(fields)
    }
    file = folder / CONFIG
    if fields["peft_type"] not in types:
        others = [own.PREFIX + name.upper() for name in peft.names()]
        near = nearest(fields["peft_type"], [*types, *others])
        raise Mistake(f"{file}: peft_type {fields['peft_type']!r} is not known here; {near}")
    name, spoken = types[fields["peft_type"]], portable.dialect(model.names, tensors)
    try:
        settings = _settings(fields, layouts[name])
        if layouts[name].fits:
            layouts[name].fits(settings, model)
        groups = {name: layouts[name].arguments(settings, spoken)}
        methods = peft.build(model, (name,), groups)
        shapes = portable.expected(methods, model)
        if methods[0].files.unpack:
            tensors = methods[0].files.unpack(settings, tensors)
    except Mistake as mistake:
        raise Mistake(f"{file}: {mistake}") from None
    saved, model = settings["modules_to_save"], model._replace(names=spoken)
    leaves = portable.decode(methods[0], model, shapes, tensors, saved, folder / TENSORS)
    return methods, groups, *leaves


def _layout(name):
    return getattr(importlib.import_module(f"bmft.peft.{name}"), "LAYOUT", None)


def _settings(fields, layout):
    """{field: value} of all that a layout reads; whatever else says something is refused."""
    reads = layout.fields | WHERE
    for field, value in fields.items():
        silent = value is None or value is False or value in ("", [], {})
        known = field in reads or field in ABOUT or field in layout.ignored
        if not known and not silent and value != layout.defaults.get(field):
            raise Mistake(f"field {field!r} is {json.dumps(value)}, which is not known here")
    settings = {}
    for field, (types, default) in reads.items():
        value = fields.get(field, default)
        if not (value is None and not default) and not any(
            reading.is_of(value, kind) for kind in types
        ):
            raise Mistake(f"field {field!r} cannot be {json.dumps(value)}")
        settings[field] = default if value is None else value
    implied = _implied(fields.get("task_type"))
    settings["modules_to_save"] = [*(settings["modules_to_save"] or ()), *implied]
    return settings


# --- files -----------------------------------------------------------------------------------


def _read_config(folder):
    """adapter_config.json as a dict that has a peft_type, or is AdapterHub's."""
    file = folder / CONFIG
    if not file.is_file():
        raise Mistake(f"{str(folder)!r} is no adapter directory: it has no {CONFIG}")
    fields = reading.json_of(file)
    hub = adapterhub.is_one(fields)
    if not hub and not (isinstance(fields, dict) and isinstance(fields.get("peft_type"), str)):
        raise Mistake(f"{file}: no peft_type, as PEFT's have, and no AdapterHub's config")
    reading.check_there(folder, *((adapterhub.ADAPTER) if hub else (TENSORS, PICKLE)))
    return fields


def _file_of(folder, fields):
    """The file of an adapter's tensors."""
    return folder / (adapterhub.ADAPTER[0] if adapterhub.is_one(fields) else TENSORS)


def _labels(about, file):
    """The label names in a file's metadata; None if there are none."""
    if LABELS_KEY not in about:
        return None
    try:
        labels = json.loads(about[LABELS_KEY])
    except (ValueError, RecursionError):
        labels = None
    if not reading.is_of(labels, list[str]):
        raise Mistake(f"{file}: {LABELS_KEY} in the metadata is no list of texts")
    return tuple(labels)
