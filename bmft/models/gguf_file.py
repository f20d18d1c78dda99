"""GGUF files: what their header says, and parts of their tensors as float32.

A file is its metadata (`general.architecture`, `llama.block_count`, `tokenizer.ggml.tokens`, ...),
a table of tensors, and their bytes. A row of a quantized tensor is a run of blocks, each some
values (32 or 256) that share their scales; package gguf knows the formats. The header is read here:
gguf.GGUFReader makes several NumPy views of every token of a vocabulary, takes seconds over that,
and does not say what is wrong with a damaged file.
"""

import functools
import math
import mmap
import os
import re
import struct
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np

from bmft.errors import Mistake

SUFFIX = ".gguf"
VERSIONS = (2, 3)
# What can be read. Files called Q4_K_M and the like hold several of these: where the rows of a
# tensor are no multiple of 256, llama.cpp takes a kind with blocks of 32.
KINDS = "F32 F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q2_K Q3_K Q4_K Q5_K Q6_K".split()
NUMBERS = dict(enumerate("u1 i1 u2 i2 u4 i4 f4 bool".split())) | {10: "u8", 11: "i8", 12: "f8"}
STRING, ARRAY = 8, 9
PARTS = 64  # files whose headers are kept: the layers of a large model lie in many
PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")  # how llama.cpp names the parts of a split file


class Stored(NamedTuple):
    """A tensor as it lies in a file."""

    path: Path
    name: str
    shape: tuple  # outermost axis first, as in NumPy
    kind: str  # of KINDS
    start: int  # its first byte in the file


class Header(NamedTuple):
    metadata: dict  # {key: str, number, bool, list of str, or array of numbers}
    tensors: dict  # {name: Stored}


def parts(path):
    """The files that make one model: the file itself, or all parts of a split one, the first first.

    Raises Mistake if one of them is not there.
    """
    path = Path(path)
    split = PART.fullmatch(path.name)
    if split is None:
        return [path]
    stem, _, count = split.groups()
    found = [path.with_name(f"{stem}-{i + 1:05}-of-{count}.gguf") for i in range(int(count))]
    absent = [part.name for part in found if not part.is_file()]
    if absent:
        raise Mistake(
            f"{path}: {len(absent)} of its {len(found)} parts are not beside it: {absent[0]!r}"
        )
    return found


def metadata(path):
    """The metadata of a file, or of the first part of a split one: the others have none."""
    return header(parts(path)[0]).metadata


def tensors(path):
    """{name: Stored} of all parts."""
    return {name: at for part in parts(path) for name, at in header(part).tensors.items()}


def header(path):
    """The `Header` of one file; Mistake for one that is none, is damaged, or cut off."""
    return _header(path, *stamp(path))


def stamp(path):
    """What changes when a file does: what is read from it is kept by this."""
    try:
        with open(path, "rb") as file:
            about = os.fstat(file.fileno())
    except OSError as error:
        raise Mistake(f"{path}: {error.strerror}") from None
    return about.st_size, about.st_mtime_ns


@functools.lru_cache(maxsize=PARTS)
def _header(path, size, _changed):
    if size < 24:
        raise Mistake(f"{path}: {size} bytes are no GGUF file")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] != b"GGUF":
            raise Mistake(f"{path}: not a GGUF file: it begins with {bytes(data[:4])!r}")
        cursor = _Cursor(data, 4)
        try:
            return _read_header(path, cursor)
        except _Wrong as wrong:
            raise Mistake(f"{path}: {wrong}") from None
        except (struct.error, UnicodeDecodeError):
            at = f"at byte {cursor.at} of {size}"
            raise Mistake(f"{path}: its header is damaged or cut off {at}") from None


class _Wrong(Exception):
    """What is wrong with a header."""


class _Cursor:
    """Reads a file's values one after the other."""

    def __init__(self, data, at):
        self.data, self.at = data, at

    def number(self, kind):
        """kind: of NumPy, u4"""
        code = np.dtype(kind).char if kind != "bool" else "?"
        code = {"l": "q", "L": "Q"}.get(code, code)  # NumPy's 8 bytes are struct's q
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += np.dtype(kind).itemsize
        return value

    def text(self):
        (length,) = struct.unpack_from("<Q", self.data, self.at)
        self.room(length, 8)
        start = self.at + 8
        self.at = start + length
        return self.data[start : self.at].decode()

    def room(self, size, after=0):
        """struct.error for what would end behind the file: a damaged length is not believed."""
        if self.at + after + size > len(self.data):
            raise struct.error

    def value(self, kind):
        """One value of the metadata, by the number of its type."""
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            return self.array(self.number("u4"), self.number("u8"))
        if kind not in NUMBERS:
            raise _Wrong(f"there is no metadata type {kind}")
        return self.number(NUMBERS[kind])

    def array(self, kind, count):
        if kind == STRING:
            self.room(8 * count)
            return [self.text() for _ in range(count)]
        if kind not in NUMBERS:
            raise _Wrong(f"there are no arrays of metadata type {kind}")
        dtype = np.dtype(NUMBERS[kind]).newbyteorder("<")
        self.room(dtype.itemsize * count)
        self.at += dtype.itemsize * count
        return np.frombuffer(self.data[self.at - dtype.itemsize * count : self.at], dtype)


def _read_header(path, cursor):
    version = cursor.number("u4")
    if version not in VERSIONS:
        large = " or big-endian" if version & 0xFFFF == 0 else ""
        raise _Wrong(f"GGUF version {version}{large} is not read; 2 and 3 are")
    tensor_count, key_count = cursor.number("u8"), cursor.number("u8")
    cursor.room(13 * key_count + 24 * tensor_count)  # the least that each takes
    about = {}
    for _ in range(key_count):
        key = cursor.text()
        if key in about:
            raise _Wrong(f"{key} stands there twice")
        about[key] = cursor.value(cursor.number("u4"))
    table = [_table_row(cursor) for _ in range(tensor_count)]
    alignment = about.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise _Wrong(f"general.alignment is {alignment!r}")
    start = -(-cursor.at // alignment) * alignment
    found = {}
    for name, shape, kind, offset in table:
        if name in found:
            raise _Wrong(f"tensor {name!r} stands there twice")
        found[name] = _checked(Stored(path, name, shape, kind, start + offset), len(cursor.data))
    return Header(about, found)


def _table_row(cursor):
    """(name, shape, kind, offset) of a tensor"""
    name = cursor.text()
    axes = cursor.number("u4")
    if not 1 <= axes <= 4:
        raise _Wrong(f"tensor {name!r} has {axes} axes")
    shape = tuple(cursor.number("u8") for _ in range(axes))[::-1]
    number = cursor.number("u4")
    return name, shape, _kind(name, number), cursor.number("u8")


def _kind(name, number):
    try:
        kind = gguf.GGMLQuantizationType(number).name
    except ValueError:
        kind = f"number {number}, which package gguf does not know"
    if kind not in KINDS:
        raise _Wrong(f"tensor {name!r} is of type {kind}; these are read: {', '.join(KINDS)}")
    return kind


def _checked(tensor, size):
    """The tensor, if it lies in the file as its type and shape say."""
    values, width = _block(tensor.kind)
    if tensor.shape[-1] % values:
        raise _Wrong(f"tensor {tensor.name!r}: rows of {tensor.shape[-1]} are no {tensor.kind}")
    end = tensor.start + math.prod(tensor.shape) // values * width
    if end > size:
        raise _Wrong(f"cut off: tensor {tensor.name!r} ends at byte {end}, the file before it")
    return tensor


def _block(kind):
    """(values, bytes) of a block"""
    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]


def values(tensor, rows, columns=slice(None)):
    """Rows of a tensor of one or two axes as float32, dequantized; of one axis: its values.

    rows: a slice or indices (int array); columns: a slice with step 1. Only the blocks that these
    touch are read.
    """
    size, width = _block(tensor.kind)
    if len(tensor.shape) == 1:
        tensor = tensor._replace(shape=(1, *tensor.shape))
        return values(tensor, slice(None))[0, rows]
    count, length = tensor.shape
    begin, end, _ = columns.indices(length)
    first, last = begin // size, -(-end // size)
    packed = np.memmap(tensor.path, np.uint8, "r", tensor.start, (count, length // size, width))
    chosen = np.ascontiguousarray(packed[rows, first:last])
    kind = gguf.GGMLQuantizationType[tensor.kind]
    found = gguf.dequantize(chosen.reshape(len(chosen), (last - first) * width), kind)
    return found[:, begin - first * size : end - first * size]


def same_bytes(one, other):
    """Do two tensors of a kind and shape hold the same?"""
    values, width = _block(one.kind)
    size = math.prod(one.shape) // values * width
    chunk = 1 << 24
    with open(one.path, "rb") as first, open(other.path, "rb") as second:
        first.seek(one.start)
        second.seek(other.start)
        sizes = (min(chunk, size - done) for done in range(0, size, chunk))
        return all(first.read(n) == second.read(n) for n in sizes)
