"""Tokenizers from GGUF metadata: each kind against one made in another way from the same tokens."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_gguf
import tokenizers
from tokenizers import pre_tokenizers, trainers
from transformers import AutoTokenizer

from bmft import models
from bmft.errors import Mistake
from bmft.models import gguf_tokenizer

TEXTS = [
    "Hello world! It's 2024, don't you'LL see? 1234567 ½ ٣٤",
    "  two  spaces   and\ttabs\n\n\nlines \r\n end  ",
    "def f(x):\n    return x**2  # naïve café – déjà vu",
    "日本語のテキスト 한국어 العربية हिन्दी \u00a0\u3000 e\u0301 e",
    "emoji 👩‍👩‍👧 🏳️‍🌈 🇩🇪!! ... ---",
    "<|start|>user\nHi<|end|> <tool> <|start|><|end|>x",
    "snake_case CamelCase XMLHttpRequest a/b\\c http://x.y/?q=1&r=2",
    "",
    " ",
    "\n",
    "a",
]
CONTROL, USER = ["<|start|>", "<|end|>", "<pad>"], ["<tool>"]
# As the published tokenizer.json of each says it.
SPLITS = {
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "tekken": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


def published(pre, model):
    """A tokenizer.json of a kind, with the tokens of `model`."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    steps = [level | {"use_regex": pre not in SPLITS}]
    if pre in SPLITS:
        pattern = {"Regex": SPLITS[pre]}
        steps.insert(
            0, {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
        )
    if pre == "smollm":
        steps.insert(0, {"type": "Digits", "individual_digits": True})
    size = len(model["vocab"])
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        plain | {"id": size + i, "content": token, "special": token in CONTROL}
        for i, token in enumerate(CONTROL + USER)
    ]
    whole = {"model": model | {"ignore_merges": pre in ("llama-bpe", "tekken")}}
    whole |= {"added_tokens": added, "decoder": level | {"use_regex": True}}
    whole |= {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}
    whole["normalizer"] = {"type": "NFC"} if pre == "qwen2" else None
    return tokenizers.Tokenizer.from_str(json.dumps(whole))


@pytest.fixture(scope="module")
def learnt():
    """The model of a small byte-level BPE, as in its tokenizer.json."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    core.train_from_iterator([text for text in TEXTS if "<|" not in text] * 2, trainer)
    return json.loads(core.to_str())["model"]


def byte_level(path, learnt, **more):
    tokens = sorted(learnt["vocab"], key=learnt["vocab"].get)
    types = [1] * len(tokens) + [3] * len(CONTROL) + [4] * len(USER)
    pairs = [merge if isinstance(merge, list) else merge.split(" ") for merge in learnt["merges"]]
    about = {"model": "gpt2", "tokens": tokens + CONTROL + USER, "token_type": types}
    about |= {"merges": [" ".join(pair) for pair in pairs], "bos_token_id": len(tokens)}
    about |= {"eos_token_id": len(tokens) + 1, "padding_token_id": len(tokens) + 2} | more
    metadata = {f"tokenizer.ggml.{key}": value for key, value in about.items() if value is not None}
    return tiny_gguf.write(path, metadata)


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2", "tekken"])
def test_byte_level(tmp_path, learnt, pre):
    reference = published(pre, learnt)
    found = gguf_tokenizer.tokenizer(byte_level(tmp_path / "a.gguf", learnt, pre=pre))
    bos = [found.bos_token_id] if pre in ("llama-bpe", "tekken") else []
    for text in TEXTS:
        wanted = reference.encode(text, add_special_tokens=False)
        assert found(text)["input_ids"] == bos + wanted.ids
        assert found.decode(wanted.ids) == reference.decode(wanted.ids, skip_special_tokens=False)
        plain = found.decode(wanted.ids, skip_special_tokens=True)
        assert plain == reference.decode(wanted.ids)
        if pre != "qwen2":  # which normalizes
            assert found.decode(wanted.ids) == text
    named = (found.bos_token, found.eos_token, found.pad_token, found.unk_token)
    assert named == (*CONTROL, None)


SPACE = "\u2581"
PIECES = (
    "h e l o w r d t s a n i he ll llo hello wo rld ▁w ▁wo or ▁world th ▁th ▁the the in an and ▁a"
)
SPECIAL = ["<unk>", "<s>", "</s>", "<mark>", "  ", "   ", "\n\n"]
KINDS = [2, 3, 3, 4, 4, 4, 4]


def sentencepiece(path, **more):
    pieces = [*PIECES.split(), SPACE, "\n"]
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    tokens = SPECIAL + bytes_ + pieces
    scores = [0.0] * (len(tokens) - len(pieces)) + [-float(i) for i in range(len(pieces))]
    about = {"model": "llama", "tokens": tokens, "scores": scores}
    about["token_type"] = KINDS + [6] * 256 + [1] * len(pieces)
    metadata = {f"tokenizer.ggml.{key}": value for key, value in (about | more).items()}
    return tiny_gguf.write(path, metadata), tokens, scores


def by_scores(text, tokens, scores):
    """SentencePiece's way: of all neighbours that make a piece, join the best, the first of equals;
    what is no piece then is bytes."""
    ids = {token: i for i, token in enumerate(tokens)}
    parts = list(text)
    while True:
        ways = [
            (scores[ids[a + b]], -i)
            for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False))
            if a + b in ids
        ]
        if not ways:
            break
        at = -max(ways)[1]
        parts[at : at + 2] = ["".join(parts[at : at + 2])]
    found = []
    for part in parts:
        unknown = [ids[f"<0x{byte:02X}>"] for byte in part.encode()]
        found += [ids[part]] if part in ids else unknown
    return found


@pytest.mark.parametrize("prefixed", [True, False])
def test_sentencepiece(tmp_path, prefixed):
    path, tokens, scores = sentencepiece(
        tmp_path / "a.gguf", add_space_prefix=prefixed, add_eos_token=True
    )
    found = gguf_tokenizer.tokenizer(path)
    for text in ("hello world", "the world and the", "thin worlds", "hé 日", "lloworld", "x\ny"):
        spaced = (SPACE if prefixed else "") + text.replace(" ", SPACE)
        wanted = by_scores(spaced, tokens, scores)
        assert found(text)["input_ids"] == [1, *wanted, 2]
        assert found.decode(wanted) == text
    ids = {token: i for i, token in enumerate(tokens)}
    two, three, mark = (ids[token] for token in ("  ", "   ", "<mark>"))
    if not prefixed:  # runs that have a token of their own, as in Gemma
        assert found("a  a   a", add_special_tokens=False)["input_ids"] == [
            *(ids["a"], two, ids["a"], three, ids["a"])
        ]
        assert found.decode([ids["a"], two, ids["a"]]) == "a  a"
    assert mark in found("a<mark>a")["input_ids"]
    assert found("a", "a")["input_ids"].count(1) == 2
    assert (found.bos_token, found.eos_token, found.unk_token) == ("<s>", "</s>", "<unk>")


def test_templates_and_saving(tmp_path, learnt):
    template = "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>{% endfor %}"
    path = byte_level(tmp_path / "a.gguf", learnt, pre="smollm", add_bos_token=True)
    found = gguf_tokenizer.tokenizer(path)
    assert found.chat_template is None
    found.chat_template = gguf_tokenizer._chat_template({"tokenizer.chat_template": template})
    messages = [{"role": "user", "content": "a 12"}]
    assert found.apply_chat_template(messages, tokenize=False) == "<|start|>user\na 12<|end|>"
    found.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in TEXTS:
        ids = found(text)["input_ids"]
        assert ids[0] == found.bos_token_id
        assert again(text)["input_ids"] == ids
    assert again.chat_template == template
    several = {"tokenizer.chat_template": template, "tokenizer.chat_template.tools": "x"}
    assert gguf_tokenizer._chat_template(several) == {"default": template, "tools": "x"}


REFUSED = [
    ({"model": "bert"}, "tokenizer.ggml.model 'bert' is not known"),
    ({"pre": "smolm"}, "tokenizer.ggml.pre 'smolm' is not known; did you mean 'smollm'"),
    ({"merges": ["a b", "ab c d"]}, "its tokenizer does not fit together"),
    ({"merges": ["qqq zzz"]}, "its tokenizer does not fit together"),
    ({"bos_token_id": 100000}, "special token 100000 is none of"),
    ({"token_type": [1, 1]}, "but 2 tokenizer.ggml.token_type"),
    ({"tokens": ["a", "a"], "token_type": None}, "holds the same token twice"),
    ({"tokens": None}, "no tokenizer.ggml.tokens"),
    ({"model": "llama"}, "lack a score for each"),
]


@pytest.mark.parametrize("changes, says", REFUSED)
def test_tokenizers_that_are_refused(tmp_path, learnt, changes, says):
    path = byte_level(tmp_path / "a.gguf", learnt, **changes)
    with pytest.raises(Mistake, match=says) as refused:
        gguf_tokenizer.tokenizer(path)
    assert str(refused.value).startswith(f"{path}: ")


def test_smollm2():
    """Its own tokens. Those of the first lines are as others published them for this model."""
    found = models.tokenizer(SimpleNamespace(folder=models.locate("smollm2")))
    known = {
        "Hello world! 123": [19556, 905, 17, 216, 33, 34, 35],
        "The capital of France is": [504, 3575, 282, 4649, 314],
        "  multiple   spaces": [216, 2701, 256, 5600],
        "Café déjà vu.": [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30],
    }
    assert {text: found(text)["input_ids"] for text in known} == known
    for text in TEXTS:
        assert found.decode(found(text)["input_ids"]) == text
    assert found("<|im_start|>a<|im_end|>")["input_ids"] == [1, 81, 2]
    assert (found.bos_token, found.eos_token, found.pad_token) == (
        *("<|im_start|>", "<|im_end|>", "<|im_end|>"),
    )
    said = found.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert said.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert np.shape(found(TEXTS[0])["attention_mask"]) == np.shape(found(TEXTS[0])["input_ids"])
