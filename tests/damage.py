"""Ways to damage an adapter directory, and what reading one says."""

import json
import os

import pytest
from safetensors.numpy import load_file, save_file

from bmft.errors import Mistake
from bmft.peft import files

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def change(**fields):
    """Fields of adapter_config.json with other values."""

    def mutate(folder):
        path = folder / CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return mutate


def leave_out(field):
    def mutate(folder):
        path = folder / CONFIG
        fields = json.loads(path.read_text())
        del fields[field]
        path.write_text(json.dumps(fields))

    return mutate


def retensor(edit, about=None):
    """edit({key: tensor}); about: the metadata."""

    def mutate(folder):
        path = folder / TENSORS
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path, about)

    return mutate


def rename(old, new):
    def edit(tensors):
        for key in list(tensors):
            tensors[key.replace(old, new)] = tensors.pop(key)

    return retensor(edit)


def rewrite(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def remove(name):
    return lambda folder: os.remove(folder / name)


def as_folder(name):
    def mutate(folder):
        os.remove(folder / name)
        (folder / name).mkdir()

    return mutate


def pickled(folder):
    os.rename(folder / TENSORS, folder / "adapter_model.bin")


def keep(size):
    """The tensors' file cut to so many bytes; below zero: so many less."""

    def mutate(folder):
        path = folder / TENSORS
        path.write_bytes(path.read_bytes()[:size])

    return mutate


def is_refused(folder, model, says, **given):
    """Reading it is a Mistake of one line that names the file and what is wrong; looking at its
    card is nothing worse."""
    with pytest.raises(Mistake) as refused:
        files.read(folder, model, **given)
    line = str(refused.value)
    assert "\n" not in line
    assert says in line
    assert str(folder) in line
    try:
        files.card(folder)
    except Mistake as mistake:
        assert "\n" not in str(mistake)
        assert str(folder) in str(mistake)
