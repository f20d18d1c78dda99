"""The common formats of instructions, told apart by their columns.

    messages     messages: [{role, content}, ...]
    sharegpt     conversations: [{from, value}, ...]     human, gpt, system
    alpaca       instruction, output, and input where there is one
    completion   prompt, completion                      both texts, or both lists of messages
    gsm8k        question, answer                        `<<48/2=24>>` is left out of answers
    e2e          meaning, reference                      or lines `meaning||reference` of a .txt
    text         text                                    where no other format fits
    preference   chosen, rejected, and prompt            texts, or lists of messages; without a
                                                         prompt, dialogs that differ in their ends

Other columns are not read. `data.format` names one where several fit.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from bmft.data.dialogs import Dialogs, Turn, check, text, turns_of
from bmft.errors import Mistake, nearest

CALCULATOR = re.compile(r"<<[^<>]*>>")  # GSM8K's marks of what a calculator is to compute
HUMANS = {"human": "user", "user": "user", "system": "system"}
SHAREGPT = HUMANS | {"gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant"}


class Format(NamedTuple):
    columns: tuple  # that it needs
    read: Callable  # (row as {column: value}, where) -> turns, or (turns, rejected answer)
    template: str = "chat"  # how its examples are rendered where task.template does not say
    separator: str = "\n"  # between prompt and answer where they are rendered plainly
    measures: tuple = ()  # of bmft/tasks/answers.py, that written answers are measured by


def build(data, source, *, format=None, lines=None, pairs=False, column="text"):
    """The `Dialogs` of `{column name: list of values}`.

    format: one of FORMATS, None: by the columns. lines: of each row in a file. pairs: preference
    pairs are wanted, and nothing else. column: which holds the text of format `text`.
    Raises Mistake, with file and line.
    """
    data = _e2e_columns(data, source, lines, format)
    name = find(data, source, format, pairs, column)
    form = FORMATS[name]
    needed = (column,) if name == "text" else form.columns
    absent = [need for need in needed if need not in data]
    if absent:
        raise Mistake(
            f"{source} has no column {absent[0]!r}, which format {name} has; {_has(data)}"
        )
    unit = "row" if lines is None else "line"
    table = Dialogs([], [] if pairs else None, name, source, lines, unit)
    for row, values in enumerate(zip(*data.values(), strict=True)):
        values = dict(zip(data, values, strict=True))
        if name == "text":
            values = {"text": values[column]}
        found = form.read(values, table.where(row))
        if pairs:
            found, rejected = found
            table.rejected.append(rejected)
        table.dialogs.append(found)
    if not table.dialogs:
        raise Mistake(f"{source} holds no examples")
    if name == "completion" and isinstance(data["prompt"][0], list):
        return table._replace(format="messages")  # which is how they are rendered
    return table


def find(columns, source, format=None, pairs=False, column="text"):
    """The name of the format: `format`, or the one that fits the columns. Raises Mistake."""
    eligible = [name for name in FORMATS if (name == "preference") == pairs]
    if format is not None:
        if format not in FORMATS:
            raise Mistake(f"data.format={format!r}; {nearest(format, eligible)}")
        if format not in eligible:
            need = "preference pairs" if pairs else "no preference pairs"
            raise Mistake(f"data.format={format!r}: the task takes {need}: {', '.join(eligible)}")
        return format
    fits = [name for name in eligible if _fits(name, columns)]
    structured = [name for name in fits if name != "text"]
    if len(structured) > 1:
        raise Mistake(
            f"{source} fits the formats {' and '.join(structured)}; name one: data.format"
        )
    if structured:
        return structured[0]
    if column in columns and not pairs:
        return "text"
    needs = {name: FORMATS[name].columns for name in eligible}
    needs |= {} if pairs else {"text": (column,)}
    known = "; ".join(f"{name} ({', '.join(need)})" for name, need in needs.items())
    # What the other task reads is no foreign file.
    found = [name for name in FORMATS if name not in (*eligible, "text") and _fits(name, columns)]
    task = "causal_lm" if pairs else "preference"
    hint = f"; it does fit {found[0]}: task.name={task}" if found else ""
    raise Mistake(f"{source} fits no format; {_has(columns)}; formats: {known}{hint}")


def _fits(name, columns):
    return set(FORMATS[name].columns) <= set(columns)


def _has(columns):
    return f"it has {', '.join(str(column)[:40] for column in columns) or 'no columns'}"


def _e2e_columns(data, source, lines, format):
    """A file of lines alone whose first has `||` is E2E's: both columns of it."""
    if list(data) != ["text"] or not str(source).endswith(".txt") or format == "text":
        return data
    rows = data["text"]
    if format != "e2e" and not (rows and "||" in rows[0]):
        return data
    parts = [row.split("||") for row in rows]
    for i, part in enumerate(parts):
        if len(part) != 2:
            where = f"{source} line {lines[i]}" if lines else f"{source} row {i}"
            times = f"{len(part) - 1} times '||'"
            raise Mistake(
                f"{where}: {times}; a line is meaning||reference (data.format=text: any text)"
            )
    meanings, references = zip(*parts, strict=True)
    return {"meaning": list(meanings), "reference": list(references)}


# A row of each format


def _messages(row, where):
    return turns_of(row["messages"], where, "messages")


def _sharegpt(row, where):
    keys = {"role": "from", "content": "value", "roles": SHAREGPT}
    return turns_of(row["conversations"], where, "conversations", **keys)


def _question(prompt, answer):
    return Turn("user", prompt), Turn("assistant", answer)


def _alpaca(row, where):
    prompt = text(row["instruction"], "'instruction'", where)
    if row.get("input") not in (None, ""):
        prompt += "\n\n" + text(row["input"], "'input'", where)
    return _question(prompt, text(row["output"], "'output'", where))


def _completion(row, where):
    prompt, answer = row["prompt"], row["completion"]
    if isinstance(prompt, list) != isinstance(answer, list):
        raise Mistake(f"{where}: of 'prompt' and 'completion' one is a text and one is a list")
    if not isinstance(prompt, list):
        prompt = text(prompt, "'prompt'", where)
        return _question(prompt, text(answer, "'completion'", where))
    turns = turns_of(prompt, where, "prompt", answered=False)
    return (*turns, _answer(answer, where, "completion"))


def _gsm8k(row, where):
    answer = text(row["answer"], "'answer'", where)
    return _question(text(row["question"], "'question'", where), CALCULATOR.sub("", answer))


def _e2e(row, where):
    meaning = text(row["meaning"], "'meaning'", where).strip()
    return _question(meaning, text(row["reference"], "'reference'", where).strip())


def _text(row, where):
    return (Turn("assistant", text(row["text"], "'text'", where)),)


def _answer(messages, where, name):
    """The one `Turn` of a list of messages that is an answer alone."""
    if not isinstance(messages, list) or len(messages) != 1:
        raise Mistake(f"{where}: {name!r} is {messages!r:.40}, not one message of the assistant")
    (turn,) = turns_of(messages, where, name, alone=True)
    return turn


def _preference(row, where):
    """(the preferred dialog, the other's answer)."""
    chosen, rejected = row["chosen"], row["rejected"]
    prompt = row.get("prompt")
    if isinstance(chosen, list) != isinstance(rejected, list):
        raise Mistake(f"{where}: of 'chosen' and 'rejected' one is a text and one is a list")
    if not isinstance(chosen, list):
        before = _before(prompt, where)
        chosen = (*before, Turn("assistant", text(chosen, "'chosen'", where)))
        return _told_apart(chosen, text(rejected, "'rejected'", where), where)
    if prompt is not None and len(chosen) == len(rejected) == 1:
        turns = (*_before(prompt, where), _answer(chosen, where, "chosen"))
        return _told_apart(turns, _answer(rejected, where, "rejected").content, where)
    # UltraFeedback has whole dialogs, and the prompt as a text besides.
    turns, others = turns_of(chosen, where, "chosen"), turns_of(rejected, where, "rejected")
    if turns[:-1] != others[:-1]:
        raise Mistake(f"{where}: 'chosen' and 'rejected' differ before their last answers")
    return _told_apart(turns, others[-1].content, where)


def _before(prompt, where):
    if isinstance(prompt, list):
        return turns_of(prompt, where, "prompt", answered=False)
    turns = (Turn("user", text(prompt, "'prompt'", where)),)
    check(turns, where, answered=False)
    return turns


def _told_apart(turns, rejected, where):
    if turns[-1].content == rejected:
        raise Mistake(f"{where}: 'chosen' and 'rejected' are the same answer")
    return turns, rejected


FORMATS = {
    "messages": Format(("messages",), _messages),
    "sharegpt": Format(("conversations",), _sharegpt),
    "alpaca": Format(("instruction", "output"), _alpaca),
    "completion": Format(("prompt", "completion"), _completion, "plain", ""),
    "gsm8k": Format(("question", "answer"), _gsm8k, measures=("exact_match",)),
    "e2e": Format(("meaning", "reference"), _e2e, "plain", measures=("bleu", "rouge_l")),
    "text": Format(("text",), _text, "plain", ""),
    "preference": Format(("chosen", "rejected"), _preference),
}
