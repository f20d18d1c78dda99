"""How a dialog becomes text, and which characters of it are an answer to be learnt.

    chat     the tokenizer's chat template, as transformers applies it
    plain    prompt, separator, answer, and the token that ends a sequence

An answer is found by rendering a dialog twice: cut before the answer, with the template's opening
of the assistant's turn (add_generation_prompt), and with it. What follows the opening, up to the
mark that ends the turn, is what the model has to write. A template whose `{% generation %}` says
itself what that is gets its way. Either way `check_template` tries it on a small dialog first.
"""

import datetime
import re
from typing import NamedTuple

import jinja2

from bmft.data.dialogs import Turn
from bmft.errors import Mistake, nearest

TEMPLATES = ("chat", "plain")
LEARNED = ("all", "last")
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
NOW = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
TODAY = datetime.date(2024, 7, 26)  # which Llama 3.1's template takes where it is told none
PROBE = (
    Turn("user", "What is one and one?"),
    Turn("assistant", "It is two."),
    Turn("user", "Are you sure of that?"),
    Turn("assistant", "Yes, quite sure."),
)


class Style(NamedTuple):
    """How dialogs become text."""

    template: str  # one of TEMPLATES
    separator: str = "\n"  # plain: between prompt and answer; spaces at its end are the answer's
    answers: str = "all"  # chat: which are learned, one of LEARNED


class Unfit(ValueError):
    """A dialog that a template does not render in a way answers can be found in."""


def check_style(style):
    """Raise Mistake for a value that a field of `style` cannot have."""
    for key, value, known in (
        ("template", style.template, TEMPLATES),
        ("answers", style.answers, LEARNED),
    ):
        if value not in known:
            raise Mistake(f"task.{key}={value!r}; {nearest(value, known)}")


def name_of(tokenizer):
    return getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__


def render(tokenizer, turns, opened=False):
    """The text of turns by the chat template. opened: and what opens an answer. Raises Unfit."""
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    try:
        return tokenizer.apply_chat_template(
            messages,
            chat_template=template(tokenizer),
            tokenize=False,
            add_generation_prompt=opened,
        )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise Unfit(f"fails: {str(error).strip() or type(error).__name__}") from None


def template(tokenizer):
    """The text of its chat template, in which today is always the same day, so that the tokens of
    a run do not change over night (Llama 3.2's begins with the date). Raises Mistake for none."""
    try:
        found = tokenizer.get_chat_template()
    except ValueError:  # none, or several without a default
        raise Mistake(
            f"the tokenizer of {name_of(tokenizer)} has no chat template: set task.template=plain, "
            "or name an instruction-tuned model"
        ) from None
    return NOW.sub(lambda call: repr(TODAY.strftime(call[2])), found)


def says_itself(tokenizer):
    """Has the chat template `{% generation %}`?"""
    return bool(GENERATION.search(template(tokenizer)))


# --- which characters are learned ------------------------------------------------------------


def prompt(tokenizer, turns, style):
    """The text of turns before an answer, which is to be written next. Raises Unfit."""
    if style.template == "chat":
        return render(tokenizer, turns, opened=True)
    if [turn.role for turn in turns] != ["user"][: len(turns)]:
        raise Unfit("has one prompt and one answer; for more turns set task.template=chat")
    return turns[0].content + style.separator.rstrip(" ") if turns else ""


def ends(tokenizer):
    """A pattern of the special tokens, of which one mostly ends a turn. Gemma has added blanks."""
    added = (*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens)
    special = {token for token in added if token.strip()}
    return re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)")


def spans(tokenizer, turns, style, ends):
    """(the text of a dialog, [(start, end)] of what is learned in it). ends: of `ends`. Raises
    Unfit."""
    if style.template == "plain":
        before = prompt(tokenizer, turns[:-1], style)
        spaces = style.separator[len(style.separator.rstrip(" ")) :] if before else ""
        text = before + spaces + turns[-1].content
        return text, [(len(before), len(text))]
    if len(turns) == 1:
        raise Unfit("needs a question before an answer; for texts set task.template=plain")
    text, found = render(tokenizer, turns), []
    for i, turn in enumerate(turns):
        if turn.role == "assistant" and (style.answers == "all" or i == len(turns) - 1):
            found.append(_span(tokenizer, text, turns, i, ends))
    return text, found


def _span(tokenizer, text, turns, i, ends):
    """(start, end) of answer i in `text`, the rendered dialog."""
    answer, last = turns[i].content.strip(), i == len(turns) - 1  # many templates strip it
    opened = render(tokenizer, turns[:i], opened=True)
    alone = text if last else render(tokenizer, turns[: i + 1])
    hint = "" if last else "; task.answers=last?"
    if not alone.startswith(opened):
        raise Unfit("changes what stands before an answer once the answer is there")
    if not text.startswith(opened):
        raise Unfit(f"changes what stands before an answer once another turn follows{hint}")
    rest, own = text[len(opened) :], alone[len(opened) :]
    usual = _usual_lead(tokenizer, turns[:i], opened) if own.count(answer) > 1 else ""
    lead, found, tail = _around(rest, answer, usual)
    own_lead, _, mark = _around(own, answer, usual)
    if not found or (lead.strip() and lead != own_lead):
        raise Unfit(f"does not repeat the answer {answer[:40]!r} as it is{hint}")
    # An opening that was not asked for would be learned, and would be missing in generation;
    # one that comes on top is the answer's: Qwen3's empty thoughts.
    if lead.strip() and opened == render(tokenizer, turns[:i]):
        raise Unfit(f"opens an answer by {lead.strip()!r} but not with add_generation_prompt")
    # Llama 3's first template opens another answer behind every dialog, asked or not.
    special = ends.search(mark)
    mark = mark[: special.end()] if special else mark.rstrip()
    if not mark:
        raise Unfit("has no mark where an answer ends, so that none would ever be ended")
    if not tail.startswith(mark):
        raise Unfit(f"ends an answer otherwise when another turn follows{hint}")
    return len(opened), len(opened) + len(lead) + len(answer) + len(mark)


def _usual_lead(tokenizer, turns, opened):
    """What the template puts between its opening and an answer to turns, whatever it says."""
    said = PROBE[-1]
    return render(tokenizer, (*turns, said))[len(opened) :].partition(said.content)[0]


def _around(rendered, answer, usual):
    """(before, answer, behind): the answer behind `usual`, as `i` stands in `<think>`, too; without
    `usual` before it, its first place in the text."""
    said = rendered[len(usual) :].lstrip()
    if rendered.startswith(usual) and said.startswith(answer):
        return rendered[: -len(said)], answer, said[len(answer) :]
    return rendered.partition(answer)


# --- a template is tried ---------------------------------------------------------------------


def check_template(tokenizer, style, encode):
    """Raise Mistake, with the template's name, if the learned tokens of a dialog of two questions
    are not its answers, each with the mark of its end.

    encode(turns) -> (ids, learned): as it will be for all examples.
    """
    template(tokenizer)
    try:
        _check_roles(render(tokenizer, PROBE))
        ids, learned = encode(PROBE)
    except Unfit as error:
        raise _refused(tokenizer, error) from None
    answers = [turn.content for turn in PROBE if turn.role == "assistant"]
    answers = answers if style.answers == "all" else answers[-1:]
    runs = runs_of(learned)
    texts = [tokenizer.decode(ids[a:b]) for a, b in runs]
    if len(texts) != len(answers):
        raise _refused(
            tokenizer, f"learns {len(texts)} stretches of a dialog of {len(answers)} answers"
        )
    for text, answer, (start, _) in zip(texts, answers, runs, strict=True):
        lead, found, mark = (_bare(part) for part in _cut(text, answer))
        before = _bare(tokenizer.decode(ids[:start]))
        if not found or (lead and not _opens(tokenizer, before, answer)):
            raise _refused(tokenizer, f"learns {text!r} where the answer is {answer!r}")
        if not mark:
            raise _refused(tokenizer, f"learns no mark at the end of an answer: {text!r}")


def _cut(text, answer):
    """text around the answer, whatever blanks a tokenizer puts between its tokens."""
    pattern = r"\s*".join(map(re.escape, _bare(answer)))
    found = re.search(pattern, text)
    return (text[: found.start()], found[0], text[found.end() :]) if found else (text, "", "")


def _bare(text):
    """The text without blanks: decoding adds and drops some."""
    return "".join(text.split())


def _opens(tokenizer, before, answer):
    """Does `before`, decoded and bare, end with the template's own opening of this answer?"""
    i = next(i for i, turn in enumerate(PROBE) if turn.content == answer)
    opened, closed = (_bare(render(tokenizer, PROBE[:i], o)) for o in (True, False))
    return opened != closed and before.endswith(opened[len(closed) :])


def _check_roles(text):
    """The text between a question and its answer must not be that between an answer and the next
    question."""
    places, at = [], 0
    for turn in PROBE:
        at = text.find(turn.content, at)
        if at < 0:
            raise Unfit(f"leaves out what the {turn.role} says")
        places.append((at, at := at + len(turn.content)))
    between = [text[a[1] : b[0]].strip() for a, b in zip(places, places[1:], strict=False)]
    if between[0] == between[1]:
        raise Unfit(f"does not tell user and assistant apart: {between[0]!r} stands before both")


def _refused(tokenizer, reason):
    return Mistake(f"the chat template of {name_of(tokenizer)} {reason}")


def runs_of(learned):
    """[(start, end)] of the stretches of True in a sequence of bool."""
    edges, before = [], False
    for i, here in enumerate([*learned, False]):
        if here != before:
            edges.append(i)
        before = here
    return list(zip(edges[::2], edges[1::2], strict=True))
