"""Token ids of all examples of a split, end to end in one array, cached by content.

The key of the cache is what the ids depend on: texts, tokenizer, cut, version of `tokenizers`. A
changed file or tokenizer is another key; nothing has to be invalidated by hand.
"""

import hashlib
import os
import pathlib
import tempfile
import warnings
import zipfile
from typing import NamedTuple

import numpy as np
import tokenizers

from bmft.errors import Mistake

CHUNK = 4096  # examples tokenized at once: what bounds the memory of the tokenizer's own objects
FORMAT = "bmft tokens 1"  # of the cache; a new number makes old files unread


class Encoded(NamedTuple):
    """The tokens of n examples, special tokens among them.

    tokens: int32 [n_tokens]; types: uint8 [n_tokens], 1 in the second text of a pair where the
    model knows token types. Example i is tokens[offsets[i]:offsets[i + 1]]; offsets: int64 [n + 1].
    truncated: how many examples were cut to max_length.

    Of a language model (bmft/data/dialog_text.py), otherwise None:
    learned: bool [n_tokens], whether a token counts in the loss, as a prediction.
    second: int64 [n], tokens of an example before its second sequence, where it is two.
    rows: int64 [n], which row of its table an example is; others are left out.
    """

    tokens: np.ndarray
    types: np.ndarray
    offsets: np.ndarray
    truncated: int
    learned: np.ndarray | None = None
    second: np.ndarray | None = None
    rows: np.ndarray | None = None

    @property
    def lengths(self):
        """int64 [n], tokens of each example."""
        return np.diff(self.offsets)

    @property
    def longest(self):
        return int(self.lengths.max())

    def behind(self, ids):
        """The same examples, each sequence behind the tokens `ids`, of type 0, which are not
        learned."""
        count, parts, starts = len(self.offsets) - 1, 1, self.offsets[:-1]
        if self.second is not None:
            parts, starts = 2, np.stack([starts, starts + self.second], 1).ravel()
        places = np.repeat(starts, len(ids))
        new = self._replace(
            tokens=np.insert(self.tokens, places, np.tile(np.array(ids, np.int32), count * parts)),
            types=np.insert(self.types, places, 0),
            offsets=self.offsets + parts * len(ids) * np.arange(count + 1),
        )
        if self.learned is not None:
            new = new._replace(learned=np.insert(self.learned, places, False))
        if self.second is not None:
            new = new._replace(second=self.second + len(ids))
        return new


def encode(table, tokenizer, max_length, cache=None):
    """The `Encoded` of a table.

    tokenizer: of transformers, one of the fast ones. max_length: tokens an example is cut to, of a
    pair the longer text first, as transformers does by default. cache: folder for the result, None
    for no cache.
    Raises Mistake if max_length leaves no room for text, an example has no tokens, or there is no
    example.
    """
    if not table.size:
        raise Mistake(f"{table.source}: there are no examples")
    backend = _backend(tokenizer, max_length, table.pairs is not None)

    def make():
        encoded = _tokenize(table, tokenizer, backend)
        if encoded.lengths.min() < 1:
            raise Mistake(f"{table.where(int(encoded.lengths.argmin()))}: the text has no tokens")
        return encoded

    return cached(cache, lambda: _key(table, tokenizer, backend), make, table.size)


def cached(cache, key, make, size=None):
    """make(), an `Encoded`, or what an earlier call kept in `cache` under the same key().

    cache: a folder, None for no cache. size: how many examples it has, where that is known.
    """
    if cache is None:
        return make()
    path = pathlib.Path(cache) / "tokens" / f"{key()}.npz"
    kept = _load(path)
    if kept is not None and size in (None, len(kept.offsets) - 1):
        return kept
    encoded = make()
    _save(path, encoded)
    return encoded


def cache_directory(path=None):
    """`path` (of config.data.cache), or $BMFT_CACHE, or ~/.cache/bmft."""
    chosen = path or os.environ.get("BMFT_CACHE") or pathlib.Path.home() / ".cache" / "bmft"
    return pathlib.Path(chosen).expanduser()


def _backend(tokenizer, max_length, paired):
    """The tokenizer's Rust core, set to cut at max_length and not to pad.

    That is the state transformers itself sets at each call. A tokenizer's file may bring its own:
    minilm's cuts and pads to 128.
    """
    backend = core(tokenizer)
    special = backend.num_special_tokens_to_add(paired)
    if max_length <= special:
        raise Mistake(
            f"data.max_length={max_length} leaves no room for text: {special} tokens are special"
        )
    side = getattr(tokenizer, "truncation_side", "right")
    backend.enable_truncation(max_length, strategy="longest_first", direction=side)
    return backend


def core(tokenizer):
    """The tokenizer's Rust core, set neither to cut nor to pad. Raises Mistake if it has none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise Mistake(
            f"tokenizer {type(tokenizer).__name__} has no tokenizer.json form; convert it with "
            "transformers.AutoTokenizer and save it"
        )
    backend.no_truncation()
    backend.no_padding()
    return backend


def _tokenize(table, tokenizer, backend):
    typed = "token_type_ids" in tokenizer.model_input_names
    tokens, types, lengths, truncated = [], [], [], 0
    for start in range(0, table.size, CHUNK):
        texts = table.texts[start : start + CHUNK]
        if table.pairs is not None:
            texts = list(zip(texts, table.pairs[start : start + CHUNK], strict=True))
        found = backend.encode_batch_fast(texts)
        ids = [encoding.ids for encoding in found]
        lengths.extend(map(len, ids))
        tokens.append(np.fromiter((i for row in ids for i in row), np.int32))
        if typed:
            types.append(np.fromiter((t for e in found for t in e.type_ids), np.uint8))
        truncated += sum(bool(encoding.overflowing) for encoding in found)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.concatenate(tokens)
    types = np.concatenate(types) if typed else np.zeros(len(tokens), np.uint8)
    return Encoded(tokens, types, offsets, truncated)


def _key(table, tokenizer, backend):
    """Hash of all that the tokens depend on. `backend` holds the cut, too."""
    digest = hashlib.sha256()
    typed = "token_type_ids" in tokenizer.model_input_names
    for part in (FORMAT, tokenizers.__version__, str(typed), backend.to_str()):
        add_texts(digest, [part])
    add_texts(digest, table.texts)
    add_texts(digest, table.pairs or ())
    return digest.hexdigest()


def add_texts(digest, texts):
    """Texts with their lengths: ("ab", "c") is not ("a", "bc")."""
    encoded = [text.encode() for text in texts]
    digest.update(np.array([len(encoded), *map(len, encoded)], np.int64).tobytes())
    digest.update(b"".join(encoded))


def _load(path):
    """What `_save` wrote, None if there is nothing whole. The zip's checksums find damage."""
    try:
        with zipfile.ZipFile(path) as whole:  # np.load would trust a damaged header before them
            if whole.testzip() is not None:
                raise zipfile.BadZipFile("wrong checksum")
        with np.load(path, allow_pickle=False) as kept:
            fields = {name: kept[name] for name in kept.files}
            return Encoded(**fields | {"truncated": int(fields["truncated"])})
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        EOFError,
        RuntimeError,
        zipfile.BadZipFile,
    ) as error:
        warnings.warn(f"cache {path} is damaged and made again: {error}", stacklevel=4)
        return None


def _save(path, encoded):
    """Write to a file of another name first, so that no one ever reads half of it."""
    partial = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".partial", delete=False) as file:
            partial = pathlib.Path(file.name)
            fields = encoded._asdict().items()
            np.savez(file, **{name: field for name, field in fields if field is not None})
        partial.replace(path)
    except OSError as error:  # a full disk or a folder of someone else's: slower, not wrong
        if partial is not None:
            partial.unlink(missing_ok=True)
        warnings.warn(f"tokenized data is not cached: {error}", stacklevel=4)
