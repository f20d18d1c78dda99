"""Where images come from: what is read, and what is refused in which words."""

import io
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from bmft.data import image_sources, images, tfds
from bmft.data.image_table import ImageTable, Records
from bmft.data.images import Resize, decode
from bmft.data.text import cache_directory
from bmft.errors import Mistake
from configs import base

NAMES = ("cat", "dog")


def data(**changes):
    """The data group of a config for images."""
    group = base.get_config().data
    with group.unlocked():
        group.update({key: default for key, (_, default) in image_sources.KEYS.items()})
    group.update(changes)
    return group


def load(**changes):
    """The tables as a run gets them: whole, and every image readable."""
    group = data(**changes)
    found, cache = image_sources.load(group), cache_directory()
    return {
        split: images.check(t, skip_bad=group.skip_bad, cache=cache) for split, t in found.items()
    }


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(image, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind)
    return file.getvalue()


def colour(i):
    """The bytes of an image whose colour says that it is number i."""
    return encoded(np.full((5, 7, 3), [i, 255 - i, 0], np.uint8))


def numbers(table):
    """Which images of `colour` a table holds."""
    return [int(decode(table.images[i], Resize(4))[0, 0, 0]) for i in range(table.size)]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


# Digits


def test_digits():
    tables = load(name="digits")
    assert list(tables) == ["train", "validation", "test"]
    assert [table.size for table in tables.values()] == [1437, 180, 180]
    for table in tables.values():
        assert table.images.shape[1:] == (8, 8, 3)
        assert table.images.dtype == np.uint8
        assert (table.images.min(), table.images.max()) == (0, 255)
        assert (table.images == table.images[..., :1]).all()
        assert set(table.labels) == set(range(10))
        assert table.names == tuple("0123456789")
    assert min(np.bincount(tables["test"].labels)) == 10  # as the docstring says
    assert max(np.bincount(tables["test"].labels)) == 31
    assert tables["test"].where(3) == "digits test row 30"
    assert tables["validation"].where(3) == "digits validation row 31"
    assert tables["train"].labels[:8].tolist() == [2, 3, 4, 5, 6, 7, 8, 9]


def test_the_first_so_many():
    tables = load(name="digits", max_train_examples=8)
    assert [table.size for table in tables.values()] == [8, 180, 180]
    assert tables["train"].labels.tolist() == [2, 3, 4, 5, 6, 7, 8, 9]
    assert tables["train"].notes == ()
    tables = load(name="digits", max_train_examples=25)
    assert tables["train"].notes == ("the first 25 images are of 8 of 10 classes",)
    assert image_sources.load(data(name="digits"), splits=("test",)).keys() == {"test"}


# Names and keys


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "digit"}, "data.name='digit' is no source of images; did you mean 'digits'"),
        ({"name": "tweets"}, "data.name='tweets' is no source of images; "),
        ({"name": "hub:"}, "data.name='hub:'"),
        ({"name": "digits", "dir": "x"}, "data.dir='x' is not read with data.name='digits'"),
        ({"name": "digits", "to_rgb": True}, "data.to_rgb=True is not read .*none of these keys"),
        ({"name": "digits", "validation_share": 0.1}, "data.validation_share=0.1 is not read"),
        ({"name": "npz", "dir": "x"}, "data.dir='x' is not read .*; it reads data.train, "),
        ({"name": "npz", "train": "a.npz", "image": "img"}, "data.image='img' is not read"),
        ({"name": "folders", "label": "y"}, "data.label='y' is not read"),
        ({"name": "tfds:x", "train": "y"}, "data.train='y' is not read"),
        ({"name": "hub:a/b", "text": "y"}, "data.text='y' is not read"),
        ({"name": "npz"}, "data.name='npz' needs data.train"),
        ({"name": "folders"}, "data.name='folders' needs data.train, .* or data.dir"),
        ({"name": "hub:a/b", "dir": "/no/where"}, "data.dir: no folder '/no/where'"),
        ({"name": "tfds:a", "dir": "/no/where"}, "data.dir: no folder '/no/where'"),
    ],
)
def test_wrong_names_and_keys(changes, message):
    with pytest.raises(Mistake, match=message):
        load(**changes)


# Arrays


def npz(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


def arrays(n, prefix="", seed=0, classes=2):
    return {f"{prefix}x": noise(n, 6, 5, 3, seed=seed), f"{prefix}y": np.arange(n) % classes}


def test_one_npz_with_all_splits(tmp_path):
    content = arrays(9, "train_") | arrays(4, "val_", 1) | arrays(5, "test_", 2)
    path = npz(tmp_path / "a.npz", **content, class_names=np.array(NAMES), more=np.zeros(3))
    tables = load(name="npz", train=path)
    assert list(tables) == ["train", "validation", "test"]
    for split, prefix in [("train", "train_"), ("validation", "val_"), ("test", "test_")]:
        assert np.array_equal(tables[split].images, content[f"{prefix}x"])
        assert np.array_equal(tables[split].labels, content[f"{prefix}y"])
        assert (tables[split].names, tables[split].notes) == (NAMES, ())
    assert tables["validation"].where(2) == f"{path} val_x row 2"
    assert tables["train"].take(np.array([4, 7])).where(1) == f"{path} train_x row 7"


def test_npz_files_of_their_own(tmp_path):
    train = npz(tmp_path / "train.npz", **arrays(9), **arrays(7, "test_", 1))
    test = npz(tmp_path / "test.npz", x=noise(3, 6, 5, 3, seed=2))
    tables = load(name="npz", train=train, test=test)
    assert [(split, table.size) for split, table in tables.items()] == [("train", 9), ("test", 3)]
    assert tables["train"].names == ("0", "1")
    assert tables["test"].labels is None
    note = f"{test} x has no labels: it is predicted for, not measured"
    assert tables["test"].notes == (note,)
    tables = load(name="npz", train=train, validation=train)
    assert np.array_equal(tables["validation"].images, tables["train"].images)
    assert tables["test"].size == 7


def test_labels_follow_the_names_of_train(tmp_path):
    train = npz(tmp_path / "a.npz", **arrays(9), class_names=np.array(NAMES))
    other = npz(tmp_path / "b.npz", x=noise(3, 6, 5, 3), y=[0, 1, 1], class_names=NAMES[::-1])
    tables = load(name="npz", train=train, test=other)
    assert tables["test"].labels.tolist() == [1, 0, 0]
    assert tables["test"].names == NAMES
    wrong = npz(tmp_path / "c.npz", x=noise(1, 6, 5, 3), y=[0], class_names=["dogs"])
    with pytest.raises(Mistake, match=r"c\.npz x: train has no class 'dogs'; did you mean 'dog'"):
        load(name="npz", train=train, test=wrong)


GOOD = arrays(6)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD | {"y": [0, 1, 2, 0, 1, 0]}, "x row 2: label 2 is not one of 0 to 1; data.skip_bad"),
        (GOOD | {"y": [0, 1, 1, 0, 1, -1]}, "x row 5: label -1 is not one of 0 to 1"),
        (GOOD | {"y": [0, 1]}, "a.npz x: 6 images and 2 labels"),
        (GOOD | {"y": np.zeros(6)}, r"x row 0: the label .*0\.0.* is no class number"),
        (GOOD | {"y": np.zeros((6, 1), int)}, "is no class number"),
        (GOOD | {"class_names": ["cat", "cat"]}, "two classes have one name: cat, cat"),
        ({"x": GOOD["x"]}, "a.npz has no array 'y'"),
        ({"X": GOOD["x"], "y": GOOD["y"]}, "no array 'x' or 'train_x' .data.train.; known: .*X, y"),
        ({"x": GOOD["x"][:0], "y": []}, "a.npz x holds no images"),
        (GOOD | {"x": GOOD["x"] / 255}, r"x: float64 \[6, 5, 3\], not uint8"),
        (GOOD | {"x": GOOD["x"][..., 0]}, r"x: mode L \(grey\), not RGB; data.to_rgb=True"),
        (GOOD | {"x": GOOD["x"][..., :1]}, r"x: mode L \(grey\), not RGB; data.to_rgb=True"),
        (GOOD | {"x": noise(6, 5, 5, 4)}, r"x: mode RGBA \(with transparency\), not RGB"),
        (GOOD | {"x": noise(6, 3, 8, 8)}, r"x: an array \[3, 8, 8\].*transpose it"),
        (GOOD | {"x": noise(6, 0, 8, 3)}, "x: 8 x 0 pixels"),
        (GOOD | {"x": np.array([None] * 6)}, "a.npz x: .*allow_pickle"),
    ],
)
def test_wrong_npz(content, message, tmp_path):
    path = npz(tmp_path / "a.npz", **({"class_names": NAMES} | content))
    with pytest.raises(Mistake, match=message) as raised:
        load(name="npz", train=path)
    assert "\n" not in str(raised.value)


def test_wrong_npz_files(tmp_path):
    path = npz(tmp_path / "a.npz", **GOOD)
    cut = tmp_path / "cut.npz"
    cut.write_bytes(pathlib.Path(path).read_bytes()[:-100])
    damaged = bytearray(pathlib.Path(path).read_bytes())
    damaged[200] ^= 255
    (tmp_path / "bits.npz").write_bytes(damaged)
    (tmp_path / "text.npz").write_text("no zip")
    np.save(tmp_path / "a.npy", GOOD["x"])
    for name, message in [
        ("cut.npz", "cut.npz is no readable .npz file"),
        ("text.npz", "text.npz is no readable .npz file"),
        ("bits.npz", "bits.npz x: .*"),
        ("a.npy", r"data\.train='.*a\.npy': unknown ending; known: \.npz"),
        ("aa.npz", r"data\.train: no file '.*aa\.npz'; did you mean 'a\.np"),
    ]:
        with pytest.raises(Mistake, match=message) as raised:
            load(name="npz", train=str(tmp_path / name))
        assert "\n" not in str(raised.value)
    with pytest.raises(Mistake, match=r"data\.test: no file .* there is no folder '.*none'"):
        load(name="npz", train=path, test=str(tmp_path / "none" / "a.npz"))


def test_labels_without_names_have_no_gap(tmp_path):
    path = npz(tmp_path / "a.npz", x=noise(3, 6, 5, 3), y=[0, 1, 3])
    with pytest.raises(Mistake, match="the labels go to 3 and have no names, but none is 2"):
        load(name="npz", train=path)
    path = npz(tmp_path / "b.npz", x=noise(3, 6, 5, 3), y=[0, 2**60, 1])
    with pytest.raises(Mistake, match="the labels go to 1152921504606846976 .* but none is 2"):
        load(name="npz", train=path)


@pytest.mark.parametrize("shape", [(4, 6, 5), (4, 6, 5, 1), (4, 6, 5, 4)])
def test_arrays_are_converted_when_asked(shape, tmp_path):
    content = noise(*shape)
    path = npz(tmp_path / "a.npz", x=content, y=[0, 1, 0, 1])
    table = load(name="npz", train=path, to_rgb=True)["train"]
    assert (table.images.shape, table.images.dtype) == ((4, 6, 5, 3), np.uint8)
    if shape[-1] == 4:
        alpha = content[..., 3:] / 255
        expected = content[..., :3] * alpha + 255 * (1 - alpha)  # on white
        assert abs(table.images - expected).max() <= 1
    else:
        assert np.array_equal(table.images[..., 2], content.reshape(4, 6, 5))


def test_labels_out_of_range_are_left_out_when_asked(tmp_path):
    labels = [0, 1, 2, 1, -1, 0, 9, 9, 9, 9, 9]
    path = npz(tmp_path / "a.npz", x=noise(11, 6, 5, 3), y=labels, class_names=NAMES)
    table = load(name="npz", train=path, skip_bad=True)["train"]
    assert table.labels.tolist() == [0, 1, 1, 0]
    assert np.array_equal(table.images, noise(11, 6, 5, 3)[[0, 1, 3, 5]])
    assert [table.where(row)[-5:] for row in range(4)] == ["row 0", "row 1", "row 3", "row 5"]
    where = f"{tmp_path.name}/a.npz x row"
    assert table.notes == (
        f"7 images left out: {where} 2 (label 2), {where} 4 (label -1), {where} 6 (label 9), "
        f"{where} 7 (label 9), {where} 8 (label 9), ...",
    )
    assert table.skipped[0] == f"{path} x row 2 (label 2)"
    assert len(table.skipped) == 7
    path = npz(tmp_path / "b.npz", x=noise(2, 6, 5, 3), y=[5, 5], class_names=NAMES)
    with pytest.raises(Mistake, match="b.npz x: no image can be used: .*b.npz x row 0: label 5"):
        load(name="npz", train=path, skip_bad=True)


@pytest.mark.parametrize("share", [0.1, 0.25])
def test_a_share_of_train_is_held_out_by_class(share, tmp_path):
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [60, 20, 1]))
    path = npz(tmp_path / "a.npz", x=noise(81, 2, 2, 3), y=labels)
    tables = load(name="npz", train=path, validation_share=share)
    train, held = tables["train"], tables["validation"]
    assert list(tables) == ["train", "validation"]
    assert np.bincount(held.labels).tolist() == [60 * share, 20 * share]
    assert sorted([*train.numbers, *held.numbers]) == list(range(81))
    assert not np.array_equal(held.numbers, np.arange(held.size))
    for table in (train, held):
        assert np.array_equal(table.labels, labels[table.numbers])
        assert np.array_equal(table.images, noise(81, 2, 2, 3)[table.numbers])
    assert held.notes == (f"{held.size} of 81 training images held out",)
    # The same whatever else is asked for, and part of a larger share.
    again = load(name="npz", train=path, validation_share=share, max_train_examples=5)
    assert np.array_equal(again["validation"].numbers, held.numbers)
    assert again["train"].size == 5
    more = load(name="npz", train=path, validation_share=2 * share)["validation"]
    assert set(held.numbers) < set(more.numbers)


def test_no_class_is_held_out_whole(tmp_path):
    path = npz(tmp_path / "a.npz", x=noise(4, 2, 2, 3), y=[0, 0, 0, 1])
    tables = load(name="npz", train=path, validation_share=0.9)
    assert tables["validation"].labels.tolist() == [0, 0]
    assert sorted(tables["train"].labels) == [0, 1]


def test_wrong_shares(tmp_path):
    path = npz(tmp_path / "a.npz", **arrays(9))
    for share, message in [
        (1.0, "data.validation_share=1.0 is not between 0 and 1"),
        (-0.1, "data.validation_share=-0.1 is not between"),
        (0.01, "data.validation_share=0.01 of .* is no image of any class"),
    ]:
        with pytest.raises(Mistake, match=message):
            load(name="npz", train=path, validation_share=share)
    with pytest.raises(Mistake, match="validation_share=0.1, but the data of .* has a validation"):
        load(name="npz", train=path, validation=path, validation_share=0.1)


# Folders


def make_folders(root, counts, first=0):
    """{class: how many}: images of `colour`, numbered from `first`."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            write(root / name / f"{i}.png", colour(first + i))
        first += count
    return str(root)


def test_folders(tmp_path):
    counts = {"class10": 2, "class2": 3, "Class1": 1, "02": 2}
    train = make_folders(tmp_path / "train", counts)
    test = make_folders(tmp_path / "test", {"class2": 1, "class10": 1}, 100)
    write(tmp_path / "train" / "class2" / ".DS_Store", b"x")
    write(tmp_path / "train" / "class2" / ".cache" / "a.txt", b"x")
    write(tmp_path / "train" / "Thumbs.db", b"x")
    (tmp_path / "train" / ".git").mkdir()
    tables = load(name="folders", train=train, test=test)
    table = tables["train"]
    assert table.names == ("02", "Class1", "class2", "class10")
    assert all(isinstance(path, os.PathLike) for path in table.images)
    # Of each class in turn, so that the first few are of all classes.
    assert table.labels.tolist() == [0, 1, 2, 3, 0, 2, 3, 2]
    assert numbers(table) == [6, 5, 2, 0, 7, 3, 1, 4]
    assert table.where(4) == f"{train}/02/1.png"
    assert tables["test"].labels.tolist() == [2, 3]
    assert tables["test"].names == table.names
    assert load(name="folders", train=train, max_train_examples=4)["train"].labels.tolist() == [
        0, 1, 2, 3,
    ]  # fmt: skip


def test_images_are_in_natural_order_wherever_they_lie_below_a_class(tmp_path):
    for i, name in enumerate(["2.png", "10.PNG", "a/1.jpeg", "a/b/c.webp"]):
        write(tmp_path / "cat" / name, colour(i))
    assert numbers(load(name="folders", train=str(tmp_path))["train"]) == [0, 1, 2, 3]


@pytest.mark.parametrize("word", ["validation", "val", "valid", "dev"])
def test_a_folder_of_splits(word, tmp_path):
    for split, first in [("train", 0), (word, 50), ("test", 100)]:
        make_folders(tmp_path / split, {"cat": 2, "dog": 1}, first)
    tables = load(name="folders", dir=str(tmp_path))
    assert list(tables) == ["train", "validation", "test"]
    assert numbers(tables["validation"]) == [50, 52, 51]
    assert tables["validation"].names == NAMES
    with pytest.raises(Mistake, match="data.dir='.*' and data.test='x': give one of the two"):
        load(name="folders", dir=str(tmp_path), test="x")
    with pytest.raises(Mistake, match=rf"data.train: .* holds splits \(.*{word}.*\), not classes"):
        load(name="folders", train=str(tmp_path))


def test_a_test_folder_may_hold_images_alone(tmp_path):
    make_folders(tmp_path / "train", {"cat": 2, "dog": 1})
    make_folders(tmp_path, {"test": 3}, 10)
    table = load(name="folders", dir=str(tmp_path))["test"]
    assert (numbers(table), table.labels) == ([10, 11, 12], None)
    assert table.notes[0].endswith("test has no labels: it is predicted for, not measured")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("train/cow/", r"train/cow: the folder of a class without images; data.skip_bad=True"),
        ("train/cow/.hidden", "train/cow: the folder of a class without images"),
        ("train/dog/notes.txt", r"train/dog/notes\.txt: no image by its ending; data.skip_bad"),
        ("train/dog/scan.tiff", r"scan\.tiff: no image by its ending"),
        ("train/0.png", r"train/0\.png: outside of the folders of the classes"),
        ("test/cow/0.png", r"test: train has no class 'cow'; known: cat, dog"),
        ("test/cats/0.png", r"test: train has no class 'cats'; did you mean 'cat'"),
        ("test/cat/", r"test/cat: the folder of a class without images"),
        ("valid/cat/0.png", "validation"),
    ],
)
def test_wrong_folders(wrong, message, tmp_path):
    make_folders(tmp_path / "train", {"cat": 2, "dog": 1})
    make_folders(tmp_path / "validation", {"cat": 2})
    path = tmp_path / wrong
    if wrong.endswith("/"):
        path.mkdir(parents=True)
    else:
        write(path, colour(1))
    with pytest.raises(Mistake, match=message) as raised:
        load(name="folders", dir=str(tmp_path))
    assert "\n" not in str(raised.value)


def test_missing_folders(tmp_path):
    make_folders(tmp_path / "train", {"cat": 2})
    (tmp_path / "empty").mkdir()
    for key, name, message in [
        ("train", "trian", r"data\.train: no folder '.*trian'; did you mean 'train'"),
        ("train", "none/train", "there is no folder '.*none'"),
        ("train", "empty", r"data\.train: '.*empty' has no folder for a class in it"),
        ("train", "train/cat/0.png", r"data\.train: no folder"),
        ("dir", "train", r"no folder '.*train/train'; .*; where its folders are classes set data"),
        ("dir", "none", r"data\.dir: no folder '.*none'"),
    ]:
        with pytest.raises(Mistake, match=message):
            load(name="folders", **{key: str(tmp_path / name)})


# Bad images


def bad_folder(root):
    """Seven good images, and six bad ones."""
    train = make_folders(root / "train", {"cat": 4, "dog": 3})
    whole = encoded(noise(40, 40, 3))
    write(root / "train" / "cat" / "cut.png", whole[: len(whole) // 2])
    write(root / "train" / "dog" / "grey.png", encoded(noise(8, 8)))
    write(root / "train" / "dog" / "clear.png", encoded(noise(8, 8, 4)))
    write(root / "train" / "dog" / "text.jpg", b"not found")
    write(root / "train" / "dog" / "readme.md", b"about dogs")
    (root / "train" / "cow").mkdir()
    return train


def test_bad_images_are_found_one_by_one(tmp_path):
    train = bad_folder(tmp_path)
    removed = []
    for name, message in [
        ("dog/readme.md", "no image by its ending; data.skip_bad=True leaves it out"),
        ("cow", "the folder of a class without images; data.skip_bad=True leaves it out"),
        ("dog/clear.png", r"mode RGBA \(with transparency\), not RGB; data.to_rgb=True converts"),
        ("dog/grey.png", r"mode L \(grey\), not RGB; data.to_rgb=True converts it, data.skip_bad"),
        ("cat/cut.png", "truncated; data.skip_bad=True leaves it out"),
        ("dog/text.jpg", "not an image that can be read .*; data.skip_bad=True leaves it out"),
    ]:
        path = tmp_path / "train" / name
        with pytest.raises(Mistake) as raised:
            load(name="folders", train=train)
        found = str(raised.value)
        assert "\n" not in found
        removed.append(found.partition(":")[0])
        named = tmp_path / "train" / removed[-1].removeprefix(f"{train}/")
        assert named.exists()
        if named == path:
            assert pytest.raises(Mistake, load, name="folders", train=train).match(message)
        os.rmdir(named) if named.is_dir() else named.unlink()
    assert len(set(removed)) == 6
    assert load(name="folders", train=train)["train"].size == 7


def test_bad_images_are_left_out_counted_and_listed(tmp_path):
    train = bad_folder(tmp_path)
    table = load(name="folders", train=train, skip_bad=True)["train"]
    assert sorted(numbers(table)) == list(range(7))
    assert (table.names, np.bincount(table.labels).tolist()) == (NAMES, [4, 3])
    assert [note.partition(":")[0] for note in table.notes] == [
        "2 files left out",
        "4 images left out",
    ]
    assert "dog/clear.png (mode RGBA (with transparency), not RGB)" in table.notes[1]
    assert "cat/cut.png (truncated)" in table.notes[1]
    assert set(table.skipped) == {
        f"{train}/dog/readme.md (no image by its ending)",
        f"{train}/cow (the folder of a class without images)",
        f"{train}/cat/cut.png (truncated)",
        f"{train}/dog/clear.png (mode RGBA (with transparency), not RGB)",
        f"{train}/dog/grey.png (mode L (grey), not RGB)",
        f"{train}/dog/text.jpg (not an image that can be read (JPEG, PNG, WEBP, BMP, GIF))",
    }
    converted = load(name="folders", train=train, skip_bad=True, to_rgb=True)["train"]
    assert converted.to_rgb
    assert (converted.size, len(converted.skipped)) == (9, 4)


def test_of_many_bad_images_a_note_names_a_few(tmp_path):
    for i in range(12):
        write(tmp_path / "cat" / f"{i}.png", colour(i)[: None if i % 2 else -30])
    table = load(name="folders", train=str(tmp_path), skip_bad=True)["train"]
    assert numbers(table) == [1, 3, 5, 7, 9, 11]
    assert table.notes[0].startswith("6 images left out: cat/0.png (truncated), cat/2.png (")
    assert table.notes[0].endswith("cat/8.png (truncated), ...")
    assert len(table.skipped) == 6
    for i in range(1, 12, 2):
        (tmp_path / "cat" / f"{i}.png").unlink()
    with pytest.raises(Mistake, match=r"no image can be used: .*0\.png: truncated"):
        load(name="folders", train=str(tmp_path), skip_bad=True)


def test_the_verdict_is_kept_until_a_file_changes(tmp_path, monkeypatch):
    paths = [write(tmp_path / f"{i}.png", colour(i)) for i in range(70)]
    paths[66].write_bytes(colour(66)[:-30])
    table, looked, problem = ImageTable(paths), [], images.problem
    monkeypatch.setattr(images, "problem", lambda *args: looked.append(args) or problem(*args))

    def check(**changes):
        looked.clear()
        found = images.check(table, skip_bad=True, cache=tmp_path / "cache", **changes)
        return found.size, len(looked)

    with pytest.raises(Mistake, match=r"66\.png: truncated"):
        images.check(table, cache=tmp_path / "cache")  # the first alone is no verdict
    paths[68].write_bytes(colour(68)[:-30])
    with pytest.raises(Mistake, match=r"66\.png: truncated"):
        images.check(table, cache=tmp_path / "cache")
    assert check() == (68, 70)
    assert check() == (68, 0)
    paths[68].write_bytes(colour(68))
    assert check() == (69, 70)
    assert check() == (69, 0)
    with pytest.raises(Mistake, match=r"66\.png: truncated; data.skip_bad=True"):
        images.check(table, cache=tmp_path / "cache")
    assert not looked[1:]
    paths[66].write_bytes(colour(66))
    assert check() == (70, 70)
    assert check() == (70, 0)
    (kept,) = [p for p in (tmp_path / "cache" / "images").iterdir() if p.read_text() == "[]"]
    kept.write_text('{"a": ')
    with pytest.warns(UserWarning, match="is damaged and made again"):
        assert check() == (70, 70)
    assert check() == (70, 0)
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="the check of images is not cached"):
        images.check(table, cache=tmp_path / "file")


def test_arrays_are_not_checked(monkeypatch):
    table = ImageTable(noise(3, 4, 4, 3))
    monkeypatch.setattr(images, "_find_bad", None)
    assert images.check(table) is table


# The Hub

FEATURES = {"image": {"_type": "Image"}, "label": {"names": list(NAMES), "_type": "ClassLabel"}}


def parquet(path, columns, features=FEATURES):
    """A Parquet file as Hugging Face `datasets` writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if features is not None:
        written = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
        table = table.replace_schema_metadata(written)
    pq.write_table(table, path, row_group_size=3)


def rows(*numbers_, image="image", labels=None):
    cells = [{"bytes": colour(i), "path": f"{i}.png"} for i in numbers_]
    return {image: cells, "label": [i % 2 for i in numbers_] if labels is None else labels}


def test_a_copy_of_the_hub(tmp_path):
    parquet(tmp_path / "data/train-00000-of-00002.parquet", rows(*range(8)))
    parquet(tmp_path / "data/train-00001-of-00002.parquet", rows(8, 9, 10))
    parquet(tmp_path / "data/test-00000-of-00001.parquet", rows(20, 21, labels=[-1, -1]))
    tables = load(name="hub:someone/pets", dir=str(tmp_path))
    assert list(tables) == ["train", "test"]
    train = tables["train"]
    assert isinstance(train.images, Records)
    assert numbers(train) == list(range(11))
    assert train.labels.tolist() == [i % 2 for i in range(11)]
    assert (train.names, train.where(9)) == (NAMES, "hub:someone/pets train row 9")
    assert tables["test"].labels is None
    part = train.take(slice(7, 10)).take(np.array([2, 0]))
    assert (numbers(part), part.labels.tolist()) == ([9, 7], [1, 1])
    assert part.where(0) == "hub:someone/pets train row 9"


def test_columns_of_the_hub(tmp_path):
    columns = rows(1, 2, image="img")
    parquet(tmp_path / "train.parquet", columns | {"fine": columns["label"]}, None)
    with pytest.raises(Mistake, match=r"no column 'image' \(data.image\); did you mean 'img'"):
        load(name="hub:a/b", dir=str(tmp_path))
    with pytest.raises(Mistake, match=r"no column 'lable' \(data.label\); did you mean 'label'"):
        load(name="hub:a/b", dir=str(tmp_path), image="img", label="lable")
    table = load(name="hub:a/b", dir=str(tmp_path), image="img", label="fine")["train"]
    assert (numbers(table), table.names) == ([1, 2], ("0", "1"))
    parquet(tmp_path / "train.parquet", {"image": [colour(3)], "label": [0]})  # bytes alone
    assert numbers(load(name="hub:a/b", dir=str(tmp_path))["train"]) == [3]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (rows(1, 2, labels=[0, 2]), "hub:a/b train row 1: label 2 is not one of 0 to 1"),
        (rows(1, 2, labels=["cat", "dog"]), "row 0: the label 'cat' is no class number"),
        (rows(1, 2, labels=[0, None]), "row 1: the label None is no class number"),
        ({"image": ["a.png"], "label": [0]}, "'image' is a column of string, not of images"),
        (
            {"image": [{"bytes": colour(1)}, {"bytes": None, "path": "a"}], "label": [0, 1]},
            "hub:a/b train row 1: empty, without a byte",
        ),
        (
            {"image": [{"bytes": colour(1)}, {"bytes": colour(2)[:-30]}], "label": [0, 1]},
            "hub:a/b train row 1: truncated",
        ),
    ],
)
def test_wrong_parquet(columns, message, tmp_path):
    parquet(tmp_path / "train.parquet", columns)
    with pytest.raises(Mistake, match=message):
        load(name="hub:a/b", dir=str(tmp_path))


def test_a_damaged_file_of_the_hub(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(Mistake, match="hub:a/b train: "):
        load(name="hub:a/b", dir=str(tmp_path))


def test_bad_rows_of_the_hub_are_left_out_when_asked(tmp_path):
    columns = rows(*range(6), labels=[0, 1, 0, 7, 0, 1])
    columns["image"][2]["bytes"] = encoded(noise(4, 4))
    parquet(tmp_path / "train.parquet", columns)
    table = load(name="hub:a/b", dir=str(tmp_path), skip_bad=True)["train"]
    assert numbers(table) == [0, 1, 4, 5]
    assert table.labels.tolist() == [0, 1, 0, 1]
    assert table.skipped == (
        "hub:a/b train row 3 (label 7)",
        "hub:a/b train row 2 (mode L (grey), not RGB)",
    )


# TFDS

BUILD = """
import io, sys
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

def png(*shape):
    file = io.BytesIO()
    Image.fromarray(np.full(shape[:-1], shape[-1], np.uint8)).save(file, "PNG")
    return file.getvalue()

with tfds.core.registered.skip_registration():

    class Pets(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        BUILDER_CONFIGS = [
            tfds.core.BuilderConfig(name=name, version="1.0.0") for name in ("rgb", "grey")
        ]

        def _info(self):
            channels = 3 if self.builder_config.name == "rgb" else 1
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict({
                    "image": tfds.features.Image(shape=(None, None, channels)),
                    "mask": tfds.features.Image(shape=(None, None, 1)),
                    "label": tfds.features.ClassLabel(names=["cat", "dog"]),
                    "size": np.int32,
                }),
            )

        def _split_generators(self, dl_manager):
            return {"train": self._make(40), "test": self._make(6)}

        def _make(self, n):
            rgb = self.builder_config.name == "rgb"
            for i in range(n):
                yield i, {
                    "image": png(5, 7, 3, i) if rgb else png(5, 7, i),
                    "mask": b"never decoded",
                    "label": i % 2, "size": i % 3,
                }

        def _generate_examples(self):
            pass


for name in ("rgb", "grey"):
    builder = Pets(config=name, data_dir=sys.argv[1], file_format="array_record")
    builder.download_and_prepare()
assert "tensorflow" not in sys.modules
"""

LOAD = """
import json, sys
from bmft.data import image_batches, image_sources, images
from configs import base
group = base.get_config().data
with group.unlocked():
    group.update({key: default for key, (_, default) in image_sources.KEYS.items()})
group.update({"name": "tfds:pets/rgb", "dir": sys.argv[1]})
table = image_sources.load(group)["train"]
batches = image_batches.ImageBatches(
    table, table.labels, batch_size=8, resize=images.Resize(4), shuffle=True
)
found = [batches.at(step) for step in range(7)]
assert "tensorflow" not in sys.modules and "flax" not in sys.modules
print(json.dumps([
    [batch["images"][:, 0, 0].tolist(), batch["labels"].tolist(), batch["index"].tolist()]
    for batch in found
]))
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder as TFDS prepares it."""
    folder = tmp_path_factory.mktemp("tfds")
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(folder)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return str(folder)


def test_tfds_needs_no_tensorflow(prepared):
    done = subprocess.run([sys.executable, "-c", LOAD, prepared], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = load(name="tfds:pets/rgb", dir=prepared)["train"]
    for pixels, labels, index in json.loads(done.stdout):
        assert labels == table.labels[index].tolist()
        assert pixels == [[number] * 3 for number in np.array(numbers(table))[index].tolist()]


def test_tfds(prepared):
    tables = load(name="tfds:pets/rgb", dir=prepared)
    assert [(split, table.size) for split, table in tables.items()] == [("train", 40), ("test", 6)]
    train = tables["train"]
    assert isinstance(train.images, Records)
    assert isinstance(train.images[3], bytes)
    assert sorted(numbers(train)) == list(range(40))
    assert train.labels.tolist() == [number % 2 for number in numbers(train)]
    assert (train.names, train.where(3)) == (NAMES, "pets/rgb train row 3")
    keys = {images.content_key(table) for table in tables.values()}
    assert len(keys) == 2
    assert all(os.path.isfile(path) for path in train.images.files)
    by_size = load(name="tfds:pets/rgb", dir=prepared, label="size", validation_share=0.2)
    assert by_size["train"].names == ("0", "1", "2")
    held = by_size["validation"]
    assert held.size == 9  # of 14, 13 and 13
    assert held.labels.tolist() == [number % 3 for number in numbers(held)]


def test_wrong_features_of_tfds(prepared):
    settings = {"name": "tfds:pets/rgb", "dir": prepared}
    for changes, message in [
        ({"image": "imag"}, r"pets/rgb t.* has no column 'imag' \(data.image\); did you mean 'im"),
        ({"label": "lab"}, r"no column 'lab' \(data.label\); did you mean 'label'"),
        ({"image": "mask"}, "pets/rgb t.* row 0: not an image that can be read"),
        ({"image": "size"}, r"pets/rgb t.*: 'size' is no image but "),
        (
            {"name": "tfds:pets"},
            "'pets' .* has configs: write tfds:pets/<config>; known: grey, rgb",
        ),
    ]:
        with pytest.raises(Mistake, match=message):
            load(**settings | changes)


def test_float_images_of_tfds(prepared, tmp_path):
    """TFDS stores them as PNG files of other modes, whose pixels mean something else."""
    folder = shutil.copytree(f"{prepared}/pets/rgb", tmp_path / "pets" / "rgb")
    (path,) = folder.glob("*/features.json")
    features = json.loads(path.read_text())
    features["featuresDict"]["features"]["mask"]["image"]["dtype"] = "float32"
    path.write_text(json.dumps(features))
    with pytest.raises(Mistake, match="pets/rgb t.*: 'mask' is float32, not uint8"):
        load(name="tfds:pets/rgb", dir=str(tmp_path), image="mask")


def test_tfds_needs_tensorflow_to_prepare_arrays(tmp_path, monkeypatch):
    def fail():
        raise ImportError("Failed to encode example:\n{'image': array([[[0\nNo module named 'x'")

    monkeypatch.setattr(tfds, "_check_network", fail)
    with pytest.raises(Mistake) as raised:
        load(name="tfds:cifar10", dir=str(tmp_path))
    assert "prepared (No module named 'x'); where there is a network and that package run" in str(
        raised.value
    )
    assert str(raised.value).endswith("data.name=files, for images folders or npz")


def test_grey_images_of_tfds(prepared):
    settings = {"name": "tfds:pets/grey", "dir": prepared}
    with pytest.raises(
        Mistake, match=r"pets/grey t.* row 0: mode L \(grey\), not RGB; data.to_rgb"
    ):
        load(**settings)
    table = load(**settings, to_rgb=True)["train"]
    found = [decode(table.images[i], Resize(4), table.to_rgb)[0, 0].tolist() for i in range(40)]
    assert sorted(found) == [[i] * 3 for i in range(40)]


def test_what_is_heavy_is_imported_when_needed():
    heavy = ["flax", "jax", "grain", "tensorflow_datasets", "transformers", "torch", "sklearn"]
    modules = "bmft.data.image_sources, bmft.data.image_batches"
    code = f"import sys, {modules}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(heavy) & set(done.stdout.split())
