"""Measures of what was generated."""

import math

import pytest

from bmft.errors import Mistake
from bmft.tasks import answers

NUMBERS = {
    "48/2 = <<48/2=24>>24 clips.\n#### 72": "72",
    "#### 1,000": "1000",
    "#### $1000.50 and 3 more": "1000.5",
    "####-5": "-5",
    "#### \N{MINUS SIGN}5": "-5",
    "#### 72\n\nQuestion: of 5 and 6?\n#### 11": "72",
    "It is 3, or 4.": "4",
    "That makes $1,234.": "1234",
    "He has 3-2 left": "2",
    "costs .5": "0.5",
    "0.0": "0",
    "a1 b2": None,
    "nothing <<1+1=2>>": None,
    "": None,
}


@pytest.mark.parametrize(("text", "number"), NUMBERS.items())
def test_the_number_of_an_answer(text, number):
    assert answers.answer(text) == number


def test_the_answer_of_a_pattern():
    assert answers.answer("Answer: (A)\nAnswer: (B) ", r"^Answer: (.*)$") == "(B)"
    assert answers.answer("no, yes, no", "yes|no") == "no"
    assert answers.answer("b", "(a)?b") == ""
    assert answers.answer("b", "a") is None


def test_exact_match():
    references = [["#### 72"], ["#### 1,000", "#### 5"], ["#### 3"], ["none"]]
    generated = ["so 72", "#### 5.0", "no idea", "none"]
    assert answers.exact_match(generated, references) == 0.5
    assert answers.exact_match(["a b", "c"], [["B"], ["C", "c"]], "[a-z]$") == 0.5


def test_bleu_takes_any_number_of_references():
    """The second answer has one reference, the others two; a text that is a reference has 100."""
    references = [["the cat sat on a mat", "a cat sat"], ["it ran far from the dog"]]
    assert answers.bleu([own[0] for own in references], references) == pytest.approx(100)
    # 12 words were to be said: of 8 words 7, of 6 pairs 5, of 4 triples 3, of 2 fours 1.
    precision = (7 / 8 * 5 / 6 * 3 / 4 * 1 / 2) ** 0.25
    found = answers.bleu(["the cat sat on it", "it ran far"], references)
    assert found == pytest.approx(100 * precision * math.exp(1 - 12 / 8))


def test_rouge_l():
    # 3 of 4 words and 3 of 6 words: precision 0.75, recall 0.5
    assert answers.rouge_l(["The cat, sat! far"], [["the CAT sat on a mat"]]) == pytest.approx(60)
    assert answers.rouge_l(["a b", ""], [["b a", "a-b c"], ["x"]]) == pytest.approx(40)
    assert answers.longest_common("abcbdab", "bdcaba") == 4


def test_measure():
    found = answers.measure(("rouge_l", "exact_match"), ["5"], [["5"]])
    assert found == {"rouge_l": 100, "exact_match": 1}
    assert answers.measure(["exact_match"], ["ab"], [["b"]], "b") == {"exact_match": 1}
    with pytest.raises(ValueError, match="2 answers for 1"):
        answers.measure(["bleu"], ["5", "6"], [["5"]])


WRONG = {
    "name": (("rouge",), None, "task.measures: no measure 'rouge'; did you mean 'rouge_l'"),
    "pattern": (("exact_match",), "(", r"task.pattern='\(' is no regular expression: missing \)"),
    "unused": (("bleu",), "a", "task.pattern='a' needs exact_match in task.measures"),
}


@pytest.mark.parametrize(("names", "pattern", "message"), WRONG.values(), ids=WRONG)
def test_wrong_keys(names, pattern, message):
    with pytest.raises(Mistake, match=message):
        answers.check(names, pattern)
