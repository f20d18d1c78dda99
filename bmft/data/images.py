"""Pixels: from a file, bytes or an array to uint8 [host, host, 3], with Pillow on the host.

    resize = Resize(256, "bicubic")
    decode(path, resize)                   # the shortest side to 256, the centre cut out
    table = check(table, skip_bad=True)    # before training: every image can be read

Only RGB passes as it is. Grey, palette, CMYK, 16-bit and transparent images are refused, or
converted with to_rgb: what is transparent lies on white then, of 16 bits the upper eight count.
"""

import contextlib
import hashlib
import io
import json
import os
import pathlib
import struct
import tempfile
import warnings
from typing import NamedTuple

import numpy as np
import PIL
from PIL import Image, ImageOps

from bmft.data import image_table
from bmft.data.image_table import Records
from bmft.errors import Mistake, nearest

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")  # whatever the ending says
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
RESAMPLE = {
    name: Image.Resampling[name.upper()]
    for name in ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
}
MODES = {
    "1": "black and white",
    "L": "grey",
    "LA": "grey with transparency",
    "P": "palette",
    "PA": "palette with transparency",
    "RGBA": "with transparency",
    "CMYK": "for print",
    "I;16": "16-bit grey",
}
# What Pillow raised on 32,000 files with bytes changed, left out or cut off at the end.
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error)
LONGEST = 100  # an image 100 times as long as wide holds nothing, and would fill the memory

CHUNK = 32  # images a worker checks in one go
FORMAT = "bmft images 1"  # of the cache; a new number makes old files unread


class Unreadable(Mistake):
    """An image that cannot be used. reason: in few words; hint: what helps, may be empty."""

    def __init__(self, reason, hint="", where=None):
        self.reason, self.hint = reason, hint
        super().__init__(f"{where or 'image'}: {reason}" + f"; {hint}" * bool(hint))


class Resize(NamedTuple):
    """Any image to host x host pixels.

    The shortest side is resized to host and the centre cut out, or with squash the whole resized
    without regard to its shape. resample: the filter, a key of RESAMPLE.
    """

    host: int
    resample: str = "bicubic"
    squash: bool = False

    @property
    def filter(self):
        """Pillow's filter. Raises Mistake for an unknown name."""
        if self.resample not in RESAMPLE:
            raise Mistake(f"resample={self.resample!r}; {nearest(self.resample, RESAMPLE)}")
        return RESAMPLE[self.resample]

    def __call__(self, image):
        """uint8 [host, host, 3] of a Pillow image of mode RGB."""
        square = (self.host, self.host)
        if self.squash:
            return np.asarray(image.resize(square, self.filter))
        # Resizing the middle alone (Pillow's `box`) would be cheaper, but other pixels by up to 23:
        # Pillow then takes its two passes in the other order.
        sizes = [self.host * side // min(image.size) for side in image.size]
        left, top = ((side - self.host) // 2 for side in sizes)
        image = image.resize(sizes, self.filter)
        return np.asarray(image.crop((left, top, left + self.host, top + self.host)))


def decode(image, resize, to_rgb=False, where=None):
    """uint8 [host, host, 3] of `image`: a path, the bytes of a file, or an array.

    Arrays are uint8 [h, w, 3]; with to_rgb also [h, w], [h, w, 1] and [h, w, 4]. The orientation
    that a camera wrote (EXIF) is applied. where: for messages, by default the path.
    Raises Unreadable, a Mistake.
    """
    try:
        return resize(_rgb(_load(image), to_rgb))
    except Unreadable as bad:
        where = where or (image if isinstance(image, str | os.PathLike) else None)
        raise Unreadable(bad.reason, bad.hint, where) from None


def rgb(array, to_rgb=True):
    """uint8 [h, w, 3] of one image as an array [h, w], [h, w, 1], [h, w, 3] or [h, w, 4]."""
    return np.asarray(_rgb(_of_array(array), to_rgb))


def problem(image, to_rgb=False):
    """(reason, hint) why an image cannot be used; None if it can."""
    try:
        _rgb(_load(image), to_rgb)
    except Unreadable as bad:
        return bad.reason, bad.hint
    return None


def _load(image):
    """The whole image, upright, as Pillow's."""
    if isinstance(image, np.ndarray):
        return _of_array(image)
    try:
        raw = image if isinstance(image, bytes) else pathlib.Path(image).read_bytes()
    except OSError as error:
        raise Unreadable(f"cannot be read ({error.strerror or error})") from None
    if not raw:
        raise Unreadable("empty, without a byte")
    try:
        with Image.open(io.BytesIO(raw), formats=FORMATS) as opened:
            _check_size(*opened.size)
            frames = getattr(opened, "n_frames", 1)
            if frames > 1 and opened.format != "MPO":  # a camera's JPEG with a preview behind it
                raise Unreadable(f"an animation of {frames} frames")
            opened.load()
            ImageOps.exif_transpose(opened, in_place=True)
            return opened
    except PIL.UnidentifiedImageError:
        raise Unreadable(f"not an image that can be read ({', '.join(FORMATS)})") from None
    except Image.DecompressionBombError:
        raise Unreadable("too many pixels") from None
    except DAMAGED as error:
        told = str(error)
        cut = "truncated" in told.lower() or "broken data stream" in told
        raise Unreadable("truncated" if cut else f"damaged ({told:.60})") from None


def _check_size(width, height):
    size = f"{width} x {height} pixels"
    if not (width and height):
        raise Unreadable(size)
    if Image.MAX_IMAGE_PIXELS and width * height > Image.MAX_IMAGE_PIXELS:
        raise Unreadable(f"too many pixels, {width} x {height}")
    if max(width, height) > LONGEST * min(width, height):
        raise Unreadable(f"{size}, one side over {LONGEST} times the other")


def _of_array(array):
    shape = list(array.shape)
    if array.dtype != np.uint8:
        raise Unreadable(f"{array.dtype} {shape}, not uint8")
    if array.ndim == 3 and shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and not (array.ndim == 3 and shape[2] in (3, 4)):
        first = array.ndim == 3 and shape[0] in (1, 3, 4)
        hint = "transpose it to [height, width, 3]" if first else ""
        raise Unreadable(f"an array {shape}, not [height, width, 3]", hint)
    _check_size(shape[1], shape[0])
    return Image.fromarray(array)


def _rgb(image, to_rgb):
    if image.mode == "RGB":
        return image
    if image.mode in ("I", "F"):  # no telling what is white
        raise Unreadable(f"mode {image.mode} (32-bit grey), not RGB")
    if not to_rgb:
        known = f" ({MODES[image.mode]})" if image.mode in MODES else ""
        raise Unreadable(f"mode {image.mode}{known}, not RGB", "data.to_rgb=True converts it")
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# Before training


def check(table, *, skip_bad=False, cache=None):
    """The table, if every image of it can be read: each is decoded once.

    Otherwise the first that cannot be is a Mistake, or with skip_bad all are left out, counted in
    the notes and listed in `skipped`. cache: folder for the verdict, None for no cache; it holds
    until a file has another path, size or time. Arrays need no check.
    """
    if isinstance(table.images, np.ndarray):
        return table
    path = None
    if cache is not None:
        path = pathlib.Path(cache) / "images" / f"{_verdict_key(table)}.json"
    bad = _load_verdict(path) if path is not None else None
    if bad is None:
        bad = _find_bad(table, all_of_them=skip_bad)
        if path is not None and (skip_bad or not bad):
            _save_verdict(path, bad)
    if bad and not skip_bad:
        row, reason, hint = bad[0]
        hints = [hint] * bool(hint) + [image_table.LEAVE_OUT]
        raise Unreadable(reason, ", ".join(hints), table.where(row))
    return image_table.leave_out(table, {row: reason for row, reason, _ in bad})


def _find_bad(table, all_of_them):
    """[(row, reason, hint)] of the first image that cannot be used, or of all of them."""
    import grain  # imports jax and Orbax: two seconds

    def bad_of(start):
        rows = range(start, min(start + CHUNK, table.size))
        found = ((row, problem(table.images[row], table.to_rgb)) for row in rows)
        return [(row, *why) for row, why in found if why]

    workers = min(16, os.cpu_count() or 1)
    options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=2 * workers)
    chunks = grain.MapDataset.range(0, table.size, CHUNK).map(bad_of).to_iter_dataset(options)
    bad = []
    with contextlib.closing(iter(chunks)) as found:
        for chunk in found:
            bad += chunk
            if bad and not all_of_them:
                return bad[:1]
    return bad


def content_key(table):
    """Hash of what a table holds, a name for whatever is computed from it.

    Of files it takes path, size and time of change, of arrays and bytes the content; with them the
    labels, the names of the classes and to_rgb.
    """
    digest = hashlib.sha256()
    images = table.images
    _add(digest, FORMAT, table.to_rgb, table.names)
    _add_array(digest, table.labels)
    if isinstance(images, np.ndarray):
        _add_array(digest, images)
    elif isinstance(images, Records):
        _add(digest, images.part, *map(_stamp, images.files))
        _add_array(digest, images.numbers)
    else:
        for image in images:
            if isinstance(image, np.ndarray):
                _add_array(digest, image)
            elif isinstance(image, bytes):
                _add(digest, hashlib.sha256(image).hexdigest())
            else:
                _add(digest, _stamp(image))
    return digest.hexdigest()


def _stamp(path):
    try:
        found = os.stat(path)
    except OSError as error:
        raise Unreadable(f"cannot be read ({error.strerror})", where=path) from None
    return os.path.abspath(path), found.st_size, found.st_mtime_ns


def _add(digest, *parts):
    digest.update(f"{parts!r}\n".encode(errors="surrogateescape"))


def _add_array(digest, array):
    _add(digest, None if array is None else (array.shape, str(array.dtype)))
    if array is not None:
        digest.update(np.ascontiguousarray(array))


def _verdict_key(table):
    """Another Pillow may read what this one does not."""
    parts = (content_key(table), PIL.__version__, Image.MAX_IMAGE_PIXELS, LONGEST)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _load_verdict(path):
    """What `_save_verdict` wrote, None if there is nothing whole."""
    try:
        return [(int(row), str(why), str(hint)) for row, why, hint in json.loads(path.read_text())]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError) as error:
        warnings.warn(f"cache {path} is damaged and made again: {error}", stacklevel=3)
        return None


def _save_verdict(path, bad):
    """Write to a file of another name first, so that no one ever reads half of it."""
    partial = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, suffix=".partial", delete=False
        ) as file:
            partial = pathlib.Path(file.name)
            json.dump(bad, file)
        partial.replace(path)
    except OSError as error:  # a full disk or a folder of someone else's: slower, not wrong
        if partial is not None:
            partial.unlink(missing_ok=True)
        warnings.warn(f"the check of images is not cached: {error}", stacklevel=3)
