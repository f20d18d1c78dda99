"""Dialogs as tokens: what is learned is what the assistant says, and a template is tried first."""

import numpy as np
import pytest
import tokenizers
from tiny_chat import CHATML, TEMPLATES, UNFIT, tokenizer
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

from bmft.data import chat, dialog_text
from bmft.data.chat import PROBE, Style
from bmft.data.dialogs import Dialogs, Turn
from bmft.errors import Mistake

CHAT, PLAIN = Style("chat"), Style("plain")
ASKED = (Turn("user", "two?"), Turn("assistant", "2"))
SURE = (*PROBE[:1], Turn("assistant", "\n3 </think>"))


def encode(dialogs, template=CHATML, style=CHAT, max_length=99, rejected=None, cache=None, **more):
    """(encoded, its tokenizer); a text for a dialog of that answer alone."""
    dialogs = [(Turn("assistant", d),) if isinstance(d, str) else d for d in dialogs]
    made = tokenizer(template, **more)
    table = Dialogs(dialogs, rejected, source="mine", unit="line", numbers=range(1, 99))
    return dialog_text.encode(table, made, style, max_length, cache), made


def learned(encoded, made, example=0):
    """The texts that are learned of an example."""
    own = slice(*encoded.offsets[example : example + 2])
    ids, mask = encoded.tokens[own], encoded.learned[own]
    return [made.decode(ids[a:b]) for a, b in chat.runs_of(mask)]


ANSWERS = {  # lead and end of an answer; the lead of a last one
    "chatml": ("", "<|im_end|>", ""),
    "smollm2": ("", "<|im_end|>", ""),
    "llama2": (" ", " </s>", " "),
    "llama3": ("", "<|eot|>", ""),
    "llama3 at first": ("", "<|eot|>", ""),
    "gemma": ("", "<end>", ""),
    "mistral": (" ", "</s>", " "),
    "qwen3": ("", "<|im_end|>", "<think></think>\n"),
    "generation": ("", "<|im_end|>", ""),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_learned_by_template(name):
    lead, end, last_lead = ANSWERS[name]
    encoded, made = encode([PROBE, ASKED], TEMPLATES[name])
    assert learned(encoded, made) == [f"{lead}It is two.{end}", f"{last_lead}Yes, quite sure.{end}"]
    assert learned(encoded, made, 1) == [f"{last_lead}2{end}"]
    messages = [turn._asdict() for turn in PROBE]
    expected = made.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    length = encoded.offsets[1]
    assert encoded.tokens[:length].tolist() == expected[:length]
    # Nothing depends on what follows the last learned token.
    assert not made.decode(expected[length:]).replace("<turn>assistant<end>", "").strip()
    assert encoded.learned[length - 1]
    last, _ = encode([PROBE], TEMPLATES[name], Style("chat", answers="last"))
    assert learned(last, made) == [f"{last_lead}Yes, quite sure.{end}"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_generation_goes_on_from_tokens_that_training_saw(name):
    """The ids before an answer are those of the prompt, to which a model would answer."""
    encoded, made = encode([ASKED], TEMPLATES[name])
    prompt = dialog_text.prompt(made, ASKED[:1], CHAT)
    (start, _), *_ = chat.runs_of(encoded.learned)
    assert encoded.tokens[:start].tolist() == prompt


@pytest.mark.parametrize(("template", "message"), UNFIT.values(), ids=UNFIT)
def test_a_template_that_does_not_fit_is_refused_by_name(template, message):
    with pytest.raises(Mistake, match=f"^the chat template of tiny {message}"):
        encode([ASKED], template)


WRONG = {
    "no template": (ASKED, None, CHAT, "the tokenizer of tiny has no chat template: set task.temp"),
    "system": (
        (Turn("system", "short"), *ASKED),
        TEMPLATES["gemma"],
        CHAT,
        "mine line 1: the chat template of tiny fails: System role not supported",
    ),
    "a text": ("two", CHATML, CHAT, "line 1: .*needs a question before an answer; .*=plain"),
    "turns": (PROBE, None, PLAIN, "mine line 1: task.template=plain has one prompt and one answer"),
    "answer changed": (
        SURE,
        CHATML.replace("m.content", "m.content.replace('</think>', '')"),
        CHAT,
        r"mine line 1: .*does not repeat the answer '3 </think>' as it is",
    ),
    "generation lost": (
        ASKED,
        TEMPLATES["generation"].replace("m.role == 'assistant'", "m.content | length > 3"),
        CHAT,
        "the chat template of tiny marks 4 stretches",
    ),
    "style": (ASKED, CHATML, Style("chatml"), "task.template='chatml'; did you mean 'chat'"),
    "answers": (ASKED, CHATML, Style("chat", "", "first"), "task.answers='first'; known: all, l"),
    "too short": (ASKED, CHATML, CHAT, "data.max_length=4 leaves no example with anything to"),
}


@pytest.mark.parametrize(("dialog", "template", "style", "message"), WRONG.values(), ids=WRONG)
def test_wrong_dialogs(dialog, template, style, message):
    with pytest.raises(Mistake, match=message):
        encode([dialog], template, style, 4 if "max_length" in message else 99)


def test_a_text_needs_its_end():
    with pytest.raises(Mistake, match="the tokenizer of tiny has no eos_token, which ends a text"):
        encode(["two"], None, PLAIN, eos_token=None)


def test_plain():
    encoded, made = encode([ASKED, "It is two."], None, PLAIN)
    assert dialog_text.shown(encoded, made) == "<s>two?\n⟦2</s>⟧"
    assert dialog_text.shown(encoded, made, 1) == "<s>⟦It is two.</s>⟧"
    encoded, made = encode([ASKED, "It is"], None, PLAIN, bos=False)
    assert dialog_text.shown(encoded, made) == "two?\n⟦2</s>⟧"
    # Nothing comes before a first token, so it is not learned.
    assert dialog_text.shown(encoded, made, 1) == "It⟦ is</s>⟧"


def test_an_answer_that_the_lead_of_the_template_holds_too():
    """Qwen3 puts empty thoughts before a last answer, in tokens of their own."""
    template = TEMPLATES["qwen3"].replace("<think></think>", "<turn>think<end>")
    for said in ("think", " <"):
        encoded, made = encode([(*ASKED[:1], Turn("assistant", said))], template)
        assert learned(encoded, made) == [f"<turn>think<end>\n{said}<|im_end|>"]


def test_thoughts_that_only_a_last_answer_has():
    """As Qwen3.5's: the opening has them, an answer before the last has not."""
    thoughtful = TEMPLATES["qwen3"].replace("assistant\n", "assistant\n<think></think>\n")
    with pytest.raises(Mistake, match=r"once another turn follows; task\.answers=last\?$"):
        encode([PROBE], thoughtful)
    encoded, made = encode([PROBE], thoughtful, Style("chat", answers="last"))
    assert learned(encoded, made) == ["Yes, quite sure.<|im_end|>"]
    assert names(dialog_text.ends(made, CHAT), made) == ["</s>", "<|im_end|>"]


def test_what_ends_an_answer():
    made = tokenizer(CHATML)
    assert names(dialog_text.ends(made, CHAT), made) == ["</s>", "<|im_end|>"]
    assert names(dialog_text.ends(made, PLAIN), made) == ["</s>"]
    # What a template learns behind the mark is no mark.
    longer = "<|im_end|>{{ '\n' + eos_token }}{% endgeneration %}"
    made = tokenizer(TEMPLATES["generation"].replace("<|im_end|>{% endgeneration %}", longer))
    assert names(dialog_text.ends(made, CHAT), made) == ["</s>", "<|im_end|>"]


def names(ids, made):
    return made.convert_ids_to_tokens(list(ids))


def test_no_blank_comes_in_between_where_a_tokenizer_puts_one_before_a_text():
    """As Llama 2's and Mistral's does: `A: ` goes on with `yes`, not with ` yes`."""
    words = ["<s>", "</s>", *"▁A:yesa\n", "ye", "yes", "▁yes"]
    merges = [("y", "e"), ("ye", "s"), ("▁", "yes")]
    vocab = {word: i for i, word in enumerate(words)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    blanks = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence(blanks)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    for asked, expected in (("A: ", ["▁", "A", ":", "▁", "yes"]), ("A:", ["▁", "A", ":", "yes"])):
        table = Dialogs([(Turn("user", asked), Turn("assistant", "yes"))])
        encoded = dialog_text.encode(table, made, Style("plain", ""), 99)
        assert names(encoded.tokens.tolist(), made) == [*expected, "</s>"]
        assert names(encoded.tokens[encoded.learned].tolist(), made) == ["yes", "</s>"]


def test_no_token_lies_across_the_beginning_of_an_answer():
    asked = (Turn("user", "A: "), Turn("assistant", "yes"))
    encoded, made = encode([asked, ASKED], None, Style("plain", ""))
    ids = [made.convert_ids_to_tokens(i) for i in encoded.tokens[: encoded.offsets[1]].tolist()]
    assert ids == ["<s>", "A", ":", " ", "yes", "</s>"]  # as a whole it would be " yes"
    assert learned(encoded, made) == ["yes</s>"]
    assert learned(encoded, made, 1) == ["2</s>"]
    # Blanks at the end of a separator are the answer's, as in a text.
    spaced = Style("plain", " B: ")
    encoded, made = encode([(Turn("user", "A:"), Turn("assistant", "yes"))], None, spaced)
    assert dialog_text.shown(encoded, made) == "<s>A: B:⟦ yes</s>⟧"
    assert dialog_text.prompt(made, (Turn("user", "A:"),), spaced) == encoded.tokens[:-2].tolist()


def test_an_answer_may_begin_as_the_template_ends():
    """`assistant` + two line ends: the second of them is the answer's, though blank."""
    asked = (*ASKED[:1], Turn("assistant", "\nYes"))
    encoded, made = encode([asked])
    assert learned(encoded, made) == ["\nYes<|im_end|>"]


def test_long_examples_are_cut_and_useless_ones_left_out():
    encoded, made = encode([PROBE, ASKED, PROBE], max_length=17)
    whole, _ = encode([PROBE, ASKED, PROBE])
    assert encoded.lengths.tolist() == [17, whole.lengths[1], 17]
    assert encoded.truncated == 2
    assert learned(encoded, made) == ["It is two"]
    encoded, made = encode([PROBE, ASKED, PROBE], max_length=12)
    assert encoded.rows.tolist() == [1]
    assert (encoded.truncated, learned(encoded, made)) == (0, ["2<|im_end|>"])


def test_a_pair_is_one_example_of_two_sequences():
    encoded, made = encode([ASKED, PROBE], rejected=["No way.", "short"])
    one, _ = encode([ASKED])
    other, _ = encode([(*ASKED[:1], Turn("assistant", "No way."))])
    assert encoded.second.tolist()[0] == one.lengths[0]
    own = encoded.tokens[: encoded.offsets[1]]
    assert own.tolist() == [*one.tokens, *other.tokens]
    assert learned(encoded, made) == ["2<|im_end|>", "No way.<|im_end|>"]
    assert len(dialog_text.shown(encoded, made, 1).split("<|im_start|>user")) == 5
    behind = encoded.behind(range(90, 92))
    assert behind.second.tolist() == (encoded.second + 2).tolist()
    starts = np.stack([behind.offsets[:-1], behind.offsets[:-1] + behind.second], 1).ravel()
    assert (behind.tokens[starts[:, None] + np.arange(2)] == [90, 91]).all()
    assert not behind.learned[starts].any()
    assert behind.learned.sum() == encoded.learned.sum()
    # If one answer is cut off, the pair is of no use.
    short, _ = encode([ASKED, PROBE], rejected=["No way.", "short"], max_length=12)
    assert short.rows.tolist() == [0]


def test_today_is_always_the_same_day():
    template = "{{ strftime_now('%d %B %Y') }}" + CHATML
    made = tokenizer(template)
    assert chat.render(made, ASKED).startswith("26 July 2024<|im_start|>")


def test_the_cache_knows_what_tokens_depend_on(tmp_path, monkeypatch):
    settings = {"style": CHAT, "cache": tmp_path}
    first, _ = encode([PROBE, ASKED], **settings)
    others = (
        {"style": Style("chat", answers="last")},
        {"template": TEMPLATES["llama3"]},
        {"max_length": 17},
        {"rejected": ["3", "3"], "style": Style("chat", answers="last")},
        {"eos_token": "<end>"},
    )
    for count, other in enumerate(others, start=2):
        encode([PROBE, ASKED], **settings | other)
        assert len(list((tmp_path / "tokens").iterdir())) == count
    encode([ASKED, PROBE], **settings)
    assert len(list((tmp_path / "tokens").iterdir())) == count + 1
    monkeypatch.setattr(dialog_text, "_encode", lambda *_: pytest.fail("tokenized again"))
    again, _ = encode([PROBE, ASKED], **settings)
    for one, other in zip(first, again, strict=True):
        assert np.array_equal(one, other)
