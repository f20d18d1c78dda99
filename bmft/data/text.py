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
    """

    tokens: np.ndarray
    types: np.ndarray
    offsets: np.ndarray
    truncated: int

    @property
    def lengths(self):
        """int64 [n], tokens of each example."""
        return np.diff(self.offsets)

    @property
    def longest(self):
        return int(self.lengths.max())

    def behind(self, ids):
        """The same examples, each behind the tokens `ids`, of type 0."""
        count = len(self.offsets) - 1
        places = np.repeat(self.offsets[:-1], len(ids))
        return self._replace(
            tokens=np.insert(self.tokens, places, np.tile(np.array(ids, np.int32), count)),
            types=np.insert(self.types, places, 0),
            offsets=self.offsets + len(ids) * np.arange(count + 1),
        )


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
    path = None
    if cache is not None:
        path = pathlib.Path(cache) / "tokens" / f"{_key(table, tokenizer, backend)}.npz"
        kept = _load(path, table.size)
        if kept is not None:
            return kept
    encoded = _tokenize(table, tokenizer, backend)
    if encoded.lengths.min() < 1:
        raise Mistake(f"{table.where(int(encoded.lengths.argmin()))}: the text has no tokens")
    if path is not None:
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
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise Mistake(
            f"tokenizer {type(tokenizer).__name__} has no tokenizer.json form; convert it with "
            "transformers.AutoTokenizer and save it"
        )
    special = backend.num_special_tokens_to_add(paired)
    if max_length <= special:
        raise Mistake(
            f"data.max_length={max_length} leaves no room for text: {special} tokens are special"
        )
    side = getattr(tokenizer, "truncation_side", "right")
    backend.enable_truncation(max_length, strategy="longest_first", direction=side)
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
        _add(digest, [part])
    _add(digest, table.texts)
    _add(digest, table.pairs or ())
    return digest.hexdigest()


def _add(digest, texts):
    """Texts with their lengths: ("ab", "c") is not ("a", "bc")."""
    encoded = [text.encode() for text in texts]
    digest.update(np.array([len(encoded), *map(len, encoded)], np.int64).tobytes())
    digest.update(b"".join(encoded))


def _load(path, size):
    """What `_save` wrote, None if there is nothing whole. The zip's checksums find damage."""
    try:
        with zipfile.ZipFile(path) as whole:  # np.load would trust a damaged header before them
            if whole.testzip() is not None:
                raise zipfile.BadZipFile("wrong checksum")
        with np.load(path, allow_pickle=False) as kept:
            encoded = Encoded(
                kept["tokens"], kept["types"], kept["offsets"], int(kept["truncated"])
            )
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
        warnings.warn(f"cache {path} is damaged and made again: {error}", stacklevel=3)
        return None
    return encoded if len(encoded.offsets) == size + 1 else None


def _save(path, encoded):
    """Write to a file of another name first, so that no one ever reads half of it."""
    partial = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".partial", delete=False) as file:
            partial = pathlib.Path(file.name)
            np.savez(file, **encoded._asdict())
        partial.replace(path)
    except OSError as error:  # a full disk or a folder of someone else's: slower, not wrong
        if partial is not None:
            partial.unlink(missing_ok=True)
        warnings.warn(f"tokenized data is not cached: {error}", stacklevel=3)
