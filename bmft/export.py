"""What a finished run leaves for others: adapter/ and model/, written whole or not at all.

It takes functions and trees: which methods there are, and how their files look, is theirs to say.
"""

import contextlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from bmft import tree
from bmft.errors import Mistake
from bmft.names import to_file

# Keys of config.json that speak of where the base came from, or of the precision it was kept in.
OF_THE_BASE = ("_name_or_path", "torch_dtype", "transformers_version", "_preprocessor")
MEAN = "running_mean"  # of torch's BatchNorm, which also counts its batches


def adapter(folder, write, beside=None):
    """An adapter directory: `write(folder)` writes the adapter; a tokenizer, or what else has
    `save_pretrained`, lies beside it."""
    with whole(folder) as partial:
        write(partial)
        if beside is not None:
            beside.save_pretrained(partial)


def merged(folder, *, load, merge, moving, names, settings, labels, beside=None):
    """A directory that transformers loads: the methods folded into plain weights, float32.

    load() -> the base tree in float32 with its running statistics, read again from its file, since
    frozen leaves may be in a lower precision; merge(params) -> params with the methods folded in;
    moving: the tree of variables that moved, running statistics among them, whole on this host;
    names: the model's names table; settings: its config.json; labels: names of the outputs, None
    for regression, and for a language model. Raises Mistake for a method that cannot be merged.
    """
    params = {path: np.asarray(leaf, np.float32) for path, leaf in tree.flatten(load()).items()}
    for name in ("params", "batch_stats"):
        for path, leaf in tree.flatten(moving.get(name, {})).items():
            params[path] = np.asarray(leaf, np.float32)
    params = tree.flatten(merge(tree.unflatten(params)))
    with whole(folder) as partial:
        save_file(tensors(names, params), partial / "model.safetensors", {"format": "pt"})
        config = _language_config(settings) if names.head else _config(settings, labels)
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (partial / "config.json").write_text(text, encoding="utf-8")
        if beside is not None:
            beside.save_pretrained(partial)


def tensors(names, params):
    """{name in the file: tensor as it lies there} of a base tree {path: leaf}."""
    parts = {}
    for leaf in names.leaves:
        for layer in names.layers_of(leaf.path):
            array = np.asarray(params[leaf.path], np.float32)
            array = array if layer is None else array[layer]
            array = to_file(leaf.written_layout or leaf.layout, array)
            parts.setdefault(names.written(leaf).format(layer), []).append(array)
    # Leaves of one name are parts of one tensor, in their order.
    found = {name: np.ascontiguousarray(np.concatenate(p)) for name, p in parts.items()}
    for name in [name for name in found if name.endswith(MEAN)]:
        found[name.removesuffix(MEAN) + "num_batches_tracked"] = np.zeros((), np.int64)
    return found


def _config(settings, labels):
    """config.json of a classifier with these labels."""
    # From this file of transformers names can be had without PyTorch, but not the file itself.
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as images,
    )
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as texts,
    )

    classes = dict(images) | dict(texts)
    own = [classes[kind] for kind in [settings["model_type"]] if kind in classes]
    written = list(labels) if labels is not None else ["LABEL_0"]
    return _kept(settings) | {
        "architectures": own,
        "dtype": "float32",
        "num_labels": len(written),
        "id2label": {str(i): label for i, label in enumerate(written)},
        "label2id": {label: i for i, label in enumerate(written)},
        "problem_type": "regression" if labels is None else "single_label_classification",
    }


def _language_config(settings):
    """config.json of a language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as models

    own = dict(models)[settings["model_type"]]
    return _kept(settings) | {"architectures": [own], "dtype": "float32"}


def _kept(settings):
    return {key: value for key, value in settings.items() if key not in OF_THE_BASE}


@contextlib.contextmanager
def whole(folder):
    """A folder to write into, which becomes `folder` when all is written.

    What lies in `folder` already and is not written anew stays. A process killed at any moment
    leaves the old folder or the new one, at worst under the name `.<folder>.old`, from where the
    next call brings it back.
    """
    folder = Path(folder).absolute()
    partial, old = (folder.parent / f".{folder.name}.{end}" for end in ("partial", "old"))
    try:
        if old.exists() and not folder.exists():
            os.rename(old, folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        for left in (partial, old):
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir()
        yield partial
        if folder.exists():
            _carry_over(folder, partial)
            os.rename(folder, old)
        os.rename(partial, folder)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise Mistake(f"cannot write {folder}: {getattr(error, 'strerror', 0) or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _carry_over(folder, partial):
    """Copies what `folder` has and `partial` has not."""
    for path in sorted(folder.iterdir()):
        new = partial / path.name
        if path.is_dir() and not path.is_symlink():
            if new.is_dir():
                _carry_over(path, new)
            elif not new.exists():
                shutil.copytree(path, new, symlinks=True)
        elif not new.exists():
            shutil.copy2(path, new, follow_symlinks=False)
