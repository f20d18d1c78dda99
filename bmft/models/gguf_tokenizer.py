"""A GGUF file's tokenizer and chat template, as transformers' fast tokenizer.

Two kinds, by `tokenizer.ggml.model`: "gpt2", byte-level BPE with merges, whose way of cutting text
into words `tokenizer.ggml.pre` names; "llama", SentencePiece's BPE, whose merges follow from the
scores of its pieces, with bytes for characters that it lacks. What a file leaves unsaid is as in
llama.cpp.
"""

from typing import NamedTuple

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from bmft.errors import Mistake, nearest
from bmft.models import gguf_file

UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 2, 3, 4, 5, 6  # tokenizer.ggml.token_type; 1: normal
SPACE = "\u2581"  # SentencePiece's

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _REST
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _REST
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class _Words(NamedTuple):
    """How text is cut into words, which BPE never joins."""

    pattern: str | None = None  # None: GPT-2's own
    digits: bool = False  # each digit by itself, first
    whole: bool = False  # a word that is a token is taken as it is, whatever the merges
    bos: bool = False  # a text begins with bos where the file does not say
    nfc: bool = False


_GPT2, _DIGITS = _Words(), _Words(digits=True)
_LLAMA_BPE = _Words(_LLAMA3, whole=True, bos=True)
WORDS = {  # tokenizer.ggml.pre
    **dict.fromkeys(("gpt-2", "olmo", "mpt", "exaone4"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell"), _DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), _LLAMA_BPE),
    "smaug-bpe": _Words(_LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _Words(_QWEN2, nfc=True)),
    "tekken": _Words(_TEKKEN, whole=True, bos=True),
}


def tokenizer(path):
    """transformers' fast tokenizer of a file; its chat template with it.

    Raises Mistake for a kind of tokenizer that is not known, or that does not fit together.
    """
    from transformers import PreTrainedTokenizerFast

    about = gguf_file.metadata(path)
    kind = about.get("tokenizer.ggml.model")
    if kind not in _CORES:
        raise Mistake(f"{path}: tokenizer.ggml.model {kind!r} is not known; gpt2 and llama are")
    tokens, types = _vocabulary(path, about, kind)
    try:
        core, bos = _CORES[kind](path, about, tokens, types)
        _add_special(core, tokens, types)
        named = _named(about, tokens, kind)
        core.post_processor = _ends(about, named, tokens, bos, core.post_processor)
    except Mistake:
        raise
    except Exception as error:  # noqa: BLE001 - package tokenizers raises no kind of its own
        raise Mistake(f"{path}: its tokenizer does not fit together: {error}") from None
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        clean_up_tokenization_spaces=False,
        chat_template=_chat_template(about),
        **named,
    )


def _vocabulary(path, about, kind):
    """The tokens by id, and their types."""
    tokens = about.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise Mistake(f"{path}: the metadata have no tokenizer.ggml.tokens")
    types = about.get("tokenizer.ggml.token_type")
    types = [1] * len(tokens) if types is None else types.tolist()
    if len(types) != len(tokens):
        raise Mistake(f"{path}: {len(tokens)} tokens, but {len(types)} tokenizer.ggml.token_type")
    if kind == "llama":  # llama.cpp writes a run of spaces, which is user-defined in Gemma, so
        tokens = [
            token.replace(" ", SPACE) if is_of == USER_DEFINED else token
            for token, is_of in zip(tokens, types, strict=True)
        ]
    if len(set(tokens)) != len(tokens):
        raise Mistake(f"{path}: tokenizer.ggml.tokens holds the same token twice")
    return tokens, types


def _byte_level(path, about, tokens, types):
    """Byte-level BPE, and whether it begins a text with bos."""
    pre = about.get("tokenizer.ggml.pre", "gpt-2")
    if pre not in WORDS:
        raise Mistake(f"{path}: tokenizer.ggml.pre {pre!r} is not known; {nearest(pre, WORDS)}")
    words = WORDS[pre]
    merges = [tuple(merge.split(" ")) for merge in about.get("tokenizer.ggml.merges", ())]
    core = Tokenizer(models.BPE(_ids(tokens), merges, ignore_merges=words.whole))
    steps = [pre_tokenizers.Digits(individual_digits=True)] if words.digits else []
    if words.pattern:
        steps.append(pre_tokenizers.Split(Regex(words.pattern), "isolated"))
    own = words.pattern is None
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own))
    core.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if words.nfc:
        core.normalizer = normalizers.NFC()
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=False)
    return core, words.bos


def _sentencepiece(path, about, tokens, types):
    """SentencePiece's BPE, as transformers writes it; it begins a text with bos."""
    scores = about.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        raise Mistake(f"{path}: the metadata lack a score for each of the {len(tokens)} tokens")
    unknown = _at(tokens, about.get("tokenizer.ggml.unknown_token_id", 0))
    merges = _merges(tokens, scores.tolist(), types)
    core = Tokenizer(
        models.BPE(_ids(tokens), merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefixed = about.get("tokenizer.ggml.add_space_prefix", True)
    first = [normalizers.Prepend(SPACE)] if prefixed else []
    core.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", SPACE)])
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if prefixed else [])])
    return core, True


_CORES = {"gpt2": _byte_level, "llama": _sentencepiece}


def _merges(tokens, scores, types):
    """The merges that pieces and their scores stand for, best first: of every piece each way to
    make it from two others. In the order that transformers gives them."""
    apart = (UNKNOWN, CONTROL, UNUSED, BYTE)
    parts = {token: i for i, token in enumerate(tokens) if types[i] not in apart}
    found = []
    for token, i in parts.items():
        score = 0.0 if types[i] == USER_DEFINED else scores[i]
        ways = []
        for cut in range(1, len(token)):
            left, right = parts.get(token[:cut]), parts.get(token[cut:])
            if left is not None and right is not None:
                ways.append((left, right, (score, cut, len(token) - cut)))
        found += sorted(ways)
    found.sort(key=lambda way: way[2], reverse=True)
    return [(tokens[left], tokens[right]) for left, right, _ in found]


def _ids(tokens):
    return {token: i for i, token in enumerate(tokens)}


def _at(tokens, i):
    if i is None:
        return None
    if not 0 <= i < len(tokens):
        raise ValueError(f"special token {i} is none of {len(tokens)}")
    return tokens[i]


def _add_special(core, tokens, types):
    """Tokens that are cut out of a text before anything else happens to it."""
    for kind, special in ((UNKNOWN, True), (CONTROL, True), (USER_DEFINED, False)):
        chosen = [token for token, is_of in zip(tokens, types, strict=True) if is_of == kind]
        added = [AddedToken(token, special=special, normalized=False) for token in chosen]
        core.add_special_tokens(added) if special else core.add_tokens(added)


def _named(about, tokens, kind):
    """bos_token and the like -> the token, for those that there are."""
    defaults = {"bos": 1, "eos": 2, "unknown": 0} if kind == "llama" else {}
    words = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    ids = {
        word: about.get(f"tokenizer.ggml.{key}_token_id", defaults.get(key))
        for key, word in words.items()
    }
    return {word: _at(tokens, i) for word, i in ids.items() if i is not None}


def _ends(about, named, tokens, bos, otherwise):
    """What puts bos before a text, and eos behind it, where the file wants that."""
    before = named.get("bos_token") if about.get("tokenizer.ggml.add_bos_token", bos) else None
    after = named.get("eos_token") if about.get("tokenizer.ggml.add_eos_token", False) else None
    if before is None and after is None:
        return otherwise
    ids = _ids(tokens)
    single = [part for part in (before, "$A", after) if part]
    return processors.TemplateProcessing(
        single=single,
        pair=[*single, *(f"{part}:1" for part in (before, "$B", after) if part)],
        special_tokens=[(token, ids[token]) for token in dict.fromkeys((before, after)) if token],
    )


def _chat_template(about):
    """The template; {name: template} where there are several."""
    key = "tokenizer.chat_template"
    others = {k.removeprefix(key + "."): v for k, v in about.items() if k.startswith(key + ".")}
    if others and key in about:
        return {"default": about[key], **others}
    return about.get(key)
