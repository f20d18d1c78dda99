"""Pixels and batches of images: what Pillow makes of files, and the same rows on any host."""

import gc
import io
import threading

import numpy as np
import pytest
from PIL import Image
from test_batches import SHARES, together

from bmft.data import images
from bmft.data.image_batches import ImageBatches
from bmft.data.image_table import ImageTable, Records
from bmft.data.images import Resize, Unreadable, content_key, decode
from bmft.errors import Mistake

N = 53


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(image, kind="PNG", **settings):
    """The bytes of a file of this image: an array or Pillow's."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


# Resizing


@pytest.mark.parametrize("resample", images.RESAMPLE)
@pytest.mark.parametrize(
    ("height", "width", "host", "whole", "corner"),
    [
        (40, 40, 20, (20, 20), (0, 0)),
        (37, 53, 20, (28, 20), (4, 0)),  # 53 * 20 / 37 = 28.6
        (53, 37, 21, (21, 30), (0, 4)),
        (9, 5, 32, (32, 57), (0, 12)),  # up
    ],
)
def test_the_shortest_side_is_resized_and_the_centre_cut_out(
    height, width, host, whole, corner, resample
):
    image = noise(height, width, 3)
    found = decode(image, Resize(host, resample))
    left, top = corner
    expected = Image.fromarray(image).resize(whole, images.RESAMPLE[resample])
    expected = expected.crop((left, top, left + host, top + host))
    assert (found.shape, found.dtype) == ((host, host, 3), np.uint8)
    assert np.array_equal(found, np.asarray(expected))


def test_squashed_images_are_not_cut():
    image = noise(20, 60, 3)
    expected = Image.fromarray(image).resize((16, 16), Image.Resampling.BILINEAR)
    assert np.array_equal(decode(image, Resize(16, "bilinear", True)), np.asarray(expected))
    assert not np.array_equal(decode(image, Resize(16, "bilinear")), np.asarray(expected))


def test_what_has_the_right_size_is_not_touched():
    image = noise(24, 24, 3)
    for resample in images.RESAMPLE:
        assert np.array_equal(decode(image, Resize(24, resample)), image)
        assert np.array_equal(decode(encoded(image), Resize(24, resample)), image)


def test_unknown_filters():
    with pytest.raises(Mistake, match="resample='bicubicc'; did you mean 'bicubic'"):
        decode(noise(8, 8, 3), Resize(4, "bicubicc"))
    with pytest.raises(Mistake, match="resample='bi'; "):
        ImageBatches(ImageTable(noise(4, 8, 8, 3)), batch_size=2, resize=Resize(8, "bi"))


# Formats and modes


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP"])
def test_lossless_files(kind, tmp_path):
    image = noise(12, 12, 3)
    raw = encoded(image, kind, **({"lossless": True} if kind == "WEBP" else {}))
    path = tmp_path / "a.jpg"  # the content says what it is
    path.write_bytes(raw)
    for source in (raw, path, str(path)):
        assert np.array_equal(decode(source, Resize(12)), image)


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_the_orientation_of_a_camera_is_applied(turn, kind):
    image = np.zeros((16, 32, 3), np.uint8)
    image[:8, :16] = [255, 0, 0]  # above, left
    image[8:, :16] = [0, 255, 0]  # below, left
    exif = Image.Exif()
    exif[0x0112] = turn
    found = decode(encoded(image, kind, exif=exif), Resize(16, squash=True)).astype(int)
    # Of a stored image, EXIF says which of its sides are shown above and on the left.
    upright = {
        1: image, 2: image[:, ::-1], 3: image[::-1, ::-1], 4: image[::-1],
        5: image.swapaxes(0, 1), 6: np.rot90(image, -1), 7: image[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(image),
    }[turn]  # fmt: skip
    expected = decode(np.ascontiguousarray(upright), Resize(16, squash=True)).astype(int)
    assert abs(found - expected)[2:6, 2:6].max() < 40  # within the corners: JPEG is no exact
    assert abs(found - expected)[10:14, 2:6].max() < 40
    assert abs(found - expected)[2:6, 10:14].max() < 40


def modes():
    """(name, bytes, what to_rgb makes of the first pixel)."""
    grey = np.full((8, 8), 100, np.uint8)
    clear = np.zeros((8, 8, 4), np.uint8)
    half = np.full((8, 8, 4), [100, 0, 200, 128], np.uint8)
    palette = Image.fromarray(np.full((8, 8, 3), [10, 20, 30], np.uint8)).quantize(4)
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    sixteen = Image.fromarray(np.full((8, 8), 0x80FF, np.uint16))
    two = np.stack([grey, np.zeros_like(grey)], axis=2)
    return [
        ("L", encoded(grey), [100] * 3),
        ("L", encoded(grey, transparency=100), [255] * 3),
        ("L", encoded(grey, "JPEG"), [100] * 3),
        ("LA", encoded(Image.fromarray(two, "LA")), [255] * 3),
        ("P", encoded(palette), [10, 20, 30]),
        ("P", encoded(palette, "GIF"), [10, 20, 30]),
        ("P", encoded(palette, transparency=0), [255] * 3),
        ("RGBA", encoded(clear), [255] * 3),
        ("RGBA", encoded(half), [177, 127, 227]),
        ("CMYK", encoded(cmyk, "JPEG", quality=100), [254, 0, 0]),
        ("I;16", encoded(sixteen), [0x80] * 3),
        ("1", encoded(Image.new("1", (8, 8), 1)), [255] * 3),
    ]


@pytest.mark.parametrize(("mode", "raw", "pixel"), modes(), ids=[mode for mode, *_ in modes()])
def test_what_is_not_rgb_is_refused_or_converted(mode, raw, pixel, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(raw)
    message = rf"a\.png: mode {mode} \(.*\), not RGB; data.to_rgb=True converts it"
    with pytest.raises(Mistake, match=message):
        decode(path, Resize(4))
    found = decode(path, Resize(4), to_rgb=True)
    assert found.shape == (4, 4, 3)
    assert abs(found.astype(int) - pixel).max() <= 1


def test_arrays_of_other_shapes():
    grey, alpha = noise(6, 6), noise(6, 6, 4)
    alpha[..., 3] = 255
    with pytest.raises(Mistake, match=r"mode L \(grey\)"):
        decode(grey, Resize(6))
    for image in (grey, grey[..., None]):
        assert np.array_equal(decode(image, Resize(6), to_rgb=True), np.stack([grey] * 3, axis=2))
    assert np.array_equal(decode(alpha, Resize(6), to_rgb=True), alpha[..., :3])
    for array, message in [
        (noise(6, 6, 3).astype(np.float32), r"float32 \[6, 6, 3\], not uint8"),
        (noise(3, 6, 6), r"an array \[3, 6, 6\], .*; transpose it to \[height, width, 3\]"),
        (noise(6, 6, 5), r"an array \[6, 6, 5\], not \[height, width, 3\]$"),
        (noise(6, 0, 3), "0 x 6 pixels"),
    ]:
        with pytest.raises(Mistake, match=message):
            decode(array, Resize(6), to_rgb=True)


# Bad files

PHOTO = encoded(noise(40, 40, 3), "JPEG")
PICTURE = encoded(noise(40, 40, 3))


FRAMES = [Image.fromarray(noise(8, 8, 3, seed=seed)).quantize(8) for seed in range(3)]
BAD = {
    "truncated JPEG": (PHOTO[:-200], "truncated"),
    "truncated PNG": (PICTURE[:-200], "truncated"),
    "truncated WebP": (encoded(noise(40, 40, 3), "WEBP")[:-200], "(truncated|damaged)"),
    "damaged": (PICTURE[:60] + bytes(60) + PICTURE[120:], "(truncated|damaged)"),
    "empty": (b"", "empty, without a byte"),
    "text": (b"<html>404</html>", "not an image that can be read"),
    "TIFF": (encoded(noise(8, 8, 3), "TIFF"), "not an image that can be read"),
    "header": (PICTURE[:20], "truncated"),
    "line": (encoded(noise(1, 101, 3)), "101 x 1 pixels, one side over 100 times the other"),
    "animation": (
        encoded(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]),
        "an animation of 3 frames",
    ),
}


@pytest.mark.parametrize(("raw", "reason"), BAD.values(), ids=BAD.keys())
def test_bad_files(raw, reason, tmp_path):
    path = tmp_path / "b.jpg"
    path.write_bytes(raw)
    for to_rgb in (False, True):
        with pytest.raises(Unreadable, match=rf"b\.jpg: {reason}") as raised:
            decode(path, Resize(8), to_rgb)
        assert "\n" not in str(raised.value)
    with pytest.raises(Unreadable, match=f"row 7: {reason}"):
        decode(raw, Resize(8), where="row 7")


def test_a_photo_may_have_a_preview_behind_it():
    """Cameras write such JPEGs, which Pillow calls MPO."""
    photo, preview = noise(32, 32, 3), noise(8, 8, 3)
    raw = encoded(photo, "MPO", save_all=True, append_images=[Image.fromarray(preview)])
    assert Image.open(io.BytesIO(raw)).n_frames == 2
    assert abs(decode(raw, Resize(32)).astype(int) - photo).mean() < 50  # JPEG of noise


def test_missing_files_and_folders(tmp_path):
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(Mistake, match=rf"{path.name}: cannot be read \("):
            decode(path, Resize(8))


@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize("limit", [99, 40])  # Pillow itself raises above twice the limit only
def test_too_many_pixels(limit, monkeypatch):
    raw = encoded(noise(10, 10, 3))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(Mistake, match="too many pixels"):
        decode(raw, Resize(8))


@pytest.mark.filterwarnings("ignore::UserWarning")  # of damaged EXIF
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF"])
def test_no_damage_ends_in_anything_but_a_mistake(kind, seed):
    rng = np.random.default_rng(seed)
    exif = Image.Exif()
    exif[0x0112] = 6
    settings = {"exif": exif} if kind in ("JPEG", "PNG", "WEBP") else {}
    whole, refused = encoded(noise(24, 20, 3), kind, **settings), 0
    for _ in range(60):
        raw = bytearray(whole[: rng.integers(1, len(whole))] if rng.random() < 0.4 else whole)
        for place in rng.integers(0, min(len(raw), 400), 3):
            raw[place] = rng.integers(0, 256)
        try:
            assert decode(bytes(raw), Resize(8), to_rgb=True).shape == (8, 8, 3)
        except Unreadable:
            refused += 1
    assert refused > 15


# What a table's content is named by


def test_content_key(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(encoded(noise(4, 4, 3)))
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    labels, arrays = np.array([0, 1]), noise(2, 4, 4, 3)
    of_files = Records(lambda i: b"", 2, paths, "image")
    tables = [
        ImageTable(paths, labels, ("x", "y")),
        ImageTable(paths[::-1], labels, ("x", "y")),
        ImageTable(paths, labels[::-1], ("x", "y")),
        ImageTable(paths, labels, ("x", "z")),
        ImageTable(paths, labels, ("x", "y"), to_rgb=True),
        ImageTable(paths[:1], labels[:1], ("x", "y")),
        ImageTable(paths),
        ImageTable(arrays),
        ImageTable(255 - arrays),
        ImageTable(arrays.reshape(2, 2, 8, 3)),
        ImageTable([b"a", b"bc"]),
        ImageTable([b"ab", b"c"]),
        ImageTable(of_files),
        ImageTable(of_files.take(np.array([1, 0]))),
        ImageTable(Records(lambda i: b"", 2, paths, "other")),
    ]
    keys = [content_key(table) for table in tables]
    assert len(set(keys)) == len(keys)
    assert keys == [content_key(table) for table in tables]
    assert content_key(tables[0]._replace(source="elsewhere", notes=("x",))) == keys[0]
    (tmp_path / "a.png").write_bytes(encoded(noise(5, 4, 3)))
    changed = [a != content_key(table) for a, table in zip(keys, tables, strict=True)]
    assert changed == [True] * 7 + [False] * 5 + [True] * 3
    with pytest.raises(Mistake, match=r"gone\.png: cannot be read"):
        content_key(ImageTable([tmp_path / "gone.png"]))


# Batches


def table(kind="bytes", n=N):
    """n images of odd sizes, each of one colour of its own: (table, [n, 3] of their colours)."""
    rng = np.random.default_rng(1)
    colours = rng.permutation(256)[:n, None] * [1, 0, 0] + rng.integers(0, 256, (n, 3)) * [0, 1, 1]
    colours = colours.astype(np.uint8)
    if kind == "array":
        return ImageTable(np.broadcast_to(colours[:, None, None], (n, 8, 8, 3)).copy()), colours
    sides = rng.integers(5, 30, (n, 2))
    raw = [encoded(np.full((*side, 3), c)) for side, c in zip(sides, colours, strict=True)]
    return ImageTable(raw), colours


def labels(n=N):
    return np.random.default_rng(2).integers(0, 5, n)


def batches(kind="bytes", **changes):
    settings = {"batch_size": 10, "resize": Resize(8), "seed": 3, "shuffle": True} | changes
    return ImageBatches(table(kind)[0], labels(), **settings)


def equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("kind", ["bytes", "array"])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("multiple", [1, 4])
def test_everything_of_an_image_lies_at_its_place(kind, shuffle, multiple):
    colours, classes = table(kind)[1], labels()
    found, seen = batches(kind, shuffle=shuffle, rows_multiple=multiple), []
    rows = {1: 10, 4: 12}[multiple]
    assert len(found) == 6
    for batch in found:
        assert (batch["images"].shape, batch["images"].dtype) == ((rows, 8, 8, 3), np.uint8)
        for name, dtype in [("labels", np.int32), ("weights", np.float32), ("index", np.int32)]:
            assert (batch[name].shape, batch[name].dtype) == ((rows,), dtype)
        real = batch["index"] >= 0
        assert np.array_equal(batch["weights"], real.astype(np.float32))
        index = batch["index"][real]
        assert np.array_equal(
            batch["images"][real], batch["images"][real][:, :1, :1] + 0 * batch["images"][real]
        )
        assert np.array_equal(batch["images"][real][:, 0, 0], colours[index])
        assert np.array_equal(batch["labels"][real], classes[index])
        # Padding repeats the images of this batch, with their labels.
        padding = np.arange(rows)[~real]
        assert np.array_equal(batch["images"][~real], batch["images"][padding % len(index)])
        assert np.array_equal(batch["labels"][~real], batch["labels"][padding % len(index)])
        assert (batch["index"][~real] == -1).all()
        seen.extend(index)
    assert (seen == list(range(N))) == (not shuffle)
    assert sorted(seen) == list(range(N))


@pytest.mark.parametrize("kind", ["bytes", "array"])
@pytest.mark.parametrize("seed", [0, 3, 11])
def test_a_batch_depends_on_the_step_alone(kind, seed):
    in_order, jumping = batches(kind, seed=seed), batches(kind, seed=seed)
    expected = [in_order.at(step) for step in range(20)]
    for step in (19, 3, 4, 5, 12, 11, 12, 13, 0, 1, 17):  # some of them in turn: made ahead
        assert equal(jumping.at(step), expected[step])
    for step in (7, 8, 9, 10):  # resumed in the middle of an epoch, and over its end
        resumed = batches(kind, seed=seed)
        for later in range(step, step + 3):
            assert equal(resumed.at(later), expected[later])
    assert not equal(batches(kind, seed=seed + 1).at(0), expected[0])


def test_arrays_and_files_of_the_same_images_are_the_same_batches():
    for step in (0, 1, 2, 8):
        assert equal(batches("array").at(step), batches("bytes").at(step))
    resized = batches("array", resize=Resize(6)).at(4)
    assert equal(resized, batches("bytes", resize=Resize(6)).at(4))


def test_every_epoch_holds_every_image_once_in_another_order():
    found, epochs = batches(), []
    for epoch in range(3):
        index = [found.at(epoch * 6 + step)["index"] for step in range(6)]
        epochs.append(np.concatenate([i[i >= 0] for i in index]))
        assert sorted(epochs[-1]) == list(range(N))
        assert sum(index[-1] >= 0) == 3  # the last, partial one
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[1], epochs[2])


def test_without_shuffling_every_epoch_is_the_same():
    found = batches(shuffle=False)
    first = list(found)
    for batch, again in zip(first, found, strict=True):
        assert equal(batch, again)
    assert equal(found.at(2 + len(found)), first[2])


@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("kind", ["bytes", "array"])
def test_hosts_hold_their_shares_of_one_batch(kind, shares):
    whole, count = batches(kind, rows_multiple=6), 1 + max(map(max, shares))
    hosts = [batches(kind, rows_multiple=6, share=(numbers, count)) for numbers in shares]
    for step in (0, 1, 2, 5, 11):  # the last of an epoch, padded, among them
        assert equal(together(shares, [host.at(step) for host in hosts]), whole.at(step))


def test_the_number_of_devices_adds_padding_and_nothing_else():
    few, many = batches(rows_multiple=1).at(5), batches(rows_multiple=8).at(5)
    assert equal(few, {name: array[:10] for name, array in many.items()})
    assert len(many["index"]) == 16
    assert not many["weights"][10:].any()


def counted(watch=lambda row: None, **changes):
    """Batches of bytes, and the list of the rows that were read for them; watch(row) sees each."""
    raw, read = table()[0].images, []

    def of(row):
        read.append(row)
        watch(row)
        return raw[row]

    settings = {"batch_size": 10, "resize": Resize(8), "seed": 3, "shuffle": True} | changes
    return ImageBatches(ImageTable(Records(of, N, [], "")), labels(), **settings), read


def test_a_host_reads_its_own_rows_and_each_once():
    found, read = counted(rows_multiple=16, share=((1,), 2))
    batch = found.at(0)  # rows 8 to 15, of which the last six are padding: of images of host 0
    assert len(batch["index"]) == 8
    assert len(read) == 8
    assert set(batch["index"][batch["index"] >= 0]) == set(read[:2])
    found, read = counted(rows_multiple=16)
    found.at(5)  # three images, 16 rows
    assert len(read) == 3


def test_steps_in_turn_are_prepared_ahead_and_others_are_not():
    later, reached = set(batches().at(5)["index"]) - {-1}, threading.Event()
    found, read = counted(lambda row: row in later and reached.set())
    for step in (0, 2, 0, 2):
        found.at(step)
    assert len(read) == 4 * 10
    assert not reached.is_set()
    found.at(3)
    assert reached.wait(60)  # of step 5, which nobody asked for


@pytest.mark.parametrize("how", ["dropped", "jumped"])
def test_no_thread_outlives_its_use(how):
    before = set(threading.enumerate())
    found = batches()
    for step in range(4):
        found.at(step)
    started = set(threading.enumerate()) - before
    assert started
    if how == "jumped":
        found.at(40)
    else:
        del found
        gc.collect()
    for thread in started:
        thread.join(60)
        assert not thread.is_alive()


def test_a_file_that_goes_is_named_and_others_still_come(tmp_path):
    raw, paths = table()[0].images, []
    for i, content in enumerate(raw):
        paths.append(tmp_path / f"{i}.png")
        paths[-1].write_bytes(content)
    found = ImageBatches(ImageTable(paths), batch_size=10, resize=Resize(8))
    expected = [found.at(step) for step in range(6)]
    again = ImageBatches(ImageTable(paths), batch_size=10, resize=Resize(8))
    paths[33].unlink()
    for step in (0, 1, 2):
        assert equal(again.at(step), expected[step])
    with pytest.raises(Mistake, match=r"33\.png: cannot be read \(No such file"):
        again.at(3)
    for step in (4, 5, 0):
        assert equal(again.at(step), expected[step])


def test_figures_for_the_report():
    found = batches(rows_multiple=4)
    real = sum(batch["weights"].sum() for batch in found)
    places = sum(batch["weights"].size for batch in found)
    assert found.examples == N
    assert found.steps_per_epoch == len(found) == 6
    assert found.tokens_per_step is None
    assert found.padding_share == pytest.approx(1 - real / places)


def test_a_split_smaller_than_a_batch_makes_a_small_batch():
    few = ImageTable(noise(3, 8, 8, 3))
    found = ImageBatches(few, batch_size=64, resize=Resize(8), rows_multiple=2)
    batch = found.at(0)
    assert batch["index"].tolist() == [0, 1, 2, -1]
    assert np.array_equal(batch["images"][3], few.images[0])
    assert batch["labels"].tolist() == [0] * 4


def test_an_array_may_be_taken_as_it_is(tmp_path):
    features = np.random.default_rng(0).standard_normal((N, 3, 2), np.float32)
    np.save(tmp_path / "a.npy", features)
    table = ImageTable(np.load(tmp_path / "a.npy", mmap_mode="r"))
    found = ImageBatches(table, labels(), batch_size=10, resize=None, seed=3, shuffle=True)
    for step in (0, 1, 5):
        batch = found.at(step)
        real = batch["index"] >= 0
        assert type(batch["images"]) is np.ndarray
        assert np.array_equal(batch["images"][real], features[batch["index"][real]])
        assert np.array_equal(batch["index"], batches().at(step)["index"])


def test_put_is_applied():
    assert batches(put=sorted).at(0) == ["images", "index", "labels", "weights"]


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="labels"):
        ImageBatches(table()[0], labels(N - 1), batch_size=10, resize=Resize(8))
    with pytest.raises(ValueError, match="2 equal parts"):
        batches(rows_multiple=3, share=((0,), 2))
