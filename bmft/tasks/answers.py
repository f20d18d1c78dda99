"""How good written answers are: pure functions of what was generated and what was to be.

    exact_match   share whose answer, found by a regular expression, is that of a reference
    bleu          sacrebleu's corpus BLEU, 0 to 100, of any number of references each
    rouge_l       the mean of ROUGE-L's F1, 0 to 100, of each the best of its references

`generated` is a list of texts, `references` a list of lists of texts.
"""

import decimal
import re

import numpy as np

from bmft.data.dialog_formats import CALCULATOR
from bmft.errors import Mistake, nearest

# GSM8K: the number behind `####` ends an answer; without one the last number counts.
NUMBER = r"-?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
MARKED = re.compile(rf"####\s*({NUMBER})")
LAST = re.compile(rf"(?<![\w.])({NUMBER})")
WORDS = re.compile("[a-z0-9]+")  # of lower case, as ROUGE has them


def check(names, pattern=None):
    """Raise Mistake for a measure that there is not, or a pattern that is none."""
    for name in names:
        if name not in MEASURES:
            raise Mistake(f"task.measures: no measure {name!r}; {nearest(name, MEASURES)}")
    if pattern is not None and "exact_match" not in names:
        raise Mistake(f"task.pattern={pattern!r} needs exact_match in task.measures")
    try:
        re.compile(pattern or "")
    except re.error as error:
        raise Mistake(f"task.pattern={pattern!r} is no regular expression: {error}") from None


def measure(names, generated, references, pattern=None):
    """{name: float} of the measures `names`. pattern: exact_match's."""
    if len(generated) != len(references) or not generated:
        raise ValueError(f"{len(generated)} answers for {len(references)} lists of references")
    more = {"exact_match": {"pattern": pattern}}
    return {name: MEASURES[name](generated, references, **more.get(name, {})) for name in names}


# --- exact match -----------------------------------------------------------------------------


def exact_match(generated, references, pattern=None):
    """The share of answers that are the same as one of their references; `answer` says of what."""
    right = [
        (found := answer(text, pattern)) is not None
        and any(found == answer(reference, pattern) for reference in own)
        for text, own in zip(generated, references, strict=True)
    ]
    return float(np.mean(right))


def answer(text, pattern=None):
    """What a text says in the end; None where there is nothing of the kind.

    pattern: a regular expression; its last match counts, of that the first group, if it has any,
    without the blanks around it. None: GSM8K's number, `normal_number` of it.
    """
    if pattern is None:
        text = CALCULATOR.sub("", text).replace("\N{MINUS SIGN}", "-")
        found = MARKED.findall(text)[:1] or LAST.findall(text)[-1:]
        return normal_number(found[0]) if found else None
    matches = list(re.finditer(pattern, text, re.MULTILINE))
    if not matches:
        return None
    last = matches[-1]
    found = last[1] if last.re.groups else last[0]
    return (found or "").strip()


def normal_number(text):
    """A number as one way to write it: 1,000.50 and $1000.5 are "1000.5"."""
    number = decimal.Decimal(text.replace(",", "").replace("$", ""))
    return "0" if number == 0 else f"{number.normalize():f}"


# --- words in common -------------------------------------------------------------------------


def bleu(generated, references):
    """sacrebleu's corpus BLEU with its own tokenizer (13a)."""
    import sacrebleu

    most = max(map(len, references))
    streams = [[own[i] if i < len(own) else None for own in references] for i in range(most)]
    # force: it does not warn of text with blanks before its stops, as all of E2E's is.
    return float(sacrebleu.corpus_bleu(generated, streams, force=True).score)


def rouge_l(generated, references):
    """100 times the mean F1 of the longest common subsequence of words, the best reference's."""
    scores = [
        max(_f1(words(text), words(reference)) for reference in own)
        for text, own in zip(generated, references, strict=True)
    ]
    return 100 * float(np.mean(scores))


def words(text):
    """Words as ROUGE's own script had them: letters and digits of ASCII, in lower case."""
    return WORDS.findall(text.lower())


def _f1(one, other):
    common = longest_common(one, other)
    return 2 * common / (len(one) + len(other)) if common else 0.0


def longest_common(one, other):
    """The length of the longest common subsequence of two lists."""
    row = [0] * (len(other) + 1)  # of the part of `one` so far and each beginning of `other`
    for word in one:
        before = row
        row = [0]
        for i, same in enumerate(other):
            row.append(before[i] + 1 if word == same else max(row[i], before[i + 1]))
    return row[-1]


MEASURES = {"exact_match": exact_match, "bleu": bleu, "rouge_l": rouge_l}
