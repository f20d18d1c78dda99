"""Token ids: those that transformers gives, cut as it cuts, from a cache that cannot be wrong."""

import random

import numpy as np
import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from bmft.data import text
from bmft.data.table import Table
from bmft.errors import Mistake

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "dog",
    "##s",
    "ran",
    "far",
    "from",
    "it",
    "!",
    ".",
]
TEXTS = ["The cat sat on a mat.", "dogs ran", "", "it ran far far away from the dog and the mat !"]
PAIRS = ["a dog sat", "it ran and ran and ran and ran from a cat", "the mat", "cats"]


def tokenizer(words=WORDS, special=True, **settings):
    """A tiny BERT tokenizer; its file cuts and pads to 6, as files of real ones do."""
    vocab = {
        word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])
    }
    backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if special:
        backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    backend.enable_truncation(6)
    backend.enable_padding(length=6)
    named = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    settings = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]} | settings
    return PreTrainedTokenizerFast(tokenizer_object=backend, **named, **settings)


def rows(encoded, array):
    return [array[a:b].tolist() for a, b in zip(encoded.offsets, encoded.offsets[1:], strict=False)]


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("max_length", [5, 8, 100])
@pytest.mark.parametrize("pairs", [None, PAIRS], ids=["single", "pair"])
def test_tokens_are_those_of_transformers(pairs, max_length, side):
    ours, theirs = (tokenizer(truncation_side=side) for _ in range(2))
    found = text.encode(Table(TEXTS, pairs), ours, max_length)
    expected = theirs(TEXTS, pairs, truncation=True, max_length=max_length)
    assert rows(found, found.tokens) == expected["input_ids"]
    assert rows(found, found.types) == expected["token_type_ids"]
    whole = theirs(TEXTS, pairs, truncation=False)["input_ids"]
    assert found.truncated == sum(len(row) > max_length for row in whole)
    assert found.lengths.tolist() == list(map(len, expected["input_ids"]))
    assert found.longest == max(map(len, expected["input_ids"])) <= max_length


def test_types_of_the_arrays():
    found = text.encode(Table(TEXTS, PAIRS), tokenizer(), 9)
    assert (found.tokens.dtype, found.types.dtype) == (np.int32, np.uint8)
    assert found.offsets.dtype == np.int64
    assert set(found.types) == {0, 1}


def test_a_model_without_token_types_gets_none():
    plain = tokenizer(model_input_names=["input_ids", "attention_mask"])
    found = text.encode(Table(TEXTS, PAIRS), plain, 9)
    assert not found.types.any()
    assert np.array_equal(found.tokens, text.encode(Table(TEXTS, PAIRS), tokenizer(), 9).tokens)


def test_chunks_are_put_together(monkeypatch):
    whole = text.encode(Table(TEXTS, PAIRS), tokenizer(), 9)
    monkeypatch.setattr(text, "CHUNK", 3)
    assert equal(whole, text.encode(Table(TEXTS, PAIRS), tokenizer(), 9))


@pytest.mark.parametrize(("pairs", "max_length"), [(None, 2), (PAIRS, 3)])
def test_a_cut_must_leave_room(pairs, max_length):
    with pytest.raises(Mistake, match=f"data.max_length={max_length} leaves no room"):
        text.encode(Table(TEXTS, pairs), tokenizer(), max_length)


def test_an_example_without_tokens_is_named():
    with pytest.raises(Mistake, match="mine line 8: the text has no tokens"):
        table = Table(TEXTS, source="mine", numbers=[2, 4, 8, 9], unit="line")
        text.encode(table, tokenizer(special=False), 9)


def test_no_examples():
    with pytest.raises(Mistake, match="examples: there are no examples"):
        text.encode(Table([]), tokenizer(), 9)


def test_only_tokenizers_with_a_core_of_their_own():
    with pytest.raises(Mistake, match="object has no tokenizer.json"):
        text.encode(Table(TEXTS), object(), 9)


# The cache


def test_the_second_time_nothing_is_tokenized(tmp_path, monkeypatch):
    first = text.encode(Table(TEXTS, PAIRS), tokenizer(), 8, tmp_path)
    monkeypatch.setattr(text, "_tokenize", lambda *_: pytest.fail("tokenized again"))
    again = text.encode(Table(TEXTS, PAIRS), tokenizer(), 8, tmp_path)
    assert equal(first, again)
    assert [path.suffix for path in (tmp_path / "tokens").iterdir()] == [".npz"]


OTHERS = {
    "text": (Table([*TEXTS[:-1], "it"], PAIRS), {}, 8),
    "boundary": (Table(["The cat sat on a mat.d", "ogs ran", *TEXTS[2:]], PAIRS), {}, 8),
    "columns swapped": (Table(PAIRS, TEXTS), {}, 8),
    "no pairs": (Table(TEXTS), {}, 8),
    "no pairs, as many texts": (Table(TEXTS + PAIRS), {}, 8),
    "order": (Table(TEXTS[::-1], PAIRS[::-1]), {}, 8),
    "cut": (Table(TEXTS, PAIRS), {}, 7),
    "side": (Table(TEXTS, PAIRS), {"truncation_side": "left"}, 8),
    "vocabulary": (Table(TEXTS, PAIRS), {"words": WORDS[::-1]}, 8),
    "token types": (Table(TEXTS, PAIRS), {"model_input_names": ["input_ids"]}, 8),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_whatever_the_tokens_depend_on_is_in_the_key(other, tmp_path):
    table, settings, max_length = other
    text.encode(Table(TEXTS, PAIRS), tokenizer(), 8, tmp_path)
    cached = text.encode(table, tokenizer(**settings), max_length, tmp_path)
    assert equal(cached, text.encode(table, tokenizer(**settings), max_length))
    assert len(list((tmp_path / "tokens").iterdir())) == 2


def test_labels_and_places_are_not_in_the_key(tmp_path):
    text.encode(Table(TEXTS), tokenizer(), 8, tmp_path)
    table = Table(TEXTS, labels=[0, 1, 0, 1], source="elsewhere", numbers=[2, 3, 4, 5])
    text.encode(table, tokenizer(), 8, tmp_path)
    assert len(list((tmp_path / "tokens").iterdir())) == 1


def test_a_damaged_cache_is_never_believed(tmp_path):
    """Every bit counts: a flipped one either is found or changes nothing."""
    expected = text.encode(Table(TEXTS, PAIRS), tokenizer(), 8, tmp_path)
    (path,) = (tmp_path / "tokens").iterdir()
    whole, found = path.read_bytes(), 0
    rng = random.Random(0)
    for at in [0, 1, len(whole) // 2, len(whole) - 1, *rng.sample(range(len(whole)), 150)]:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.warns() as warned:
            assert equal(text.encode(Table(TEXTS, PAIRS), tokenizer(), 8, tmp_path), expected)
            text.warnings.warn("one more, for flips in bytes that say nothing", stacklevel=1)
        found += len(warned) > 1
    assert found > 100


@pytest.mark.parametrize("size", [0, 1, 100, -1])
def test_a_cache_that_was_cut_off_is_made_again(size, tmp_path):
    expected = text.encode(Table(TEXTS), tokenizer(), 8, tmp_path)
    (path,) = (tmp_path / "tokens").iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:size])
    with pytest.warns(UserWarning, match="is damaged and made again"):
        assert equal(text.encode(Table(TEXTS), tokenizer(), 8, tmp_path), expected)
    assert equal(text.encode(Table(TEXTS), tokenizer(), 8, tmp_path), expected)


def test_a_cache_that_cannot_be_written_does_not_stop_the_run(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.warns(UserWarning, match="not cached"):
        found = text.encode(Table(TEXTS), tokenizer(), 8, tmp_path / "file")
    assert equal(found, text.encode(Table(TEXTS), tokenizer(), 8))


def test_nothing_half_written_stays_behind(tmp_path, monkeypatch):
    def full(file, **arrays):
        file.write(b"PK")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(text.np, "savez", full)
    with pytest.warns(UserWarning, match="No space left"):
        text.encode(Table(TEXTS), tokenizer(), 8, tmp_path)
    assert list((tmp_path / "tokens").iterdir()) == []


def test_where_the_cache_is(tmp_path, monkeypatch):
    monkeypatch.setenv("BMFT_CACHE", str(tmp_path / "a"))
    assert text.cache_directory() == tmp_path / "a"
    assert text.cache_directory(str(tmp_path / "b")) == tmp_path / "b"
    monkeypatch.delenv("BMFT_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert text.cache_directory() == tmp_path / ".cache" / "bmft"
    assert text.cache_directory("~/c") == tmp_path / "c"
