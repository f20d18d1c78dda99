"""Images in the user's own files: arrays in .npz, and folders with a folder for each class.

a.npz     x, y, or train_x, train_y, test_x, ...; class_names if there are any
DIR       train/CLASS/IMAGE, validation/CLASS/IMAGE, test/CLASS/IMAGE or test/IMAGE
"""

import itertools
import os
import pathlib
import re
import zipfile
import zlib

import numpy as np

from bmft.data import image_table, images
from bmft.data.sources import ALIASES, SPLITS
from bmft.errors import Mistake, nearest

SPELLINGS = {  # of a split, in names of folders and arrays
    split: (split, *(alias for alias, meant in ALIASES.items() if meant == split))
    for split in SPLITS
}
LITTER = ("Thumbs.db", "desktop.ini")  # what Windows hides


def npz(data):
    """{split: ImageTable} of data.train, data.validation and data.test, .npz files.

    A split without a file of its own may be in that of train, as test_x or validation_x. x is uint8
    [n, h, w, 3]; other shapes are refused or with data.to_rgb converted. Whole splits are loaded.
    """
    if data.train is None:
        raise Mistake("data.name='npz' needs data.train, the path of an .npz file")
    tables = {}
    for split in SPLITS:
        own = getattr(data, split) is not None
        key = f"data.{split}" if own else "data.train"
        path = pathlib.Path(getattr(data, split) or data.train).expanduser()
        with _open(path, key) as arrays:
            prefixes = [f"{word}_" for word in SPELLINGS[split]] + [""] * own
            prefix = next((p for p in prefixes if f"{p}x" in arrays.files), None)
            if prefix is not None:
                tables[split] = _npz_table(arrays, path, prefix, split != "test", data.to_rgb)
            elif own:
                known = ", ".join(arrays.files)
                raise Mistake(f"{path} has no array 'x' or '{split}_x' ({key}); known: {known}")
    return tables


def _open(path, key):
    if path.suffix.lower() != ".npz":
        raise Mistake(f"{key}={str(path)!r}: unknown ending; known: .npz")
    if not path.is_file():
        raise Mistake(f"{key}: no file {str(path)!r}{_neighbour(path)}")
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise Mistake(f"{path} is no readable .npz file: {error}") from None


def _array(arrays, path, name):
    try:
        return arrays[name]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise Mistake(f"{path} {name}: {error}") from None


def _npz_table(arrays, path, prefix, labelled, to_rgb):
    name, label, classes = f"{prefix}x", f"{prefix}y", None
    pixels = _pixels(_array(arrays, path, name), f"{path} {name}", to_rgb)
    if labelled and label not in arrays.files:
        raise Mistake(f"{path} has no array {label!r}; {nearest(label, arrays.files)}")
    labels = _array(arrays, path, label) if label in arrays.files else None
    if "class_names" in arrays.files:
        classes = tuple(map(str, _array(arrays, path, "class_names").tolist()))
        if len(set(classes)) < len(classes):
            raise Mistake(f"{path} class_names: two classes have one name: {', '.join(classes)}")
    return image_table.build(pixels, labels, f"{path} {name}", names=classes, labelled=labelled)


def _pixels(array, source, to_rgb):
    """uint8 [n, h, w, 3] of the images in `array`."""
    if not array.ndim or not len(array):
        raise Mistake(f"{source} holds no images")
    try:
        images.rgb(array[0], to_rgb)  # what holds for one holds for all of them
    except images.Unreadable as bad:
        raise images.Unreadable(bad.reason, bad.hint, source) from None
    if array.ndim == 4 and array.shape[3] == 3:
        return array
    return np.stack([images.rgb(image) for image in array])


def folders(data):
    """{split: ImageTable} of data.train, data.validation and data.test, or of data.dir/train, ...

    Classes are in natural order of their folders' names (`2` before `10`). Images come in turn from
    each class, so that the first of them (data.max_train_examples) are of all. Hidden files are
    passed over; other files that are no images, and folders of classes without any, are refused, or
    with data.skip_bad left out.
    """
    return {
        split: _folder_table(folder, key, split, data)
        for split, (folder, key) in _split_folders(data).items()
    }


def _split_folders(data):
    """{split: (folder, what named it)}"""
    own = {split: getattr(data, split) for split in SPLITS if getattr(data, split) is not None}
    if data.dir is None:
        if "train" not in own:
            raise Mistake(
                "data.name='folders' needs data.train, a folder with a folder for each class, or "
                "data.dir, a folder that holds train and test so"
            )
        return {split: (_folder(own[split], f"data.{split}"), f"data.{split}") for split in own}
    if own:
        split = next(iter(own))
        raise Mistake(f"data.dir={data.dir!r} and data.{split}={own[split]!r}: give one of the two")
    root = _folder(data.dir, "data.dir")
    found = {}
    for split, words in SPELLINGS.items():
        there = [root / word for word in words if (root / word).is_dir()]
        if len(there) > 1:
            raise Mistake(f"data.dir: {there[0]} and {there[1]} are both the {split} split")
        if there:
            found[split] = (there[0], "data.dir")
    if "train" not in found:
        known = nearest("train", [path.name for path in root.iterdir() if path.is_dir()])
        hint = "where its folders are classes set data.train instead"
        raise Mistake(f"data.dir: no folder {str(root / 'train')!r}; {known}; {hint}")
    return found


def _folder(path, key):
    path = pathlib.Path(path).expanduser()
    if not path.is_dir():
        raise Mistake(f"{key}: no folder {str(path)!r}{_neighbour(path)}")
    return path


def _neighbour(path):
    """What is of a similar name in the same folder, as the end of a message."""
    if not path.parent.is_dir():
        return f": there is no folder {str(path.parent)!r}"
    names = [other.name for other in path.parent.iterdir() if not _hidden(other.name)]
    return f"; {nearest(path.name, names)}" if names else ""


def _folder_table(folder, key, split, data):
    inside = [path for path in folder.iterdir() if not _hidden(path.name)]
    classes = sorted((path for path in inside if path.is_dir()), key=_natural)
    loose = sorted((path for path in inside if not path.is_dir()), key=_natural)
    if not classes and split == "test":  # the images lie in the folder itself: no labels
        paths, bad = _images_of(loose, data.skip_bad)
        table = image_table.build(paths, None, str(folder), labelled=False)
    else:
        _refuse_other_layouts(folder, key, classes)
        bad = _bad(loose, "outside of the folders of the classes", data.skip_bad)
        found, others = _by_class(classes, data.skip_bad)
        bad += others
        columns = [[(path, i) for path in paths] for i, paths in enumerate(found.values())]
        in_turn = [pair for row in itertools.zip_longest(*columns) for pair in row if pair]
        paths, labels = [path for path, _ in in_turn], [label for _, label in in_turn]
        table = image_table.build(paths, labels, str(folder), names=tuple(found))
    return image_table.skip(table, bad, "file")


def _refuse_other_layouts(folder, key, classes):
    words = [word for spellings in SPELLINGS.values() for word in spellings]
    if not classes:
        raise Mistake(f"{key}: {str(folder)!r} has no folder for a class in it")
    if all(path.name in words for path in classes):
        inside = ", ".join(path.name for path in classes)
        raise Mistake(f"{key}: {str(folder)!r} holds splits ({inside}), not classes; set data.dir")


def _by_class(folders, skip_bad):
    """{name: images} of the classes, and what is left out."""
    found, bad = {}, []
    for folder in folders:
        below = []
        for root, inside, names in os.walk(folder, followlinks=True):
            inside[:] = [name for name in inside if not _hidden(name)]
            below += [pathlib.Path(root, name) for name in names if not _hidden(name)]
        paths, others = _images_of(sorted(below, key=_natural), skip_bad)
        bad += others
        if paths:
            found[folder.name] = paths
        else:
            bad += _bad([folder], "the folder of a class without images", skip_bad)
    return found, bad


def _images_of(paths, skip_bad):
    """The images of `paths`, and what is left out."""
    good = [path for path in paths if path.suffix.lower() in images.ENDINGS]
    others = [path for path in paths if path.suffix.lower() not in images.ENDINGS]
    return good, _bad(others, "no image by its ending", skip_bad)


def _bad(paths, reason, skip_bad):
    """[(path, reason)]; without skip_bad the first is a Mistake."""
    if paths and not skip_bad:
        raise images.Unreadable(reason, image_table.LEAVE_OUT, paths[0])
    return [(str(path), reason) for path in paths]


def _hidden(name):
    return name.startswith(".") or name in LITTER


def _natural(path):
    """Key to sort by, in which `class2` comes before `class10`."""
    parts = re.split("([0-9]+)", str(path))
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], str(path)
